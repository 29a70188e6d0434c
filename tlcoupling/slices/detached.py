r"""Detached maps: the model with its nonlinear factors frozen, one linear map for each input token and a bias apart.

With the scales of norms, the attention patterns, the factors act(x) / x and the gates held at their values in the
trace, a target is exactly sum_s A_s x_s + c: a map A_s for each token's stream and what the biases give, c. So it
rebuilds the output, which the Jacobian does not; the Jacobian says what a perturbation does, which A does not, since
it holds fixed what a perturbation moves. ``compare_detached`` puts the two side by side.

Source: Golden, TMLR 2025 (detached Jacobians).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tlcoupling.arguments import Indices, check_int, resolve_indices
from tlcoupling.coupling.metric import subspace_overlap
from tlcoupling.directions.readout import logits_from
from tlcoupling.errors import ArgumentError, CertificateError
from tlcoupling.forward.block import Uncovered, close, weight_of
from tlcoupling.forward.context import measured
from tlcoupling.forward.lifting import lifted, lifted_model
from tlcoupling.forward.offload import device_of
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.certificate import TOLERANCE
from tlcoupling.jacobian.flow import NormFlow, SlopeFlow, WeightFlow
from tlcoupling.jacobian.frozen import Affine, FrozenLayer
from tlcoupling.jacobian.held import HeldJacobian
from tlcoupling.jacobian.norms import Norm
from tlcoupling.jacobian.runs import BlockRun
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.linalg.svd import truncated_svd
from tlcoupling.results.base import Result
from tlcoupling.slices.flows import Flows, site_value
from tlcoupling.slices.sites import Placement, Site, SiteSpec, ends_of, name_of
from tlcoupling.slices.slice import SliceJacobian, run_to, slice_jacobian, stream_chain

MAPS, SIDES = ("jacobian", "detached"), ("writes", "reads")


class DetachedMap(SliceJacobian):
    """The linear maps from each token's stream to a target with the nonlinear factors frozen, side by side.

    Attributes:
        inputs: x_s, the streams that it reads, ``[src, d_model]``.
        constant: c, what the biases give, ``[dest coordinates]``.
        value: the target as the model has it, ``[dest coordinates]``.
        rebuilt: the target by the maps of all positions and the constant. Same axes.
    """

    inputs: Float[Tensor, "src d_model"]
    constant: Float[Tensor, " m"]
    value: Float[Tensor, " m"]
    rebuilt: Float[Tensor, " m"]

    @property
    def error(self) -> float:
        """||rebuilt - value|| / ||value||."""
        return float((self.rebuilt - self.value).norm() / self.value.norm())

    def shares(self) -> Float[Tensor, "src m"]:
        """Return what each token's stream gives, A_s x_s; over all positions and with the constant, the target."""
        return self.mm(torch.block_diag(*self.inputs[:, None]).mT).mT


@measured
def detached_map(
    trace: Trace, target: SiteSpec, source: SiteSpec = ("resid_pre", 0), *, src: Indices = "all", dest: Indices = -1
) -> DetachedMap:
    r"""Return the linear maps that rebuild a target from each token's stream, with the nonlinear factors frozen.

    Frozen are the scales of norms, the attention patterns, act(x) / x of activations, and gates: of gated MLPs the
    branch of the gate. The target is then sum_s A_s x_s + c exactly. A is no derivative: see ``slice_jacobian``.

    Args:
        trace: a trace of the model, without hooks.
        target: as in ``slice_jacobian``; also of logits.
        source: the stream that it is rebuilt from, ``"resid_pre"``, ``"resid_mid"`` or ``"resid_post"`` of a layer; by
            default the embeddings. A sublayer's write stands for the stream behind it.
        src: positions whose maps stand side by side.
        dest: positions at which the target is read.

    Returns:
        An operator of shape ``(dest coordinates, src coordinates)``. ``shares()`` is each token's part of the target.

    Raises:
        ArgumentError: as ``slice_jacobian``; a head's z as the source, which alone does not make a target.
        CertificateError: a block or what lies behind them has no certified closed form, or hooks act in it.
        DerivativeError, StaleTraceError: see ``slice_jacobian``.

    Example:
        >>> detached = tlc.detached_map(trace, ("logits", [token]))  # doctest: +SKIP
        >>> detached.shares()[:, 0], detached.constant  # what each token gives to the logit  # doctest: +SKIP
    """
    require_trace(trace)
    start, end = ends_of(trace, source, target)
    if start.stage == "z":
        raise ArgumentError("source", source, "a residual stream: one head's z alone does not make a target")
    sources, dests = resolve_indices("src", src, trace.n_tokens), resolve_indices("dest", dest, trace.n_tokens)
    if end.readout == "norm":
        raise ArgumentError("target", target, "a hook point of a block, or logits")
    if end.readout == "logits" and end.tokens is None and len(dests) > 1:
        raise ArgumentError("dest", dests, "one position with all logits: choose some, ('logits', tokens)")
    flows = DetachedFlows(trace)
    chain = stream_chain(flows, start, end)
    stream = site_value(trace, start)
    size = chain.shape[0] // trace.n_tokens
    leave = Placement(trace.n_tokens, dests, "stack", size, chain).T
    last, value = Affine.without_bias(leave), leave.mv(site_value(trace, end).flatten())
    if end.readout == "logits":
        readout, value = _readout(trace, end, dests)
        last = readout.after(last)
    rebuilt, constant = (last(flows.rebuild(start, end, each)) for each in (stream, torch.zeros_like(stream)))
    enter = Placement(trace.n_tokens, sources, "stack", trace.d_model, chain)
    made = DetachedMap(last.linear @ chain @ enter, trace, source, target, sources, dests, flows.used)
    made.inputs, made.constant, made.value, made.rebuilt = stream[list(sources)], constant, value, rebuilt
    if not made.error <= TOLERANCE:
        raise CertificateError(f"the detached map misses the model's own {target} by {made.error:.1e}")
    return made


