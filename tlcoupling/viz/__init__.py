"""Notebook widgets, the report page and figures.

``widgets`` makes the widgets; the dashboard is the whole report. ``payload`` and ``panes`` (heat maps) take the numbers
from a result, and ``page`` joins them with the HTML, CSS and JavaScript in ``assets``. ``plain`` encodes numbers and
tokens for a page. ``live`` measures more where a kernel is there. ``shown`` and ``thumbnail`` are what results show of
themselves. ``figures`` draws for print with matplotlib, which is imported at its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tlcoupling.viz import plots
from tlcoupling.viz.widgets import (
    Widget,
    attention_and_coupling,
    dashboard,
    depth_coupling,
    render_html,
    sensitivity_atlas,
    tokens,
    write_html,
)

if TYPE_CHECKING:
    from tlcoupling.viz import figures
    from tlcoupling.viz.live import Live

__all__ = [
    "Live",
    "Widget",
    "attention_and_coupling",
    "dashboard",
    "depth_coupling",
    "figures",
    "render_html",
    "sensitivity_atlas",
    "tokens",
    "write_html",
]


def __getattr__(name: str) -> Any:
    """Import ``figures`` and ``Live`` at their first use."""
    if name == "Live":
        remedy = "live notebooks need anywidget: pip install anywidget"
        return plots.with_remedy("live", remedy, "anywidget", "traitlets").Live
    if name != "figures":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return plots.figures()
