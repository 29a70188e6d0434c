"""Notebook widgets: sections of the report, each in a frame of its own.

A widget displays itself in Jupyter, JupyterLab, VS Code and Colab, in saved notebooks too, and needs no network.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from tlcoupling.analysis import Analysis
from tlcoupling.coupling import DepthCoupling
from tlcoupling.errors import ArgumentError
from tlcoupling.viz import payload
from tlcoupling.viz.page import render
from tlcoupling.viz.report import render_html


@dataclass(frozen=True)
class Widget:
    """An HTML page that a notebook shows in a frame.

    Attributes:
        html: the page.
        height: height of the frame in pixels; the page scrolls inside it.
    """

    html: str = field(repr=False)
    height: int

    def _repr_html_(self) -> str:
        """A frame that shares neither styles nor scripts with the notebook around it."""
        return (
            f'<iframe sandbox="allow-scripts" width="100%" height="{self.height}" style="border: 0" '
            f'srcdoc="{html.escape(self.html)}"></iframe>'
        )


def attention(analysis: Analysis) -> Widget:
    """The attention patterns of the analysis's chosen layer, drawn by circuitsvis.

    Raises:
        ArgumentError: the model has no attention pattern to show.
    """
    data = payload.attention(analysis)
    if data is None:
        raise ArgumentError("analysis", analysis.provenance.model_name, "one of a model that has attn.hook_pattern")
    return Widget(render("Attention", {"attention": data}), height=1000)


def depth_coupling(result: DepthCoupling | Analysis) -> Widget:
    """Layer x layer coupling, null and excess of each sublayer, and the profile by distance."""
    coupling = result.coupling if isinstance(result, Analysis) else result
    data = payload.coupling(coupling)
    return Widget(render("Depth-wise coupling", {"coupling": data}), height=1320)


def tokens(analysis: Analysis) -> Widget:
    """The tokens coloured by line-shape score, expodistance and final norm, and the most and least straight ones."""
    return Widget(render("Tokens", {"tokens": payload.tokens(analysis)}), height=600)


def report(analysis: Analysis) -> Widget:
    """The whole report."""
    return Widget(render_html(analysis), height=900)
