"""Operators of one shape whose products are taken together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.operator import JacobianOperator


class Stack:
    """Operators of one shape, dtype and device; matrices are multiplied in one call.

    Attributes:
        formed: whether all are matrices.
    """

    def __init__(self, operators: Sequence[JacobianOperator]) -> None:
        """Take one operator or more."""
        self.operators = operators
        self.shape, self.dtype, self.device = operators[0].shape, operators[0].dtype, operators[0].device
        weights = [one.weight for one in operators if isinstance(one, Projection)]
        self._matrices = None
        self.formed = len(weights) == len(operators)
        if self.formed:
            self._matrices = torch.stack(weights) if len(weights) > 1 else weights[0][None]

    def mm(self, x: Float[Tensor, "stack n k"]) -> Float[Tensor, "stack m k"]:
        """J X of each."""
        if self._matrices is not None:
            return self._matrices @ x
        return torch.stack([one.mm(part) for one, part in zip(self.operators, x, strict=True)])

    def rmm(self, y: Float[Tensor, "stack m k"]) -> Float[Tensor, "stack n k"]:
        """J^T Y of each."""
        if self._matrices is not None:
            return (y.mT @ self._matrices).mT  # the matrices as they lie in memory: half the time
        return torch.stack([one.rmm(part) for one, part in zip(self.operators, y, strict=True)])
