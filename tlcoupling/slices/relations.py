r"""How a slice follows from the blocks that it runs through: their top directions, and their coupling.

At one token of a causal model the slice from x^a to x^b is the product of the blocks,
P = (I + J^{b-1}) ... (I + J^a). Two questions:

- does its top subspace follow from the blocks' top directions? P_K = prod (I + U_K S_K V_K^T) has nothing else of them;
- what does coupling add to its singular values? Uncoupled blocks of the same spectra are I + Q J^l Q^T, with a
  Haar-random rotation Q of each block: nothing relates one block's bases to another's any more (``"blocks"``). In
  I + Q J^l R^T what a block writes is unrelated to what it reads itself, too (``"bases"``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import check_index, check_int
from tlcoupling.coupling.metric import subspace_overlap
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.haar import haar_of
from tlcoupling.results.base import Result
from tlcoupling.text import counted

if TYPE_CHECKING:
    import pandas

SIDES, CONTROLS = ("writes", "reads"), ("blocks", "bases")


@dataclass(frozen=True, repr=False, eq=False)
class SliceRelations(Result):
    r"""Slices of several lengths, against the product of the blocks' top parts and against uncoupled blocks.

    Attributes:
        overlap: ||B1^T B2||_F^2 / K of the top K singular directions of P and of P_K, left (``"writes"``) and right
            (``"reads"``), ``[pair, side]``.
        singular_values: of P, ``[pair, rank]``.
        uncoupled: of the product of uncoupled blocks of the same spectra, of either kind of rotation. ``[pair, control,
            draw, rank]``.
        pairs: (a, b): from x^a to x^b.
        k: K.
        width: d_model.
        position: the token.
    """

    overlap: Float[Tensor, "pair side"]
    singular_values: Float[Tensor, "pair rank"]
    uncoupled: Float[Tensor, "pair control draw rank"]
    pairs: tuple[tuple[int, int], ...]
    k: int
    width: int
    position: int

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "overlap": ("pair", "side"),
        "singular_values": ("pair", "rank"),
        "uncoupled": ("pair", "control", "draw", "rank"),
    }

    def __repr__(self) -> str:
        """One line."""
        longest = max(b - a for a, b in self.pairs)
        return f"SliceRelations({counted(len(self.pairs), 'slice')} of up to {longest} blocks, K = {self.k})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        ranks, draws = self.singular_values.shape[1], self.uncoupled.shape[2]
        pairs = [f"{a} to {b}" for a, b in self.pairs]
        return {"pair": pairs, "side": SIDES, "control": CONTROLS, "rank": range(ranks), "draw": range(draws)}

    @property
    def null(self) -> float:
        """The overlap of unrelated subspaces, K / d_model."""
        return self.k / self.width

    @property
    def gain(self) -> Float[Tensor, "pair control draw"]:
        """The mean over ranks of ln s - ln s of uncoupled blocks: what coupling adds; above 0 where it amplifies."""
        return (self.singular_values[:, None, None].log() - self.uncoupled.log()).mean(-1)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per slice.

        Columns: ``start``, ``end``, ``blocks``; ``overlap_writes``, ``overlap_reads`` and their ``null``; ``s_1``; for
        either kind of uncoupled blocks the means over draws of s_1, ``uncoupled_blocks_s_1``, and of the gain,
        ``gain_blocks``, and its standard deviation, ``gain_blocks_std``; and the same for ``bases``.
        """
        import pandas as pd

        rows = [
            {
                "start": a,
                "end": b,
                "blocks": b - a,
                **{f"overlap_{side}": float(self.overlap[at, column]) for column, side in enumerate(SIDES)},
                "null": self.null,
                "s_1": float(self.singular_values[at, 0]),
                **{
                    name: float(value)
                    for row, control in enumerate(CONTROLS)
                    for name, value in (
                        (f"uncoupled_{control}_s_1", self.uncoupled[at, row, :, 0].mean()),
                        (f"gain_{control}", self.gain[at, row].mean()),
                        (f"gain_{control}_std", self.gain[at, row].std()),
                    )
                },
            }
            for at, (a, b) in enumerate(self.pairs)
        ]
        return pd.DataFrame(rows)


