"""Linear operators that are matrices only on request, and their products, sums and transposes."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import ArgumentError
from tlcoupling.precision import in_full_precision


class JacobianOperator(ABC):
    """A linear map J from R^n to R^m, ``shape = (m, n)``, known by its products.

    A subclass sets ``shape``, ``dtype`` and ``device`` and defines ``mm`` and ``rmm``. ``A @ B``, ``A + B`` and ``A.T``
    compose operators of any kind. Solvers choose between products and the matrix by the two costs: set them where the
    defaults, those of a dense matrix, are wrong.

    Products are taken in full precision, whatever autocast, inference mode or precision of float32 products is in force
    where they are asked for, and in the operator's own dtype and on its device, whatever those of the vectors are.

    Attributes:
        shape: ``(rows, columns)``: rows are output coordinates, columns input coordinates.
        dtype: dtype of its products, float32 or float64.
        device: where its products are computed.
        product_flops: floating-point operations of one product with one vector, J x or J^T y; 2 m n by default.
        dense_flops: floating-point operations of ``dense()``; n products by default.

    Example:
        >>> J = tlc.residual_jacobian(trace, 13) @ tlc.residual_jacobian(trace, 12)  # doctest: +SKIP
        >>> tlc.truncated_svd(J, 5)  # doctest: +SKIP
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    product_flops: float = cached_property(lambda self: 2.0 * math.prod(self.shape))  # pyright: ignore[reportAssignmentType]
    dense_flops: float = cached_property(lambda self: self.shape[1] * self.product_flops)  # pyright: ignore[reportAssignmentType]
    _light = False  # one product costs O(n): a composition applies it to the matrix of its neighbour

    def _describe(self, shape: tuple[int, int], like: Any) -> None:
        """Set the shape, and the dtype and device of a tensor or an operator."""
        self.shape, self.dtype, self.device = shape, like.dtype, like.device

    def _cost(self, product: float, dense: float) -> None:
        """Set the two costs."""
        self.product_flops, self.dense_flops = product, dense

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take the products of every kind of operator in full precision: users keep operators and use them anywhere."""
        super().__init_subclass__(**kwargs)
        for name in {"mm", "rmm", "dense"} & vars(cls).keys():
            setattr(cls, name, in_full_precision(_converting(vars(cls)[name])))

    @abstractmethod
    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""

    @abstractmethod
    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""

    def dense(self) -> Float[Tensor, "m n"]:
        """Return the matrix, by default from products with the columns of the identity."""
        return self.mm(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))

    def mv(self, x: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """J x."""
        return self.mm(x[:, None])[:, 0]

    def rmv(self, y: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """J^T y."""
        return self.rmm(y[:, None])[:, 0]

    def __matmul__(self, other: JacobianOperator) -> JacobianOperator:
        """A @ B: first B, then A.

        Raises:
            ArgumentError: A has another number of columns than B has rows.
        """
        return Composition(self, other) if isinstance(other, JacobianOperator) else NotImplemented

    def __add__(self, other: JacobianOperator) -> JacobianOperator:
        """A + B.

        Raises:
            ArgumentError: the shapes differ.
        """
        return Sum([self, other]) if isinstance(other, JacobianOperator) else NotImplemented

    @property
    def T(self) -> JacobianOperator:
        """J^T."""
        return Transpose(self)

    def __repr__(self) -> str:
        """One line."""
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"


def _converting(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Bring what a product is taken with to the operator's dtype and device."""

    @functools.wraps(product)
    def converted(self: JacobianOperator, *vectors: Tensor) -> Tensor:
        return product(self, *(each.to(self.device, self.dtype) for each in vectors))

    return converted


class Composition(JacobianOperator):
    """A B: first B, then A."""

    left: JacobianOperator
    right: JacobianOperator

    def __init__(self, left: JacobianOperator, right: JacobianOperator) -> None:
        """Compose two operators.

        Raises:
            ArgumentError: A has another number of columns than B has rows.
        """
        if left.shape[1] != right.shape[0]:
            raise ArgumentError("right", right, f"an operator of {left.shape[1]} rows, to follow by {left}")
        self._describe((left.shape[0], right.shape[1]), left)
        self.left, self.right = left, right
        self._light = left._light and right._light
        if left._light:
            dense = right.dense_flops + left.product_flops * right.shape[1]
        elif right._light:
            dense = left.dense_flops + right.product_flops * left.shape[0]
        else:
            product = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
            dense = left.dense_flops + right.dense_flops + product
        self._cost(left.product_flops + right.product_flops, dense)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """A (B X)."""
        return self.left.mm(self.right.mm(x))

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """B^T (A^T Y)."""
        return self.right.rmm(self.left.rmm(y))

    def dense(self) -> Float[Tensor, "m n"]:
        """Return the matrix A B; a light factor is applied to the matrix of the other."""
        if self.left._light:
            return self.left.mm(self.right.dense())
        if self.right._light:
            return self.right.rmm(self.left.dense().mT).mT
        return self.left.dense() @ self.right.dense()


class Sum(JacobianOperator):
    """A + B + ..., all of one shape."""

    terms: tuple[JacobianOperator, ...]

    def __init__(self, terms: Sequence[JacobianOperator]) -> None:
        """Add operators.

        Raises:
            ArgumentError: the shapes differ.
        """
        first, *others = terms
        for other in others:
            if other.shape != first.shape:
                raise ArgumentError("terms", other, f"operators of one shape, here {first.shape}")
        self._describe(first.shape, first)
        self.terms = tuple(terms)
        self._light = all(term._light for term in terms)
        added = first.shape[0] * first.shape[1]
        self._cost(sum(term.product_flops for term in terms), sum(term.dense_flops for term in terms) + added)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """A X + B X + ..."""
        return sum((term.mm(x) for term in self.terms[1:]), self.terms[0].mm(x))

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """A^T Y + B^T Y + ..."""
        return sum((term.rmm(y) for term in self.terms[1:]), self.terms[0].rmm(y))

    def dense(self) -> Float[Tensor, "m n"]:
        """A + B + ..."""
        return sum((term.dense() for term in self.terms[1:]), self.terms[0].dense())


class Transpose(JacobianOperator):
    """A^T."""

    inner: JacobianOperator

    def __init__(self, inner: JacobianOperator) -> None:
        """Transpose an operator."""
        self._describe((inner.shape[1], inner.shape[0]), inner)
        self.inner, self._light = inner, inner._light
        self._cost(inner.product_flops, inner.dense_flops)

    @property
    def T(self) -> JacobianOperator:
        """A."""
        return self.inner

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """A^T X."""
        return self.inner.rmm(x)

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """A Y."""
        return self.inner.mm(y)

    def dense(self) -> Float[Tensor, "m n"]:
        """A^T."""
        return self.inner.dense().mT