class DetachedFlows(Flows):
    """The blocks with their nonlinear factors frozen. Each block's true derivative is certified first."""

    def __init__(self, trace: Trace) -> None:
        """Take a trace."""
        super().__init__(trace, "analytic")
        self._frozen: dict[int, tuple[FrozenLayer, Affine, Affine | None]] = {}

    def between(self, layer: int, start: Site | None, end: Site | None) -> JacobianOperator:
        """Return the frozen map between two places of a block, as ``Flows.between`` its derivative."""
        if end is None or end.stage != "z":
            return super().between(layer, start, end)
        self.block(layer)
        return HeldJacobian(self._head(end).linear, self.trace.model.blocks[layer], layer)

    def rebuild(self, start: Site, end: Site, stream: Float[Tensor, "pos d_model"]) -> Float[Tensor, " n"]:
        """Return what the frozen blocks make of a stream, biases included, all positions in one vector."""
        x = stream.flatten()
        for layer in range(start.layer, end.layer if end.stage == "pre" else end.layer + 1):
            self.block(layer)
            _, attn, mlp = self._frozen[layer]
            stop = end.stage if layer == end.layer else "pre"
            if stop == "z":
                return self._head(end)(x)
            mid = x
            if layer != start.layer or start.stage == "pre":
                written = attn(x)
                mid = x + written
                if stop == "attn":
                    return written
            if stop == "mid":
                return mid
            if mlp is None:
                x = mid
                continue
            written = mlp(mid if self.trace.topology == "sequential" else x)
            if stop == "mlp":
                return written
            x = mid + written
        return x

    def _checked(self, layer: int) -> JacobianOperator:
        super()._checked(layer)  # raises where the closed form is not the block's own derivative
        try:
            frozen = FrozenLayer(BlockRun(self.trace, layer))
            attn, mlp = frozen.attention(), frozen.mlp() if "mlp" in self.trace.writes else None
        except Uncovered as reason:
            self._refuse(f"layer {layer}: {reason}")
        self._frozen[layer] = (frozen, attn, mlp)
        self._closed[layer] = linear = (attn.linear, None if mlp is None else mlp.linear)
        made = self._composed(linear, "pre", "pre")
        assert made is not None
        return made

    def _head(self, end: Site) -> Affine:
        """Return z of one head."""
        heads = self._frozen[end.layer][0].heads()
        width = heads.linear.shape[0] // self.trace.n_tokens
        size = width // self.trace.model.cfg.n_heads
        picked = torch.eye(width, dtype=heads.constant.dtype, device=heads.constant.device)[end.head * size :][:size]
        return Affine.without_bias(WeightFlow(picked, self.trace.n_tokens)).after(heads)

    def _refuse(self, reason: str) -> NoReturn:
        raise CertificateError(f"there is no detached map: {reason}")


