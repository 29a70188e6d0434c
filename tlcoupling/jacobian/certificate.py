"""The certificate of a closed form: its products, held against those of the block's own modules, pair by pair.

One backward pass with a random cotangent y at ``dest`` gives J^T y of a sublayer at every ``src`` at once, so that each
measured pair is tested by itself and nothing is extrapolated from one pair to another: an adapter on the queries shows
nowhere but where the queries have a derivative, and a soft-cap nowhere but where the scores are large. A block needs no
graph of its own: its closed form is the chain rule over its sublayers, and ``differences`` hold it against the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.analytic import AnalyticLayer
from tlcoupling.jacobian.autograd import at_once
from tlcoupling.jacobian.runs import Run
from tlcoupling.linalg.operator import JacobianOperator

# Relative gap allowed between an analytic product and the module's own derivative along the same probe. Float32
# products of this size agree to 1e-5; HuggingFace modules cast to float32 inside, whatever the model's dtype.
TOLERANCE = 1e-4

Pair = tuple[int, int]  # src, dest


class ModuleProducts:
    """J^T y of a block's sublayers by their own modules, for one random y.

    The graphs are those of the runs that the closed form reads: nothing is run again. The MLP runs on the measured
    positions alone where it can, and gives what it gave among all of them.

    Attributes:
        cotangent: y.
    """

    def __init__(self, closed: AnalyticLayer, pairs: Iterable[Pair] = ()) -> None:
        """Take a layer.

        Args:
            closed: its closed forms.
            pairs: (src, dest) that will be asked for: they share backward passes.
        """
        self._closed, self._pairs = closed, frozenset(pairs)
        self.cotangent = random_vector(closed.trace, closed.layer, closed.layer)
        self._attn: dict[Pair, Float[Tensor, " d_model"]] = {}
        self._mlp: dict[int, tuple[Float[Tensor, " d_model"], float]] = {}

    def attn(self, src: int, dest: int) -> Float[Tensor, " d_model"]:
        """J_attn^T y at ``src``, for y at ``dest``."""
        if (src, dest) not in self._attn:
            pairs = self._pairs if (src, dest) in self._pairs else {(src, dest)}
            for one, pulled in self._pulled(self._closed.attn_run, {dest for _, dest in pairs}):
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
            run, positions = self._closed.mlp_run(dest)
            announced = {pos for _, pos in self._pairs}
            wanted = announced.intersection(positions) if dest in announced else {dest}
            rows = {positions.index(pos): pos for pos in wanted}
            for row, pulled in self._pulled(run, rows):
                lengths = pulled.norm(dim=-1)
                own = float(lengths[row])
                lengths[row] = 0.0
                other = float(lengths.max())
                self._mlp[rows[row]] = pulled[row].clone(), other / own if own > 0 else float(other > 0)
        return self._mlp[dest]

    def _pulled(self, run: Run, rows: Iterable[int]) -> Iterator[tuple[int, Float[Tensor, "pos d_model"]]]:
        """Yield J^T y at all positions for y at each of some rows of a run."""
        order = sorted(rows)
        chunk = at_once(self._closed.trace, self._closed.layer) if len(order) > 1 else 1
        for some in (order[start : start + chunk] for start in range(0, len(order), chunk)):
            yield from zip(some, run.pull(self.cotangent, some), strict=True)


def random_vector(trace: Trace, layer: int, seed: int) -> Float[Tensor, " d_model"]:
    """Draw a random vector of length 1, the same for the same seed, on the device of a block."""
    vector = torch.randn(trace.d_model, generator=torch.Generator().manual_seed(seed), dtype=trace.resid.dtype)
    return (vector / vector.norm()).to(trace.block_input(layer).device)


def misses(
    operator: JacobianOperator,
    cotangent: Float[Tensor, " m"],
    truth: Float[Tensor, " n"],
    direction: Float[Tensor, " n"],
    product: Float[Tensor, " m"],
) -> float | None:
    """Return how far a closed form lies from the module's own derivative; None where they agree.

    Args:
        operator: the closed form.
        cotangent: y.
        truth: J^T y by the modules.
        direction: q, of any length.
        product: J q by the closed form. It has to be the adjoint of J^T, which shows in the one number y . J q.
    """
    adjoint = (cotangent @ product - truth @ direction).abs() / direction.norm()
    gap, size = torch.maximum((operator.rmv(cotangent) - truth).norm(), adjoint), truth.norm()
    return None if gap <= TOLERANCE * size else float(gap / size)
