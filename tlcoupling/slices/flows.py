"""The derivative of each block of a trace at all positions, certified against the model.

A closed form (``jacobian/flow``) is held against the backward pass of the block's own modules, at all sources and for a
random cotangent at all destinations; where it misses, or where hooks act, the graph itself is used. Either is then held
against central differences of the block, at each position.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlcoupling.errors import CertificateError
from tlcoupling.forward.block import Uncovered
from tlcoupling.forward.hooked import Hook
from tlcoupling.forward.offload import is_offloaded
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.analytic import AnalyticLayer
from tlcoupling.jacobian.autograd import BlockGraph, StreamJacobian
from tlcoupling.jacobian.certificate import TOLERANCE
from tlcoupling.jacobian.differences import require_step_followed
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.jacobian.flow import MatrixFlow
from tlcoupling.jacobian.held import HeldJacobian, RemadeJacobian
from tlcoupling.jacobian.parts import BlockMap
from tlcoupling.jacobian.runs import BlockRun
from tlcoupling.linalg.maps import Identity
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.slices.sites import Site, Stage

_ROUNDINGS = 10  # of a cotangent of length 1 that the skip carries


class Flows:
    """The blocks' derivatives at all positions, each checked when it is first asked for.

    Attributes:
        trace: the trace.
        used: which engine made each layer's.
    """

    def __init__(self, trace: Trace, engine: EngineName = "auto") -> None:
        """Take a trace, and ``"auto"``, ``"analytic"`` or ``"autograd"``."""
        self.trace, self.engine = trace, engine
        self.used: dict[int, str] = {}
        self._hooked = trace.hooked_layers | trace.layers_hooked_now()
        self._closed: dict[int, tuple[JacobianOperator, JacobianOperator | None] | None] = {}
        self._whole: dict[int, JacobianOperator] = {}
        self._said = False

    @property
    def summary(self) -> dict[str, str]:
        """Which engine made the blocks, for the provenance."""
        by_engine: dict[str, list[int]] = {}
        for layer, name in sorted(self.used.items()):
            by_engine.setdefault(name, []).append(layer)
        parts = [f"{name} (layers {layers})" for name, layers in by_engine.items()]
        return {"block": next(iter(by_engine)) if len(by_engine) == 1 else ", ".join(parts)} if by_engine else {}

    def block(self, layer: int) -> JacobianOperator:
        """Return the derivative of x^{layer+1} by x^layer, skip included, ``[pos * d_model, pos * d_model]``.

        Raises:
            CertificateError: ``engine="analytic"`` and there is no certified closed form.
            HookError, DerivativeError, StaleTraceError: see ``residual_jacobian``.
        """
        if layer not in self._whole:
            self._whole[layer] = HeldJacobian(self._checked(layer), self.trace.model.blocks[layer], layer)
        return self._whole[layer]

    def formed(self, layer: int) -> Flows:
        """Return the same derivative of one block with the MLP's matrix at each position formed.

        A product with a vector is then cheaper by the MLP's width over that of the stream, and forming the matrices
        costs as much as d_model products.

        Raises:
            DerivativeError: as ``block``, whose other errors it raises too.
        """
        whole, made = self.block(layer), copy.copy(self)
        closed = self._closed[layer]
        made._closed, made._whole = {layer: closed}, {layer: whole}
        if closed is None or closed[1] is None:
            return made
        matrices = MatrixFlow.of(closed[1], self.trace.n_tokens)
        direction = _random(self.trace, layer, 4).flatten()
        expected = closed[1].mv(direction)
        if not (matrices.mv(direction) - expected).norm() <= TOLERANCE * expected.norm():
            return made  # an MLP that moves something between positions
        made._closed[layer] = closed[0], matrices
        composed = self._composed((closed[0], matrices), "pre", "pre")
        assert composed is not None
        made._whole[layer] = composed
        return made

    def between(self, layer: int, start: Site | None, end: Site | None) -> JacobianOperator:
        """Return the derivative between two places of a block: its ends (None), or sites within it.

        Raises:
            DerivativeError: as ``block``, whose other errors it raises too.
        """
        whole = self.block(layer)
        first, last = start or Site(layer), end or Site(layer + 1)
        if first.stage == last.stage == "pre":
            return whole
        closed = self._closed[layer]
        made = None if closed is None else self._composed(closed, first.stage, last.stage)
        if made is None:
            make = partial(StageJacobian, self.trace, layer, first, last)
            made = RemadeJacobian(self.trace, make, make()) if self._offloaded(layer) else make()
        return HeldJacobian(made, self.trace.model.blocks[layer], layer)

    def _checked(self, layer: int) -> JacobianOperator:
        """The derivative of a whole block."""
        trace = self.trace
        graph = StreamJacobian(trace, layer)
        closed = self._certified(layer, graph)
        self._closed[layer] = closed
        made = graph if closed is None else self._composed(closed, "pre", "pre")
        self.used[layer] = "autograd" if closed is None else "analytic"
        assert made is not None
        move = _random(trace, layer, 1) * trace.resid[layer].norm(dim=-1, keepdim=True)
        reason = require_step_followed(trace, made, layer, move, layer in self._hooked)
        if reason is not None:
            warnings.warn(reason, stacklevel=2)
        return self._remade(layer, made) if self._offloaded(layer) else made

    def _offloaded(self, layer: int) -> bool:
        return is_offloaded(self.trace.model.blocks[layer])

    def _remade(self, layer: int, made: JacobianOperator) -> JacobianOperator:
        """The same derivative without its block's weights: those of several blocks are not held at once."""
        trace, closed = self.trace, self._closed[layer]
        if closed is None:
            return RemadeJacobian(trace, partial(StreamJacobian, trace, layer), made)

        def again(name: str, like: JacobianOperator) -> JacobianOperator:
            return RemadeJacobian(trace, lambda: AnalyticLayer(BlockRun(trace, layer)).flow(name), like)

        attn, mlp = closed
        closed = again(next(iter(trace.writes)), attn), None if mlp is None else again("mlp", mlp)
        self._closed[layer], composed = closed, self._composed(closed, "pre", "pre")
        assert composed is not None
        return composed

    def _certified(self, layer: int, graph: StreamJacobian) -> tuple[JacobianOperator, JacobianOperator | None] | None:
        """The closed forms of attention and MLP (None where there is none); None where the block goes to autograd."""
        if self.engine == "autograd":
            return None
        trace = self.trace
        if layer in self._hooked:
            return self._refuse(f"hooks act in block {layer}")
        try:
            if not trace.writes:
                raise Uncovered("the block is not split into sublayers, of which a closed form is made")
            layers = AnalyticLayer(BlockRun(trace, layer))
            closed = (layers.flow(next(iter(trace.writes))), layers.flow("mlp") if "mlp" in trace.writes else None)
        except Uncovered as reason:
            return self._refuse(f"layer {layer}: {reason}")
        made = self._composed(closed, "pre", "pre")
        assert made is not None
        cotangent, direction = _random(trace, layer, 2).flatten(), _random(trace, layer, 3).flatten()
        pulled, truth = (self._rows(one.rmv(cotangent) - cotangent) for one in (made, graph))
        # the skip rounds what is small beside it, as for a token of a large norm
        rounding = _ROUNDINGS * torch.finfo(truth.dtype).eps
        off = (pulled - truth).norm(dim=-1) / (truth.norm(dim=-1) + rounding / TOLERANCE)
        adjoint = (cotangent @ (made.mv(direction) - direction) - truth.flatten() @ direction).abs()
        gap = torch.maximum(off.max(), adjoint / (truth.norm() + rounding / TOLERANCE))
        if not gap <= TOLERANCE:
            where = f"layer {layer}, first at position {int(off.argmax())}"
            return self._refuse(f"its closed form misses the module's own derivative by {float(gap):.1e} ({where})")
        return closed

    def _composed(
        self, closed: tuple[JacobianOperator, JacobianOperator | None], start: Stage, end: Stage
    ) -> JacobianOperator | None:
        """The derivative between two places from the closed forms of attention and MLP; None from or to a head."""
        attn, mlp = closed
        one = Identity(attn.shape[0], self.trace.resid)
        sequential = self.trace.topology == "sequential"
        if "z" in (start, end):
            return None
        if start == "mid":
            assert mlp is not None
            return mlp if end == "mlp" else one + mlp
        if end == "attn":
            return attn
        if end == "mid":
            return one + attn
        if mlp is None:
            return one + attn
        if end == "mlp":
            return mlp @ (one + attn) if sequential else mlp
        return one + (BlockMap(attn, mlp, skip=True) if sequential else attn + mlp)

    def _refuse(self, reason: str) -> None:
        if self.engine == "analytic":
            raise CertificateError(f"engine='analytic' cannot be used here: {reason}")
        if not self._said:
            self._said = True
            warnings.warn(f"tlcoupling computes by autograd, which is slower: {reason}", stacklevel=2)

    def _rows(self, stream: Float[Tensor, " n"]) -> Float[Tensor, "pos d_model"]:
        return stream.unflatten(0, (self.trace.n_tokens, -1))


