"""Elementary operators: identity, zero, matrix, diagonal, and one that keeps its matrix."""

from __future__ import annotations

from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.linalg.operator import JacobianOperator


class Identity(JacobianOperator):
    """x -> x."""

    _light = True

    def __init__(self, size: int, like: Tensor) -> None:
        """The identity of R^size."""
        self._describe((size, size), like)
        self._cost(0.0, 0.0)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """X."""
        return x

    def rmm(self, y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Y."""
        return y

    def dense(self) -> Float[Tensor, "n n"]:
        """The unit matrix."""
        return torch.eye(self.shape[0], dtype=self.dtype, device=self.device)


class Zero(JacobianOperator):
    """x -> 0."""

    _light = True

    def __init__(self, size: int, like: Tensor) -> None:
        """The zero map of R^size."""
        self._describe((size, size), like)
        self._cost(0.0, 0.0)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Zeros."""
        return torch.zeros_like(x)

    def rmm(self, y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Zeros."""
        return torch.zeros_like(y)

    def dense(self) -> Float[Tensor, "n n"]:
        """The zero matrix."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class Projection(JacobianOperator):
    """x -> W x, a weight matrix."""

    def __init__(self, weight: Float[Tensor, "m n"]) -> None:
        """Take the matrix, output coordinates in rows."""
        self._describe((weight.shape[0], weight.shape[1]), weight)
        self.weight = weight
        self._cost(2.0 * weight.numel(), 0.0)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """W X."""
        return self.weight @ x

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """W^T Y."""
        return self.weight.mT @ y

    def dense(self) -> Float[Tensor, "m n"]:
        """W."""
        return self.weight


class Diagonal(JacobianOperator):
    """x -> a * x, the derivative of a pointwise activation."""

    _light = True

    def __init__(self, diagonal: Float[Tensor, " n"]) -> None:
        """Take the diagonal a."""
        self._describe((diagonal.shape[0], diagonal.shape[0]), diagonal)
        self.diagonal = diagonal
        self._cost(1.0 * diagonal.numel(), 1.0 * diagonal.numel())

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """A X."""
        return self.diagonal[:, None] * x

    def rmm(self, y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """A Y."""
        return self.diagonal[:, None] * y

    def dense(self) -> Float[Tensor, "n n"]:
        """diag(a)."""
        return self.diagonal.diag()


class Shared(JacobianOperator):
    """A map that is used more than once: its matrix is computed once, on the first request."""

    def __init__(self, inner: JacobianOperator) -> None:
        """Wrap a map."""
        self._describe(inner.shape, inner)
        self.inner = inner
        self._cost(inner.product_flops, inner.dense_flops)
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
