r"""The linearised system x <- (I + J^l) x along a trajectory, compared with the real model.

A perturbation of one token's residual stream x^l_t is carried to x^L twice: by the residual Jacobians of the
unperturbed trajectory, and by running the model's own blocks on the perturbed stream.

Attention is causal, so a perturbation at token t does not change earlier tokens. Token t itself depends on no later
token, so the product of same-token factors (I + J[l, t->t]) is its exact first-order response. Later tokens respond
too, because they read token t; ``tokens="all"`` carries them as well, by derivatives of whole blocks.

Source: Li and Papyan, "Residual Alignment", NeurIPS 2023, arXiv 2401.09018; arXiv 2407.07810, section 3.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import check_index, check_name
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.autograd import StreamJacobian
from tlcoupling.jacobian.differences import require_step_followed
from tlcoupling.jacobian.engine import EngineName, JacobianEngine
from tlcoupling.results.base import Result

Tokens = Literal["same", "all"]


@dataclass(frozen=True, repr=False, eq=False)
class LinearizationGap(Result):
    r"""The error of the linearised system, by perturbation size and by depth.

    delta^l is the change of the residual stream in the real model, lin^l that in the linearised system.

    Attributes:
        gap: ||delta^l - lin^l|| / ||delta^l||: 0 if the linearisation is exact, proportional to the size for small
            perturbations. ``[size, depth]``.
        cosine: cos(delta^l, lin^l), the agreement in direction alone. ``[size, depth]``.
        real_norm: ||delta^l||. ``[size, depth]``.
        linear_norm: ||lin^l||. ``[size, depth]``.
        rounding: order of magnitude of the gap from rounding alone: the dtype's precision times ||x^l|| / ||delta^l||.
            A gap of this size means nothing. ``[size, depth]``.
        sizes: ||delta|| / ||x|| at the perturbed token and layer.
        depths: indices of the residual stream, from the perturbed layer's input to L.
        position: the perturbed token.
        tokens: ``"same"``: norms are over the perturbed token alone; ``"all"``: over it and all later tokens.
    """

    gap: Float[Tensor, "size depth"]
    cosine: Float[Tensor, "size depth"]
    real_norm: Float[Tensor, "size depth"]
    linear_norm: Float[Tensor, "size depth"]
    rounding: Float[Tensor, "size depth"]
    sizes: tuple[float, ...]
    depths: tuple[int, ...]
    position: int
    tokens: str

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = dict.fromkeys(
        ("gap", "cosine", "real_norm", "linear_norm", "rounding"), ("size", "depth")
    )

    def __repr__(self) -> str:
        """One line."""
        ends = ", ".join(f"{size:g}: {gap:.2g}" for size, gap in zip(self.sizes, self.gap[:, -1], strict=True))
        return f"LinearizationGap(layer {self.depths[0]}, token {self.position}: gap at the end by size: {ends})"

    def reach(self, allowed: float = 0.1) -> Float[Tensor, " depth"]:
        """Return the largest size up to which the gap stays within ``allowed``, by depth; NaN if none does."""
        order = sorted(range(len(self.sizes)), key=lambda index: self.sizes[index])
        holds = (self.gap[order] <= allowed).long().cumprod(0).sum(0)
        sizes = self.gap.new_tensor([float("nan"), *(self.sizes[index] for index in order)])
        return sizes[holds]

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"size": self.sizes, "depth": self.depths}


@measured
def linearized(
    trace: Trace,
    perturbation: Float[Tensor, " d_model"],
    *,
    layer: int = 0,
    pos: int = -1,
    tokens: Tokens = "same",
    engine: EngineName = "auto",
) -> Float[Tensor, "depth pos d_model"]:
    r"""Carry a perturbation of x^layer at one token through the linearised system to x^L.

    - ``tokens="same"``: lin^{l+1} = (I + J[l, t->t]) lin^l, at the perturbed token alone. Exact to first order there,
      because attention is causal.
    - ``tokens="all"``: lin^{l+1}_s = lin^l_s + sum_{r <= s} J[l, r->s] lin^l_r, for the perturbed token and all later
      ones (for all in a bidirectional model). Exact to first order everywhere. Takes one run of each block and two
      backward passes through it.

    Args:
        trace: a trace of the model.
        perturbation: the change of x^layer at token ``pos``.
        layer: the block whose input is perturbed.
        pos: the token, t.
        tokens: ``"same"`` or ``"all"``.
        engine: as in ``residual_jacobian``, for ``tokens="same"``; ``"all"`` always uses autograd.

    Returns:
        The perturbation at the inputs of blocks layer .. L - 1 and at x^L, for token t (``"same"``) or tokens t and
        later (``"all"``).

    Raises:
        ArgumentError: an argument out of range.
        HookError: a user hook hides its effect from autograd.
        DerivativeError: the model itself hides its effect from autograd.
        StaleTraceError: the model or its hooks have changed since the trace was taken.
    """
    require_trace(trace)
    layer, pos = check_index("layer", layer, trace.n_layers), check_index("pos", pos, trace.n_tokens)
    check_name("tokens", tokens, get_args(Tokens))
    _require_followed(trace, tokens)
    if tuple(perturbation.shape) != (trace.d_model,):
        raise ArgumentError("perturbation", tuple(perturbation.shape), f"a vector of d_model = {trace.d_model} numbers")
    jacobians = JacobianEngine(trace, engine)
    return _linearized(trace, perturbation.to(trace.resid), layer, pos, tokens, jacobians)


def _linearized(
    trace: Trace, perturbation: Tensor, layer: int, pos: int, tokens: Tokens, jacobians: JacobianEngine
) -> Float[Tensor, "depth pos d_model"]:
    if tokens == "same":
        carried = [perturbation]
        for index in range(layer, trace.n_layers):
            operator = jacobians.operator(index, "block", pos, pos)
            last = carried[-1].to(operator.device)
            carried.append((last + operator.mv(last)).to(perturbation.device))
        return torch.stack(carried)[:, None]
    stream = torch.zeros_like(trace.resid[0])
    stream[pos] = perturbation
    carried = [stream]
    for index in range(layer, trace.n_layers):
        step = StreamJacobian(trace, index)
        moved = step.mv(carried[-1].to(step.device).flatten()).unflatten(0, stream.shape).to(stream.device)
        reason = require_step_followed(trace, step, index, carried[-1], index in jacobians.hooked)
        jacobians.warn_once(index, reason)
        carried.append(moved)
    return torch.stack(carried)[:, _first(trace, pos) :]


def _require_followed(trace: Trace, tokens: Tokens) -> None:
    """Check that no perturbation comes back to its token by way of others.

    Raises:
        ArgumentError: it does, and the token alone is followed.
    """
    if tokens == "same" and not trace.causal:
        allowed = "'all': the model is bidirectional, so a perturbation comes back to its token by way of others"
        raise ArgumentError("tokens", tokens, allowed)


def _first(trace: Trace, pos: int) -> int:
    """The first token that a perturbation at ``pos`` reaches."""
    return pos if trace.causal else 0


@measured
def linearization_gap(
    trace: Trace,
    direction: Float[Tensor, " d_model"] | None = None,
    *,
    layer: int = 0,
    pos: int = -1,
    sizes: Sequence[float] = (0.001, 0.01, 0.1, 1.0),
    tokens: Tokens = "same",
    engine: EngineName = "auto",
    seed: int = 0,
) -> LinearizationGap:
    """Compare a perturbation in the linearised system with the same perturbation in the real model.

    Args:
        trace: a trace of the model.
        direction: the direction of the perturbation of x^layer at token ``pos``; a random one by default.
        layer: the block whose input is perturbed.
        pos: the token.
        sizes: the perturbation's norms, as shares of ||x^layer|| at the token.
        tokens: ``"same"``: the perturbed token alone; ``"all"``: also all later ones. See ``linearized``.
        engine: as in ``linearized``.
        seed: seed of the random direction.

    Raises:
        ArgumentError: an argument out of range; a direction of length zero; a size that is not above zero.
        HookError: a user hook hides its effect from autograd.
        DerivativeError: the model itself hides its effect from autograd.
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Warns:
        UserWarning: the real model does not change at all; gap and cosine are then NaN.

    Example:
        >>> tlc.linearization_gap(trace, layer=5).reach(0.1)  # doctest: +SKIP
    """
    started = time.perf_counter()
    require_trace(trace)
    layer, pos = check_index("layer", layer, trace.n_layers), check_index("pos", pos, trace.n_tokens)
    check_name("tokens", tokens, get_args(Tokens))
    _require_followed(trace, tokens)
    sizes = tuple(float(size) for size in sizes)
    if not sizes or not all(0 < size < float("inf") for size in sizes):
        raise ArgumentError("sizes", sizes, "one or more numbers above 0")
    if direction is None:
        direction = torch.randn(trace.d_model, generator=torch.Generator().manual_seed(seed), dtype=trace.resid.dtype)
    elif tuple(direction.shape) != (trace.d_model,):
        raise ArgumentError("direction", tuple(direction.shape), f"a vector of d_model = {trace.d_model} numbers")
    length = direction.norm()
    if not 0 < length < float("inf"):
        raise ArgumentError("direction", float(length), "a direction of finite length above zero")
    unit = (direction / length).to(trace.resid) * trace.resid[layer, pos].norm()
    jacobians = JacobianEngine(trace, engine)
    carried = _linearized(trace, unit, layer, pos, tokens, jacobians)
    followed = slice(pos, pos + 1) if tokens == "same" else slice(_first(trace, pos), None)
    base = _real(trace, trace.resid[layer], layer)[:, followed]
    rows = []
    for size in sizes:
        moved = trace.resid[layer].clone()
        moved[pos] += size * unit
        rows.append(_compare(_real(trace, moved, layer)[:, followed] - base, size * carried, base))
    fields = {name: torch.stack([row[name] for row in rows]).cpu() for name in rows[0]}
    if (fields["real_norm"] == 0).any():
        warnings.warn(
            "the perturbation does not change the real model at some size and depth, so there is nothing to compare "
            "the linearisation with: gap and cosine are NaN there",
            stacklevel=3,
        )
    settings = {"layer": layer, "pos": pos, "sizes": list(sizes), "tokens": tokens, "engine": engine, "seed": seed}
    return LinearizationGap(
        provenance=trace.provenance(
            settings=settings, seconds=time.perf_counter() - started, engine=jacobians.used or {"block": "autograd"}
        ),
        **fields,
        sizes=sizes,
        depths=tuple(range(layer, trace.n_layers + 1)),
        position=pos,
        tokens=tokens,
    )


def _real(trace: Trace, stream: Float[Tensor, "pos d_model"], layer: int) -> Float[Tensor, "depth pos d_model"]:
    """Return the residual streams x^layer .. x^L that the model's own blocks compute from a stream at ``layer``."""
    streams = [stream]
    with torch.no_grad():
        for index in range(layer, trace.n_layers):
            resid_pre = streams[-1].to(trace.block_input(index).device)[None]
            streams.append(trace.run_block(index, resid_pre, {})[0].to(stream))
    return torch.stack(streams)


def _compare(
    real: Float[Tensor, "depth pos d_model"],
    linear: Float[Tensor, "depth pos d_model"],
    base: Float[Tensor, "depth pos d_model"],
) -> dict[str, Float[Tensor, " depth"]]:
    """Return the fields of ``LinearizationGap`` for one size."""
    real, linear, base = real.flatten(1), linear.flatten(1), base.flatten(1)
    real_norm, linear_norm = real.norm(dim=1), linear.norm(dim=1)
    changed = real_norm.where(real_norm > 0, torch.nan)
    return {
        "gap": (real - linear).norm(dim=1) / changed,
        "cosine": (real * linear).sum(1) / (changed * linear_norm),
        "real_norm": real_norm,
        "linear_norm": linear_norm,
        "rounding": torch.finfo(real.dtype).eps * base.norm(dim=1) / changed,
    }
