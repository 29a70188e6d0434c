"""What a reader sees: notebook widgets and the report page.

``widgets`` makes the widgets, of which the dashboard is the whole report. They hand the numbers that ``payload`` (and
``panes``, for the heat maps) takes from a result to ``page``, which joins them with the HTML, CSS and JavaScript in
``assets``. ``plain`` turns numbers and tokens into what a page can hold. ``summary`` reduces an analysis to the few
numbers that the page and the terminal print.
"""

from tlcoupling.viz.widgets import (
    Widget,
    attention_and_coupling,
    dashboard,
    depth_coupling,
    render_html,
    tokens,
    write_html,
)

__all__ = [
    "Widget",
    "attention_and_coupling",
    "dashboard",
    "depth_coupling",
    "render_html",
    "tokens",
    "write_html",
]
