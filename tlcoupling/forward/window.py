"""A block run on some consecutive positions alone, with keys and values of the earlier ones as the model cached them.

What a causal block gives at a position depends on later positions not at all, and on earlier ones through their keys
and values. So the measured positions of a long prompt can be run without the others. Whether that holds of a block is
not assumed: what it gives then is held against the trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.hooked import BlockCall


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values of the positions before a window, in the place of the key-value cache that filled them.

    Attributes:
        keys, values: as the attention's products take them, ``[1, group, pos, e]``.
    """

    keys: Float[Tensor, "1 group pos e"]
    values: Float[Tensor, "1 group pos e_value"]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values, those given last; nothing is kept."""
        pairs = ((self.keys, keys), (self.values, values))
        joined = [torch.cat([past.expand(len(now), -1, -1, -1), now], dim=-2) for past, now in pairs]
        return joined[0], joined[1]

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of positions before the window."""
        return self.keys.shape[-2]


def windowed(call: BlockCall, layer: int, window: slice, n_tokens: int) -> BlockCall | None:
    """Return the call of a block on a window of its positions; None where the model cached no keys and values.

    Args:
        call: its call on all positions.
        layer: block index.
        window: the positions.
        n_tokens: number of all positions.
    """

    def cut(value: Any, name: str = "") -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(cut(one, name) for one in value)
        if not isinstance(value, Tensor):
            return value
        if "mask" in name and value.shape[-2:] == (n_tokens, n_tokens):
            return value[..., window, : window.stop]
        axes = [axis for axis, size in enumerate(value.shape) if size == n_tokens]
        return value[(slice(None),) * axes[0] + (window,)] if axes else value

    args = [cut(value) for value in call.args]
    kwargs = {name: cut(value, name) for name, value in call.kwargs.items()}
    if window.start == 0:
        return replace(call, args=tuple(args), kwargs=kwargs)
    past = _past(call.caches, layer, window.start, n_tokens)
    if past is None:
        return None
    for place in call.caches:
        if isinstance(place, int):
            args[place] = past
        else:
            kwargs[place] = past
    return replace(call, args=tuple(args), kwargs=kwargs)


def _past(caches: Mapping[int | str, Any], layer: int, count: int, n_tokens: int) -> Past | None:
    """Return the first keys and values that a layer put into the model's cache; None where it did not put all there."""
    layers = [getattr(cache, "layers", ()) for cache in caches.values()]
    if len(layers) != 1 or len(layers[0]) <= layer:
        return None
    keys, values = (getattr(layers[0][layer], name, None) for name in ("keys", "values"))
    if not (isinstance(keys, Tensor) and isinstance(values, Tensor)):
        return None
    if any(each.ndim != 4 or each.shape[-2] != n_tokens for each in (keys, values)):
        return None
    return Past(keys[:, :, :count], values[:, :, :count])
