"""The interface of a Jacobian: a linear operator that is dense only on request."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.precision import full_precision


class JacobianOperator(ABC):
    """A linear map J from R^n to R^m, ``shape = (m, n)``, known by its products.

    Products are taken in full precision, whatever autocast, inference mode or precision of float32 products is in
    force where they are asked for.

    Attributes:
        shape: ``(rows, columns)``: rows are output coordinates, columns input coordinates.
        dtype: dtype of its products, float32 or float64.
        device: where its products are computed.
        product_flops: floating-point operations of one product with one vector, J x or J^T y.
        dense_flops: floating-point operations of ``dense()``.
        concurrent: whether several threads may take its products and those of others at once: not where they run the
            modules of the model.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    product_flops: float
    dense_flops: float
    concurrent: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take the products of every kind of operator in full precision: users keep operators and use them anywhere."""
        super().__init_subclass__(**kwargs)
        for name in ("mm", "rmm", "dense"):
            if name in vars(cls):
                setattr(cls, name, full_precision()(vars(cls)[name]))

    @abstractmethod
    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""

    @abstractmethod
    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself."""

    def mv(self, x: Float[Tensor, " n"]) -> Float[Tensor, " m"]:
        """J x."""
        return self.mm(x[:, None])[:, 0]

    def rmv(self, y: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """J^T y."""
        return self.rmm(y[:, None])[:, 0]

    def __repr__(self) -> str:
        """One line."""
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"
