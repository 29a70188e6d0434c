"""What the slices between all pairs of layers share: the maps of the blocks, and the ways into and out of them.

A slice between two layers is leave @ end @ blocks in between @ start @ enter. ``Routes`` makes the maps of a block once
for all slices that pass it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.linalg.maps import Identity, Projection
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.slices.flows import Flows
from tlcoupling.slices.sites import Site
from tlcoupling.slices.slice import vectors_through

_Cut = Callable[[JacobianOperator], JacobianOperator]


@dataclass(frozen=True)
class Maps:
    """The maps of one block, of what is carried through it.

    Attributes:
        start: from the layer's source site to x^{layer+1}.
        block: from x^layer to x^{layer+1}.
        end: from x^layer to the layer's target site.
    """

    start: JacobianOperator
    block: JacobianOperator
    end: JacobianOperator


@dataclass(frozen=True)
class Routes:
    """All slices between layers.

    Attributes:
        enter: from what is added at the source's positions to what the blocks carry.
        leave: from that to what is read at the target's positions.
        maps: the maps of a block.
        at_once: how many vectors go through a block together.
        alone: whether what is carried is one position.
        engine: which engine made the blocks, once all maps are made.
    """

    enter: JacobianOperator
    leave: JacobianOperator
    maps: Callable[[int], Maps]
    at_once: int
    alone: bool
    engine: Callable[[], Mapping[str, str]]

    def through(self, operator: JacobianOperator, vectors: Float[Tensor, "n vector"]) -> Float[Tensor, "m vector"]:
        """A map of many vectors, as many at a time as memory holds."""
        parts = [operator.mm(some).mT for some in vectors.split(self.at_once, dim=1)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).mT


def routes_of(
    trace: Trace,
    sources: Mapping[int, Site],
    targets: Mapping[int, Site],
    enter: JacobianOperator,
    leave: JacobianOperator,
    pos: int | None,
    engine: EngineName,
) -> Routes:
    """Prepare the maps of all slices between layers.

    From one position to itself, where no other position lies on the way, the maps are matrices of that position.
    Elsewhere they are maps of whole streams.

    Args:
        trace: the trace.
        sources: where the slices from each layer start.
        targets: where those to each layer end.
        enter: from what is added to the stream at all positions.
        leave: from the stream at all positions to what is read.
        pos: the position, where it is one and the same that is moved and read; None elsewhere.
        engine: as in ``residual_jacobian``.
    """
    flows = Flows(trace, engine)

    def maps(layer: int, blocks: Flows, whole: JacobianOperator, cut: _Cut = lambda part: part) -> Maps:
        one, source, target = Identity(whole.shape[0], trace.resid), sources.get(layer), targets.get(layer)
        start = end = one  # also of a block that lies between the layers
        if source == Site(layer):
            start = whole
        elif source is not None and source.layer == layer:
            start = cut(blocks.between(layer, source, None))
        if target is not None and target.layer > layer:
            end = whole
        elif target is not None and target != Site(layer):
            end = cut(blocks.between(layer, None, target))
        return Maps(start, whole, end)

    at_once = vectors_through(trace)
    if pos is not None and trace.alone(pos):
        single = JacobianEngine(trace, engine, {(pos, pos)}, formed=True)
        one = Identity(trace.d_model, trace.resid)

        def cut(part: JacobianOperator) -> JacobianOperator:
            columns = one.dense().split(at_once, dim=1)
            return Projection(torch.cat([(leave @ part @ enter).mm(some) for some in columns], dim=1))

        def at_position(layer: int) -> Maps:
            jacobian = single.operator(layer, "block", pos, pos).dense()
            return maps(layer, flows, Projection(one.dense() + jacobian.to(one.device)), cut)

        return Routes(one, one, at_position, trace.d_model, True, lambda: single.used)

    def at_all(layer: int) -> Maps:
        formed = flows.formed(layer)
        return maps(layer, formed, formed.block(layer))

    return Routes(enter, leave, at_all, at_once, False, lambda: flows.summary)
