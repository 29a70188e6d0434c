r"""Small linear maps and how they compose: norm, projection, activation, attention core.

Every map has its product, its transposed product and its matrix, so that the dense and the matrix-free form of a
Jacobian come from the same composition. ``light`` marks a map that costs O(n) per vector (a diagonal, a norm, a
per-head block): a composition applies it to the matrix of its neighbour instead of multiplying matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcoupling.linalg.operator import JacobianOperator


class LinearMap(JacobianOperator):
    """A map that composes."""

    light = False
    concurrent = True

    def __init__(self, shape: tuple[int, int], like: Tensor) -> None:
        """Take dtype and device from a tensor."""
        self.shape, self.dtype, self.device = shape, like.dtype, like.device

    def __matmul__(self, other: LinearMap) -> LinearMap:
        """A @ B: first B, then A."""
        return Composition(self, other)

    def __add__(self, other: LinearMap) -> LinearMap:
        """A + B."""
        return Sum([self, other])


class Identity(LinearMap):
    """x -> x."""

    light = True

    def __init__(self, size: int, like: Tensor) -> None:
        """The identity of R^size."""
        super().__init__((size, size), like)
        self.product_flops, self.dense_flops = 0.0, 0.0

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """X."""
        return x

    def rmm(self, y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Y."""
        return y

    def dense(self) -> Float[Tensor, "n n"]:
        """The unit matrix."""
        return torch.eye(self.shape[0], dtype=self.dtype, device=self.device)


class Zero(LinearMap):
    """x -> 0."""

    light = True

    def __init__(self, size: int, like: Tensor) -> None:
        """The zero map of R^size."""
        super().__init__((size, size), like)
        self.product_flops, self.dense_flops = 0.0, 0.0

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Zeros."""
        return torch.zeros_like(x)

    def rmm(self, y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Zeros."""
        return torch.zeros_like(y)

    def dense(self) -> Float[Tensor, "n n"]:
        """The zero matrix."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class Projection(LinearMap):
    """x -> W x, a weight matrix."""

    def __init__(self, weight: Float[Tensor, "m n"]) -> None:
        """Take the matrix, output coordinates in rows."""
        super().__init__((weight.shape[0], weight.shape[1]), weight)
        self.weight = weight
        self.product_flops, self.dense_flops = 2.0 * weight.numel(), 0.0

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """W X."""
        return self.weight @ x

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """W^T Y."""
        return self.weight.mT @ y

    def dense(self) -> Float[Tensor, "m n"]:
        """W."""
        return self.weight


class Diagonal(LinearMap):
    """x -> a * x, the derivative of a pointwise activation."""

    light = True

    def __init__(self, diagonal: Float[Tensor, " n"]) -> None:
        """Take the diagonal a."""
        super().__init__((diagonal.shape[0], diagonal.shape[0]), diagonal)
        self.diagonal = diagonal
        self.product_flops, self.dense_flops = 1.0 * diagonal.numel(), 1.0 * diagonal.numel()

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """A X."""
        return self.diagonal[:, None] * x

    def rmm(self, y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """A Y."""
        return self.diagonal[:, None] * y

    def dense(self) -> Float[Tensor, "n n"]:
        """diag(a)."""
        return self.diagonal.diag()


class NormMap(LinearMap):
    r"""The derivative of a norm, J = diag(g) (C - x_hat x_hat^T / d) / r, with C = I - 1 1^T / d where it centres.

    x_hat is the normalised input, r = sqrt(mean(x_c^2) + eps) the scale it was divided by, g the gain.
    """

    light = True

    def __init__(
        self,
        normalized: Float[Tensor, " d"],
        scale: Float[Tensor, ""],
        gain: Float[Tensor, " d"],
        centered: bool,
    ) -> None:
        """Take x_hat, r, g, and whether the norm subtracts the mean."""
        size = normalized.shape[0]
        super().__init__((size, size), normalized)
        self.normalized, self.scale, self.gain, self.centered = normalized, scale, gain, centered
        self.product_flops, self.dense_flops = 8.0 * size, 8.0 * size * size

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

    def dense(self) -> Float[Tensor, "d d"]:
        """The matrix itself."""
        return self.mm(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))


class HeadMap(LinearMap):
    """One block per head, from its group's coordinates to its own: ``[group * d_in] -> [head * d_out]``.

    Several heads may read the same group (grouped-query attention).
    """

    light = True

    def __init__(self, blocks: Float[Tensor, "head d_out d_in"], groups: Int[Tensor, " head"], n_groups: int) -> None:
        """Take each head's block and the group that it reads."""
        heads, d_out, d_in = blocks.shape
        super().__init__((heads * d_out, n_groups * d_in), blocks)
        self.blocks, self.groups, self.n_groups = blocks, groups, n_groups
        self.product_flops = 2.0 * blocks.numel()
        self.dense_flops = 0.0

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """Each block times its group's rows."""
        grouped = x.reshape(self.n_groups, -1, x.shape[1])
        return (self.blocks @ grouped[self.groups]).reshape(-1, x.shape[1])

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """Each transposed block times its head's rows, summed within a group."""
        by_head = self.blocks.mT @ y.reshape(self.blocks.shape[0], -1, y.shape[1])
        out = by_head.new_zeros(self.n_groups, *by_head.shape[1:])
        return out.index_add_(0, self.groups, by_head).reshape(-1, y.shape[1])

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself."""
        return self.mm(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))


class Composition(LinearMap):
    """A B: first B, then A."""

    def __init__(self, left: LinearMap, right: LinearMap) -> None:
        """Compose two maps."""
        super().__init__((left.shape[0], right.shape[1]), torch.empty(0, dtype=left.dtype, device=left.device))
        self.left, self.right = left, right
        self.light = left.light and right.light
        self.product_flops = left.product_flops + right.product_flops
        if left.light:
            product = left.product_flops * right.shape[1]
            self.dense_flops = right.dense_flops + product
        elif right.light:
            product = right.product_flops * left.shape[0]
            self.dense_flops = left.dense_flops + product
        else:
            product = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
            self.dense_flops = left.dense_flops + right.dense_flops + product

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """A (B X)."""
        return self.left.mm(self.right.mm(x))

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """B^T (A^T Y)."""
        return self.right.rmm(self.left.rmm(y))

    def dense(self) -> Float[Tensor, "m n"]:
        """The product, by the cheaper of the two sides' own products where one is light."""
        if self.left.light:
            return self.left.mm(self.right.dense())
        if self.right.light:
            return self.right.rmm(self.left.dense().mT).mT
        return self.left.dense() @ self.right.dense()


