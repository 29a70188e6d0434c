"""Edits of small models that hide from autograd, or from a closed form, what the model computes; and their undoing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS
from torch import Tensor, nn

LLAMA = next((case for case in CASES if case.name == "bridge-llama"), None)
needs_llama = pytest.mark.skipif(LLAMA is None, reason="edits the projections of a bridge")
PAIRS = [(src, dest) for dest in range(len(TOKENS)) for src in range(dest + 1)]


@contextmanager
def forward(module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace a module's forward by a function of it."""
    had = module.__dict__.get("forward")
    module.__dict__["forward"] = wrap(module.forward)  # a bridge would hand an attribute on to what it wraps
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if had is not None:
            module.__dict__["forward"] = had


def on_output(edit: Callable[[Tensor], Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Edit what a module gives."""

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def edited(*args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

        return edited

    return wrap


def adapter(call: Callable[..., Any]) -> Callable[..., Any]:
    """Add B A x of rank 2 to what a projection gives, and leave its weight: LoRA."""

    def edited(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = call(x, *args, **kwargs)
        generator = torch.Generator().manual_seed(3)
        down, up = (0.3 * torch.randn(2, wide.shape[-1], generator=generator).to(x) for wide in (x, out))
        return out + (x @ down.mT) @ up

    return edited


def shifting(call: Callable[..., Any]) -> Callable[..., Any]:
    """An MLP that mixes in its left neighbour (RWKV's token shift)."""

    def edited(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        left = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return call(0.5 * x + 0.5 * left, *args, **kwargs)

    return edited


def half_detached(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def staircase(x: Tensor, step: float = 0.05) -> Tensor:
    """Round to multiples of a step; autograd says zero."""
    return step * (x / step).round()


def straight_through(x: Tensor) -> Tensor:
    """Round to multiples of a step; autograd says the identity."""
    return x + (staircase(x) - x).detach()


CUTS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "no_grad": lambda call: torch.no_grad()(call),
    "half detached": on_output(half_detached),
    "staircase": on_output(staircase),
    "straight through": on_output(straight_through),
}