def _readout(trace: Trace, end: Site, dests: Sequence[int]) -> tuple[Affine, Float[Tensor, " m"]]:
    """The frozen map from x^L at the dests to the chosen logits there, and these logits in the model.

    Behind the unembedding, each logit may go through a function of its own (a soft-cap, a scale): its factor is frozen.
    """
    resid, model = trace.resid[-1], trace.model
    normed, raw, logits, slopes = _behind_blocks(trace)
    rows = list(dests)
    module = getattr(model, "ln_final", None)
    norm = None
    try:
        if module is not None and not close(normed, resid):
            with lifted(model, module):
                norm = Norm.read(module, resid.to(normed), "the final norm")
        with lifted(model, model.unembed):  # which is a module: it was run
            weight = weight_of(model, "W_U")
        if weight is None or not close(resid if norm is None else norm(resid.to(normed)), normed):
            raise Uncovered("what lies behind the blocks is not a norm and an unembedding W_U")
        columns = list(range(weight.shape[1])) if end.tokens is None else list(end.tokens)
        weight = weight.detach()[:, columns].mT.to(normed)
        fitted = Affine.fitted(WeightFlow(weight, trace.n_tokens), normed, raw[:, columns])
    except Uncovered as reason:
        raise CertificateError(f"there is no detached map of logits: {reason}") from None
    bias = fitted.constant.view(trace.n_tokens, -1)[: len(rows)].flatten()
    made = Affine(WeightFlow(weight, len(rows)), bias)
    at = resid.to(normed)[rows]
    if norm is not None:
        made = made.after(Affine(NormFlow(norm, at, frozen=True), norm.bias.expand_as(at).flatten()))
    given, read, slope = (each[rows][:, columns] for each in (logits, raw, slopes))
    made = Affine.without_bias(SlopeFlow(torch.where(read == 0, slope, given / read))).after(made)
    if end.signs is not None:
        signs = given.new_tensor([end.signs])
        made = Affine.without_bias(Projection(torch.block_diag(*[signs] * len(rows)))).after(made)
        given = given @ signs.mT
    return made, given.flatten()