class StageJacobian(BlockGraph):
    """The Jacobian between two places of a block by its own modules, all positions in one vector."""

    def __init__(self, trace: Trace, layer: int, start: Site, end: Site) -> None:
        """Run the block once with its graph kept."""
        leaf = stage_value(trace, layer, start.stage).clone().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            output = run_between(trace, layer, start.stage, end.stage, leaf)
            output = _of_head(output, end.head)[0].flatten()
        super().__init__(trace, layer, end.stage, output, leaf, lambda grads: _of_head(grads, start.head).flatten(-3))


def _of_head(x: Tensor, head: int | None) -> Tensor:
    """A stream ``[..., pos, head, e]`` of one head, any other one as it is."""
    return x if head is None else x[..., head, :]


def stage_value(trace: Trace, layer: int, stage: Stage) -> Float[Tensor, "1 pos *axes"]:
    """What a trace holds at a place of a block, with a batch axis; z is taken from a run of the block."""
    if stage == "pre":
        return trace.block_input(layer)
    if stage == "mid":
        return trace.mlp_input(layer)
    with torch.no_grad():
        return run_between(trace, layer, "pre", stage, trace.block_input(layer))


def site_value(trace: Trace, site: Site) -> Float[Tensor, "pos n"]:
    """Return what a trace holds at a site; x^L for logits."""
    if site.stage == "pre":
        return trace.resid[site.layer]
    value = stage_value(trace, site.layer, site.stage)[0]
    return value if site.head is None else value[:, site.head]


