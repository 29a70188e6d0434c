"""Runs of a block's own sublayers: what the closed forms read, and what they are certified by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.block import Sublayer
from tlcoupling.forward.hooked import Hook
from tlcoupling.forward.trace import Trace

# How a trace runs a sublayer: layer, stream, hooks.
Runner = Callable[[int, Tensor, Mapping[str, Hook]], Tensor]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sublayer's own modules, and its graph, which holds the lifted weights of half-precision models.

    Attributes:
        values: recorded activations by short hook name, without batch axis.
        unnormed: what the norm behind the sublayer read; None where there is none.
        out: what the sublayer wrote.
    """

    values: Mapping[str, Tensor]
    unnormed: Float[Tensor, "pos d_model"] | None
    out: Float[Tensor, "pos d_model"]
    _leaf: Float[Tensor, "1 pos d_model"]
    _output: Float[Tensor, "1 pos d_model"]
    _in_graph: Mapping[str, Tensor]

    def slopes(self, output: str, inputs: Iterable[str]) -> list[Tensor | None]:
        """Return the diagonal of d output / d input, for a recorded activation that is pointwise in others.

        Args:
            output: the short hook name of the activation.
            inputs: those of the others.

        Returns:
            One diagonal for each input; None for those that the output does not depend on.
        """
        out, leaves = self._in_graph[output], [self._in_graph[name] for name in inputs]
        if not (out.requires_grad and all(leaf.requires_grad for leaf in leaves)):
            return [None for _ in leaves]
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True, allow_unused=True)
        return [None if grad is None else grad[0] for grad in grads]

    def pull(self, cotangent: Float[Tensor, " d_model"], rows: Sequence[int]) -> Float[Tensor, "row pos d_model"]:
        """Return J^T y at all positions by the sublayer's own modules, for y at each of some rows of what it writes."""
        output, leaf = self._output, self._leaf
        if not output.requires_grad:
            return leaf.new_zeros(len(rows), *leaf.shape[1:])
        cotangents = output.new_zeros(len(rows), *output.shape)
        cotangents[range(len(rows)), 0, list(rows)] = cotangent.to(output)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        if len(rows) > 1:
            try:
                (grads,) = torch.autograd.grad(output, leaf, cotangents, is_grads_batched=True, **options)
                return grads.expand(len(rows), *leaf.shape)[:, 0]  # zeros of an unused leaf come without a batch axis
            except RuntimeError:  # a module whose backward has no batching rule
                pass
        return torch.cat([torch.autograd.grad(output, leaf, one, **options)[0] for one in cotangents])


def run_sublayer(
    trace: Trace,
    layer: int,
    sublayer: Sublayer,
    run: Runner,
    points: Iterable[str],
    stream: Float[Tensor, "1 pos d_model"],
) -> Run:
    """Run a sublayer, and record its values.

    Args:
        trace: a trace of the model.
        layer: block index.
        sublayer: of that block.
        run: how the trace runs it.
        points: short names of the hook points to record, as far as the model has them.
        stream: what the sublayer reads.
    """
    values: dict[str, Tensor] = {}
    in_graph: dict[str, Tensor] = {}
    unnormed: list[Tensor] = []

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def record(tensor: Tensor) -> Tensor:
            values[name] = tensor.detach()[0].clone()  # a module may go on to write into the tensor itself
            # A hook may be shown a view that the output does not depend on (OPT's MLP). The output depends on what the
            # hook returns.
            given = tensor.view_as(tensor)
            in_graph[name] = given
            return given

        return record

    hooks = {name: keep(name) for name in points if trace.point(layer, name) is not None}
    leaf = stream.detach().clone().requires_grad_()
    unnormed_kept = sublayer.keep_unnormed(lambda tensor: unnormed.append(tensor.detach()[0].clone()))
    with unnormed_kept, torch.enable_grad():
        output = run(layer, leaf, hooks)
    return Run(values, unnormed[0] if unnormed else None, output.detach()[0].clone(), leaf, output, in_graph)
