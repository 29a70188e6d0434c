"""Jacobians that are held: one remembers the weights that it was made with, one is made again for each product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tlcoupling.errors import StaleTraceError
from tlcoupling.forward.context import measuring
from tlcoupling.forward.lifting import lifted_once
from tlcoupling.forward.quantised import state_of
from tlcoupling.forward.trace import Trace
from tlcoupling.linalg.operator import JacobianOperator


class RemadeJacobian(JacobianOperator):
    """A Jacobian that is made again for each product: weights that accelerate offloads are read for it, and dropped."""

    def __init__(self, trace: Trace, make: Callable[[], JacobianOperator], like: JacobianOperator) -> None:
        """Take the trace, what makes the Jacobian, and the Jacobian as it was made first, of which shapes are kept."""
        self._describe(like.shape, like)
        self._cost(like.product_flops, like.dense_flops)
        self._trace, self._make = trace, make

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""
        with measuring(self._trace), lifted_once({}):
            return self._make().mm(x)

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""
        with measuring(self._trace), lifted_once({}):
            return self._make().rmm(y)


class HeldJacobian(JacobianOperator):
    """The Jacobian of a block whose weights stay as they were: each product checks that they did.

    An operator reads the model's weights where they lie, so that an optimiser's step would change what it multiplies
    by. The check costs about a quarter of a product with one vector.
    """

    def __init__(self, inner: JacobianOperator, block: nn.Module, layer: int) -> None:
        """Take a Jacobian, the block that it was made from, and its index."""
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device
        self._cost(inner.product_flops, inner.dense_flops)
        self.inner, self._block, self._layer = inner, block, layer
        self._then = _sums(block)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""
        return self._current().mm(x)

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""
        return self._current().rmm(y)

    def dense(self) -> Float[Tensor, "m n"]:
        """Return the matrix."""
        return self._current().dense()

    def _current(self) -> JacobianOperator:
        """Return the Jacobian.

        Raises:
            StaleTraceError: a weight has changed; the message names it.
        """
        now = _sums(self._block)
        for name in sorted(self._then.keys() | now.keys()):
            then = self._then.get(name)
            if then is None or name not in now or not then.equal(now[name]):
                raise StaleTraceError(
                    f"blocks.{self._layer}.{name} has changed since this Jacobian was made, which reads the weights "
                    "where they lie: take its products, or its matrix by dense(), before you change the model"
                )
        return self.inner


def _sums(block: nn.Module) -> dict[str, Tensor]:
    """Return the sum of the bits of each row of a block's weights, by name: exact in any order of summation.

    A version counter would miss what is written through ``.data``. The weight of a 4-bit layer is made with the scales
    in its quantisation state too.
    """
    tensors: dict[str, Tensor] = {**dict(block.named_parameters()), **dict(block.named_buffers())}
    for name, tensor in list(tensors.items()):
        flatten: Any = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None:  # torchao's: the bits are those of the tensors that it holds
            del tensors[name]
            tensors |= {f"{name}.{part}": getattr(tensor, part) for part in flatten()[0]}
    for name, module in block.named_modules():
        state = state_of(module)
        for place, each in (("quant_state", state), ("quant_state.state2", getattr(state, "state2", None))):
            values = getattr(each, "__dict__", {}).items()
            tensors |= {f"{name}.{place}.{key}": value for key, value in values if isinstance(value, Tensor)}
    # the numbers of offloaded weights are a Jacobian's own
    there = {name: tensor for name, tensor in tensors.items() if tensor.numel() and not tensor.is_meta}
    return {name: _bits(tensor.detach()).sum(-1) for name, tensor in there.items()}


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers, eight bytes at a time where the rows allow it: that is fastest."""
    column = tensor.ndim < 2 or tensor.shape[-1] == 1  # bitsandbytes packs a matrix into a column of bytes
    rows = tensor.contiguous().reshape(1, -1) if column else tensor.contiguous().flatten(0, -2)
    size = rows.element_size()
    whole = rows.shape[-1] * size % 8 == 0 and rows.data_ptr() % 8 == 0
    return rows.view(torch.int64 if whole else {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
