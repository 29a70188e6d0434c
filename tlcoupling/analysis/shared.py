"""What Jacobians share: one in the bases of another, and the tokens of these bases.

``shared_directions`` measures all pairs of some blocks at a token. ``shared_pair`` measures any one pair: of layers, of
tokens or of heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.groups import Group, Place
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.pairs import compare_pair
from tlcoupling.coupling.projected import ProjectedJacobians, projected_with_bases
from tlcoupling.coupling.schedule import Comparison, make_schedule
from tlcoupling.directions.readout import ENDS, SIDES, reader
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.linalg.triplets import DETERMINED
from tlcoupling.results.base import Result

if TYPE_CHECKING:
    import pandas

# At most so many layers, evenly spaced, and singular vectors of each; and so many tokens at each end of a direction.
LAYERS, VECTORS, TOKENS = 32, 10, 5
_PLACES = ("layer", "side", "rank", "end", "place")


@dataclass(frozen=True, repr=False, eq=False)
class SharedDirections(Result):
    """Projected Jacobians of pairs of layers at one token, and the tokens that each layer's bases write and read.

    Attributes:
        projected: U2^T J1 V2 of all ordered pairs of the layers, of blocks.
        scores: of each layer's singular vectors, as in ``DirectionReadout``. ``[layer, side, rank, end, place]``.
        null: the mean score at each place for random directions. ``[side, place]``.
        texts: the tokens as text, nested like ``scores``.
    """

    projected: ProjectedJacobians
    scores: Float[Tensor, "layer side rank end place"]
    null: Float[Tensor, "side place"]
    texts: tuple[Any, ...]

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"scores": _PLACES, "null": ("side", "place")}

    def __repr__(self) -> str:
        """One line."""
        _, _, rank, _, top = self.scores.shape
        where = f"token {self.projected.position}"
        return f"SharedDirections({len(self.projected.layers)} layers at {where}, K={rank}, {top} tokens at each end)"

    def _coords(self) -> dict[str, Sequence[Any]]:
        *_, ranks, _, places = self.scores.shape
        return {
            "layer": self.projected.layers,
            "side": SIDES,
            "rank": range(ranks),
            "end": ENDS,
            "place": range(places),
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per token: ``layer``, ``side``, ``rank``, ``end``, ``place``, ``token``, ``score``, ``null``.

        ``projected.to_dataframe()`` has the projected Jacobians.
        """
        import pandas as pd

        coords = self._coords()
        index = pd.MultiIndex.from_product([list(coords[axis]) for axis in _PLACES], names=_PLACES)
        table = index.to_frame(index=False)
        nested = (text for layer in self.texts for side in layer for rank in side for end in rank for text in end)
        table["token"] = list(nested)
        table["score"] = self.scores.double().flatten().numpy()
        table["null"] = self.null[:, None, None].expand_as(self.scores).double().flatten().numpy()
        return table


def compared(n_layers: int, ks: Sequence[int]) -> tuple[range, int]:
    """Return the layers, at most ``LAYERS`` and evenly spaced, and how many singular vectors, at most ``VECTORS``."""
    return range(0, n_layers, -(-n_layers // LAYERS)), min(ks[0], VECTORS)


def shared_directions(trace: Trace, coupling: DepthCoupling) -> SharedDirections:
    """Measure what blocks share at the last token whose coupling was measured, with the same bases, engine and solver.

    The layers and the number of singular vectors are those of ``compared``.

    Raises:
        UnsupportedModelError: the embeddings are not in the residual stream's space.
    """
    layers, k = compared(trace.n_layers, coupling.ks)
    position = coupling.positions[-1]
    settings = {name: coupling.provenance.settings[name] for name in ("bases", "engine", "solver")}
    read, null = reader(trace, position, min(TOKENS, trace.model.cfg.d_vocab))
    projected, triplets = projected_with_bases(trace, list(layers), k, sublayers="block", token=position, **settings)
    scores, _, texts = read([triplets["block", layer] for layer in layers])
    return SharedDirections(provenance=projected.provenance, projected=projected, scores=scores, null=null, texts=texts)


@dataclass(frozen=True)
class SharedPair:
    """The Jacobian J1 of a pair in the bases of J2, and the tokens that these bases write and read.

    Attributes:
        values: U2^T J1 V2, or V2^T J1 U2 with the bases ``"vu"``.
        coupling, null: of the pair, at this K.
        null_entry: the expected |entry| under independent random bases, sqrt(2 / pi) ||J1||_F / width.
        determined: whether J2's singular values lie far enough apart to determine its vectors.
        scores, random, texts: of J2's singular vectors, as the scores, null and texts of ``DirectionReadout``.
    """

    values: Float[Tensor, "K K"]
    coupling: float
    null: float
    null_entry: float
    determined: bool
    scores: Float[Tensor, "side rank end place"]
    random: Float[Tensor, "side place"]
    texts: tuple[Any, ...]


@measured
def shared_pair(trace: Trace, sublayer: str, row: Place, column: Place, options: Options) -> SharedPair:
    """Measure what two Jacobians of a sublayer share; tokens are those that the column's dest would write.

    Args:
        trace: a trace of the model.
        sublayer: ``"block"``, ``"attn"``, ``"mlp"``.
        row: which Jacobian is J1.
        column: which Jacobian gives the bases.
        options: how they are compared, at one K.

    Raises:
        ArgumentError: K above the rank of one of the two.
        UnsupportedModelError: the embeddings are not in the residual stream's space.
        StaleTraceError: the model or its hooks have changed since the trace was taken.
    """
    groups = [Group((row,), (column,))]
    schedule = make_schedule(Comparison.of(trace, (sublayer,), groups, options))
    pairs = {(place.src, place.dest) for place in (row, column)}
    jacobians = JacobianEngine(trace, options.engine, pairs, schedule.forms)
    fields, values, triplets = compare_pair(jacobians, schedule)
    read, random = reader(trace, column.dest, min(TOKENS, trace.model.cfg.d_vocab))
    (scores,), _, (texts,) = read([triplets])
    return SharedPair(
        values=values.cpu(),
        coupling=float(fields["values"]),
        null=float(fields["null"]),
        null_entry=float(math.sqrt(2 / math.pi) * fields["frobenius"] / fields["null_width"]),
        determined=bool((fields["uncertainty"] <= DETERMINED).all()),
        scores=scores,
        random=random,
        texts=texts,
    )
