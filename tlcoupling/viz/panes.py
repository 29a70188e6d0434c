"""Convert coupling and attention to plain data for the page's heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.coupling.context import ContextCoupling
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.metric import off_diagonal_mean
from tlcoupling.coupling.token import TokenCoupling
from tlcoupling.text import visible
from tlcoupling.viz.plain import formula, label, packed, plain, roots

# Cells that circuitsvis draws without a noticeable delay: all heads, and the zoomed one again.
ATTENTION_CELLS = 40_000
# Numbers of attention on one page, at a byte each: means over heads of the layers, then single heads.
ATTENTION_NUMBERS = 1_500_000


def depth(result: DepthCoupling, fresh: DepthCoupling | None = None) -> dict[str, Any]:
    """Return layer x layer matrices ``[sublayer, token, k, row, column]``, with a null by row, means and profiles.

    Args:
        result: the coupling.
        fresh: the same of fresh weights, if they were measured.
    """
    return {
        **_metric(result),
        "sublayers": result.sublayers,
        "layers": result.layers,
        "ks": result.ks,
        "positions": result.positions,
        "tokens": [visible(token) for token in result.tokens],
        **_matrices(result),
        **_profile(result),
        "undetermined": _undetermined(result.values_determined),
        "fresh": None if fresh is None else {**_matrices(fresh), **_profile(fresh)},
    }


def _matrices(result: DepthCoupling | TokenCoupling | ContextCoupling, layers: Sequence[int] | None = None) -> Any:
    """Return coupling, its null and the null's standard deviation by row, and the means over all pairs.

    Args:
        result: the coupling.
        layers: indices on the axis of layers; None for a result without one, whose matrices are of layers.
    """
    chosen = slice(None) if layers is None else list(layers)

    def mean(name: str) -> Any:
        return plain(off_diagonal_mean(getattr(result, name)[:, chosen]))

    return {
        "values": packed(result.values[:, chosen]),
        "null": packed(result.null[:, chosen].mean(-1)),  # of one row they differ by less than a tenth of a spread
        "std": packed(result.null_std[:, chosen].mean(-1)),
        "mean": {"coupling": mean("values"), "null": mean("null"), "excess": mean("excess"), "z": mean("z")},
    }


def _profile(result: DepthCoupling) -> dict[str, Any]:
    """Return coupling, null and the null's standard deviation for a pair, by distance between layers."""
    spread = replace(result, values=result.null_std)  # averaged over the same pairs
    names = {"values": result.profile(), "null": result.profile("null"), "std": spread.profile()}
    return {"profile": {name: plain(profile) for name, profile in names.items()}}


def pairs(
    tokens: Sequence[str],
    analysis: Analysis | None,
    couplings: Mapping[str, TokenCoupling | ContextCoupling],
    start: int,
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return token x token matrices of layers: attention patterns, token-wise and context coupling, on the same axes.

    All tokens are there. Of a long prompt, attention holds the means over heads of some layers, and single heads of
    fewer: as many as ``ATTENTION_NUMBERS`` allows, those of ``start`` and of compared layers first.

    Args:
        tokens: all tokens of the prompt.
        analysis: the analysis with the attention patterns, and with fresh weights if they were measured.
        couplings: the coupling to show, by its name in an analysis.
        start: the layer that is shown first.
        layers: layers to show; by default all.
    """
    other = None if analysis is None else analysis.baseline
    kinds = [_kind(one, None if other is None else getattr(other, name), layers) for name, one in couplings.items()]
    first = [start, *(layer for one in couplings.values() for layer in one.layers)]
    return {
        "tokens": [label(token) for token in tokens],
        "attention": None if analysis is None else _attention(analysis, first, layers),
        "kinds": kinds,
        **(_metric(next(iter(couplings.values()))) if couplings else {}),
    }


def _attention(analysis: Analysis, first: Sequence[int], layers: Sequence[int] | None) -> dict[str, Any] | None:
    """Return attention patterns, ``[layer, pair]`` and ``[layer, head, pair]``; None if there are none."""
    chosen = [layer for layer in analysis.attention_layers if layers is None or layer in layers]
    attention = analysis.attention
    if attention is None or not chosen:
        return None
    n_heads, n_tokens = attention.shape[1:3]
    pairs = n_tokens * (n_tokens + 1) // 2  # the upper triangle is empty
    order = sorted(chosen, key=lambda layer: (first.index(layer) if layer in first else len(first), layer))
    means = sorted(order[: max(1, ATTENTION_NUMBERS // pairs)])
    left = ATTENTION_NUMBERS - len(means) * pairs
    heads = sorted(layer for layer in order[: max(1, left // (pairs * n_heads))] if layer in means)

    def patterns(kept: Sequence[int]) -> Tensor:
        return attention[[analysis.attention_layers.index(layer) for layer in kept]]

    return {
        "layers": means,
        "mean": roots(_lower_triangle(patterns(means).mean(1))),
        "head_layers": heads,
        "heads": roots(_lower_triangle(patterns(heads))),
        "window": max(1, math.isqrt(ATTENTION_CELLS // (n_heads + 1))),
    }


def _kind(
    result: TokenCoupling | ContextCoupling,
    fresh: TokenCoupling | ContextCoupling | None,
    layers: Sequence[int] | None,
) -> dict[str, Any]:
    """Return one kind of coupling, ``[sublayer, layer, k, row, column]``, and the same of fresh weights."""
    chosen = [i for i, layer in enumerate(result.layers) if layers is None or layer in layers]
    determined = result.values_determined
    return {
        **_title(result),
        "sublayers": result.sublayers,
        "layers": [result.layers[i] for i in chosen],
        "ks": result.ks,
        "positions": result.positions,
        **_matrices(result, chosen),
        "undetermined": None if determined is None else _undetermined(determined[:, chosen]),
        "fresh": None if fresh is None else _matrices(fresh, chosen),
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
