"""Convert coupling and attention to plain data for the page's heat maps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.shared import SharedDirections, SharedPair
from tlcoupling.coupling.context import ContextCoupling
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.heads import HeadCoupling
from tlcoupling.coupling.metric import off_diagonal_mean
from tlcoupling.coupling.result import Coupling
from tlcoupling.coupling.token import TokenCoupling
from tlcoupling.slices.atlas import OVERLAPS, SensitivityAtlas
from tlcoupling.text import visible
from tlcoupling.viz.plain import formula, label, packed, plain, roots
from tlcoupling.viz.shown import shown

# Cells that circuitsvis draws without a noticeable delay: all heads, and the zoomed one again.
ATTENTION_CELLS = 40_000
# Bytes that the page may take for coupling across depth, for what layers share, and for coupling of tokens. Numbers
# become coarser to fit.
DEPTH_BYTES, SHARED_BYTES, TOKENS_BYTES = 600_000, 80_000, 1_520_000
# Cells of coupling of tokens; more are averaged over blocks of tokens.
TOKENS_CELLS = 2_500_000
# Bytes for coupling of tokens and attention, a byte for each number of attention: the heads of the layer shown first,
# then means over heads of all layers, then heads of other layers.
PAIRS_BYTES = 1_970_000
_OF_SLICES = {
    "singular_value": "largest singular value",
    "share": "largest singular value over the product of norms",
    **{name: f"{words}: overlap" for name, words in OVERLAPS.items()},
}


def depth(
    result: DepthCoupling, fresh: DepthCoupling | None = None, shared: SharedDirections | None = None
) -> dict[str, Any]:
    """Return layer x layer matrices ``[sublayer, token, k, row, column]``, with a null by row, means and profiles.

    Args:
        result: the coupling.
        fresh: the same of fresh weights, if they were measured.
        shared: what pairs of blocks share, if it was measured.
    """
    budget = DEPTH_BYTES // (1 if fresh is None else 2)
    return {
        **_metric(result),
        "sublayers": result.sublayers,
        "layers": result.layers,
        "kinds": result.provenance.settings.get("layer_kinds"),
        "ks": result.ks,
        "positions": result.positions,
        "tokens": [visible(token) for token in result.tokens],
        **_matrices(result, budget),
        **_profile(result),
        "undetermined": _undetermined(result.values_determined),
        "fresh": None if fresh is None else {**_matrices(fresh, budget), **_profile(fresh)},
        "shared": None if shared is None else _shared(shared),
    }


def _shared(shared: SharedDirections) -> dict[str, Any]:
    """Return |U2^T J1 V2| of pairs of blocks, and the tokens of their bases, ``[layer, side, rank, end]``."""
    projected = shared.projected
    excess = (projected.coupling[0] - projected.null[0][:, None]).fill_diagonal_(-math.inf)
    row, column = divmod(int(excess.nan_to_num(-math.inf).argmax()), len(excess))
    words = [[[[[label(text) for text in end] for end in rank] for rank in side] for side in of] for of in shared.texts]
    return {
        "layers": projected.layers,
        "position": projected.position,
        "token": visible(projected.token),
        "k": projected.values.shape[-1],
        "bases": projected.bases,
        "values": packed(projected.values[0].abs(), SHARED_BYTES),
        "chance": plain(projected.null_entry[0]),
        "texts": words,
        "scores": plain(shared.scores[..., 0]),
        "random": plain(shared.null[:, 0]),
        "start": [projected.layers[row], projected.layers[column]],
    }


def shared_pair(shared: SharedPair, bases: str) -> dict[str, Any]:
    """Return what one pair shares: |U2^T J1 V2|, and the tokens of the bases, ``[side, rank, end]``."""
    numbers = ("coupling", "null", "determined")
    return {
        **{name: plain(getattr(shared, name)) for name in numbers},
        "bases": bases,
        "k": len(shared.values),
        "values": plain(shared.values.abs()),
        "chance": shared.null_entry,
        "texts": [[[[label(text) for text in end] for end in rank] for rank in side] for side in shared.texts],
        "scores": plain(shared.scores[..., 0]),
        "random": plain(shared.random[:, 0]),
    }


def heads(result: HeadCoupling) -> dict[str, Any]:
    """Return the coupling of one layer's heads, its null and the null's standard deviation, ``[head, basis_head]``."""
    names = {"values": "values", "null": "null", "std": "null_std"}
    same = result.key_value_heads
    return {
        **{name: plain(getattr(result, of)[0, 0]) for name, of in names.items()},
        "k": result.ks[0],
        "mean": plain(result.mean("excess")[0, 0]),
        "diagonal_is_one": _diagonal_is_one(result),
        "undetermined": None if (fine := result.determined) is None else plain(~fine[0].all(-1)),
        "related": None if same is None else [[a == b for b in same] for a in same],
    }


def atlas(result: SensitivityAtlas) -> dict[str, Any]:
    """Return quantities of the slices between all pairs of layers, ``[source, target]``, with those of the baseline."""
    one = shown(result)
    model, other = _of_slices(result), None if result.baseline is None else _of_slices(result.baseline)
    return {
        "layers": result.layers,
        "note": f"{one.below}. {one.note}".strip(),
        "has_baseline": other is not None,
        "quantities": [
            {
                "title": _OF_SLICES[name],
                "scale": "less chance" if name in OVERLAPS else "log₁₀",
                "model": plain(matrix),
                "baseline": None if other is None else plain(other[name]),
            }
            for name, matrix in model.items()
        ],
    }


def _of_slices(result: SensitivityAtlas) -> dict[str, Tensor]:
    """Return the matrices by name: logarithms of singular values, and overlaps less that of independent subspaces."""
    pairs = result.by_pair()
    largest = pairs["singular_value"][:, 0].double()
    cells = {
        "singular_value": largest.log10(),
        "share": (largest / pairs["norm_product"]).log10(),
        **{name: pairs[name].double() - result.null for name in OVERLAPS},
    }
    return {name: result.grid(values) for name, values in cells.items()}


def _matrices(
    result: DepthCoupling | TokenCoupling | ContextCoupling,
    budget: int,
    layers: Sequence[int] | None = None,
    pool: int = 1,
) -> Any:
    """Return coupling, its null and the null's standard deviation by row, and the means over all pairs.

    A diagonal that is 1 by definition is not packed.

    Args:
        result: the coupling.
        budget: bytes that the matrices of coupling may take.
        layers: indices on the axis of layers; None for a result without one, whose matrices are of layers.
        pool: side of the blocks over which cells are averaged.
    """
    chosen = slice(None) if layers is None else list(layers)
    values, null, std = (getattr(result, name)[:, chosen].double() for name in ("values", "null", "null_std"))
    if _diagonal_is_one(result):
        values = values.masked_fill(torch.eye(values.shape[-1], dtype=torch.bool), math.nan if pool > 1 else 0.0)

    def mean(name: str) -> Any:
        return plain(off_diagonal_mean(getattr(result, name)[:, chosen]))

    return {
        "values": packed(_blocks(values, pool), budget),
        "null": packed(_pooled(null.mean(-1), pool)),
        "std": packed(_pooled(std.mean(-1), pool)),
        "mean": {"coupling": mean("values"), "null": mean("null"), "excess": mean("excess"), "z": mean("z")},
    }


def _blocks(matrices: Tensor, pool: int) -> Tensor:
    """Average over square blocks of the last two axes, without NaN."""
    return _pooled(_pooled(matrices, pool).mT, pool).mT


def _pooled(array: Tensor, pool: int) -> Tensor:
    """Average over blocks of the last axis, without NaN; the last block may be shorter."""
    if pool == 1:
        return array
    padding = array.new_full((*array.shape[:-1], -array.shape[-1] % pool), math.nan)
    return torch.cat([array, padding], -1).unflatten(-1, (-1, pool)).nanmean(-1)


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

    All tokens are there. Those of a long prompt are averaged over blocks, so that the page stays below ``PAIRS_BYTES``,
    and single heads are those of ``start`` and of compared layers first, as many as fit.

    Args:
        tokens: all tokens of the prompt.
        analysis: the analysis with the attention patterns, and with fresh weights if they were measured.
        couplings: the coupling to show, by its name in an analysis.
        start: the layer that is shown first.
        layers: layers to show; by default all.
    """
    other = None if analysis is None else analysis.baseline
    shown = {
        name: [i for i, layer in enumerate(one.layers) if layers is None or layer in layers]
        for name, one in couplings.items()
    }
    cells = sum(one.values[:, shown[name]].numel() for name, one in couplings.items()) * (1 if other is None else 2)
    pool = math.ceil(math.sqrt(cells / TOKENS_CELLS)) or 1
    kinds = [
        _kind(one, None if other is None else getattr(other, name), shown[name], pool, TOKENS_BYTES / max(cells, 1))
        for name, one in couplings.items()
    ]
    used = sum(len(part["values"]["data"]) for kind in kinds for part in (kind, kind["fresh"]) if part is not None)
    first = [start, *(layer for one in couplings.values() for layer in one.layers)]
    room = PAIRS_BYTES - min(TOKENS_BYTES, used)
    return {
        "tokens": [label(token) for token in tokens],
        "sinks": [] if analysis is None else analysis.growth.sinks.nonzero().flatten().tolist(),
        "picture": None if analysis is None else _picture(analysis),
        "attention": None if analysis is None else _attention(analysis, first, layers, room),
        "kinds": kinds,
        "across": any(one.basis_layers != one.layers for one in couplings.values()),
        **(_metric(next(iter(couplings.values()))) if couplings else {}),
    }


