"""What a reader sees: notebook widgets and the report page.

``widgets`` makes the notebook widgets and ``report`` the self-contained page. Both hand the numbers that ``payload``
takes from a result to ``page``, which joins them with the HTML, CSS and JavaScript in ``assets``. ``summary`` reduces
an analysis to the few numbers that the page and the terminal print. ``figures`` draws for print, with matplotlib, which
is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tlcoupling.viz.report import render_html, write_html
from tlcoupling.viz.widgets import Widget, attention, depth_coupling, report, tokens

if TYPE_CHECKING:
    from tlcoupling.viz import figures

__all__ = [
    "Widget",
    "attention",
    "depth_coupling",
    "figures",
    "render_html",
    "report",
    "tokens",
    "write_html",
]


def __getattr__(name: str) -> Any:
    """Import ``figures`` when it is first asked for."""
    if name != "figures":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module(f"{__name__}.figures")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError("figures need matplotlib: pip install 'tlcoupling[figures]'") from error