@measured
def slice_relations(
    trace: Trace,
    pairs: Iterable[tuple[int, int]],
    *,
    k: int = 10,
    pos: int = -1,
    draws: int = 5,
    seed: int = 0,
    engine: EngineName = "auto",
) -> SliceRelations:
    """Compare slices at one token with the product of the blocks' top parts, and with uncoupled blocks.

    Args:
        trace: a trace of the model.
        pairs: (a, b) for the slice from x^a to x^b, with 0 <= a < b <= the number of blocks.
        k: number of singular directions, of the blocks and of the slices.
        pos: the token.
        draws: number of products of uncoupled blocks, two or more.
        seed: seed of the random rotations.
        engine: as in ``residual_jacobian``.

    Raises:
        ArgumentError: an argument out of range.
        UnsupportedModelError: other positions lie on the way from the token to itself: a bidirectional model, or a
            hook that brings later tokens to earlier ones.
        HookError, DerivativeError, StaleTraceError: see ``residual_jacobian``.

    Example:
        >>> tlc.slice_relations(trace, [(8, 8 + n) for n in (1, 2, 4, 8, 16)]).to_dataframe()  # doctest: +SKIP
    """
    require_trace(trace)
    started = time.perf_counter()
    chosen = tuple((_end(a, trace.n_layers), _end(b, trace.n_layers)) for a, b in pairs)
    if not chosen or any(a >= b for a, b in chosen):
        raise ArgumentError("pairs", chosen, "one or more (a, b) with a < b")
    k = check_int("k", k, 1, trace.d_model, "the width of the residual stream")
    draws, pos = check_int("draws", draws, 2), check_index("pos", pos, trace.n_tokens)
    trace.require_alone(pos)
    jacobians = JacobianEngine(trace, engine, {(pos, pos)})
    layers = sorted({layer for a, b in chosen for layer in range(a, b)})
    blocks = {layer: jacobians.operator(layer, "block", pos, pos).dense().cpu() for layer in layers}
    tops = {layer: _top(block, k) for layer, block in blocks.items()}
    generator = torch.Generator().manual_seed(seed)
    eye = torch.eye(trace.d_model, dtype=trace.resid.dtype)
    overlaps, values, uncoupled = [], [], []
    for a, b in chosen:
        whole, parts = eye, eye
        for layer in range(a, b):
            u, s, vh = tops[layer]
            whole, parts = whole + blocks[layer] @ whole, parts + u @ (s[:, None] * (vh @ parts))
        (u1, s1, vh1), (u2, _, vh2) = _top(whole, k), _top(parts, k)
        overlaps.append(torch.stack([subspace_overlap(u1.mT @ u2), subspace_overlap(vh1 @ vh2.mT)]))
        values.append(s1)
        drawn = []
        for _ in range(draws):
            both = [eye, eye]
            for layer in range(a, b):
                left, right = (
                    haar_of(torch.randn(eye.shape, generator=generator, dtype=torch.float64)).to(eye) for _ in "lr"
                )
                others = zip(both, (left.mT, right), strict=True)
                both = [product + left @ (blocks[layer] @ (other @ product)) for product, other in others]
            drawn.append(torch.stack([torch.linalg.svdvals(product)[:k] for product in both]))
        uncoupled.append(torch.stack(drawn, dim=1))
    return SliceRelations(
        provenance=trace.provenance(
            settings={"pairs": chosen, "k": k, "pos": pos, "draws": draws, "seed": seed, "engine": engine},
            seconds=time.perf_counter() - started,
            engine=jacobians.used,
        ),
        overlap=torch.stack(overlaps),
        singular_values=torch.stack(values),
        uncoupled=torch.stack(uncoupled),
        pairs=chosen,
        k=k,
        width=trace.d_model,
        position=pos,
    )


def _end(index: Any, n_layers: int) -> int:
    return check_int("pairs", index, 0, n_layers, "an index of the residual stream")


def _top(matrix: Float[Tensor, "d d"], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top k singular triplets."""
    u, s, vh = torch.linalg.svd(matrix)
    return u[:, :k], s[:k], vh[:k]
