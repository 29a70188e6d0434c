r"""The sensitivity atlas: the top singular triplets of the slices between all pairs of layers.

A slice from layer i to a later layer j is a product of the blocks' Jacobians, skips included. One sweep up through the
blocks carries the matrices of all slices: each block multiplies those that come from all earlier layers.

From one position to itself in a causal model, the blocks' Jacobians of that position alone are exact: what is added to
the stream there moves later positions too, but none of them leads back. Elsewhere the sweep carries whole streams,
``[pos * d_model, d_model]`` from each layer. Each block's MLP is then a matrix at each position, which is formed once
for all of them: the 435 pairs of SmolLM2 at 28 tokens take 21 TFLOP in place of 51.

Source: Ayyub 2026, "Power Steering", which finds the same right singular vectors by block power iteration through
autograd, one pair of layers at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from tlcoupling.arguments import Indices, check_name, resolve_indices
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.forward.trace import trace as trace_of
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.models.baseline import baseline_model
from tlcoupling.results.base import Result
from tlcoupling.slices.sites import positions_of, source_of, stream_points, target_of
from tlcoupling.slices.sweep import Sweep
from tlcoupling.text import counted

if TYPE_CHECKING:
    import pandas

COMPARED = ("reads, reads", "writes, writes", "reads, writes")
OVERLAPS = {
    "reads_as_first": "reads as its first block",
    "writes_as_last": "writes as its last block",
    "reads_source": "reads what the source writes",
}
_PAIR = ("source", "target")


@dataclass(frozen=True, repr=False, eq=False)
class SensitivityAtlas(Result):
    r"""The top singular triplets of the slices from each layer to each later one.

    Cells whose target is not behind their source are NaN. The overlap of two subspaces is ||A^T B||_F^2 / K, from 0 to
    1, and K / d_model (``null``) for independent ones.

    Attributes:
        singular_values: ``[source, target, rank]``.
        residual: max(||J v - s u||, ||J^T u - s v||) / s of each triplet, ``[source, target, rank]``.
        converged: whether that is as small as was asked, ``[source, target, rank]``; False where there is no slice.
        norm_product: the product of the largest singular values of all maps that a slice consists of, which its own
            cannot exceed. ``[source, target]``.
        u: left singular vectors: how the target site moves, ``[source, target, out, rank]``.
        v: right singular vectors: what is added at the source site, ``[source, target, in, rank]``.
        block_values: top singular values of each block's own Jacobian, without the skip, at the same positions,
            ``[block, rank]``.
        block_u: its left singular vectors: what the block writes, ``[block, out, rank]``.
        block_v: its right singular vectors: what it reads, ``[block, in, rank]``.
        layers: layers between which slices run.
        blocks: the blocks from the first to the last of them.
        enters: for each layer, the first block that a slice from it passes.
        leaves: for each layer, the last block that a slice to it passes.
        source_site, target_site: hook points at which slices start and end.
        src, dest: positions at which the same vector is added, and whose mean is read.
        alone: whether only one position counts, so that slices are products of its matrices.
        baseline: the atlas of another model, such as fresh weights; None without one.
    """

    singular_values: Float[Tensor, "source target rank"]
    residual: Float[Tensor, "source target rank"]
    converged: Bool[Tensor, "source target rank"]
    norm_product: Float[Tensor, "source target"]
    u: Float[Tensor, "source target out rank"]
    v: Float[Tensor, "source target in rank"]
    block_values: Float[Tensor, "block rank"]
    block_u: Float[Tensor, "block out rank"]
    block_v: Float[Tensor, "block in rank"]
    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    enters: tuple[int, ...]
    leaves: tuple[int, ...]
    source_site: str
    target_site: str
    src: tuple[int, ...]
    dest: tuple[int, ...]
    alone: bool
    baseline: SensitivityAtlas | None = None

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "singular_values": (*_PAIR, "rank"),
        "residual": (*_PAIR, "rank"),
        "converged": (*_PAIR, "rank"),
        "norm_product": _PAIR,
        "u": (*_PAIR, "out", "rank"),
        "v": (*_PAIR, "in", "rank"),
        "block_values": ("block", "rank"),
        "block_u": ("block", "out", "rank"),
        "block_v": ("block", "in", "rank"),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "block_overlap": ("compared", *_PAIR, "block"),
        "source_overlap": (*_PAIR, "other_target"),
        "target_overlap": (*_PAIR, "other_source"),
    }

    def __repr__(self) -> str:
        """One line."""
        first, last = self.layers[0], self.layers[-1]
        beside = "" if self.baseline is None else f" (baseline {float(self.baseline.singular_values[0, -1, 0]):.3g})"
        left = int((~self.converged & self.singular_values.isfinite()).sum())
        return (
            f"SensitivityAtlas({self.source_site} to {self.target_site}, {counted(len(self.pairs), 'pair')} of layers, "
            f"K = {self.k}: largest s from {first} to {last} {float(self.singular_values[0, -1, 0]):.3g}{beside}"
            f"{'; ' + counted(left, 'triplet') + ' not converged' if left else ''})"
        )

    def _coords(self) -> dict[str, Sequence[Any]]:
        width = self.u.shape[2]
        layers = dict.fromkeys((*_PAIR, "other_source", "other_target"), self.layers)
        sizes = {"rank": self.k, "out": width, "in": width}
        return {
            **layers,
            **{axis: range(size) for axis, size in sizes.items()},
            "block": self.blocks,
            "compared": COMPARED,
        }

    @property
    def k(self) -> int:
        """The number of triplets."""
        return self.singular_values.shape[-1]

    @property
    def null(self) -> float:
        """The overlap of independent random subspaces, K / d_model."""
        return self.k / self.u.shape[2]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Source and target layer of each slice."""
        return [(source, target) for source in self.layers for target in self.layers if source < target]

    @property
    def block_overlap(self) -> Float[Tensor, "compared source target block"]:
        """The overlap of each slice's directions with those of each block.

        First what the slice reads (v) with what the block reads, then what both write (u), then what the slice reads
        with what the block writes.
        """
        sides = ((self.v, self.block_v), (self.u, self.block_u), (self.v, self.block_u))
        return torch.stack([_overlaps(here, there) for here, there in sides])

    @property
    def source_overlap(self) -> Float[Tensor, "source target other_target"]:
        """The overlap of what two slices from the same source read."""
        return torch.stack([_overlaps(row, row) for row in self.v])

    @property
    def target_overlap(self) -> Float[Tensor, "source target other_source"]:
        """The overlap of what two slices to the same target write."""
        return torch.stack([_overlaps(column, column) for column in self.u.transpose(0, 1)], dim=1)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per pair of layers and rank; the vectors and the other overlaps are left out.

        The columns: ``source``, ``target``, ``rank`` (from 0), ``singular_value``, ``residual``, ``converged``,
        ``norm_product``; ``baseline``, the singular value there (NaN without one); and the overlap, with its chance
        level ``null``, of what the slice reads with what its first block reads (``reads_as_first``), of what it writes
        with what its last block writes (``writes_as_last``), and of what it reads with what the block at the source
        writes (``reads_source``).
        """
        import pandas as pd

        pairs, columns = self.by_pair(), {}
        for name, values in pairs.items():
            columns[name] = values.flatten() if values.ndim > 1 else values.repeat_interleave(self.k)
        table = pd.DataFrame({name: values.tolist() for name, values in columns.items()})
        table.insert(2, "rank", list(range(self.k)) * len(pairs["source"]))
        return table

    def by_pair(self) -> dict[str, Tensor]:
        """Return the columns of ``to_dataframe``, ``[pair]`` or ``[pair, rank]`` each."""
        cells = [(i, j) for i in range(len(self.layers)) for j in range(i + 1, len(self.layers))]
        i, j = torch.tensor(cells).unbind(1)
        values = self.singular_values[i, j]
        layers, first = torch.tensor(self.layers), self.blocks[0]
        reads, writes, fed = self.block_overlap
        enters, leaves = (torch.tensor(each) - first for each in (self.enters, self.leaves))
        return {
            "source": layers[i],
            "target": layers[j],
            "singular_value": values,
            "baseline": values * torch.nan if self.baseline is None else self.baseline.singular_values[i, j],
            "residual": self.residual[i, j],
            "converged": self.converged[i, j],
            "norm_product": self.norm_product[i, j],
            "reads_as_first": reads[i, j, enters[i]],
            "writes_as_last": writes[i, j, leaves[j]],
            "reads_source": fed[i, j, layers[i] - first],
            "null": values.new_full((len(cells),), self.null),
        }

    def grid(self, values: Float[Tensor, " pair"]) -> Float[Tensor, "source target"]:
        """Return one number of each pair, in the order of ``by_pair``, as a matrix of layers; NaN where no slice is."""
        behind = torch.ones(2 * [len(self.layers)], dtype=torch.bool).triu(1)
        return torch.full(behind.shape, torch.nan, dtype=torch.float64).masked_scatter(behind, values.double())

    def summary(self) -> pandas.DataFrame:
        """Return one row per number of layers between source and target: means over these pairs.

        The columns: ``distance``, ``pairs``; geometric means of the largest singular value, ``s``, of that of the
        ``baseline``, and of ``norm_product``; means of the overlaps of ``to_dataframe``, with ``null``.
        """
        import pandas as pd

        pairs = self.by_pair()
        distance = pairs["target"] - pairs["source"]
        logs = {
            "s": pairs["singular_value"][:, 0].double().log(),
            "baseline": pairs["baseline"][:, 0].double().log(),
            "norm_product": pairs["norm_product"].double().log(),
        }
        rows = []
        for apart in distance.unique().tolist():
            here = distance == apart
            means = {name: float(values[here].mean().exp()) for name, values in logs.items()}
            overlaps = {name: float(pairs[name][here].mean()) for name in (*OVERLAPS, "null")}
            rows.append({"distance": apart, "pairs": int(here.sum()), **means, **overlaps})
        return pd.DataFrame(rows)


def _overlaps(
    here: Float[Tensor, "*rows d rank"], there: Float[Tensor, "other d rank"]
) -> Float[Tensor, "*rows other"]:
    """||A^T B||_F^2 / K of all pairs of bases."""
    inner = einsum(here, there, "... d k, other d l -> ... other k l")
    return inner.square().sum((-2, -1)) / here.shape[-1]


@measured
def sensitivity_atlas(
    trace: Trace,
    k: int = 8,
    *,
    source_site: str = "resid_post",
    target_site: str = "resid_post",
    src: Indices = -1,
    dest: Indices = -1,
    layers: Indices | None = None,
    baseline: Any | None = None,
    engine: EngineName = "auto",
    progress: bool | None = None,
) -> SensitivityAtlas:
    """Measure the top singular triplets of the slices from each layer to each later one.

    From one position to itself in a causal model, slices are products of the blocks' matrices at that position. That is
    exact: no other position lies on the way, which is tested. With ``src="all"``, the same vector is added at all
    positions, as in steering, and whole streams are carried: ``tlc.estimate_atlas`` says beforehand what that costs.

    Args:
        trace: a trace of the model.
        k: number of triplets of each slice.
        source_site: where slices start: ``"resid_pre"``, ``"resid_mid"``, ``"attn_out"`` (``"mixer_out"``),
            ``"mlp_out"`` or ``"resid_post"`` of each layer.
        target_site: where they end: the same, of each later layer.
        src: positions at which the same vector is added: one, several or ``"all"``.
        dest: positions whose mean is read.
        layers: layers between which slices run; by default all.
        baseline: what stands beside it: ``"fresh"`` for fresh weights of the same architecture (``random_baseline``), a
            model, a trace of one, or an atlas with the same arguments.
        engine: as in ``residual_jacobian``.
        progress: show a progress bar; None: on a terminal or in a notebook, once it takes two seconds.

    Raises:
        ArgumentError: an argument out of range, fewer than two layers, k above the rank of a slice, dest before every
            src of a causal model, or a baseline of other layers, sites, positions or k.
        InsufficientMemoryError: what is carried from one layer does not fit into memory.
        CertificateError: ``engine="analytic"`` where no certified closed form exists.
        HookError: a hook of the user's hides from autograd what it does.
        DerivativeError: the model itself hides from autograd what it does.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Warns:
        UserWarning: triplets that have not converged; ``converged`` says which.

    Example:
        >>> atlas = tlc.sensitivity_atlas(trace, baseline="fresh")  # doctest: +SKIP
        >>> atlas.summary()  # by distance  # doctest: +SKIP
        >>> steer = tlc.add_direction(atlas.v[3, 20, :, 0], layer=3)  # doctest: +SKIP
    """
    started = time.perf_counter()
    require_trace(trace)
    check_name("source_site", source_site, stream_points(trace, "source"))
    check_name("target_site", target_site, stream_points(trace, "target"))
    chosen = resolve_indices("layers", layers, trace.n_layers)
    if len(chosen) < 2:
        raise ArgumentError("layers", layers, "two or more layers, between which slices run")
    chosen = tuple(sorted(chosen))
    moved, read = positions_of(trace, src, dest)
    sources = {layer: source_of(trace, (source_site, layer)) for layer in chosen}
    targets = {layer: target_of(trace, (target_site, layer)) for layer in chosen}
    sweep = Sweep(trace, k, sources, targets, moved, read, engine)
    where = {"layers": chosen, "source_site": source_site, "target_site": target_site, "src": moved, "dest": read}
    beside = None if baseline is None else _baseline(baseline, trace, {"k": k, **where}, engine, progress)
    sweep.run(progress)
    used = sweep.routes.engine()
    seconds = time.perf_counter() - started
    return SensitivityAtlas(
        provenance=trace.provenance(settings={"k": k, **where, "engine": engine}, seconds=seconds, engine=used),
        **sweep.fields,
        **where,
        blocks=sweep.blocks,
        enters=tuple(sources[layer].layer for layer in chosen),
        leaves=tuple(targets[layer].layer - (targets[layer].stage == "pre") for layer in chosen),
        alone=sweep.routes.alone,
        baseline=beside,
    )


def _baseline(
    baseline: Any, traced: Trace, settings: Mapping[str, Any], engine: EngineName, progress: bool | None
) -> SensitivityAtlas:
    """The atlas that stands beside another one."""
    if isinstance(baseline, SensitivityAtlas):
        for name, value in settings.items():
            if getattr(baseline, name) != value:
                raise ArgumentError("baseline", f"an atlas of {name}={getattr(baseline, name)}", f"{name}={value}")
        return baseline
    if not isinstance(baseline, Trace):
        baseline = trace_of(baseline_model(baseline, traced.model), traced.tokens)
    return sensitivity_atlas(baseline, **settings, engine=engine, progress=progress)
