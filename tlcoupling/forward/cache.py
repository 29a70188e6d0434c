"""Reading the activations of a cache: an ``ActivationCache`` or a plain dictionary, of one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import ArgumentError, MissingHookError


def plain(cache: Any) -> Mapping[str, Tensor]:
    """The dictionary inside an ``ActivationCache``, whose own look-up accepts shorthands and rejects ``in``."""
    return getattr(cache, "cache_dict", cache)


def fetch(activations: Mapping[str, Tensor], name: str) -> Float[Tensor, "pos d_model"]:
    """One recorded activation without its batch axis.

    Raises:
        MissingHookError: it was not recorded.
        ArgumentError: a batch, or no activation of the stream.
    """
    if name not in activations:
        raise MissingHookError(f"the cache lacks {name!r}. {how_to_cache(name)}")
    return without_batch(activations[name], name)


def without_batch(tensor: Float[Tensor, "..."], name: str) -> Float[Tensor, "pos d_model"]:
    """One activation of the stream without its batch axis.

    Raises:
        ArgumentError: a batch, or another number of axes.
    """
    if tensor.ndim == 3:
        if tensor.shape[0] != 1:
            raise ArgumentError("batch", tensor.shape[0], "a batch of one: trace each prompt by itself")
        tensor = tensor[0]
    if tensor.ndim != 2:
        raise ArgumentError(name, tuple(tensor.shape), "a shape of [pos, d_model] or [1, pos, d_model]")
    return tensor


def how_to_cache(name: str) -> str:
    """What to say where a hook point was not recorded."""
    return (
        f"Cache it with model.run_with_cache(tokens), or name it in names_filter: {name!r}; a measurement needs "
        "hook_resid_pre, hook_attn_out, hook_mlp_out and, where the model has it, hook_resid_mid of every block, and "
        "hook_resid_post of the last one"
    )