def _behind_blocks(trace: Trace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the unembedding reads and gives, the logits, and their slopes on what it gives, ``[pos, ...]``.

    Raises:
        CertificateError: hooks act there; or a logit is not a function of one output of the unembedding.
    """
    model, seen = trace.model, {}
    unembed = getattr(model, "unembed", None)

    def leave(module: Any, args: Any, output: Tensor) -> Tensor:
        seen["read"], seen["gave"] = args[0].detach()[0], output.detach().requires_grad_()
        torch.set_grad_enabled(True)  # from here on
        return seen["gave"]

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # restores the grad mode on exit
        stack.enter_context(lifted_model(model))
        stack.enter_context(trace.hooks_attached())
        if not isinstance(unembed, nn.Module) or trace.hooked_outside_blocks():
            raise CertificateError(
                "there is no detached map of logits: no unembedding, or hooks act outside the blocks"
            )
        stack.callback(unembed.register_forward_hook(leave).remove)
        tokens = trace.tokens[None].to(device_of(model))
        logits = model(tokens, return_type="logits")
        ones = torch.ones_like(logits)
        drawn = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        slopes, mixed = (
            torch.autograd.grad(logits, seen["gave"], cotangent, retain_graph=True)[0] for cotangent in (ones, drawn)
        )
    if not close(drawn * slopes, mixed):
        raise CertificateError("there is no detached map of logits: they mix the outputs of the unembedding")
    return seen["read"], *(each.detach()[0].to(trace.resid) for each in (seen["gave"], logits, slopes))


@dataclass(frozen=True, repr=False, eq=False)
class DetachedComparison(Result):
    r"""The Jacobian and the detached map of one target, side by side.

    Attributes:
        singular_values: of either map, ``[map, rank]``.
        overlap: ||B1^T B2||_F^2 / K of the two maps' top K singular directions, left (``"writes"``) and right
            (``"reads"``), ``[side]``.
        null: the overlap of unrelated subspaces, K over the number of coordinates, ``[side]``.
        reconstruction: ||M x + c - y|| / ||y||, with the streams x, the target y and the biases' part c of the detached
            map for both, ``[map]``.
        prediction: ||M delta - change|| / ||change|| for the change of the target in the model under a perturbation;
            1 is as good as predicting no change. ``[map, size, draw]``.
        sizes: length of the perturbation of each token's stream, relative to that stream's.
        source, target: the sites, as text.
    """

    singular_values: Float[Tensor, "map rank"]
    overlap: Float[Tensor, " side"]
    null: Float[Tensor, " side"]
    reconstruction: Float[Tensor, " map"]
    prediction: Float[Tensor, "map size draw"]
    sizes: tuple[float, ...]
    source: str
    target: str

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "singular_values": ("map", "rank"),
        "overlap": ("side",),
        "null": ("side",),
        "reconstruction": ("map",),
        "prediction": ("map", "size", "draw"),
    }

    def __repr__(self) -> str:
        """One line."""
        rebuilt = ", ".join(f"{name} {error:.1e}" for name, error in zip(MAPS, self.reconstruction, strict=True))
        return f"DetachedComparison({self.source} -> {self.target}: error of reconstruction: {rebuilt})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        ranks, draws = self.singular_values.shape[1], self.prediction.shape[2]
        return {"map": MAPS, "rank": range(ranks), "side": SIDES, "size": self.sizes, "draw": range(draws)}


@measured
def compare_detached(
    trace: Trace,
    target: SiteSpec,
    source: SiteSpec = ("resid_pre", 0),
    *,
    src: Indices = "all",
    dest: Indices = -1,
    k: int = 8,
    sizes: Sequence[float] = (0.01, 0.1, 1.0),
    draws: int = 4,
    seed: int = 0,
) -> DetachedComparison:
    """Compare the Jacobian with the detached map: which rebuilds the target, and which predicts its changes.

    Args:
        trace: as in ``detached_map``.
        target: as in ``detached_map``.
        source: as in ``detached_map``.
        src: positions whose streams are perturbed. What the others give is that of the detached map, for both.
        dest: as in ``detached_map``.
        k: number of singular values and directions.
        sizes: length of the perturbation of each token's stream, relative to that stream's.
        draws: number of random perturbations of each size.
        seed: seed of the random numbers.

    Raises:
        ArgumentError: an argument out of range.
        CertificateError: there is no detached map.
        DerivativeError, StaleTraceError: see ``slice_jacobian``.

    Example:
        >>> tlc.compare_detached(trace, ("resid_post", -1)).to_dataframe()  # doctest: +SKIP
    """
    started = time.perf_counter()
    sizes, draws = tuple(float(size) for size in sizes), check_int("draws", draws, 1)
    if not sizes or not all(0 < size < float("inf") for size in sizes):
        raise ArgumentError("sizes", sizes, "one or more finite numbers above 0")
    detached = detached_map(trace, target, source, src=src, dest=dest)
    jacobian = slice_jacobian(trace, source, target, src=src, dest=dest)
    maps = (jacobian, detached)
    tops = [truncated_svd(each, k) for each in maps]
    sides = [(tops[0].u, tops[1].u), (tops[0].v, tops[1].v)]
    value, given = detached.value, detached.inputs.flatten()
    rest = detached.rebuilt - detached.mv(given) - detached.constant  # of tokens that are not among src
    rebuilt = torch.stack([each.mv(given) + detached.constant + rest for each in maps])
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for size in sizes:
        for _ in range(draws):
            noise = torch.randn(detached.inputs.shape, generator=generator, dtype=given.dtype).to(given.device)
            lengths = detached.inputs.norm(dim=1, keepdim=True)
            move = size * lengths * noise / noise.norm(dim=1, keepdim=True)
            change = _moved(trace, detached, move) - value
            errors += [(each.mv(move.flatten()) - change).norm() / change.norm() for each in maps]
    return DetachedComparison(
        provenance=trace.provenance(
            settings={"src": detached.src, "dest": detached.dest, "k": k, "draws": draws, "seed": seed},
            seconds=time.perf_counter() - started,
            engine={"block": "analytic"},
        ),
        singular_values=torch.stack([top.s for top in tops]).cpu(),
        overlap=torch.stack([subspace_overlap(one.mT @ other) for one, other in sides]).cpu(),
        null=value.new_tensor([min(1.0, len(tops[0].s) / size) for size in jacobian.shape]).cpu(),
        reconstruction=((rebuilt - value).norm(dim=1) / value.norm()).cpu(),
        prediction=torch.stack(errors).view(len(sizes), draws, 2).permute(2, 0, 1).cpu(),
        sizes=sizes,
        source=name_of(trace, source),
        target=name_of(trace, target),
    )


@torch.no_grad()
def _moved(trace: Trace, made: DetachedMap, move: Float[Tensor, "src d_model"]) -> Float[Tensor, " m"]:
    """The target in the model itself with the streams moved."""
    start, end = ends_of(trace, made.source, made.target)
    stream = site_value(trace, start).clone()
    stream[list(made.src)] += move.to(stream)
    out = run_to(trace, start, end, stream[None])
    if end.readout != "logits":
        return out[list(made.dest)].flatten().to(move)
    logits = torch.stack([logits_from(trace, pos, out[None]) for pos in made.dest]).detach().to(move)
    chosen = logits if end.tokens is None else logits[:, list(end.tokens)]
    return (chosen if end.signs is None else chosen @ chosen.new_tensor([end.signs]).mT).flatten()
