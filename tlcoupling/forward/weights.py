"""Reading a module's weights by TransformerLens's names: W_Q, W_K, W_V, W_O, W_in, W_gate, W_out."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import UnsupportedModelError


def weight_of(module: Any, name: str) -> Tensor | None:
    """A weight of a module, None where it has none of that name.

    Attention whose queries and keys are compressed (DeepSeek's) answers with ``NotImplementedError``, and one whose
    heads are of another size than the model's with a ``ValueError``: ``getattr`` with a default lets both through.
    """
    try:
        weight = getattr(module, name)
    except (AttributeError, NotImplementedError, ValueError):
        return None
    return weight if isinstance(weight, Tensor) else None


def output_of_heads(attn: Any, layer: int, z: Tensor | None) -> Float[Tensor, "head e d_model"]:
    """W_O, by which each head writes its share.

    Args:
        attn: the attention of a block.
        layer: which block, for the error.
        z: what its ``hook_z`` showed; None where it showed nothing.

    Raises:
        UnsupportedModelError: the attention's write cannot be split into heads.
    """
    weight = weight_of(attn, "W_O")
    of_layer = f"the attention of layer {layer} ({type(attn).__name__})"
    if z is None or weight is None:
        missing = " and ".join(name for name, found in (("hook_z", z), ("W_O", weight)) if found is None)
        raise UnsupportedModelError(f"{of_layer} has no {missing} to split it into heads")
    if weight.ndim != 3 or z.shape[-2:] != weight.shape[:2]:
        raise UnsupportedModelError(
            f"{of_layer} cannot be split into heads: hook_z of shape {tuple(z.shape)} does not fit W_O of shape "
            f"{tuple(weight.shape)}"
        )
    return weight.detach()