class Sum(LinearMap):
    """A + B + ..., all of one shape."""

    def __init__(self, terms: Sequence[LinearMap]) -> None:
        """Add maps."""
        first = terms[0]
        super().__init__(first.shape, torch.empty(0, dtype=first.dtype, device=first.device))
        self.terms = tuple(terms)
        self.light = all(term.light for term in terms)
        self.product_flops = sum(term.product_flops for term in terms)
        self.dense_flops = sum(term.dense_flops for term in terms) + first.shape[0] * first.shape[1]

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """A X + B X + ..."""
        return sum((term.mm(x) for term in self.terms[1:]), self.terms[0].mm(x))

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """A^T Y + B^T Y + ..."""
        return sum((term.rmm(y) for term in self.terms[1:]), self.terms[0].rmm(y))

    def dense(self) -> Float[Tensor, "m n"]:
        """A + B + ..."""
        return sum((term.dense() for term in self.terms[1:]), self.terms[0].dense())


class Shared(LinearMap):
    """A map that is used more than once: its matrix is computed once, on the first request."""

    def __init__(self, inner: LinearMap) -> None:
        """Wrap a map."""
        super().__init__(inner.shape, torch.empty(0, dtype=inner.dtype, device=inner.device))
        self.inner = inner
        self.product_flops, self.dense_flops = inner.product_flops, inner.dense_flops
        self._matrix: Tensor | None = None
        self._forming = Lock()

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""
        return self.inner.mm(x) if self._matrix is None else self._matrix @ x

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""
        return self.inner.rmm(y) if self._matrix is None else self._matrix.mT @ y

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself."""
        with self._forming:
            if self._matrix is None:
                self._matrix = self.inner.dense()
        return self._matrix


class BlockMap(LinearMap):
    """A sequential block from its sublayers: J = J_attn + J_mlp (delta I + J_attn)."""

    def __init__(self, attn: LinearMap, mlp: LinearMap, skip: bool) -> None:
        """Take both sublayers' Jacobians, and whether src = dest (delta = 1)."""
        super().__init__(attn.shape, torch.empty(0, dtype=attn.dtype, device=attn.device))
        self.attn, self.mlp, self.skip = attn, mlp, skip
        self.product_flops = attn.product_flops + mlp.product_flops
        self.dense_flops = attn.dense_flops + mlp.dense_flops + 2.0 * attn.shape[0] ** 3

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
