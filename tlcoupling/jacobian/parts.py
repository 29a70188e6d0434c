"""The operators that a transformer's Jacobians are composed of, beside those of ``linalg``: norm, heads, block."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcoupling.linalg.operator import JacobianOperator


class NormMap(JacobianOperator):
    r"""The derivative of a norm, J = diag(g) (C - x_hat x_hat^T / d) / r, with C = I - 1 1^T / d where it centres.

    x_hat is the normalised input, r = sqrt(mean(x_c^2) + eps) the scale it was divided by, g the gain.
    """

    normalized: Float[Tensor, " d"]
    scale: Float[Tensor, ""]
    gain: Float[Tensor, " d"]
    centered: bool
    _light = True

    def __init__(
        self,
        normalized: Float[Tensor, " d"],
        scale: Float[Tensor, ""],
        gain: Float[Tensor, " d"],
        centered: bool,
    ) -> None:
        """Take x_hat, r, g, and whether the norm subtracts the mean."""
        size = normalized.shape[0]
        self._describe((size, size), normalized)
        self.normalized, self.scale, self.gain, self.centered = normalized, scale, gain, centered
        self._cost(8.0 * size, 8.0 * size * size)

    def _inner_(self, x: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """C - x_hat x_hat^T / d of X, in its place; symmetric, since C x_hat = x_hat."""
        x.addmm_(self.normalized[:, None], (self.normalized @ x)[None], alpha=-1 / self.shape[0])
        return x.sub_(x.mean(0)) if self.centered else x

    def mm(self, x: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """J X."""
        return self._inner_(x.clone()).mul_((self.gain / self.scale)[:, None])

    def rmm(self, y: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """J^T Y."""
        return self._inner_((self.gain / self.scale)[:, None] * y)


class HeadMap(JacobianOperator):
    """One block per head, from its group's coordinates to its own: ``[group * d_in] -> [head * d_out]``.

    Several heads may read the same group (grouped-query attention).
    """

    blocks: Float[Tensor, "head d_out d_in"]
    groups: Int[Tensor, " head"]
    n_groups: int
    _light = True

    def __init__(self, blocks: Float[Tensor, "head d_out d_in"], groups: Int[Tensor, " head"], n_groups: int) -> None:
        """Take each head's block and the group that it reads."""
        heads, d_out, d_in = blocks.shape
        self._describe((heads * d_out, n_groups * d_in), blocks)
        self.blocks, self.groups, self.n_groups = blocks, groups, n_groups
        self._members = (groups == torch.arange(n_groups, device=groups.device)[:, None]).to(blocks)
        self._cost(2.0 * blocks.numel(), 0.0)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """Each block times its group's rows."""
        grouped = x.reshape(self.n_groups, -1, x.shape[1])
        return (self.blocks @ grouped[self.groups]).reshape(-1, x.shape[1])

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """Each transposed block times its head's rows, summed within a group."""
        by_head = self.blocks.mT @ y.reshape(self.blocks.shape[0], -1, y.shape[1])
        # a product: index_add_ adds in another order each time on a GPU
        return (self._members @ by_head.flatten(1)).reshape(-1, y.shape[1])


class BlockMap(JacobianOperator):
    """A sequential block from its sublayers: J = J_attn + J_mlp (delta I + J_attn)."""

    attn: JacobianOperator
    mlp: JacobianOperator
    skip: bool

    def __init__(self, attn: JacobianOperator, mlp: JacobianOperator, skip: bool) -> None:
        """Take both sublayers' Jacobians, and whether src = dest (delta = 1)."""
        self._describe(attn.shape, attn)
        self.attn, self.mlp, self.skip = attn, mlp, skip
        dense = attn.dense_flops + mlp.dense_flops + 2.0 * attn.shape[0] ** 3
        self._cost(attn.product_flops + mlp.product_flops, dense)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""
        written = self.attn.mm(x)
        return written + self.mlp.mm(x + written if self.skip else written)

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""
        read = self.mlp.rmm(y)
        out = self.attn.rmm(y + read)
        return out + read if self.skip else out

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself."""
        attn, mlp = self.attn.dense(), self.mlp.dense()
        out = torch.addmm(attn, mlp, attn)
        return out + mlp if self.skip else out
