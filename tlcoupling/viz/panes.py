"""Convert coupling and attention to plain data for the page's heat maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.coupling.context import ContextCoupling
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.token import TokenCoupling
from tlcoupling.text import visible
from tlcoupling.viz.plain import formula, label, packed, rounded

# Cells that the attention component draws without a noticeable delay: all heads, and the zoomed one again.
ATTENTION_CELLS = 40_000
# Numbers of all token x token matrices on one page, at two bytes each.
PAIR_NUMBERS = 500_000


def depth(result: DepthCoupling) -> dict[str, Any]:
    """Return layer x layer matrices ``[sublayer, token, k, row, column]``, with a null by row, and profiles."""
    return {
        **_metric(result),
        "sublayers": result.sublayers,
        "layers": result.layers,
        "ks": result.ks,
        "positions": result.positions,
        "tokens": [visible(token) for token in result.tokens],
        "values": packed(result.values),
        "null": packed(result.null[..., 0]),
        "undetermined": _undetermined(result.values_determined),
        "mean": {name: rounded(result.mean(name)) for name in ("values", "null", "excess")},
        "profile": {name: rounded(result.profile(name)) for name in ("values", "null")},
    }


def pairs(
    tokens: Sequence[str],
    analysis: Analysis | None,
    couplings: Iterable[TokenCoupling | ContextCoupling],
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return token x token matrices of layers: attention patterns, token-wise and context coupling, on the same axes.

    If there are too many tokens to draw, or too many numbers for a page, the axes hold only the last tokens.

    Args:
        tokens: all tokens of the prompt.
        analysis: the analysis with the attention patterns.
        couplings: the coupling to show.
        layers: layers to show; by default all.
    """
    attention, attention_layers, couplings = None, (), list(couplings)
    if analysis is not None and analysis.attention is not None:
        attention_layers = tuple(one for one in analysis.attention_layers if layers is None or one in layers)
        attention = analysis.attention[[analysis.attention_layers.index(one) for one in attention_layers]]
    first = len(tokens) - _drawn(len(tokens), attention, couplings, layers)
    return {
        "tokens": [label(token) for token in tokens[first:]],
        "first": first,
        "n_tokens": len(tokens),
        "attention": None
        if attention is None or not attention_layers
        else {"layers": attention_layers, "patterns": packed(_lower_triangle(attention[..., first:, first:]))},
        "kinds": [_kind(result, first, layers) for result in couplings],
        **(_metric(couplings[0]) if couplings else {}),
    }


def _drawn(
    n_tokens: int,
    attention: torch.Tensor | None,
    couplings: Sequence[TokenCoupling | ContextCoupling],
    layers: Sequence[int] | None,
) -> int:
    """Return how many tokens the axes can hold."""
    n_layers, n_heads = (0, 0) if attention is None else attention.shape[:2]
    matrices = n_layers * n_heads / 2  # the upper triangle is empty
    for result in couplings:
        shown = [layer for layer in result.layers if layers is None or layer in layers]
        matrices += len(result.sublayers) * len(result.ks) * len(shown)
    fits_page = math.isqrt(int(PAIR_NUMBERS / max(matrices, 1)))
    return max(min(n_tokens, fits_page, math.isqrt(ATTENTION_CELLS // (n_heads + 1))), 1)


def _kind(result: TokenCoupling | ContextCoupling, first: int, layers: Sequence[int] | None) -> dict[str, Any]:
    """Return one kind of coupling, ``[sublayer, layer, k, row, column]``, for the tokens from ``first`` on."""
    at_layers = [i for i, layer in enumerate(result.layers) if layers is None or layer in layers]
    at_tokens = [i for i, pos in enumerate(result.positions) if pos >= first]
    values = result.values[:, at_layers][..., at_tokens, :][..., at_tokens]
    return {
        **_title(result),
        "sublayers": result.sublayers,
        "layers": [result.layers[i] for i in at_layers],
        "ks": result.ks,
        "positions": [result.positions[i] for i in at_tokens],
        "values": packed(values),
        "null": packed(result.null[:, at_layers][..., at_tokens, 0]),
        "undetermined": _undetermined(
            None
            if result.values_determined is None
            else result.values_determined[:, at_layers][..., at_tokens, :][..., at_tokens]
        ),
    }


def _undetermined(determined: torch.Tensor | None) -> dict[str, Any] | None:
    """Pack which columns have undetermined singular vectors, ``[..., column]``; None if there is none or unknown."""
    return None if determined is None or determined.all() else packed(~determined[..., 0, :])


def _title(result: TokenCoupling | ContextCoupling) -> dict[str, Any]:
    """Describe in words which Jacobians are compared."""
    if isinstance(result, TokenCoupling):
        return {"name": "token", "title": "token-wise", "compared": "J[t → t]", "fixed": None}
    preposition = "from" if result.fixed == "src" else "to"
    compared = f"J[{result.position} → t]" if result.fixed == "src" else f"J[s → {result.position}]"
    return {
        "name": f"context {result.fixed}",
        "title": f"{preposition} token {result.position}",
        "compared": compared,
        "fixed": result.position,
    }


def _lower_triangle(patterns: torch.Tensor) -> torch.Tensor:
    """Pack ``[layer, head, dest, src]`` row by row as ``[layer, head, pair]`` with src <= dest; the rest is zero."""
    rows, columns = torch.tril_indices(patterns.shape[-1], patterns.shape[-1])
    return patterns[..., rows, columns]


def _metric(result: DepthCoupling | TokenCoupling | ContextCoupling) -> dict[str, Any]:
    """Return the metric that was used: its formula, and whether the diagonal is 1 by definition."""
    return {
        "formula": formula(result),
        "diagonal_is_one": result.bases == "uv",
    }
