"""What a reader sees: notebook widgets and the report page.

``widgets`` makes the widgets, of which the dashboard is the whole report. They hand the numbers that ``payload`` (and
``panes``, for the heat maps) takes from a result to ``page``, which joins them with the HTML, CSS and JavaScript in
``assets``. ``plain`` turns numbers and tokens into what a page can hold. ``summary`` reduces an analysis to the few
numbers that the page and the terminal print. ``figures`` draws for print, with matplotlib, which is imported when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tlcoupling.viz.widgets import (
    Widget,
    attention_and_coupling,
    dashboard,
    depth_coupling,
    render_html,
    tokens,
    write_html,
)

if TYPE_CHECKING:
    from tlcoupling.viz import figures

__all__ = [
    "Widget",
    "attention_and_coupling",
    "dashboard",
    "depth_coupling",
    "figures",
    "render_html",
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