def run_between(
    trace: Trace, layer: int, start: Stage, end: Stage, stream: Float[Tensor, "1 pos *given"]
) -> Float[Tensor, "1 pos *made"]:
    """Run a block with another activation at one of its places, and return what it makes at a later one.

    ``"pre"`` as the end is x^{layer+1}.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: kept.__setitem__(name, tensor)

    resid_pre = stream if start == "pre" else trace.block_input(layer)
    hooks: dict[str, Hook] = {} if end == "pre" else {_point(trace, layer, end): keep(end)}
    if start == "z":
        hooks[_point(trace, layer, "z")] = lambda tensor: stream
    elif start == "mid":  # at the write: a bridge's hook_resid_mid is what the MLP reads, and not what is added to
        hooks[_point(trace, layer, "attn")] = lambda tensor: stream - resid_pre
    out = trace.run_block(layer, resid_pre, hooks)
    return kept.get(end, out)


def _point(trace: Trace, layer: int, stage: Stage) -> str:
    """The short name of a place's hook point."""
    block = trace.block(layer)
    if stage == "z":
        return block.attn.points("z")[0]
    return {"mid": "hook_resid_mid", "attn": block.mixer.write}.get(stage) or block.mlp.write


def _random(trace: Trace, layer: int, seed: int) -> Float[Tensor, "pos d_model"]:
    """Draw a random unit vector for each position, on the device of a block."""
    generator = torch.Generator().manual_seed(1_000 * layer + seed)
    rows = torch.randn(trace.n_tokens, trace.d_model, generator=generator, dtype=trace.resid.dtype)
    return (rows / rows.norm(dim=-1, keepdim=True)).to(trace.block_input(layer).device)
