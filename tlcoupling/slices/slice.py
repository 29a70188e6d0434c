r"""The Jacobian from one hook point to another, as a chain of the blocks' derivatives.

d target_dest / d source_src runs through every block between the two, and at all positions between src and dest: it
is carried by streams of these (``flows``), or of all positions where others may lie on the way. A perturbation that is
added to a sublayer's write is added to the stream.
"""

from __future__ import annotations

import warnings
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, check_name
from tlcoupling.directions.readout import readout_jacobian
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.autograd import autograd_column_bytes, n_heads_of
from tlcoupling.jacobian.differences import Function, leaning
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.maps import Identity, Projection
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.memory import free_memory
from tlcoupling.slices.flows import Flows, run_between, stage_value
from tlcoupling.slices.sites import Mode, Placement, Site, SiteSpec, ends_of, name_of, part_between, positions_of

_SHORTER = 1 / 16  # steps of differences than those of one block: many blocks bend more
AT_ONCE = 128  # vectors, at most, on a CPU, whose caches then hold their activations: 576 take a fifth longer
_SHARE = 0.25  # of the free memory, for the streams of vectors that go through a block together


class SliceJacobian(JacobianOperator):
    """The Jacobian between two hook points, ``[dest coordinates, src coordinates]``.

    Vectors go through the chain a few at a time (``vectors_through``).

    Attributes:
        source, target: the sites, as they were given.
        src, dest: the positions at which it starts and ends.
        engine: which engine made each layer's part.
    """

    def __init__(
        self,
        chain: JacobianOperator,
        trace: Trace,
        source: SiteSpec,
        target: SiteSpec,
        src: tuple[int, ...],
        dest: tuple[int, ...],
        engine: dict[int, str],
    ) -> None:
        """Take the chain of operators."""
        self._describe(chain.shape, chain)
        self._cost(chain.product_flops, min(chain.shape) * chain.product_flops)
        self._chain, self.engine = chain, engine
        self.source, self.target, self.src, self.dest = source, target, src, dest
        self._names = [name_of(trace, site) for site in (source, target)]
        self._at_once = vectors_through(trace)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""
        return torch.cat([self._chain.mm(part) for part in self._parts(x)], dim=1)

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""
        return torch.cat([self._chain.rmm(part) for part in self._parts(y)], dim=1)

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix, from products with the columns of the shorter side's identity."""
        rows, columns = self.shape
        eye = torch.eye(min(rows, columns), dtype=self.dtype, device=self.device)
        return self.rmm(eye).mT if rows < columns else self.mm(eye)

    def _parts(self, x: Float[Tensor, "n k"]) -> tuple[Tensor, ...]:
        return x.split(self._at_once, dim=1) if x.shape[1] else (x,)

    def __repr__(self) -> str:
        """One line."""
        source, target = self._names
        return f"SliceJacobian({source} at {self.src} -> {target} at {self.dest}, shape={self.shape})"


def vectors_through(trace: Trace) -> int:
    """How many vectors go through the blocks of a trace together: what a quarter of the free memory holds, at most."""
    column = autograd_column_bytes(
        trace.model.blocks[0], n_heads_of(trace.model.cfg), trace.n_tokens, trace.resid.dtype.itemsize
    )
    fitting = max(1, int(_SHARE * free_memory(trace.resid.device) / column))
    return min(fitting, AT_ONCE) if trace.resid.device.type == "cpu" else fitting


