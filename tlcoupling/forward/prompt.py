"""Prompts: text, token ids or a batch of one to the token ids that a model takes, and back to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tlcoupling.errors import ArgumentError


def named_prompts(prompts: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Several prompts by their names; by their numbers where they have none.

    Raises:
        ArgumentError: none, or a single string.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ArgumentError("prompts", prompts, "one prompt or more: a list, or a mapping of names to prompts")
    return dict(prompts) if isinstance(prompts, Mapping) else {str(i): prompt for i, prompt in enumerate(prompts)}


def to_tokens(model: Any, prompt: Any, prepend_bos: bool | None) -> Int[Tensor, "1 pos"]:
    """Token ids of a prompt, on the model's first device.

    Raises:
        ArgumentError: an empty prompt, a batch larger than one, token ids out of range or more than the context holds.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise ArgumentError("prompt", prompt, "at least one token; it is empty")
        if getattr(model, "tokenizer", None) is None:
            raise ArgumentError("prompt", prompt, "token ids: this model has no tokenizer")
        tokens = model.to_tokens(prompt) if prepend_bos is None else model.to_tokens(prompt, prepend_bos=prepend_bos)
    else:
        try:
            tokens = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError("prompt", prompt, "a string or token ids") from error
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ArgumentError("prompt", prompt, "a string or integer token ids")
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise ArgumentError("prompt", f"token ids of shape {tuple(tokens.shape)}", "one prompt: [pos] or [1, pos]")
    if tokens.shape[1] == 0:
        raise ArgumentError("prompt", prompt, "at least one token; it is empty")
    vocabulary = getattr(model.cfg, "d_vocab", None)
    if vocabulary and vocabulary > 0 and not ((tokens >= 0) & (tokens < vocabulary)).all():
        raise ArgumentError("prompt", prompt, f"token ids from 0 to {vocabulary - 1}")
    context = getattr(model.cfg, "n_ctx", None)
    if context and tokens.shape[1] > context:
        raise ArgumentError("prompt", f"{tokens.shape[1]} tokens", f"at most {context}, the model's context length")
    # a copy: ids made under torch.inference_mode cannot be looked up where gradients are on
    return tokens.long().to(next(model.parameters()).device, copy=True)


def to_str_tokens(model: Any, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Tokens as text; ids as text where there is no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return tuple(str(token) for token in tokens.tolist())
    return tuple(model.to_str_tokens(tokens))
