"""Batched products of several operators of one shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.operator import JacobianOperator


class Stack:
    """Operators of one shape, dtype and device. If all are matrices, one batched call multiplies them.

    Attributes:
        formed: whether all operators are matrices.
    """

    def __init__(self, operators: Sequence[JacobianOperator]) -> None:
        """Stack one or more operators."""
        self.operators = operators
        self.shape, self.dtype, self.device = operators[0].shape, operators[0].dtype, operators[0].device
        weights = [one.weight for one in operators if isinstance(one, Projection)]
        self._matrices = None
        self.formed = len(weights) == len(operators)
        if self.formed:
            self._matrices = torch.stack(weights) if len(weights) > 1 else weights[0][None]

    def of(self, places: list[int]) -> Stack:
        """Return the stack of some of the operators."""
        return Stack([self.operators[place] for place in places])

    def mm(self, x: Float[Tensor, "stack n k"]) -> Float[Tensor, "stack m k"]:
        """Return J X of each operator."""
        if self._matrices is not None:
            return self._matrices @ x
        return torch.stack([one.mm(part) for one, part in zip(self.operators, x, strict=True)])

    def rmm(self, y: Float[Tensor, "stack m k"]) -> Float[Tensor, "stack n k"]:
        """Return J^T Y of each operator."""
        if self._matrices is not None:
            return (y.mT @ self._matrices).mT  # uses the matrices' memory layout: half the time
        return torch.stack([one.rmm(part) for one, part in zip(self.operators, y, strict=True)])