def _picture(analysis: Analysis) -> dict[str, Any] | None:
    """Return the pixels of the image, and which position is which patch, ``[position, row, column]``."""
    if analysis.picture is None:
        return None
    named = enumerate(re.fullmatch(r"patch (\d+),(\d+)", token) for token in analysis.tokens)
    return {
        "shape": list(analysis.picture.shape),
        "data": analysis.picture.contiguous().numpy().tobytes(),
        "patches": [[position, int(found[1]), int(found[2])] for position, found in named if found],
    }


def _attention(
    analysis: Analysis, first: Sequence[int], layers: Sequence[int] | None, room: int
) -> dict[str, Any] | None:
    """Return attention patterns, ``[layer, pair]`` and ``[layer, head, pair]``; None if there are none.

    Pairs are those with src <= dest where no token attends to a later one, and all of them otherwise.

    Args:
        analysis: the analysis.
        first: the layers whose single heads matter most, the most important one first.
        layers: the layers to show; by default all.
        room: how many numbers may be packed. The heads of layers that were asked for always are.
    """
    chosen = [layer for layer in analysis.attention_layers if layers is None or layer in layers]
    attention = analysis.attention
    if attention is None or not chosen:
        return None
    n_heads, n_tokens = attention.shape[1:3]

    def patterns(kept: Sequence[int]) -> Tensor:
        return attention[[analysis.attention_layers.index(layer) for layer in kept]]

    above = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)
    causal = not attention[:, :, above].any()  # then the upper triangle is empty

    def pairs(pool: int) -> int:
        n = math.ceil(n_tokens / pool)
        return n * (n + 1) // 2 if causal else n * n

    def packed_pairs(matrices: Tensor) -> dict[str, Any]:
        return roots(_lower_triangle(matrices) if causal else matrices.flatten(-2))

    order = sorted(chosen, key=lambda layer: (first.index(layer) if layer in first else len(first), layer))
    per_layer = pairs(1) * n_heads
    has_heads = layers is not None or per_layer <= room
    left = max(room - has_heads * per_layer, room // 4, 1)
    pool = next(pool for pool in range(1, n_tokens + 1) if pairs(pool) * len(chosen) <= left or pool == n_tokens)
    left -= pairs(pool) * len(chosen)
    means = patterns(chosen).mean(1)
    heads = sorted(order[: 1 + max(0, left // per_layer)]) if has_heads else []
    return {
        "layers": chosen,
        "causal": causal,
        "pool": pool,
        "mean": packed_pairs(_blocks(means.masked_fill(above, math.nan) if causal else means, pool)),
        "head_layers": heads,
        "heads": packed_pairs(patterns(heads)),
        "window": max(1, math.isqrt(ATTENTION_CELLS // (n_heads + 1))),
    }


def _kind(
    result: TokenCoupling | ContextCoupling,
    fresh: TokenCoupling | ContextCoupling | None,
    chosen: Sequence[int],
    pool: int,
    budget: float,
) -> dict[str, Any]:
    """Return one kind of coupling, ``[sublayer, layer, k, row, column]``, and the same of fresh weights.

    Args:
        result: the coupling.
        fresh: the same of fresh weights, if they were measured.
        chosen: indices on the axis of layers.
        pool: side of the blocks of tokens over which cells are averaged.
        budget: bytes for each cell of the result.
    """
    determined = result.values_determined
    size = int(budget * result.values[:, chosen].numel())
    return {
        **_title(result),
        "sublayers": result.sublayers,
        "layers": [result.layers[i] for i in chosen],
        "basis_layers": [result.basis_layers[i] for i in chosen],
        "ks": result.ks,
        "positions": result.positions,
        "pool": pool,
        **_matrices(result, size, chosen, pool),
        "undetermined": None if determined is None else _undetermined(determined[:, chosen], pool),
        "fresh": None if fresh is None else _matrices(fresh, size, chosen, pool),
    }


def _undetermined(determined: Tensor | None, pool: int = 1) -> dict[str, Any] | None:
    """Pack which columns have undetermined singular vectors, ``[..., column]``; None if there is none or unknown."""
    if determined is None or determined.all():
        return None
    return packed(_pooled((~determined[..., 0, :]).double(), pool))


def _title(result: TokenCoupling | ContextCoupling) -> dict[str, Any]:
    """Describe in words which Jacobians are compared."""
    if isinstance(result, TokenCoupling):
        return {"name": "token", "title": f"token-wise{result._across()}", "compared": "J[t → t]", "fixed": None}
    preposition = "from" if result.fixed == "src" else "to"
    compared = f"J[{result.position} → t]" if result.fixed == "src" else f"J[s → {result.position}]"
    return {
        "name": f"context {result.fixed}",
        "title": f"{preposition} token {result.position}{result._across()}",
        "compared": compared,
        "fixed": result.position,
    }


def _lower_triangle(patterns: Tensor) -> Tensor:
    """Pack ``[layer, head, dest, src]`` row by row as ``[layer, head, pair]`` with src <= dest; the rest is zero."""
    rows, columns = torch.tril_indices(patterns.shape[-1], patterns.shape[-1])
    return patterns[..., rows, columns]


def _metric(result: DepthCoupling | TokenCoupling | ContextCoupling) -> dict[str, Any]:
    """Return the metric that was used: its formula, and whether the diagonal is 1 by definition."""
    return {
        "formula": formula(result),
        "diagonal_is_one": _diagonal_is_one(result),
    }


def _diagonal_is_one(result: Coupling) -> bool:
    """Return whether each Jacobian on the diagonal is compared with its own bases."""
    return result.bases == "uv" and bool(result._shared().all())
