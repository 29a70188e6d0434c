r"""The rotation test of a coupling: how far its means lie from what independent bases give.

Null hypothesis: the bases (U_i, V_i) of different layers (tokens, heads) are independent and Haar-random, with their
singular values as measured, among the directions that a norm leaves (``null.effective_width``). A draw rotates each
Jacobian, with its bases, by two rotations of its own. What a pair gives then depends on A = U_j^T U_i and
B = V_i^T V_j alone, the blocks of two random rotations: U_j^T J_i V_j is A S_i B plus the share of the singular values
beyond K, which is drawn as normal with standard deviation ||J_i beyond K||_F / w, and U_i^T J_j V_i is A^T S_j B^T plus
its share.

Two different pairs are independent, also if they share a layer: U_j^T U_i and U_k^T U_i are independent for given U_i,
because U_j and U_k are, and a random basis looks the same from everywhere. So A and B are drawn pair by pair, and no
matrix of width d is needed. Triangles of pairs are dependent; that leaves the variance of a mean as it is, and moves
its skewness by a few over d.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tlcoupling.coupling.metric import coupling
from tlcoupling.linalg.work import Work
from tlcoupling.results.base import LabelledResult

SHOWN = 3  # labels of the first axis in the one line, at most
NUMBER = 0.004  # small module calls that take as long as a random number, measured
BATCH = 2**22  # numbers in the drawn blocks at a time, at most


@dataclass(frozen=True, repr=False, eq=False)
class CouplingTest(LabelledResult):
    """Mean excess coupling over sets of pairs, and how often chance alone gives as much.

    Attributes:
        excess: mean excess over the ordered pairs of a set. ``[*axes]``; the last axis is ``pairs``.
        p: two-sided p-value: twice the share of draws with an excess at least as far on the same side, the measured one
            counted as a draw. At least 2 / (draws + 1); NaN without pairs. Same axes.
        low: lower end of the interval of the mean excess: the excess minus what chance adds to it. Same axes.
        high: upper end. Same axes.
        chance_std: standard deviation of the mean excess of a draw. Same axes.
        count: number of ordered pairs in each set. ``[pairs]``.
        draws: number of draws.
        confidence: level of the interval.
        axes: names of the axes.
        labels: labels of each axis. Those of ``pairs`` are ``"all"``, ``"distance 1"``, ..., the names of blocks, and
            ``"a with b"`` for two blocks.
    """

    excess: Float[Tensor, "*axes"]
    p: Float[Tensor, "*axes"]
    low: Float[Tensor, "*axes"]
    high: Float[Tensor, "*axes"]
    chance_std: Float[Tensor, "*axes"]
    count: Float[Tensor, " pairs"]
    draws: int
    confidence: float

    _quantities: ClassVar[tuple[str, ...]] = ("excess", "p", "low", "high", "chance_std")

    def __repr__(self) -> str:
        """One line: the mean over all pairs, the first along each label of the first axis."""
        names = self.labels[0]
        firsts = (
            getattr(self, name)[..., 0].reshape(len(names), -1)[:, 0].tolist()
            for name in ("excess", "low", "high", "p")
        )
        each = [
            f"{name} {excess:.4f} [{low:.4f}, {high:.4f}] {p_value(p, self.draws)}"
            for name, excess, low, high, p in zip(names, *firsts, strict=True)
        ]
        shown = ", ".join(each if len(each) <= SHOWN else [*each[:SHOWN], f"... {len(each) - SHOWN} more"])
        return f"CouplingTest({self.draws} draws, {self.confidence:.0%}: mean excess {shown})"


@dataclass(frozen=True)
class Drawn:
    """What a draw depends on.

    Attributes:
        singular_values: the top singular values of each row. ``[*group, row, rank]``.
        frobenius: ||J||_F of each row. ``[*group, row]``.
        null: the expected coupling, which is subtracted from each draw. ``[*group, k, row, column]``.
        shared: which groups compare one set of Jacobians with itself, so that the pairs (i, j) and (j, i) have the
            same bases. ``[*group]``.
        width: the effective width w of each pair.
        d_model: the width.
        ks: numbers of singular vectors compared.
        normalizer: as in ``coupling``.
        bases: ``"uv"`` or ``"vu"``.
        absolute: as in ``coupling``.
    """

    singular_values: Float[Tensor, "*group n rank"]
    frobenius: Float[Tensor, "*group n"]
    null: Float[Tensor, "*group k n n"]
    width: Float[Tensor, "*group n n"]
    shared: Bool[Tensor, "*group"]
    d_model: int
    ks: tuple[int, ...]
    normalizer: Any
    bases: str
    absolute: bool


def p_value(p: float, draws: int) -> str:
    """Return a p-value as text, such as ``p = 0.012`` or ``p ≤ 0.002``, the least that so many draws can show."""
    least = 2 / (draws + 1)
    return f"p ≤ {least:.2g}" if p <= least else f"p = {p:.2g}"


def rotation_test(
    excess: Float[Tensor, "*group k n n"],
    drawn: Drawn,
    sets: Mapping[str, Bool[Tensor, "n n"]],
    draws: int,
    confidence: float,
    seed: int,
) -> dict[str, Tensor]:
    """Return the numbers of a ``CouplingTest`` by field name.

    Args:
        excess: measured excess of each ordered pair.
        drawn: what a draw depends on.
        sets: the ordered pairs of each set, by its name.
        draws: number of draws.
        confidence: level of the interval.
        seed: seed of the draws.
    """
    chosen = torch.stack(list(sets.values())).double()
    count = chosen.sum((-2, -1))

    def means(each: Float[Tensor, "*any n n"]) -> Float[Tensor, "*any pairs"]:
        off = torch.where(chosen.sum(0) > 0, each.double(), 0.0)  # what is in no set may be NaN
        return torch.einsum("...ij,pij->...p", off, chosen) / count

    found = means(excess)
    chance = torch.cat([means(batch) for batch in draw_excess(drawn, draws, seed)])
    # the measured value counts as one of the draws, so that p is never 0 and holds at any number of draws
    sides = [1.0 + (chance >= found).sum(0), 1.0 + (chance <= found).sum(0)]
    p = (2 * torch.minimum(*sides) / (draws + 1)).clamp(max=1)
    ends = torch.tensor([(1 + confidence) / 2, (1 - confidence) / 2], dtype=chance.dtype)
    low, high = found - chance.nan_to_num().quantile(ends.to(chance), dim=0)
    return {
        "excess": found,
        "p": p.where(found.isfinite(), torch.nan),
        "low": low,
        "high": high,
        "chance_std": chance.std(0),
        "count": count,
    }


def draw_excess(drawn: Drawn, draws: int, seed: int) -> Iterator[Float[Tensor, "draw *group k n n"]]:
    """Yield draws of the excess of all pairs, some at a time; the diagonal is 0.

    Groups share their random numbers: each has the right distribution, and draws of different groups are dependent.
    """
    top = drawn.singular_values.float().flatten(0, -3)
    n, rank = top.shape[-2:]
    beyond = (drawn.frobenius.flatten(0, -2).double().square() - top.double().square().sum(-1)).clamp(min=0).sqrt()
    null, width = drawn.null.float().flatten(0, -4), drawn.width.float().flatten(0, -3)
    scale, spread = drawn.d_model / width, beyond.float()[..., None] / width  # [group, row, column]
    i, j = torch.triu_indices(n, n, 1)
    rng = np.random.default_rng(seed)
    at_once = max(1, min(draws, BATCH // max(1, 6 * len(i) * rank**2)))
    for start in range(0, draws, at_once):
        shape = (min(at_once, draws - start), len(i))
        blocks = [random_blocks(shape, rank, drawn.d_model, rng) for _ in range(2 if drawn.shared.all() else 4)]
        first, second = blocks[:2]
        back = (first.mT, second.mT) if drawn.bases == "uv" else (second, first)
        noise = [torch.from_numpy(rng.standard_normal((*shape, rank, rank), np.float32)) for _ in range(2)]
        found = torch.zeros(shape[0], *null.shape)
        for one, shared in enumerate(drawn.shared.flatten().tolist()):
            pairs = ((i, j, (first, second)), (j, i, back if shared else blocks[2:]))
            for (row, column, (left, right)), rest in zip(pairs, noise, strict=True):
                # blocks of rotations of the whole width, with the mean square of those of the effective one
                kept, others = (each[one, row, column, None, None] for each in (scale, spread))
                projected = left * top[one, row, None, :] @ right * kept + rest * others
                for index, k in enumerate(drawn.ks):
                    values = coupling(projected[..., :k, :k], top[one, row, :k], drawn.normalizer, drawn.absolute)
                    found[:, one, index, row, column] = values - null[one, index, row, column]
        yield found.unflatten(1, drawn.shared.shape)


def random_blocks(shape: tuple[int, ...], k: int, d: int, rng: np.random.Generator) -> Float[Tensor, "*shape {k} {k}"]:
    r"""Return U1^T U2 of independent Haar-random frames U1, U2 of k columns in R^d.

    It is distributed as the top k rows of one frame, N R^-1, where N is k x k normal and R^T R = N^T N + T^T T. T is
    triangular and T^T T Wishart with d - k degrees of freedom (Bartlett 1933).
    """
    rows = min(d - k, k)
    normal = torch.from_numpy(rng.standard_normal((*shape, k + rows, k)))
    normal[..., k:, :] = normal[..., k:, :].triu(1)
    lengths = torch.from_numpy(rng.chisquare(np.arange(d - k, d - k - rows, -1), (*shape, rows))).sqrt()
    normal[..., k:, :].diagonal(dim1=-2, dim2=-1).copy_(lengths)
    root = torch.linalg.cholesky(normal.mT @ normal, upper=True)
    return torch.linalg.solve_triangular(root, normal[..., :k, :], upper=True, left=False).float()


def work_of_draws(draws: int, pairs: int, groups: int, k: int) -> Work:
    """Return the work of a rotation test of ``groups`` matrices, each with so many unordered pairs of members."""
    numbers, blocks, products = 6 * pairs * k**2, 2 * pairs * (7.0 / 3) * k**3, 2 * pairs * groups * 2.0 * k**3
    return Work(svd=blocks + products, calls=NUMBER * numbers) * draws
