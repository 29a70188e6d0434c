"""One run of a block by its own modules: what closed forms read, what certifies them, and moved streams beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tlcoupling.forward.block import close
from tlcoupling.forward.hooked import Hook
from tlcoupling.forward.trace import Trace

# By kind of sublayer, the activations that its closed form reads.
VALUES = {
    "attn": ("q", "k", "v", "z", "rot_q", "rot_k", "cos", "sin", "pattern", "out"),
    "mlp": ("pre", "pre_linear", "post", "out"),
}
# Positions of all streams together, up to which copies and moved streams run along: reading the weights takes the time
# of products with so few columns.
FEW_ROWS = 64


@dataclass(frozen=True, eq=False)
class Run:
    """What a sublayer showed in a run of its block.

    Attributes:
        values: recorded activations by short hook name, without batch axis.
        unnormed: what the norm behind the sublayer read; None where there is none.
        out: what the sublayer wrote.
    """

    values: Mapping[str, Tensor]
    unnormed: Float[Tensor, "pos d_model"] | None
    out: Float[Tensor, "pos d_model"]


@dataclass(frozen=True, eq=False)
class _Graph:
    """A run with its graph, which holds the lifted weights of half-precision models.

    Attributes:
        copies: number of streams that are x^l; they come first in the batch.
        runs: what the sublayers showed, by name.
        inputs: the leaf that each sublayer reads, by name, ``[stream, pos, d_model]``; empty without the graph.
        points: recorded activations by short hook name, in all streams; empty without the graph.
        moved: what the sublayers wrote in the moved streams, by name; as ``"rest"`` what the block added beside.
    """

    copies: int
    runs: Mapping[str, Run]
    inputs: Mapping[str, Float[Tensor, "stream pos d_model"]]
    points: Mapping[str, Tensor]
    moved: Mapping[str, Float[Tensor, "move pos d_model"]]


class BlockRun:
    """One run of a block on x^l, made when something of it is asked for.

    The graph is cut at what later sublayers of a sequential block read: each sublayer has a graph of its own. Where a
    single dest is measured, x^l stands in the batch two or three times. One backward pass then gives the derivatives of
    all sublayers and of the activation, each in a stream in which the others have no part. Moved streams, whose writes
    give differences, run along.

    Attributes:
        trace: the trace of the model.
        layer: block index.
        block: what the block is made of.
        dests: positions whose outputs will be asked for; they share backward passes.
    """

    def __init__(
        self,
        trace: Trace,
        layer: int,
        dests: Iterable[int] = (),
        moves: Float[Tensor, "move pos d_model"] | None = None,
    ) -> None:
        """Take a block, and how x^l is moved in the moved streams."""
        self.trace, self.layer, self.block = trace, layer, trace.block(layer)
        self.dests = sorted(set(dests))
        self._cotangent = random_vector(trace, layer, layer)
        self._moves = moves
        self._current: set[str] = set()  # sublayers that were found to write what they wrote in the trace

    def of(self, name: str) -> Run:
        """Return what a sublayer showed.

        Raises:
            StaleTraceError: it wrote something else than when the trace was taken.
        """
        run = self._graph.runs[name]
        if name not in self._current:
            self.trace.check_current(name, self.layer, run.out)
            self._current.add(name)
        return run

    @property
    def moved(self) -> Mapping[str, Float[Tensor, "move pos d_model"]]:
        """What was written in the moved streams; empty where they did not run."""
        return self._graph.moved if "_graph" in self.__dict__ else {}

    def slopes(self, output: str, inputs: Sequence[str]) -> list[Tensor | None]:
        """Return the diagonal of d output / d input, for an activation of the MLP that is pointwise in others.

        The gradient of the sum of its outputs is that diagonal.

        Args:
            output: the short hook name of the activation.
            inputs: those of the others.

        Returns:
            One diagonal for each input, ``[pos, ...]``; None for those that the output does not depend on.
        """
        if all(name in self._answers for name in inputs):
            return [self._answers[name] for name in inputs]
        points = self._with_graph.points
        if not all(points[name].requires_grad for name in (output, *inputs)):
            return [None for _ in inputs]
        ones = torch.ones_like(points[output])
        grads = _grad([points[output]], [points[name] for name in inputs], [ones])
        return [None if grad is None else grad[0] for grad in grads]

    def cotangent(self, row: int) -> Float[Tensor, " d_model"]:
        """Return y at one row: that of another row turned round, so that sums over rows do not cancel."""
        return self._cotangent.roll(row)

    def pull(self, name: str, factors: Sequence[Mapping[int, float]]) -> Float[Tensor, "sum pos d_model"]:
        """Return products of J^T of a sublayer by its own modules, at all positions.

        Args:
            name: of the sublayer.
            factors: for each product, by what y is multiplied at each row of the write; at others it is zero.
        """
        write = self.block.sublayers[name].write
        grads: Sequence[Tensor | None] = [None for _ in factors]
        if write in self._answers and list(factors) == [dict.fromkeys(self.dests, 1.0)]:
            grads = [self._answers[write]]
        elif (output := self._with_graph.points[write]).requires_grad:
            leaf = self._with_graph.inputs[name]
            every = self._pulled(output, leaf, [self._at(output, one) for one in factors])
            grads = [None if grad is None else grad[0] for grad in every]
        none = torch.zeros_like(self.trace.block_input(self.layer)[0])
        return torch.stack([none if grad is None else grad for grad in grads])

    @staticmethod
    def _pulled(output: Tensor, leaf: Tensor, cotangents: list[Tensor]) -> Sequence[Tensor | None]:
        """Return the gradients of several cotangents, together where the modules' backward passes allow it."""
        if len(cotangents) > 1:
            with suppress(RuntimeError):  # a module whose backward has no batching rule
                (grads,) = _grad([output], [leaf], [torch.stack(cotangents)], is_grads_batched=True)
                return [None for _ in cotangents] if grads is None else list(grads)
        return [_grad([output], [leaf], [one])[0] for one in cotangents]

    def _at(self, output: Tensor, factors: Mapping[int, float], stream: int = 0) -> Tensor:
        """Return y at some rows of one stream, multiplied, as a cotangent of an output."""
        cotangent = torch.zeros_like(output)
        for row, factor in factors.items():
            cotangent[stream, row] = factor * self.cotangent(row).to(output)
        return cotangent

    @cached_property
    def _answers(self) -> Mapping[str, Tensor | None]:
        """The gradients of one backward pass that serves all, by the points of writes and of the activation's inputs.

        The graph is then let go. Empty where more than one dest is measured, or where a sublayer does not let itself be
        differentiated.
        """
        graph = self._graph
        if graph.copies == 1:
            return {}
        asked: list[tuple[Tensor, Tensor]] = []
        inputs: dict[str, Tensor] = {}
        streams: dict[str, int] = {}  # in which copy of x^l each is asked for
        first = next(iter(graph.inputs))
        for name, sublayer in self.block.sublayers.items():
            if name in graph.runs and graph.points[sublayer.write].requires_grad:
                output = graph.points[sublayer.write]
                streams[sublayer.write] = int(name != first and graph.inputs[name] is graph.inputs[first])
                asked.append((output, self._at(output, {self.dests[0]: 1.0}, streams[sublayer.write])))
                inputs[sublayer.write] = graph.inputs[name]
        if "mlp" in graph.runs:
            *reads, output, _ = self.block.mlp.points(*VALUES["mlp"])
            known = [name for name in reads if name in graph.points]
            if output in graph.points and all(graph.points[name].requires_grad for name in (output, *known)):
                cotangent = torch.zeros_like(graph.points[output])
                cotangent[graph.copies - 1] = 1.0
                asked.append((graph.points[output], cotangent))
                inputs |= {name: graph.points[name] for name in known}
                streams |= dict.fromkeys(known, graph.copies - 1)
        try:
            grads = _grad([output for output, _ in asked], list(inputs.values()), [one for _, one in asked])
        except RuntimeError:  # one of them fails; asked one by one, the others do not
            return {}
        self._graph = replace(graph, inputs={}, points={})
        of_streams = zip(inputs, grads, strict=True)
        return {name: None if grad is None else grad[streams[name]].clone() for name, grad in of_streams}

    @property
    def _with_graph(self) -> _Graph:
        """The run with its graph: of x^l alone, once more, where it was let go."""
        if not self._graph.points:
            again = self._run(1, self._no_moves)
            self._graph = replace(self._graph, copies=1, inputs=again.inputs, points=again.points)
        return self._graph

    @cached_property
    def _graph(self) -> _Graph:
        sublayers = self.block.sublayers.values()
        copies = 2 if self._cut or len(sublayers) == 1 else 3
        moves = self._moves
        if moves is not None and len(self.dests) == 1 and (copies + len(moves)) * self.trace.n_tokens <= FEW_ROWS:
            with suppress(Exception):  # whatever a module raises that takes no batch; alone it shows what it is
                graph = self._run(copies, moves)
                for name, run in graph.runs.items():  # another shape may round beyond what a check of one stream allows
                    self.trace.check_current(name, self.layer, run.out)
                if all(close(graph.points[each.write][:copies], graph.runs[each.name].out) for each in sublayers):
                    self._current |= graph.runs.keys()
                    return graph
        return self._run(1, self._no_moves)

    @property
    def _no_moves(self) -> Float[Tensor, "0 pos d_model"]:
        return self.trace.resid.new_zeros(0, *self.trace.resid.shape[1:])

    @property
    def _cut(self) -> bool:
        """Whether one sublayer reads what another one has written to."""
        return any(sublayer.reads != "hook_resid_pre" for sublayer in self.block.sublayers.values())

    def _run(self, copies: int, moves: Float[Tensor, "move pos d_model"]) -> _Graph:
        start, sublayers = self.trace.block_input(self.layer), self.block.sublayers
        streams = torch.cat([start.expand(copies, -1, -1), start + moves.to(start)])
        leaves = {"hook_resid_pre": streams.clone().requires_grad_()}
        values: dict[str, Tensor] = {}
        points: dict[str, Tensor] = {}
        unnormed: dict[str, Tensor] = {}

        def cut(tensor: Tensor, reads: str) -> Tensor:
            leaves[reads] = tensor.detach().clone().requires_grad_()
            return leaves[reads]

        def keep(name: str) -> Hook:
            def record(tensor: Tensor) -> Tensor:
                values[name] = tensor.detach().clone()  # a module may go on to write into the tensor itself
                # A hook may be shown a view that the output does not depend on (OPT's MLP). The output depends on what
                # the hook returns.
                points[name] = tensor.view_as(tensor)
                return points[name]

            return record

        def keep_tables(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values.update(_rotation(args, kwargs))

        inside = {each.reads for each in sublayers.values()} - {"hook_resid_pre"}
        hooks: dict[str, Hook] = {reads: partial(cut, reads=reads) for reads in inside}
        with ExitStack() as stack:
            for name, sublayer in sublayers.items():
                each = (*sublayer.points(*VALUES.get(sublayer.kind, ())), sublayer.write)
                hooks |= {point: keep(point) for point in each if self.trace.point(self.layer, point) is not None}
                kept = partial(unnormed.__setitem__, name)
                stack.enter_context(sublayer.keep_unnormed(lambda tensor, kept=kept: kept(tensor.detach().clone())))
                if sublayer.kind == "attn":
                    handle = sublayer.module.register_forward_pre_hook(keep_tables, with_kwargs=True)
                    stack.callback(handle.remove)
            stack.enter_context(torch.enable_grad())
            resid_post = self.trace.run_block(self.layer, leaves["hook_resid_pre"], hooks).detach()
        writes = {name: values[sublayer.write] for name, sublayer in sublayers.items()}
        moved = {**writes, "rest": resid_post - streams - sum(writes.values())} if len(moves) else {}
        moved = {name: each[copies:] for name, each in moved.items()}
        shown = {name: value[0] for name, value in values.items()}
        # by the names of an attention in its usual slot: a decoder with cross-attention calls it self_attn
        shown |= {name.replace("self_attn.", "attn."): value for name, value in shown.items() if "self_attn." in name}
        runs = {
            name: Run(shown, unnormed[name][0] if name in unnormed else None, write[0])
            for name, write in writes.items()
        }
        inputs = {name: leaves[sublayer.reads] for name, sublayer in sublayers.items()}
        return _Graph(copies, runs, inputs, points, moved)


def random_vector(trace: Trace, layer: int, seed: int) -> Float[Tensor, " d_model"]:
    """Draw a random vector of length 1, the same for the same seed, on the device of a block."""
    vector = torch.randn(trace.d_model, generator=torch.Generator().manual_seed(seed), dtype=trace.resid.dtype)
    return (vector / vector.norm()).to(trace.block_input(layer).device)


def _rotation(args: Iterable[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The cosines and sines that an attention is called with, which only some bridges show at hook points.

    Returns:
        With a batch axis, as hook points have it.
    """
    for given in (*args, *kwargs.values()):
        pair = given if isinstance(given, (tuple, list)) else (given,)
        if len(pair) == 1 and isinstance(given, Tensor) and given.is_complex():
            pair = (given.real, given.imag)
        if len(pair) == 2 and all(isinstance(table, Tensor) and table.is_floating_point() for table in pair):
            names = ("attn.hook_cos", "attn.hook_sin")
            return {name: table.detach().flatten(0, -3) for name, table in zip(names, pair, strict=True)}
    return {}


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], **options: Any
) -> Sequence[Tensor | None]:
    """Return gradients, None for inputs that have no part in the outputs; the graph is kept."""
    return torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, allow_unused=True, **options)
