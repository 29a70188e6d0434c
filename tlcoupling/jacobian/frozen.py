r"""A block with its nonlinear factors frozen: what each sublayer writes, as one affine map of the stream that it reads.

The scales of norms, the attention patterns, the factors act(x) / x of activations, and what gates multiply by keep the
values that they have in the trace. What is left of norm, projection and sum is linear, but for biases: with frozen r, p
and f, a norm is g C x / r + b, a head sum_s p_ts W_V x_s, an MLP W_out diag(f) W_in x. This is the detached Jacobian of
Golden (TMLR 2025), here with the biases of the affine map apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from tlcoupling.forward.block import Uncovered, close
from tlcoupling.jacobian.analytic import AnalyticLayer
from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.flow import NormFlow, ReadingFlow, SlopeFlow, StreamMap, WeightFlow
from tlcoupling.jacobian.runs import Run
from tlcoupling.linalg.maps import Identity
from tlcoupling.linalg.operator import JacobianOperator


@dataclass(frozen=True, eq=False)
class Affine:
    """x -> A x + c on whole streams, all positions in one vector.

    Attributes:
        linear: A.
        constant: c.
    """

    linear: JacobianOperator
    constant: Float[Tensor, " m"]

    @classmethod
    def fitted(cls, linear: JacobianOperator, given: Float[Tensor, "pos n"], made: Float[Tensor, "pos m"]) -> Affine:
        """Return the affine map with the one bias for all positions with which it makes ``made`` of ``given``.

        Raises:
            Uncovered: there is none.
        """
        moved = linear.mv(given.flatten()).view_as(made)
        bias = (made - moved).mean(0).expand_as(made)
        if not close(moved + bias, made):
            raise Uncovered("with its factors frozen, a part of it is not A x + b with one b for all positions")
        return cls(linear, bias.flatten())

    @classmethod
    def without_bias(cls, linear: JacobianOperator) -> Affine:
        """Return x -> A x."""
        return cls(linear, torch.zeros(linear.shape[0], dtype=linear.dtype, device=linear.device))

    def __call__(self, x: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """A x + c."""
        return self.linear.mv(x) + self.constant

    def after(self, other: Affine) -> Affine:
        """Return the map that applies the other one first."""
        return Affine(self.linear @ other.linear, self(other.constant))


class FrozenLayer(AnalyticLayer):
    """The sublayers of a block with their nonlinear factors frozen, each an affine map of the stream that it reads."""

    def heads(self) -> Affine:
        """Return z of all heads, side by side.

        Raises:
            Uncovered: the attention has no closed form.
        """
        norm, normed = self._normed(self.block.mixer.before, self.resid_pre)
        core = self._core
        reading = ReadingFlow(core.readings["v"], len(normed), frozen=True)
        heads = PatternFlow(core, reading.shape[0] // core.values[:, 0].numel())
        return Affine.without_bias(heads).after(Affine.fitted(reading, normed, heads.values)).after(norm)

    def attention(self) -> Affine:
        """Return what the attention writes.

        Raises:
            Uncovered: it has no closed form.
        """
        attn, run = self.block.mixer, self._attn_run
        weight = self._attn_factor * rearrange(self._weights(attn)["W_O"], "head e d -> d (head e)")
        return self._written(attn.behind, run, weight, self._core.z.flatten(1)).after(self.heads())

    def mlp(self) -> Affine:
        """Return what the MLP writes.

        Raises:
            Uncovered: it has no closed form.
        """
        self.flow("mlp")  # refuses what is not covered
        mlp, run, weights = self.block.mlp, self._mlp_run, self._weights(self.block.mlp)
        norm, normed = self._normed(mlp.before, self.mlp_input)
        (*gates, read), post = (each.to(normed) for each in self._mlp_values[0]), self._mlp_values[1].to(normed)
        # of gated units the slope on what is gated, which is the gate; of others act(x) / x, in the limit at 0
        factor = self._mlp_slopes[-1] if gates else torch.where(read == 0, self._mlp_slopes[0], post / read)
        reads = Affine.fitted(WeightFlow(weights["W_in"].mT, len(read)), normed, read)
        weight = mlp.write_factor(run.values.get(mlp.gives), run.out) * weights["W_out"].mT
        units = Affine.fitted(SlopeFlow(factor), read, post)  # HookedTransformer adds b_in behind the gate
        units = units.after(reads).after(norm)
        return self._written(mlp.behind, run, weight, post).after(units)

    def _normed(
        self, module: nn.Module | None, stream: Float[Tensor, "pos d"]
    ) -> tuple[Affine, Float[Tensor, "pos d"]]:
        """A norm of the block with its scales frozen, and what it makes of a stream; of the stream for None."""
        norm = self._read_norm(module, "a norm of the block", stream)
        if norm is None:
            return Affine.without_bias(Identity(stream.numel(), stream)), stream
        return Affine(NormFlow(norm, stream, frozen=True), norm.bias.expand_as(stream).flatten()), norm(stream)

    def _written(self, behind: nn.Module | None, run: Run, weight: Float[Tensor, "d n"], given: Tensor) -> Affine:
        """What a sublayer writes of what its last weight reads, through the norm behind it where there is one."""
        written = (run.out if run.unnormed is None else run.unnormed).to(weight)
        write = Affine.fitted(WeightFlow(weight, len(written)), given.to(weight), written)
        return write if run.unnormed is None else self._normed(behind, written)[0].after(write)


class PatternFlow(StreamMap):
    """z of all heads from the values of all groups, with pattern and gates frozen: z_t = g_t sum_s p_ts v_s.

    Attributes:
        values: those of the trace, ``[pos, group * f]``.
    """

    def __init__(self, core: AttentionCore, groups: int) -> None:
        """Take the core of a trace of all positions, and the number of groups that have values of their own."""
        self._pattern, self._groups = core.pattern, groups
        n_tokens, self._heads, size = core.values.shape
        self.values = core.values[:, :: self._heads // groups].flatten(1)
        self._gates = None if core.gates is None else core.gates.sigmoid()
        flops = 2.0 * self._heads * n_tokens**2 * size
        self._between(n_tokens, groups * size, self._heads * size, core.values, flops)

    def push(self, tangent: Float[Tensor, "vector pos n"]) -> Float[Tensor, "vector pos m"]:
        """Z of each stream of values."""
        values = tangent.unflatten(-1, (self._groups, -1)).repeat_interleave(self._heads // self._groups, dim=-2)
        z = einsum(self._pattern, values, "head dest src, vector src head f -> vector dest head f")
        return (z if self._gates is None else self._gates * z).flatten(-2)

    def pull(self, cotangent: Float[Tensor, "vector pos m"]) -> Float[Tensor, "vector pos n"]:
        """The transpose."""
        y = cotangent.unflatten(-1, (self._heads, -1))
        y = y if self._gates is None else self._gates * y
        values = einsum(self._pattern, y, "head dest src, vector dest head f -> vector src head f")
        return reduce(values, "vector pos (group member) f -> vector pos (group f)", "sum", group=self._groups)
