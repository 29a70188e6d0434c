"""Tensors with labelled axes: small means that a reader looks at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas


class LabelledTensor(Tensor):
    """A tensor that displays itself with the labels of its axes.

    It is a tensor everywhere. Operations on it return plain tensors, and so do pickling and copying.

    Attributes:
        quantity: what the numbers are.
        coords: labels of each axis, by the axis's name, in order.
    """

    # as torch.nn.Parameter: operations give plain tensors
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    quantity: str
    coords: Mapping[str, tuple[Any, ...]]

    def to_series(self) -> pandas.Series:
        """Return the numbers as a pandas Series, one level of its index per axis.

        ``to_series().to_xarray()`` is an ``xarray.DataArray``, where xarray is installed.
        """
        import pandas as pd

        index = pd.MultiIndex.from_product(list(self.coords.values()), names=list(self.coords))
        return pd.Series(self.detach().cpu().numpy().ravel(), index=index, name=self.quantity)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """A table: one row per number."""
        return repr(self.to_series())

    def _repr_html_(self) -> str:
        return self.to_series().to_frame().to_html(max_rows=30)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the numbers alone: files and processes need no class of ours."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()


def labelled(values: Tensor, quantity: str, coords: Mapping[str, Sequence[Any]]) -> LabelledTensor:
    """Return the tensor with labels.

    Args:
        values: the numbers.
        quantity: what they are.
        coords: labels of each axis, in the order of the axes.
    """
    tensor = values.as_subclass(LabelledTensor)
    tensor.quantity, tensor.coords = quantity, {axis: tuple(labels) for axis, labels in coords.items()}
    return tensor
