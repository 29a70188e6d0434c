"""Head alignment: which heads serve a block's top directions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, KSpec, check_index, check_sublayer, resolve_indices
from tlcoupling.coupling.groups import Group, Place
from tlcoupling.coupling.null import projector_moments
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.pairs import decompose
from tlcoupling.coupling.schedule import Comparison, make_schedule
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.svd import SolverName
from tlcoupling.results.base import Result


@dataclass(frozen=True, repr=False, eq=False)
class HeadAlignment(Result):
    """Which heads write along a block's top directions, and read along them.

    Attributes:
        writes: ||U_K^T J_h||_F^2 / ||J_h||_F^2, the share of a head's write along the block's top K left singular
            vectors, from 0 to 1. ``[layer, k, head]``.
        reads: ||J_h V_K||_F^2 / ||J_h||_F^2, the share of its read along the top K right ones. Same axes.
        null: the expectation of both for random directions, K / d_model. ``[k]``.
        null_std: the standard deviation of both for Haar-random directions. ``[layer, k, head]``.
        frobenius: ||J_h||_F. ``[layer, head]``.
        of: the module whose top directions are used, ``"block"``, ``"attn"`` or ``"mlp"``.
        position: the token's position.
        token: its text.
        ks: number of directions.
        layers: the layers measured.
    """

    writes: Float[Tensor, "layer k head"]
    reads: Float[Tensor, "layer k head"]
    null: Float[Tensor, " k"]
    null_std: Float[Tensor, "layer k head"]
    frobenius: Float[Tensor, "layer head"]
    of: str
    position: int
    token: str
    ks: tuple[int, ...]
    layers: tuple[int, ...]

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("writes", "reads", "null_std"), ("layer", "k", "head")),
        "null": ("k",),
        "frobenius": ("layer", "head"),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(("z_writes", "z_reads"), ("layer", "k", "head"))

    def __repr__(self) -> str:
        """One line."""
        layer, head = divmod(int(self.writes[:, 0].argmax()), self.writes.shape[-1])
        return (
            f"HeadAlignment({self.writes.shape[-1]} heads of {len(self.layers)} layers with the {self.of}, "
            f"K={self.ks[0]}: writes {self.writes[:, 0].mean():.4f}, reads {self.reads[:, 0].mean():.4f} (null "
            f"{self.null[0]:.4f}), most of all head {head} of layer {self.layers[layer]})"
        )

    @property
    def z_writes(self) -> Float[Tensor, "layer k head"]:
        """Return ``writes`` minus its null, in standard deviations. Heads of one block are not independent."""
        return (self.writes - self.null[:, None]) / self.null_std

    @property
    def z_reads(self) -> Float[Tensor, "layer k head"]:
        """Return ``reads`` minus its null, in standard deviations. Heads of one block are not independent."""
        return (self.reads - self.null[:, None]) / self.null_std

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"layer": self.layers, "k": self.ks, "head": range(self.writes.shape[-1])}


@measured
def head_alignment(
    trace: Trace,
    k: KSpec = 10,
    *,
    of: str = "block",
    token: int = -1,
    layers: Indices | None = None,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
) -> HeadAlignment:
    r"""Measure which heads write along a block's top left singular vectors, and read along its top right ones.

    writes = ||U_K^T J_h||_F^2 / ||J_h||_F^2 and reads = ||J_h V_K||_F^2 / ||J_h||_F^2. U_K and V_K belong to the
    Jacobian of the block (or of one of its sublayers), J_h to head h's share of a^l, all at one token. Random
    directions give K / d on average for any J_h, with an exact variance (``projector_moments``). A head is part of its
    block, so a head with a large share of the block aligns with it even in a random model.

    Args:
        trace: a trace of the model.
        k: number of directions, as in ``depth_coupling``.
        of: the module whose directions are used: ``"block"``, ``"attn"`` or ``"mlp"``.
        token: a position.
        layers: block indices; by default all.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.

    Raises:
        ArgumentError: an argument out of range (K above the rank of the block's Jacobian, an unknown token).
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> tlc.head_alignment(trace, k=10).z_writes[3, 0]  # heads of layer 3 # doctest: +SKIP
    """
    require_trace(trace)
    started = time.perf_counter()
    check_sublayer("of", of, trace.sublayers, trace.refusal)
    options = Options.resolve(trace.d_model, k, "frobenius", "uv", True, engine, solver)
    pos = check_index("token", token, trace.n_tokens)
    chosen = resolve_indices("layers", layers, trace.n_layers)
    groups = [Group.of([Place(layer, pos, pos)]) for layer in chosen]
    schedule = make_schedule(Comparison.of(trace, (of,), groups, options))
    jacobians, cfg = JacobianEngine(trace, engine, {(pos, pos)}), trace.model.cfg
    fields: dict[str, list[Tensor]] = {name: [] for name in ("writes", "reads", "null_std", "frobenius")}
    attn = trace.attention(chosen)
    for layer in chosen:
        place = Place(layer, pos, pos)
        top = decompose(jacobians, schedule, [(of, place)])[of, place].triplets
        heads = [
            _aligned(jacobians.operator(layer, attn, pos, pos, head).dense(), top.u, top.v, options.k, cfg.d_head)
            for head in range(cfg.n_heads)
        ]
        for name, values in fields.items():
            values.append(torch.stack([head[name] for head in heads], dim=-1).cpu())
    settings = {
        "of": of,
        "token": pos,
        "layers": list(chosen),
        "k": list(options.k),
        "engine": engine,
        "solver": solver,
    }
    return HeadAlignment(
        provenance=trace.provenance(settings=settings, seconds=time.perf_counter() - started, engine=jacobians.used),
        **{name: torch.stack(values) for name, values in fields.items()},
        null=torch.tensor(options.k, dtype=torch.float64) / trace.d_model,
        of=of,
        position=pos,
        token=trace.str_tokens[pos],
        ks=options.k,
        layers=chosen,
    )


def _aligned(
    jacobian: Float[Tensor, "d d"],
    u: Float[Tensor, "d rank"],
    v: Float[Tensor, "d rank"],
    ks: Sequence[int],
    d_head: int,
) -> dict[str, Tensor]:
    """Return one head's numbers by field name: ``[k]`` each, except the scalar norm.

    With X = J J^T / ||J||_F^2, the share along a random projector P is tr(X P), of variance a + 2 b tr X^2 - (K / d)^2.
    A head writes into at most d_head directions, so a d_head x d_head matrix gives tr X^2.
    """
    width, squared = len(jacobian), jacobian.square().sum()
    generator = torch.Generator().manual_seed(3)
    probes = torch.randn(width, min(d_head, width), generator=generator, dtype=jacobian.dtype).to(jacobian.device)
    inner = torch.linalg.qr(jacobian @ probes).Q.mT @ jacobian
    fourth = (inner @ inner.mT).square().sum() / squared.square()
    last = torch.tensor(ks, device=jacobian.device) - 1
    moments = [projector_moments(k, fourth.new_tensor(width)) for k in ks]
    return {
        "writes": (u.mT @ jacobian).square().sum(1).cumsum(0)[last] / squared,
        "reads": (jacobian @ v).square().sum(0).cumsum(0)[last] / squared,
        "null_std": torch.stack([a + 2 * b * fourth - (k / width) ** 2 for k, (a, b) in zip(ks, moments, strict=True)])
        .clamp(min=0)
        .sqrt(),
        "frobenius": squared.sqrt(),
    }
