"""Widgets: sections of the report, each a page that a notebook shows in its own frame.

A widget displays itself in Jupyter, JupyterLab, VS Code and Colab, also in saved notebooks, and needs no network.
Elsewhere, its ``html`` is a complete document, which ``save`` writes.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.arguments import check_index
from tlcoupling.coupling.context import ContextCoupling
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.token import TokenCoupling
from tlcoupling.errors import ArgumentError, ResultFileError
from tlcoupling.slices.atlas import SensitivityAtlas
from tlcoupling.viz import panes, payload
from tlcoupling.viz.page import asset, render

# In the script that stands behind a frame and its link.
_BESIDE = """
const link = document.currentScript?.previousElementSibling, frame = link?.previousElementSibling;
if (frame?.tagName === "IFRAME") host(frame, link);
"""


@dataclass(frozen=True)
class Widget:
    """An HTML page that a notebook shows in a frame.

    Attributes:
        html: the page as one document that needs no other file and no network.
        height: height of the frame in pixels, until the frame fits its page.
    """

    html: str = field(repr=False)
    height: int

    def _repr_html_(self) -> str:
        """Return a frame that shares no styles or scripts with the notebook.

        A script beside it makes the frame as high as its page and tells the page whether the notebook is dark. Where a
        notebook does not run it, the frame scrolls, and follows the system's colour scheme.
        """
        return (
            f'<iframe sandbox="allow-scripts" width="100%" height="{self.height}" style="border: 0" '
            f'srcdoc="{html.escape(self.html)}"></iframe>'
            f'<a hidden target="_blank" href="#">open as a page</a><script>{{{asset("host.js")}{_BESIDE}}}</script>'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file that any browser opens.

        Returns:
            The path written.

        Raises:
            ResultFileError: the file cannot be written; the message says why.
        """
        path = Path(path)
        try:
            # The data is ASCII. A lone surrogate in a title is not valid UTF-8 and becomes a character reference.
            path.write_text(self.html, encoding="utf-8", errors="xmlcharrefreplace")
        except OSError as error:
            raise ResultFileError(f"cannot write the page to {str(path)!r}: {error}") from error
        return path


def attention_and_coupling(result: Analysis | TokenCoupling | ContextCoupling, layer: int) -> Widget:
    """Show one layer's attention heads and, on the same token axes, its token-wise and context coupling.

    circuitsvis draws the heads. A pane without data says how to measure it.

    Args:
        result: ``analyze(..., token_layers=...)``; or token-wise or context coupling alone, without attention.
        layer: the layer.

    Raises:
        ArgumentError: the layer does not exist, the result is of another kind, or it holds neither the attention nor
            the coupling of tokens in that layer.
        ImportError: circuitsvis, which draws the attention patterns, is not installed.
    """
    if isinstance(result, Analysis):
        layer = check_index("layer", layer, len(result.growth.alpha))
        couplings = _token_couplings(result)
        tokens, analysis, available = result.tokens, result, {*result.attention_layers}
    elif isinstance(result, (TokenCoupling, ContextCoupling)):
        couplings, analysis, available = {"result": result}, None, set()
        tokens = result.provenance.str_tokens
    else:
        raise _wrong_kind(result, "an Analysis, a TokenCoupling or a ContextCoupling")
    available = available.union(*(one.layers for one in couplings.values()))
    if layer not in available:
        raise ArgumentError(
            "layer", layer, f"one of {sorted(available)}, for which this result holds attention or coupling of tokens"
        )
    couplings = {name: one for name, one in couplings.items() if layer in one.layers}
    ks = next(iter(couplings.values())).ks if couplings else ()
    sections = {
        "controls": payload.layer_controls(layer, ks),
        "pairs": panes.pairs(tokens, analysis, couplings, layer, [layer]),
    }
    return Widget(render(f"Attention and coupling of layer {layer}", sections), height=900)


