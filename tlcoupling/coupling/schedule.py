"""The schedule of a comparison, made from shapes before anything is run, and then followed.

It says which Jacobians are worked on together and by which method each is decomposed and compared. It is the cheapest
that fits into memory; where none fits, the comparison is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tlcoupling.coupling.groups import Group, stacks, visits
from tlcoupling.coupling.method import PROBES, THIN, THIN_ON_DEVICE, Method, cheapest
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.spectra import COLUMNS
from tlcoupling.errors import InsufficientMemoryError
from tlcoupling.forward.offload import device_of
from tlcoupling.forward.split import Split
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.autograd import CHUNK, CHUNK_SHARE, ROWS, vectors_at_once
from tlcoupling.jacobian.cost import Cost, layer_costs
from tlcoupling.jacobian.runs import FEW_ROWS
from tlcoupling.linalg.krylov import OVERSAMPLING, USUAL_STEPS
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.memory import free_memory

# Numbers in the matrices that are decomposed together: by a worker, whose caches they should fit, and on a device.
STACKED, STACKED_ON_DEVICE = 2**22, 2**29
HOST = torch.device("cpu")
KEPT_SHARE = 0.5  # of the free memory, at most, for matrices that are kept
# What a vector on its way back takes in place of ``backward_bytes``, with freed memory between; and a stream that is
# moved, without a graph. Measured.
ON_ITS_WAY, MOVED = 2.0, 0.6
HOLES = 1.15  # what an allocator takes for kept matrices, with what lies between them; measured
# Bytes of a linear algebra library's buffers: for each worker, measured on a single block; and on a device, assumed.
BUFFERS, BUFFERS_ON_DEVICE = 7 * 2**20, 64 * 2**20
HEAP = 24 * 2**20  # of each worker beyond the first: a thread's own heap keeps what is freed in it; measured


@dataclass(frozen=True)
class Again:
    """Runs of a block for closed forms and their checks.

    Attributes:
        rows: positions of each run.
        n_src, n_dest: numbers of source and destination positions.
    """

    rows: int
    n_src: int
    n_dest: int

    @property
    def streams(self) -> int:
        """Streams of the one run of a single destination: copies of x^l, and it moved to both sides at each source."""
        return 2 + 2 * self.n_src

    @property
    def few(self) -> bool:
        """Whether all is done in one run, there and back."""
        return self.n_dest == 1 and self.streams * self.rows <= FEW_ROWS

    def memory(self, cost: Cost, n_tokens: int, key_bytes: float, free: float) -> tuple[float, float]:
        """Return the memory of the graph, with vectors on their way back or streams that are moved, and what stays.

        What stays is the graph, held as long as the layer is measured. Where all is done in one run, the graph is let
        go, and its memory stays with the heap.

        Args:
            cost: of the block.
            n_tokens: length of the prompt.
            key_bytes: of the keys of one position, all heads together.
            free: bytes that may be used.
        """
        column = self._column(cost, n_tokens)
        if self.few:  # keys and values of earlier positions are joined to its own, repeated, and have gradients
            few = self.streams * (1.5 * column + 8 * n_tokens * key_bytes)
            return few, few
        most = min(CHUNK, max(1, ROWS // self.rows))
        at_once = max(ON_ITS_WAY * min(most, self.n_dest), MOVED * min(most, 2 * self.n_src))
        return column + max(ON_ITS_WAY * column, min(at_once * column, ON_ITS_WAY * CHUNK_SHARE * free)), column

    def activations(self, cost: Cost, n_tokens: int) -> float:
        """Return the memory of a layer that waits for others: its graph, or where that is let go, activations alone."""
        column = self._column(cost, n_tokens)
        return 0.5 * self.streams * column if self.few else column

    def _column(self, cost: Cost, n_tokens: int) -> float:
        """The memory of one vector on its way back at the positions of a run."""
        return cost.backward_bytes * self.rows / n_tokens


@dataclass(frozen=True)
class Comparison:
    """A comparison of Jacobians, as far as its cost depends on it.

    Attributes:
        model: the model.
        splits: how each of its blocks is split.
        n_tokens: length of the prompt.
        dtype: dtype of the linear algebra.
        sublayers: what is measured of each layer.
        groups: the Jacobians compared with each other.
        options: how they are made, decomposed and compared.
    """

    model: Any
    splits: Sequence[Split]
    n_tokens: int
    dtype: torch.dtype
    sublayers: tuple[str, ...]
    groups: Sequence[Group]
    options: Options

    @classmethod
    def of(cls, trace: Trace, sublayers: tuple[str, ...], groups: Sequence[Group], options: Options) -> Comparison:
        """Return the comparison of Jacobians of a trace."""
        return cls(trace.model, trace.splits, trace.n_tokens, trace.resid.dtype, sublayers, groups, options)

    @property
    def layers(self) -> list[int]:
        """The layers that it needs."""
        return sorted({place.layer for group in self.groups for place in group.places})

    @property
    def columns(self) -> int:
        """The most bases that a Jacobian is compared with."""
        return max(len(group.columns) for group in self.groups)

    @cached_property
    def devices(self) -> set[torch.device]:
        """Devices of the layers."""
        return {device_of(self.model.blocks[layer]) for layer in self.layers}

    @property
    def on_host(self) -> bool:
        """Whether all layers lie on the CPU."""
        return self.devices == {HOST}

    @cached_property
    def again(self) -> Again:
        """What blocks run on again, for closed forms and checks."""
        places = set().union(*(group.places for group in self.groups))
        every = {pos for place in places for pos in (place.src, place.dest)}
        # what a model caches of earlier positions stands for them; shapes have no hooks, and count as such a model
        caches = hasattr(self.model, "original_model") or not hasattr(self.model, "hook_dict")
        rows = max(every) + 1 - max(0, min(every) - 1) if caches else self.n_tokens
        return Again(rows, len({place.src for place in places}), len({place.dest for place in places}))

    def checks(self, cost: Cost, free: float) -> tuple[float, float]:
        """Return the memory of the checks of a layer, and what stays of it; see ``Again.memory``."""
        return self.again.memory(cost, self.n_tokens, float(self.dtype.itemsize * self.model.cfg.d_model), free)

    def method(self, jacobian: Cost | JacobianOperator, keep: bool) -> Method:
        """Return the cheapest method for a Jacobian; ``keep`` tells whether matrices may be kept."""
        d, k, thin = self.model.cfg.d_model, max(self.options.k), THIN if self.on_host else THIN_ON_DEVICE
        return cheapest(jacobian, d, k, self.columns, self.options.solver, keep, thin)


@dataclass(frozen=True)
class Schedule:
    """How a comparison is done.

    Attributes:
        comparison: the comparison.
        batches: groups that are worked on together.
        keep: whether matrices may be kept.
        workers: threads that decompose Jacobians side by side.
        stack: places whose Jacobians each of them decomposes together.
        costs: of one Jacobian, by layer and sublayer, as far as shapes tell.
        methods: by layer and sublayer.
        peak_bytes: memory needed beyond the model, at most.
        free_bytes: memory that was free.
    """

    comparison: Comparison
    batches: Sequence[Sequence[Group]]
    keep: bool
    workers: int
    stack: int
    costs: dict[tuple[int, str], Cost]
    methods: dict[tuple[int, str], Method]
    peak_bytes: float
    free_bytes: float

    @property
    def forms(self) -> bool:
        """Whether the matrices of all that is measured are formed; of a head, its attention is tested by products."""
        of_heads = any(place.head is not None for group in self.comparison.groups for place in group.places)
        return not of_heads and all(method.name != "products" for method in self.methods.values())

    @cached_property
    def by_layer(self) -> bool:
        """Whether checks take so much that layers are made one by one, and what they leave free is given back."""
        return any(self.comparison.checks(cost, self.free_bytes)[0] > HEAP for cost in self.costs.values())


def make_schedule(comparison: Comparison, free: float | None = None) -> Schedule:
    """Return the cheapest schedule that fits into memory.

    Args:
        comparison: the comparison.
        free: bytes that may be used; by default what is free now on the fullest device.

    Raises:
        InsufficientMemoryError: none fits; the message says what would.
    """
    free = min(free_memory(device) for device in comparison.devices) if free is None else free
    costs = _costs(comparison)
    workers, names = _most_workers(comparison, costs.values()), comparison.sublayers
    # by layer: where not all fit into memory together, those of a layer are worked on together
    groups = sorted(dict.fromkeys(comparison.groups), key=lambda group: max(place.layer for place in group.places))
    size = len(groups)
    while (kept := _kept_bytes(comparison, _held(groups[:size], names)[0])) > KEPT_SHARE * free and size > 1:
        size = (size + 1) // 2
    keep = kept <= KEPT_SHARE * free
    stack = _longest_stack(comparison)
    while (peak := _peak_bytes(comparison, costs.values(), groups[:size], keep, workers, stack, free)) > free:
        if stack > 1:
            stack //= 2
        elif workers > 1:
            workers //= 2
        elif keep or size > 1:
            keep, size = keep and size > 1, (size + 1) // 2
        else:
            break
    if peak > free:
        raise InsufficientMemoryError(_refusal(comparison, costs.values(), peak, free))
    batches = [groups[start : start + size] for start in range(0, len(groups), size)]
    methods = {each: comparison.method(cost, keep) for each, cost in costs.items()}
    return Schedule(comparison, batches, keep, workers, stack, costs, methods, peak, free)


def _costs(comparison: Comparison) -> dict[tuple[int, str], Cost]:
    """Return what a Jacobian of each layer and sublayer costs."""
    model, options = comparison.model, comparison.options
    costs = layer_costs(model, comparison.layers, comparison.splits, comparison.n_tokens, options.engine)
    of_heads = any(place.head is not None for group in comparison.groups for place in group.places)
    return {
        (layer, name): by_name["head" if of_heads else name]
        for layer, by_name in costs.items()
        for name in comparison.sublayers
    }


def _most_workers(comparison: Comparison, costs: Iterable[Cost]) -> int:
    """Return how many Jacobians can be worked on at once: one per core, for closed forms on the CPU."""
    by_autograd = any(cost.engine == "autograd" for cost in costs)
    if by_autograd or any(device.type != "cpu" for device in comparison.devices):
        return 1
    return min(torch.get_num_threads(), max(len(group.places) for group in comparison.groups))


def _longest_stack(comparison: Comparison) -> int:
    """Return how many places are decomposed together: enough for long steps, few enough for a worker's caches."""
    count, numbers = max(len(group.places) for group in comparison.groups), STACKED
    if not comparison.on_host:  # nothing is gained by fewer: a device's steps cost their calls
        count, numbers = len(set().union(*(group.places for group in comparison.groups))), STACKED_ON_DEVICE
    return max(1, min(count, numbers // (len(comparison.sublayers) * comparison.model.cfg.d_model**2)))


def _held(groups: Sequence[Group], sublayers: Sequence[str], size: int = 1) -> tuple[int, int]:
    """Return the most Jacobians that are held at once, with stacks of a size, and the most when a layer is begun."""
    held = most = most_before = 0
    layer = None
    for stack in stacks(visits(groups), size):
        before = held
        for visit in stack:
            if visit.place.layer != layer:
                layer, most_before = visit.place.layer, max(most_before, before)
            held += len(visit.place.of(sublayers))
        most = max(most, held)
        held -= sum(len(place.of(sublayers)) for visit in stack for place in visit.dropped)
    return most, most_before


def _kept_bytes(comparison: Comparison, held: int) -> float:
    """Return the memory of the matrices that are kept of some Jacobians."""
    d, item = comparison.model.cfg.d_model, comparison.dtype.itemsize
    return float(held * d**2 * item)


def _peak_bytes(
    comparison: Comparison,
    costs: Iterable[Cost],
    groups: Sequence[Group],
    keep: bool,
    workers: int,
    stack: int,
    free: float,
) -> float:
    """Return the most memory that is held at once, while each worker has ``stack`` places at work.

    That is when a layer is begun and checked, or when most matrices are kept.
    """
    d, k, item = comparison.model.cfg.d_model, max(comparison.options.k), comparison.dtype.itemsize
    held, before = _held(groups, comparison.sublayers, workers * stack)
    bases = 2.0 * held * d * k * item
    projected = item * comparison.columns * k * (2.0 * d + 3.0 * k)
    pairs = sum(len(group.rows) * len(group.columns) for group in comparison.groups)
    results = 7.0 * pairs * len(comparison.options.k) * len(comparison.sublayers)
    n_sublayers, square = len(comparison.sublayers), float(item * d**2)
    # Krylov's three bases of each Jacobian that is decomposed, copied where some of a stack are checked or leave it,
    # and a copy of its matrix beside those of the others
    decomposing = n_sublayers * (square + 6.0 * item * d * min(d, (k + OVERSAMPLING) * USUAL_STEPS))
    # the place that is being formed, with the checks of its layer or after them; each that waits, or is decomposed
    checked = formed = waits = other = 0.0
    together = 0.0  # of each layer that is made beside the one that is checked
    for cost in costs:
        method = comparison.method(cost, keep).name
        by_autograd = cost.engine == "autograd"
        at_once = min(COLUMNS, max(PROBES, comparison.columns * k))
        at_once = vectors_at_once(cost.column_bytes, comparison.n_tokens, free) if by_autograd else at_once
        products = cost.column_bytes * at_once
        forming = cost.dense_bytes + 5.0 * square  # and the decomposition of a place's
        forming += products if by_autograd else 0.0
        needed = {"matrix kept": forming, "matrix dropped": max(forming, products), "products": products}[method]
        checks, stays = comparison.checks(cost, free)
        waiting_layer = comparison.again.activations(cost, comparison.n_tokens)
        if workers > 1 and checks > HEAP:
            stays = waiting_layer  # what checks leave free is given back before workers decompose
        elif workers > 1:
            together = max(together, waiting_layer)
        checked = max(checked, cost.run_bytes + needed + checks)
        formed = max(formed, cost.run_bytes + needed + stays)
        # a block's matrix, and those of its sublayers that it is made of, as far as they are not kept anyway
        waiting = {"matrix kept": 3.0 - n_sublayers, "matrix dropped": 3.0, "products": 0.0}[method] * square
        waits = max(waits, waiting)
        other = max(other, products if method == "products" else waiting + decomposing)
    if not comparison.on_host:  # one is formed at a time there, and its matrix waits for those of the stack
        waits = other = 3.0 * n_sublayers * square
        workers = 1
    others = workers * stack - 1
    begun, most = (HOLES * _kept_bytes(comparison, count) if keep else 0.0 for count in (before, held))
    at_work = others * together + max(begun + checked + others * waits, most + formed + others * other)
    buffers = BUFFERS if comparison.on_host else BUFFERS_ON_DEVICE
    return bases + item * results + workers * (projected + buffers) + (workers - 1) * HEAP + at_work


def _refusal(comparison: Comparison, costs: Iterable[Cost], peak: float, free: float) -> str:
    """Say why a comparison does not fit, and what would."""
    costs = list(costs)
    advice = []
    for k in range(max(comparison.options.k) - 1, 0, -1):
        smaller = replace(comparison, options=replace(comparison.options, k=(k,)))
        if _peak_bytes(smaller, costs, comparison.groups[:1], False, 1, 1, free) <= free:
            advice.append(f"K up to {k}")
            break
    if comparison.options.engine == "autograd":
        advice.append("engine='auto'")
    if any(cost.engine == "autograd" for cost in costs):
        advice.append("a shorter prompt")
    if comparison.columns > 2:
        advice.append(f"fewer than {comparison.columns} Jacobians compared with each other (layers= or tokens=)")
    from rich.filesize import decimal

    where = ", ".join(sorted(map(str, comparison.devices)))
    count = sum(len(group.places) for group in comparison.groups)
    return (
        f"coupling of {count} Jacobians at K = {max(comparison.options.k)} needs "
        f"{decimal(int(peak))} beyond the model, and {decimal(int(free))} are free on {where}; smaller: "
        + ", or ".join(advice or ["a smaller model"])
    )
