"""What a reader sees: notebook widgets and the report page.

``widgets`` makes the notebook widgets and ``report`` the self-contained page. Both hand the numbers that ``payload``
takes from a result to ``page``, which joins them with the HTML, CSS and JavaScript in ``assets``. ``summary`` reduces
an analysis to the few numbers that the page and the terminal print.
"""

from tlcoupling.viz.report import render_html, write_html
from tlcoupling.viz.widgets import Widget, attention, depth_coupling, report, tokens

__all__ = [
    "Widget",
    "attention",
    "depth_coupling",
    "render_html",
    "report",
    "tokens",
    "write_html",
]