def depth_coupling(result: DepthCoupling | Analysis) -> Widget:
    """Show layer x layer coupling, null and excess of each sublayer on one colour scale, and the profile by distance.

    Raises:
        ArgumentError: a result of another kind.
    """
    coupling = result.coupling if isinstance(result, Analysis) else result
    if not isinstance(coupling, DepthCoupling):
        raise _wrong_kind(result, "an Analysis or a DepthCoupling")
    whole = result if isinstance(result, Analysis) else None
    fresh = None if whole is None or whole.baseline is None else whole.baseline.coupling
    pane = panes.depth(coupling, fresh, None if whole is None else whole.shared)
    sections = {"controls": payload.depth_controls(coupling), "coupling": pane}
    return Widget(render("Depth-wise coupling", sections), height=1320)


def tokens(result: Analysis) -> Widget:
    """Show the tokens coloured by line-shape score, ED, CV, final norm, or attention's or the MLP's share of growth.

    Raises:
        ArgumentError: a result of another kind.
    """
    if not isinstance(result, Analysis):
        raise _wrong_kind(result, "an Analysis")
    return Widget(render("Tokens", {"tokens": payload.tokens(result)}), height=640)


def sensitivity_atlas(result: SensitivityAtlas) -> Widget:
    """Show the slices between all pairs of layers: singular values, and overlaps of their directions with the blocks'.

    The baseline and the difference from it stand beside the model, on one colour scale.

    Raises:
        ArgumentError: a result of another kind.
    """
    if not isinstance(result, SensitivityAtlas):
        raise _wrong_kind(result, "a SensitivityAtlas")
    return Widget(render("Sensitivity atlas", {"atlas": panes.atlas(result)}), height=560)


def dashboard(result: Analysis) -> Widget:
    """Show a whole analysis on one page, the report.

    The parts are linked. Selecting a layer changes the attention and the coupling of tokens. Selecting a token changes
    the coupling across depth. A part that was not measured says how to measure it
    (``analyze(..., tokens=..., token_layers=...)``).

    Raises:
        ArgumentError: a result of another kind.
        ImportError: circuitsvis, which draws the attention patterns, is not installed.
    """
    if not isinstance(result, Analysis):
        raise _wrong_kind(result, "an Analysis")
    return Widget(render_html(result), height=900)


def render_html(
    analysis: Analysis, chosen: Mapping[str, int | None] | None = None, opened: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return the report as one HTML document that needs no other file and no network.

    Args:
        analysis: the analysis.
        chosen: the ``layer``, ``token`` and ``k`` that are shown first; by default a measured layer and token.
        opened: what ``viz.Live`` has answered, which is shown first.

    Raises:
        ImportError: circuitsvis, which draws the attention patterns, is not installed.
    """
    controls = payload.controls(analysis)
    controls["start"] |= chosen or {}
    controls["opened"] = opened
    start, fresh = controls["start"]["layer"], None if analysis.baseline is None else analysis.baseline.coupling
    return render(
        f"{analysis.provenance.model_name} · tlcoupling",
        {
            "header": payload.header(analysis),
            "summary": payload.summary(analysis),
            "controls": controls,
            "coupling": panes.depth(analysis.coupling, fresh, analysis.shared),
            "pairs": panes.pairs(analysis.tokens, analysis, _token_couplings(analysis), start),
            "tokens": payload.tokens(analysis),
            "growth": payload.growth(analysis),
            "measures": payload.measures(analysis),
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


def _token_couplings(analysis: Analysis) -> dict[str, TokenCoupling | ContextCoupling]:
    """Return the coupling of tokens, by its name in an analysis."""
    names = ("token_coupling", "context_src", "context_dest")
    return {name: part for name in names if (part := getattr(analysis, name)) is not None}


def _wrong_kind(result: Any, allowed: str) -> ArgumentError:
    return ArgumentError("result", type(result).__name__, allowed)
