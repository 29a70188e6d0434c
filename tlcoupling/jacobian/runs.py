"""Runs of a block's own sublayers: what the closed forms read, and the derivative that certifies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.hooked import Hook
from tlcoupling.forward.trace import Trace

_POST_NORMS = ("ln1_post", "ln2_post")

# How a trace runs a sublayer: layer, stream, hooks.
Runner = Callable[[int, Tensor, Mapping[str, Hook]], Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sublayer's own modules, with its graph.

    Attributes:
        values: recorded activations by short hook name, and what a post-norm read by its name, without batch axis.
        out: what the sublayer wrote, ``[pos, d_model]``.
    """

    values: Mapping[str, Tensor]
    out: Float[Tensor, "pos d_model"]
    _in_graph: Mapping[str, Tensor]
    _leaf: Float[Tensor, "1 pos d_model"]
    _output: Float[Tensor, "1 pos d_model"]

    def pull(self, cotangent: Float[Tensor, " d_model"], row: int, again: bool) -> Float[Tensor, "pos d_model"]:
        """J^T y at each row of the input, for a cotangent y at one row of the output.

        Args:
            cotangent: y.
            row: of the output.
            again: whether the graph is kept for another call; it holds the lifted weights of half-precision models.
        """
        if not self._output.requires_grad:
            return torch.zeros_like(self.out)
        with torch.enable_grad():  # the caller may have it off
            output = self._output[0, row]
        (pulled,) = torch.autograd.grad(
            output, self._leaf, cotangent, retain_graph=again, allow_unused=True, materialize_grads=True
        )
        return pulled[0]

    def slopes(self, output: str, inputs: Iterable[str]) -> list[Tensor | None]:
        """The diagonal of d output / d input, for a recorded activation that is pointwise in others.

        None where it does not depend on one of them.
        """
        out, leaves = self._in_graph[output], [self._in_graph[name] for name in inputs]
        if not out.requires_grad:
            return [None for _ in leaves]
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True, allow_unused=True)
        return [None if grad is None else grad[0] for grad in grads]


def run_sublayer(
    trace: Trace, layer: int, run: Runner, points: Iterable[str], stream: Float[Tensor, "1 pos d_model"]
) -> Run:
    """Run a sublayer with its graph kept, and record its values."""
    values: dict[str, Tensor] = {}
    in_graph: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def record(tensor: Tensor) -> Tensor:
            values[name] = tensor.detach()[0].clone()  # a module may go on to write into the tensor itself
            # what a hook is shown may be a view beside the graph's way (OPT's MLP); what it gives back is on the way
            in_graph[name] = tensor.view_as(tensor)
            return in_graph[name]

        return record

    hooks = {name: keep(name) for name in points if trace.point(layer, name) is not None}
    leaf = stream.detach().clone().requires_grad_()
    with ExitStack() as stack:
        for name in _POST_NORMS:
            if isinstance(module := getattr(trace.model.blocks[layer], name, None), torch.nn.Module):
                stack.callback(module.register_forward_pre_hook(_on_input(keep(name))).remove)
        stack.enter_context(torch.enable_grad())
        output = run(layer, leaf, hooks)
    return Run(values, output.detach()[0].clone(), in_graph, leaf, output)


def _on_input(function: Callable[[Tensor], Tensor]) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """As a pre-hook of a module."""

    def read(module: Any, args: tuple[Tensor, ...]) -> None:
        function(args[0])

    return read
