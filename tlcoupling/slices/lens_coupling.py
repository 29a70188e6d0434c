r"""Coupling of a Jacobian lens with the blocks: does the transport to the last layer move what a block moves?

The skip connections give J_l the identity, which is no part of a block's Jacobian either. So c_K(J_l - I, J_block) is
the coupling of ``coupling/metric``, in the bases of the block.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, check_int, resolve_indices
from tlcoupling.coupling.metric import coupling, subspace_overlap
from tlcoupling.coupling.null import effective_width, null_coupling, null_std, unreached_of
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.svd import SolverName, truncated_svd, truncated_svds
from tlcoupling.linalg.triplets import DETERMINED, Triplets
from tlcoupling.results.base import Result
from tlcoupling.slices.lens import JacobianLens

_PAIRS = ("pos", "layer", "block")


@dataclass(frozen=True, repr=False, eq=False)
class LensCoupling(Result):
    """Coupling and overlap of lens matrices, less the identity, with the Jacobians of blocks at some tokens.

    Attributes:
        values: coupling c_K(J_l - I, J_block), in the block's bases, ``[pos, layer, block]``.
        null: what independent random bases would give. Same axes.
        null_std: the standard deviation of that. Same axes.
        overlap_u: overlap of the spaces that lens and block write, from 0 to 1. Same axes.
        overlap_v: the same of the spaces that they read. Same axes.
        overlap_null_u, overlap_null_v: the overlaps of random subspaces. Same axes.
        singular_values: of J_l - I, ``[layer, rank]``.
        uncertainty: how far a block's singular vectors may be from the exact ones (``Triplets.uncertainty``),
            ``[pos, block, rank]``.
        layers: the lens's layers.
        blocks: the blocks, by index.
        positions: the tokens.
        k: number of singular vectors compared.
    """

    values: Float[Tensor, "pos layer block"]
    null: Float[Tensor, "pos layer block"]
    null_std: Float[Tensor, "pos layer block"]
    overlap_u: Float[Tensor, "pos layer block"]
    overlap_v: Float[Tensor, "pos layer block"]
    overlap_null_u: Float[Tensor, "pos layer block"]
    overlap_null_v: Float[Tensor, "pos layer block"]
    singular_values: Float[Tensor, "layer rank"]
    uncertainty: Float[Tensor, "pos block rank"]
    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    positions: tuple[int, ...]
    k: int

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("values", "null", "null_std", "overlap_u", "overlap_v"), _PAIRS),
        **dict.fromkeys(("overlap_null_u", "overlap_null_v"), _PAIRS),
        "singular_values": ("layer", "rank"),
        "uncertainty": ("pos", "block", "rank"),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"excess": _PAIRS}

    def __repr__(self) -> str:
        """One line."""
        return (
            f"LensCoupling({len(self.layers)} layers x {len(self.blocks)} blocks, K={self.k}: "
            f"{self.values.mean():.4f} (null {self.null.mean():.4f}))"
        )

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"pos": self.positions, "layer": self.layers, "block": self.blocks, "rank": range(self.k)}

    @property
    def excess(self) -> Float[Tensor, "pos layer block"]:
        """The coupling beyond that of independent random bases."""
        return self.values - self.null


@measured
def lens_coupling(
    lens: JacobianLens,
    trace: Trace,
    k: int = 10,
    *,
    tokens: Indices = -1,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
) -> LensCoupling:
    """Measure coupling and overlap of a lens's matrices with a model's blocks, beside chance.

    A lens is made of the blocks behind its layer, so it is related to these in any model. The null is about unrelated
    bases. Compare with the lens and the blocks of fresh weights (``random_baseline``).

    Args:
        lens: a lens of the model.
        trace: a trace of the model, whose blocks are compared.
        k: number of singular vectors.
        tokens: positions at which the blocks are taken: one, several or ``"all"``.
        engine: as in ``residual_jacobian``, for the blocks.
        solver: as in ``truncated_svd``.

    Raises:
        ArgumentError: a lens of another model or width, an argument out of range, K above the rank of a Jacobian.
        HookError, DerivativeError, StaleTraceError: see ``residual_jacobian``.

    Warns:
        UserWarning: singular values of a block nearly coincide, so that coupling in its bases is not determined.

    Example:
        >>> tlc.lens_coupling(lens, trace).excess[0]  # doctest: +SKIP
    """
    started = time.perf_counter()
    require_trace(trace)
    if not isinstance(lens, JacobianLens) or lens.matrices.shape[-1] != trace.d_model:
        raise ArgumentError("lens", lens, f"a JacobianLens of width {trace.d_model}")
    if lens.provenance.model_name != trace.model_name:
        raise ArgumentError("lens", f"a lens of {lens.provenance.model_name}", f"a lens of {trace.model_name}")
    k = check_int("k", k, 1, trace.d_model, "the width of the residual stream")
    positions = resolve_indices("tokens", tokens, trace.n_tokens)
    jacobians = JacobianEngine(trace, engine, {(pos, pos) for pos in positions})
    matrices = lens.matrices.to(torch.promote_types(lens.matrices.dtype, torch.float32))
    matrices = matrices - torch.eye(trace.d_model, dtype=matrices.dtype)
    rows = truncated_svds([Projection(matrix) for matrix in matrices], k, solver)
    compared = []
    for pos in positions:
        columns = [
            truncated_svd(jacobians.operator(layer, "block", pos, pos), k, solver) for layer in range(trace.n_layers)
        ]
        compared.append(_compare(trace, lens, matrices, rows, columns, pos))
    found = {name: torch.stack([one[name] for one in compared]) for name in compared[0]}
    if (found["uncertainty"] > DETERMINED).any():
        layers = (found["uncertainty"] > DETERMINED).any(-1).any(0).nonzero()[:, 0].tolist()
        warnings.warn(
            f"singular values of blocks {', '.join(map(str, layers))} nearly coincide: coupling in their bases depends "
            "on the solver and on rounding (`uncertainty`)",
            stacklevel=3,
        )
    return LensCoupling(
        provenance=trace.provenance(
            settings={"k": k, "tokens": list(positions), "engine": engine, "solver": solver},
            seconds=time.perf_counter() - started,
            engine=jacobians.used,
        ),
        **found,
        singular_values=torch.stack([row.s for row in rows]),
        layers=lens.layers,
        blocks=tuple(range(trace.n_layers)),
        positions=positions,
        k=k,
    )


def _compare(
    trace: Trace,
    lens: JacobianLens,
    matrices: Float[Tensor, "layer d d"],
    rows: Sequence[Triplets],
    columns: Sequence[Triplets],
    pos: int,
) -> dict[str, Tensor]:
    """All that is measured at one token, by field name."""
    u1, s, v1 = (torch.stack([getattr(row, name) for row in rows]) for name in "usv")
    u2, v2 = (torch.stack([getattr(column, name).to(matrices) for column in columns]) for name in "uv")
    k = s.shape[1]
    missed = [
        [
            unreached_of(one.u.to(matrices), one.v.to(matrices), trace.resid[layer, pos].to(matrices))
            for one, layer in zip(side, layers, strict=True)
        ]
        for side, layers in ((rows, [layer + 1 for layer in lens.layers]), (columns, range(trace.n_layers)))
    ]
    wide = [effective_width([one[at] for one in missed[0]], [one[at] for one in missed[1]]) for at in (0, 1)]
    of_row = {"frobenius": matrices.flatten(1).norm(dim=1)[:, None], "d_model": trace.d_model}
    width = (wide[0] * wide[1]).sqrt()
    projected = torch.einsum("cdi,rde,cej->rcij", u2, matrices, v2)
    return {
        "values": coupling(projected, s[:, None]),
        "null": null_coupling(s[:, None], width=width, **of_row),
        "null_std": null_std(s[:, None], width=width, **of_row),
        "overlap_u": subspace_overlap(torch.einsum("rdi,cdj->rcij", u1, u2)),
        "overlap_v": subspace_overlap(torch.einsum("rdi,cdj->rcij", v1, v2)),
        "overlap_null_u": (k / wide[0]).clamp(max=1).to(s),
        "overlap_null_v": (k / wide[1]).clamp(max=1).to(s),
        "uncertainty": torch.stack([column.uncertainty for column in columns]).to(s),
    }
