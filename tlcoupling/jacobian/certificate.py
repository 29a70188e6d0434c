"""The certificate of a closed form: its products, held against those of the block's own modules, pair by pair.

One backward pass with a random cotangent y at ``dest`` gives J^T y of a sublayer at every ``src`` at once, so that each
measured pair is tested by itself and nothing is extrapolated from one pair to another: an adapter on the queries shows
nowhere but where the queries have a derivative, and a soft-cap nowhere but where the scores are large. An MLP that
reads no other position answers for all ``dest`` at once, by the sum of their cotangents. A block needs no graph of its
own: its closed form is the chain rule over its sublayers, and ``differences`` hold it against the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.jacobian.autograd import at_once
from tlcoupling.jacobian.runs import BlockRun
from tlcoupling.linalg.operator import JacobianOperator

# Relative gap allowed between an analytic product and the module's own derivative along the same probe. Float32
# products of this size agree to 1e-5; HuggingFace modules cast to float32 inside, whatever the model's dtype.
TOLERANCE = 1e-4

Pair = tuple[int, int]  # src, dest


class ModuleProducts:
    """J^T y of a block's sublayers by their own modules, for one random y at each ``dest``.

    The graphs are those of the run that the closed form reads: nothing is run again.
    """

    def __init__(self, run: BlockRun, pairs: Iterable[Pair] = ()) -> None:
        """Take a run.

        Args:
            run: of a block.
            pairs: (src, dest) that will be asked for: they share backward passes.
        """
        self._run, self._pairs = run, frozenset(pairs)
        self._attn: dict[Pair, Float[Tensor, " d_model"]] = {}
        self._mlp: dict[int, tuple[Float[Tensor, " d_model"], float]] = {}

    def attn(self, src: int, dest: int) -> Float[Tensor, " d_model"]:
        """J_attn^T y at ``src``, for y at ``dest``."""
        if (src, dest) not in self._attn:
            pairs = self._pairs if (src, dest) in self._pairs else {(src, dest)}
            for one, pulled in self._pulled(self._run.block.mixer.name, {dest for _, dest in pairs}):
                self._attn |= {pair: pulled[pair[0]].clone() for pair in pairs if pair[1] == one}
        return self._attn[src, dest]

    def mlp(self, dest: int) -> Float[Tensor, " d_model"]:
        """J_mlp^T y at ``dest``, for y at ``dest``."""
        return self._mlp_at(dest)[0]

    def mlp_mixes(self, dest: int) -> float:
        """Return the largest length of J_mlp^T y at another position than ``dest``, relative to that at ``dest``."""
        return self._mlp_at(dest)[1]

    def _mlp_at(self, dest: int) -> tuple[Float[Tensor, " d_model"], float]:
        if dest not in self._mlp:
            announced = {pos for _, pos in self._pairs}
            rows = sorted(announced if dest in announced else {dest})
            self._mlp |= (self._mlp_together(rows) if len(rows) > 1 else {}) or self._mlp_alone(rows)
        return self._mlp[dest]

    def _mlp_alone(self, rows: Sequence[int]) -> dict[int, tuple[Float[Tensor, " d_model"], float]]:
        """J_mlp^T y at each of some rows, and how much of it lies at others; a product for each row."""
        found = {}
        for row, pulled in self._pulled("mlp", rows):
            lengths = pulled.norm(dim=-1)
            own = float(lengths[row])
            lengths[row] = 0.0
            other = float(lengths.max())
            found[row] = pulled[row].clone(), other / own if own > 0 else float(other > 0)
        return found

    def _mlp_together(self, rows: Sequence[int]) -> dict[int, tuple[Float[Tensor, " d_model"], float]]:
        """The same from two products for all rows; empty where the MLP reads other positions.

        Where it reads its own alone, the second is the first with each row multiplied by its factor. What a row has of
        another's cotangent is multiplied by the other's, and shows in the closed form's product with the first besides.
        """
        generator = torch.Generator().manual_seed(0)
        factors = dict(zip(rows, torch.randn(len(rows), generator=generator).tolist(), strict=True))
        once, again = self._run.pull("mlp", [dict.fromkeys(rows, 1.0), factors])
        lengths, gaps = once.norm(dim=-1), once.norm(dim=-1)
        expected = once[rows] * torch.tensor([*factors.values()]).to(once)[:, None]
        gaps[rows] = (again[rows] - expected).norm(dim=-1)
        allowed = TOLERANCE * lengths[rows].min().expand_as(lengths).index_put((torch.tensor(rows),), lengths[rows])
        if (gaps > allowed).any():
            return {}
        return {row: (once[row].clone(), float(gaps[row] / lengths[row]) if lengths[row] > 0 else 0.0) for row in rows}

    def _pulled(self, sublayer: str, rows: Iterable[int]) -> Iterator[tuple[int, Float[Tensor, "pos d_model"]]]:
        """Yield J^T y at all positions for y at each of some rows of what a sublayer writes."""
        order = sorted(rows)
        chunk = at_once(self._run.trace, self._run.layer) if len(order) > 1 else 1
        for some in (order[start : start + chunk] for start in range(0, len(order), chunk)):
            yield from zip(some, self._run.pull(sublayer, [{row: 1.0} for row in some]), strict=True)


def misses(
    operator: JacobianOperator,
    cotangent: Float[Tensor, " m"],
    truth: Float[Tensor, " n"],
    along: tuple[Float[Tensor, " n"], Float[Tensor, " m"]] | None = None,
) -> float | None:
    """Return how far a closed form lies from the module's own derivative; None where they agree.

    Args:
        operator: the closed form.
        cotangent: y.
        truth: J^T y by the modules.
        along: q, of any length, and J q by the closed form. It has to be the adjoint of J^T, which shows in the one
            number y . J q. None where J is a matrix, which gives both.
    """
    gap, size = (operator.rmv(cotangent) - truth).norm(), truth.norm()
    if along is not None:
        direction, product = along
        adjoint = (cotangent @ product - truth @ direction).abs() / direction.norm()
        gap = torch.maximum(gap, adjoint)
    return None if gap <= TOLERANCE * size else float(gap / size)
