"""Runs of a block's own sublayers: what the closed forms read, and the derivative that certifies them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlcoupling.hooked import Hook
from tlcoupling.trace import Trace

_POST_NORMS = ("ln1_post", "ln2_post")

# How a trace runs a sublayer: layer, stream, hooks.
Runner = Callable[[int, Tensor, Mapping[str, Hook]], Tensor]


@dataclass(frozen=True)
class Run:
    """One run of a sublayer's own modules.

    Attributes:
        values: recorded activations by short hook name, and what a post-norm read by its name, without batch axis.
        out: what the sublayer wrote, ``[pos, d_model]``.
        direction: a direction at each row of its input, ``[pos, d_model]``.
        tangent: the derivative of ``out`` along it; None where a module has no forward-mode derivative.
    """

    values: Mapping[str, Tensor]
    out: Float[Tensor, "pos d_model"]
    direction: Float[Tensor, "pos d_model"]
    tangent: Float[Tensor, "pos d_model"] | None


def run_sublayer(
    trace: Trace,
    layer: int,
    run: Runner,
    points: Iterable[str],
    stream: Float[Tensor, "1 pos d_model"],
    direction: Float[Tensor, "pos d_model"],
) -> Run:
    """Run a sublayer in forward mode along a direction at each row, and record its values."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: kept.__setitem__(name, forward_ad.unpack_dual(tensor).primal[0].clone())

    hooks = {name: keep(name) for name in points if trace.point(layer, name) is not None}
    with ExitStack() as stack:
        for name in _POST_NORMS:
            if isinstance(module := getattr(trace.model.blocks[layer], name, None), torch.nn.Module):
                stack.callback(module.register_forward_pre_hook(_on_input(keep(name))).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(forward_ad.dual_level())
        stack.enter_context(warnings.catch_warnings())
        # the first forward-mode derivative loads torch's decompositions, which warn of themselves
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        try:
            out, tangent = forward_ad.unpack_dual(run(layer, forward_ad.make_dual(stream, direction[None]), hooks))
            tangent = torch.zeros_like(out) if tangent is None else tangent
            return Run(kept, out[0].clone(), direction, tangent[0].clone())
        except (NotImplementedError, RuntimeError):  # no forward-mode rule: the caller takes another way
            kept.clear()
            return Run(kept, run(layer, stream, hooks)[0].clone(), direction, None)


def _on_input(function: Callable[[Tensor], None]) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """As a pre-hook of a module."""
    return lambda module, args: function(args[0])