@measured
def slice_jacobian(
    trace: Trace,
    source: SiteSpec,
    target: SiteSpec,
    *,
    src: Indices = -1,
    dest: Indices = -1,
    src_mode: Mode = "stack",
    dest_mode: Mode = "stack",
    engine: EngineName = "auto",
) -> SliceJacobian:
    r"""The Jacobian of one hook point by another, with everything in between, as a linear operator.

    The skip connections belong to it: between two places of the stream at one position it is near the identity.

    Args:
        trace: a trace of the model.
        source: where it starts: ``("resid_pre", layer)``, ``"resid_mid"``, ``"attn_out"`` (``"mixer_out"``),
            ``"mlp_out"``, ``"resid_post"``, or ``("z", layer, head)``; ``"blocks.3.hook_resid_pre"`` is
            ``("resid_pre", 3)``.
        target: where it ends: the same, ``"ln_final"`` for the final norm's output, ``"logits"``, ``("logits",
            tokens)`` for the logits of some token ids, or ``("logit_diff", token, other)`` for the difference of two.
        src: positions at which the source moves: one, several or ``"all"``.
        dest: positions at which the target is read.
        src_mode: ``"stack"``: each src moves by a vector of its own, side by side in the operator's input. ``"same"``:
            all move by the same vector, as in steering.
        dest_mode: ``"stack"``: the targets at all dest, side by side. ``"same"``: their mean.
        engine: as in ``residual_jacobian``, for whole blocks; parts of a block that start or end at a head's z are
            always by autograd.

    Returns:
        An operator of shape ``(dest coordinates, src coordinates)``, positions before coordinates. ``truncated_svd``
        takes it, and it composes with others (``A @ J``). ``product_flops`` says what a product costs.

    Raises:
        ArgumentError: an unknown site, layer, head, token or position; a target that is not behind the source; dest
            before every src of a causal model.
        CertificateError: ``engine="analytic"`` where no certified closed form exists.
        HookError: a hook of the user's hides from autograd what it does.
        DerivativeError: the model itself hides from autograd what it does.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> ends = ("resid_post", 3), ("resid_post", 20)  # doctest: +SKIP
        >>> J = tlc.slice_jacobian(trace, *ends, src="all", src_mode="same")  # doctest: +SKIP
        >>> tlc.truncated_svd(J, 8).v  # directions to steer along  # doctest: +SKIP
    """
    require_trace(trace)
    start, end = ends_of(trace, source, target)
    for name, mode in (("src_mode", src_mode), ("dest_mode", dest_mode)):
        check_name(name, mode, get_args(Mode))
    sources, dests = positions_of(trace, src, dest)
    part, first = part_between(trace, {*sources, *dests}, engine)
    flows, n_tokens = Flows(part, engine), part.n_tokens
    chain = stream_chain(flows, start, end)
    moved, read = (tuple(pos - first for pos in positions) for positions in (sources, dests))
    enter = Placement(n_tokens, moved, src_mode, chain.shape[1] // n_tokens, chain)
    size = chain.shape[0] // n_tokens
    leave = Placement(n_tokens, read, "stack", size, chain).T
    inner = leave @ chain @ enter
    require_followed(part, inner, start, end, enter, leave)
    if end.readout != "stream":
        inner = _readout(trace, end, dests) @ inner
        size = inner.shape[0] // len(dests)
    if dest_mode == "same":
        inner = _mean(len(dests), size, inner) @ inner
    return SliceJacobian(inner, part, source, target, sources, dests, flows.used)


def stream_chain(flows: Flows, start: Site, end: Site) -> JacobianOperator:
    """Chain the derivatives of all blocks between two sites, at all positions; to x^L for logits."""
    trace = flows.trace
    chain: JacobianOperator = Identity(trace.n_tokens * trace.d_model, trace.resid)
    for layer in range(start.layer, end.layer if end.stage == "pre" else end.layer + 1):
        part = flows.between(
            layer,
            start if layer == start.layer and start.stage != "pre" else None,
            end if layer == end.layer else None,
        )
        chain = part if isinstance(chain, Identity) else part @ chain
    return chain


def _readout(trace: Trace, end: Site, dests: tuple[int, ...]) -> JacobianOperator:
    """The chosen logits, or the final norm's output, at each dest by x^L there."""
    rows = []
    for pos in dests:
        if end.readout == "norm":
            rows.append(readout_jacobian(trace, pos, "norm").dense())
            continue
        jacobian = readout_jacobian(trace, pos)
        if end.tokens is None:
            if len(dests) > 1:
                raise ArgumentError("dest", dests, "one position with all logits: choose some, ('logits', tokens)")
            return jacobian
        picked = torch.zeros(jacobian.shape[0], len(end.tokens), dtype=jacobian.dtype, device=jacobian.device)
        picked[list(end.tokens), range(len(end.tokens))] = 1.0
        matrix = jacobian.rmm(picked).mT
        rows.append(matrix if end.signs is None else matrix.new_tensor([end.signs]) @ matrix)
    return Projection(torch.block_diag(*rows))


def _mean(count: int, size: int, like: JacobianOperator) -> JacobianOperator:
    """The mean over positions of a stack of them."""
    eye = torch.eye(size, dtype=like.dtype, device=like.device)
    return Projection(eye.repeat(1, count) / count)


def require_followed(
    trace: Trace, jacobian: JacobianOperator, start: Site, end: Site, enter: Placement, leave: JacobianOperator
) -> None:
    """Hold the chain against a central difference of the model run from one site to the other.

    The way along the skip connections alone, which would hide the rest, is taken off both sides.
    """
    value = stage_value(trace, start.layer, start.stage) if start.layer < trace.n_layers else trace.resid[-1][None]
    own = value if start.head is None else value[..., start.head, :]
    passes = {start.stage, end.stage} <= {"pre", "mid"}

    def skipped(direction: Tensor) -> Tensor:
        return leave.mv(enter.mv(direction)) if passes else direction.new_zeros(jacobian.shape[0])

    @torch.no_grad()
    def at(move: Tensor) -> Tensor:
        stream = value.clone()
        (stream if start.head is None else stream[..., start.head, :]).add_(enter.mv(move).view_as(own).to(stream))
        return leave.mv(run_to(trace, start, end, stream).flatten().to(move))

    still = at(value.new_zeros(jacobian.shape[1]))
    moving = own[0, list(enter.positions)]
    draws = leaning(moving.mean(0) if enter.mode == "same" else moving.flatten())
    reason = Function(
        where=f"from {start} to {end}",
        moved=lambda moves: torch.stack([at(move) - still - skipped(move) for move in moves])[:, None],
        product=lambda direction: (jacobian.mv(direction) - skipped(direction))[None],
        size=_SHORTER * float(moving.norm()) or 1.0,
        lengths=still.norm()[None],
        hooked=bool(trace.hooked_layers),
    ).require(draws.to(jacobian.device))
    if reason is not None:
        warnings.warn(reason, stacklevel=3)


def run_to(trace: Trace, start: Site, end: Site, stream: Float[Tensor, "1 pos *axes"]) -> Float[Tensor, "pos d"]:
    """Run the model's own blocks from one site, with another activation there, to another one, at all positions."""
    last = end.layer if end.stage == "pre" else end.layer + 1
    for layer in range(start.layer, last):
        stage = start.stage if layer == start.layer else "pre"
        stop = end.stage if layer == end.layer else "pre"
        stream = run_between(trace, layer, stage, stop, stream.to(trace.block_input(layer).device))
    return stream[0] if end.head is None else stream[0, :, end.head]
