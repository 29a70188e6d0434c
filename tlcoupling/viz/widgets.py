"""Widgets: sections of the report, each a page that a notebook shows in a frame of its own.

A widget displays itself in Jupyter, JupyterLab, VS Code and Colab, in saved notebooks too, and needs no network. In any
other place its ``html`` is a whole document, which ``save`` writes.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.arguments import check_index
from tlcoupling.coupling.context import ContextCoupling
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.token import TokenCoupling
from tlcoupling.errors import ArgumentError, ResultFileError
from tlcoupling.viz import panes, payload
from tlcoupling.viz.page import render


@dataclass(frozen=True)
class Widget:
    """An HTML page that a notebook shows in a frame.

    Attributes:
        html: the page: one document, with no file beside it and no request to any network.
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

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, which any browser opens.

        Returns:
            The path written.

        Raises:
            ResultFileError: the file cannot be written; the message says why.
        """
        path = Path(path)
        try:
            # The data is ASCII; what a title may hold beyond UTF-8 (half of a character) becomes a reference.
            path.write_text(self.html, encoding="utf-8", errors="xmlcharrefreplace")
        except OSError as error:
            raise ResultFileError(f"cannot write the page to {str(path)!r}: {error}") from error
        return path


def attention_and_coupling(result: Analysis | TokenCoupling | ContextCoupling, layer: int) -> Widget:
    """One layer's attention heads and, on the same token axes, its token-wise and context coupling.

    The heads are drawn by circuitsvis. Panes that the result does not hold say how to get them.

    Args:
        result: ``analyze(..., token_layers=...)``; or token-wise or context coupling alone, without attention.
        layer: the layer.

    Raises:
        ArgumentError: a layer that is not there, a result of another kind, or one that holds neither the attention nor
            the coupling of tokens in that layer.
        ImportError: circuitsvis, which draws the attention patterns, is not installed.
    """
    if isinstance(result, Analysis):
        layer = check_index("layer", layer, len(result.growth.alpha))
        found = [result.token_coupling, result.context_src, result.context_dest]
        couplings = [one for one in found if one is not None]
        tokens, analysis, there = result.tokens, result, {*result.attention_layers}
    elif isinstance(result, (TokenCoupling, ContextCoupling)):
        couplings, analysis, there = [result], None, set()
        tokens = result.provenance.str_tokens
    else:
        raise _wrong_kind(result, "an Analysis, a TokenCoupling or a ContextCoupling")
    there = there.union(*(one.layers for one in couplings))
    if layer not in there:
        raise ArgumentError(
            "layer", layer, f"one of {sorted(there)}, whose attention or coupling of tokens this result holds"
        )
    couplings = [one for one in couplings if layer in one.layers]
    sections = {
        "controls": payload.layer_controls(layer, couplings[0].ks if couplings else ()),
        "pairs": panes.pairs(tokens, analysis, couplings, [layer]),
    }
    return Widget(render(f"Attention and coupling of layer {layer}", sections), height=900)


def depth_coupling(result: DepthCoupling | Analysis) -> Widget:
    """Layer x layer coupling, null and excess of each sublayer on one colour scale, and the profile by distance.

    Raises:
        ArgumentError: a result of another kind.
    """
    coupling = result.coupling if isinstance(result, Analysis) else result
    if not isinstance(coupling, DepthCoupling):
        raise _wrong_kind(result, "an Analysis or a DepthCoupling")
    sections = {"controls": payload.depth_controls(coupling), "coupling": panes.depth(coupling)}
    return Widget(render("Depth-wise coupling", sections), height=1320)


def tokens(result: Analysis) -> Widget:
    """The tokens coloured by line-shape score, ED, CV, final norm, or attention's or the MLP's share of growth.

    Raises:
        ArgumentError: a result of another kind.
    """
    if not isinstance(result, Analysis):
        raise _wrong_kind(result, "an Analysis")
    return Widget(render("Tokens", {"tokens": payload.tokens(result)}), height=640)


def dashboard(result: Analysis) -> Widget:
    """All of an analysis on one page: the report.

    Its parts are linked: choosing a layer changes the attention and the coupling of tokens, choosing a token the
    coupling across depth. What was not measured says how to get it (``analyze(..., tokens=..., token_layers=...)``).

    Raises:
        ArgumentError: a result of another kind.
        ImportError: circuitsvis, which draws the attention patterns, is not installed.
    """
    if not isinstance(result, Analysis):
        raise _wrong_kind(result, "an Analysis")
    return Widget(render_html(result), height=900)


def render_html(analysis: Analysis) -> str:
    """The report as one HTML document: no file beside it, no request to any network.

    Raises:
        ImportError: circuitsvis, which draws the attention patterns, is not installed.
    """
    couplings = [analysis.token_coupling, analysis.context_src, analysis.context_dest]
    return render(
        f"{analysis.provenance.model_name} · tlcoupling",
        {
            "header": payload.header(analysis),
            "summary": payload.summary(analysis),
            "controls": payload.controls(analysis),
            "coupling": panes.depth(analysis.coupling),
            "pairs": panes.pairs(analysis.tokens, analysis, [one for one in couplings if one is not None]),
            "tokens": payload.tokens(analysis),
            "growth": payload.growth(analysis),
        },
    )


def write_html(analysis: Analysis, path: str | Path) -> Path:
    """Write the report to a file.

    Returns:
        The path written.

    Raises:
        ResultFileError: the file cannot be written; the message says why.
    """
    return dashboard(analysis).save(path)


def _wrong_kind(result: Any, allowed: str) -> ArgumentError:
    return ArgumentError("result", type(result).__name__, allowed)
