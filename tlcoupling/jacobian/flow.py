r"""Flows: the derivative of a block at all positions at once, as a linear operator on whole residual streams.

A stream ``[pos, d]`` is one vector of length pos * d. Norms, weights and activations act at each position alone, so
their flows apply one weight to all positions in one product; only the attention core moves anything between positions.
The formulas are those of ``formula``, for all pairs (src, dest) at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.norms import Norm
from tlcoupling.jacobian.readings import HeadNorm, Reading
from tlcoupling.linalg.operator import JacobianOperator


class StreamMap(JacobianOperator):
    """A linear map of streams, ``[pos, n]`` to ``[pos, m]``, that takes several of them in one call."""

    def _between(self, n_tokens: int, n_in: int, n_out: int, like: Tensor, flops: float) -> None:
        """Set positions, widths, dtype, device and the operations of one product."""
        self._n_tokens = n_tokens
        self._describe((n_tokens * n_out, n_tokens * n_in), like)
        self._cost(flops, self.shape[1] * flops)

    @abstractmethod
    def push(self, tangent: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos m"]:
        """J of each stream."""

    @abstractmethod
    def pull(self, cotangent: Float[Tensor, "vector pos m"]) -> Float[Tensor, "vector pos n"]:
        """J^T of each stream."""

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""
        return self.push(self._streams(x)).flatten(1).mT

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""
        return self.pull(self._streams(y)).flatten(1).mT

    def _streams(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "k pos m"]:
        return x.mT.reshape(x.shape[1], self._n_tokens, x.shape[0] // self._n_tokens)


class WeightFlow(StreamMap):
    """x -> W x at each position."""

    def __init__(self, weight: Float[Tensor, "m n"], n_tokens: int) -> None:
        """Take W, output coordinates in rows."""
        self.weight = weight
        self._between(n_tokens, weight.shape[1], weight.shape[0], weight, 2.0 * n_tokens * weight.numel())

    def push(self, tangent: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos m"]:
        """W x."""
        return tangent @ self.weight.mT

    def pull(self, cotangent: Float[Tensor, "vector pos m"]) -> Float[Tensor, "vector pos n"]:
        """W^T y."""
        return cotangent @ self.weight


class MatrixFlow(StreamMap):
    """x -> W_t x, with its own matrix at each position."""

    def __init__(self, weights: Float[Tensor, "pos n m"]) -> None:
        """Take W_t^T."""
        self.weights = weights
        n_tokens, n_in, n_out = weights.shape
        self._between(n_tokens, n_in, n_out, weights, 2.0 * weights.numel())

    @classmethod
    def of(cls, flow: JacobianOperator, n_tokens: int) -> MatrixFlow:
        """Form the matrices of a flow that moves nothing between positions, from its products with unit vectors."""
        width = flow.shape[1] // n_tokens
        unit = torch.eye(width, dtype=flow.dtype, device=flow.device)
        made = flow.mm(unit.repeat(1, n_tokens).mT).mT
        return cls(rearrange(made, "n (pos m) -> pos n m", pos=n_tokens).contiguous())

    def push(self, tangent: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos m"]:
        """W_t x."""
        return (tangent.transpose(0, 1) @ self.weights).transpose(0, 1)

    def pull(self, cotangent: Float[Tensor, "vector pos m"]) -> Float[Tensor, "vector pos n"]:
        """W_t^T y."""
        return (cotangent.transpose(0, 1) @ self.weights.mT).transpose(0, 1)


class SlopeFlow(StreamMap):
    """x -> a * x, with its own a at each position: the derivative of a pointwise activation."""

    def __init__(self, slopes: Float[Tensor, "pos n"]) -> None:
        """Take a."""
        self.slopes = slopes
        n_tokens, size = slopes.shape
        self._between(n_tokens, size, size, slopes, 1.0 * slopes.numel())

    def push(self, tangent: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos n"]:
        """A x."""
        return self.slopes * tangent

    def pull(self, cotangent: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos n"]:
        """A y."""
        return self.slopes * cotangent


class NormFlow(StreamMap):
    r"""The derivative of a norm at each position, diag(g / r) (C - x_hat x_hat^T / d); diag(g / r) C with r frozen."""

    def __init__(self, norm: Norm, inputs: Float[Tensor, "pos d"], frozen: bool = False) -> None:
        """Take the norm, what it read, and whether its scale is frozen."""
        self._slope = _NormSlope([norm], inputs[:, None], frozen)
        n_tokens, size = inputs.shape
        self._between(n_tokens, size, size, inputs, 8.0 * inputs.numel())

    def push(self, tangent: Float[Tensor, "vector pos d"]) -> Float[Tensor, "vector pos d"]:
        """J x."""
        return self._slope.push(tangent[..., None, :])[..., 0, :]

    def pull(self, cotangent: Float[Tensor, "vector pos d"]) -> Float[Tensor, "vector pos d"]:
        """J^T y."""
        return self._slope.pull(cotangent[..., None, :])[..., 0, :]


class _NormSlope:
    """The derivatives of norms side by side, one for each group of coordinates or one for all."""

    def __init__(self, norms: Sequence[Norm], inputs: Float[Tensor, "pos group e"], frozen: bool) -> None:
        made = [norm._normalize(inputs[:, group]) for group, norm in enumerate(norms)]
        self._normalized = torch.stack([normalized for normalized, _ in made], dim=1)
        if frozen:
            self._normalized = torch.zeros_like(self._normalized)
        factors = [norm.gain / scale for norm, (_, scale) in zip(norms, made, strict=True)]
        self._factor, self._centered = torch.stack(factors, dim=1), norms[0].centered

    def push(self, tangent: Float[Tensor, "vector pos group e"]) -> Float[Tensor, "vector pos group e"]:
        return self._factor * self._inner(tangent)

    def pull(self, cotangent: Float[Tensor, "vector pos group e"]) -> Float[Tensor, "vector pos group e"]:
        return self._inner(self._factor * cotangent)

    def _inner(self, x: Float[Tensor, "vector pos group e"]) -> Float[Tensor, "vector pos group e"]:
        """C - x_hat x_hat^T / d, which is symmetric."""
        out = x - self._normalized * (self._normalized * x).mean(-1, keepdim=True)
        return out - out.mean(-1, keepdim=True) if self._centered else out


class ReadingFlow(StreamMap):
    """The derivative of what queries, keys, values or gates are made of."""

    def __init__(self, reading: Reading, n_tokens: int, frozen: bool = False) -> None:
        """Take the reading of an attention that ran on so many positions, and whether norms' scales are frozen."""
        self._reading = reading
        self._norm = None if reading.norm is None else _slope_of(reading.norm, frozen)
        self._others = [ReadingFlow(other, n_tokens, frozen) for other in reading.others]
        last = reading.weight if reading.up is None else reading.up
        flops = 2.0 * n_tokens * (reading.weight.numel() + (0 if reading.up is None else reading.up.numel()))
        self._between(n_tokens, reading.weight.shape[1], last.shape[0], last, flops)

    def push(self, tangent: Float[Tensor, "vector pos d"]) -> Float[Tensor, "vector pos m"]:
        """J x."""
        made = tangent @ self._reading.weight.mT
        if self._norm is not None:
            made = self._norm.push(self._grouped(made)).flatten(-2)
        if self._reading.up is not None:
            made = made @ self._reading.up.mT
        return sum((other.push(tangent) for other in self._others), made)

    def pull(self, cotangent: Float[Tensor, "vector pos m"]) -> Float[Tensor, "vector pos d"]:
        """J^T y."""
        made = cotangent if self._reading.up is None else cotangent @ self._reading.up
        if self._norm is not None:
            made = self._norm.pull(self._grouped(made)).flatten(-2)
        return sum((other.pull(cotangent) for other in self._others), made @ self._reading.weight)

    def _grouped(self, x: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos group e"]:
        norm = self._reading.norm
        return x[..., None, :] if norm is None or norm.together else x.unflatten(-1, norm.inputs.shape[1:])


def _slope_of(norm: HeadNorm, frozen: bool) -> _NormSlope:
    return _NormSlope(norm.norms, norm.inputs.flatten(1)[:, None] if norm.together else norm.inputs, frozen)


class CoreFlow(StreamMap):
    """The derivative of the attention core, from what the attention reads (after its norm) to z of all heads.

    With pattern p, values v and slopes f' of the scores, dz_t = sum_s p_ts dv_s + sum_s w_ts (v_s - z_t), where
    w_ts = p_ts f'_ts (dq_t . k_s + q_t . dk_s).
    """

    def __init__(self, core: AttentionCore) -> None:
        """Take the core. Keys and values of positions before the first one (``past``) do not move."""
        self._own = slice(core.past, None)
        self._pattern, self._values, self._keys = core.pattern[..., self._own], core.values, core.keys
        self._queries, self._rotary = core.queries, core.rotary
        products = einsum(core.queries, core.keys, "dest head e, src head e -> head dest src")
        self._weights = core.pattern * core.scores.slope(products)
        self._z = einsum(core.pattern, core.values, "head dest src, src head f -> dest head f")
        self._gates = core.gates
        n_tokens, self._heads, size = self._z.shape
        self._flows = {name: ReadingFlow(reading, n_tokens) for name, reading in core.readings.items()}
        flops = sum(flow.product_flops for flow in self._flows.values())
        flops += 12.0 * self._heads * n_tokens**2 * size
        self._between(n_tokens, core.readings["q"].weight.shape[1], self._heads * size, self._z, flops)

    def push(self, tangent: Float[Tensor, "vector pos d"]) -> Float[Tensor, "vector pos n"]:
        """J x."""
        moves = {name: self._expand(name, flow.push(tangent)) for name, flow in self._flows.items()}
        q, k = moves["q"], moves["k"]
        if self._rotary is not None:
            q, k = self._rotary.apply(q), self._rotary.apply(k)
        scores = einsum(q, self._keys, "vector dest head e, src head e -> vector head dest src")
        scores[..., self._own] += einsum(self._queries, k, "dest head e, vector src head e -> vector head dest src")
        moved = self._weights * scores
        z = einsum(moved, self._values, "vector head dest src, src head f -> vector dest head f")
        z = z + einsum(self._pattern, moves["v"], "head dest src, vector src head f -> vector dest head f")
        z = z - self._z * rearrange(moved.sum(-1), "vector head dest -> vector dest head 1")
        if self._gates is not None:
            opened = self._gates.sigmoid()
            z = opened * z + self._z * opened * (1 - opened) * moves["gate"]
        return z.flatten(-2)

    def pull(self, cotangent: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos d"]:
        """J^T y."""
        y = rearrange(cotangent, "vector pos (head f) -> vector pos head f", head=self._heads)
        pulled = {}
        if self._gates is not None:
            opened = self._gates.sigmoid()
            pulled["gate"] = self._z * opened * (1 - opened) * y
            y = opened * y
        pulled["v"] = einsum(self._pattern, y, "head dest src, vector dest head f -> vector src head f")
        moved = einsum(y, self._values, "vector dest head f, src head f -> vector head dest src")
        moved = self._weights * (moved - rearrange((y * self._z).sum(-1), "vector dest head -> vector head dest 1"))
        pulled["q"] = einsum(moved, self._keys, "vector head dest src, src head e -> vector dest head e")
        own = moved[..., self._own]
        pulled["k"] = einsum(own, self._queries, "vector head dest src, dest head e -> vector src head e")
        if self._rotary is not None:
            pulled |= {name: self._rotary.pull(pulled[name]) for name in ("q", "k")}
        first, *others = (self._flows[name].pull(self._gather(name, each)) for name, each in pulled.items())
        return sum(others, first)

    def _groups(self, name: str) -> int:
        """The number of groups of heads that share a reading."""
        size = (self._queries if name in ("q", "k") else self._z).shape[-1]
        return self._flows[name].shape[0] // (self._n_tokens * size)

    def _expand(self, name: str, x: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos head e"]:
        """Give each head the coordinates of its group."""
        groups = self._groups(name)
        return x.unflatten(-1, (groups, -1)).repeat_interleave(self._heads // groups, dim=-2)

    def _gather(self, name: str, y: Float[Tensor, "vector pos head e"]) -> Float[Tensor, "vector pos n"]:
        """Add up the heads of each group."""
        groups = self._groups(name)
        return reduce(y, "vector pos (group member) e -> vector pos (group e)", "sum", group=groups)


def attention_flow(
    core: AttentionCore, write: Float[Tensor, "head e d_model"], before: JacobianOperator, behind: JacobianOperator
) -> JacobianOperator:
    """Compose the derivative of what attention writes at all positions by the stream that it reads.

    Args:
        core: the attention core.
        write: W_O, the block's factor included.
        before: the flow of the norm that the attention reads through.
        behind: that of the norm behind it.
    """
    flow = CoreFlow(core)
    return behind @ WeightFlow(rearrange(write, "head e d -> d (head e)"), len(core.queries)) @ flow @ before


def mlp_flow(
    slopes: Sequence[Float[Tensor, "pos d_mlp"]],
    reads: Sequence[Float[Tensor, "d_model d_mlp"]],
    write: Float[Tensor, "d_mlp d_model"],
    before: JacobianOperator,
    behind: JacobianOperator,
) -> JacobianOperator:
    """Compose the derivative of what an MLP writes at all positions by the stream that it reads.

    Args:
        slopes: of the activation, one for each weight that reads.
        reads: these weights.
        write: W_out, the block's factor included.
        before: the flow of the norm that the MLP reads through.
        behind: that of the norm behind it.
    """
    n_tokens = len(slopes[0])
    first, *others = (
        SlopeFlow(slope) @ WeightFlow(read.mT, n_tokens) for slope, read in zip(slopes, reads, strict=True)
    )
    return behind @ WeightFlow(write.mT, n_tokens) @ sum(others, first) @ before
