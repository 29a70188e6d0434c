"""The schedule of a comparison, made from shapes before anything is run, and then followed.

It says which Jacobians are worked on together and by which method each is decomposed and compared. It is the cheapest
that fits into memory; where none fits, the comparison is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from tlcoupling.coupling.groups import Group, visits
from tlcoupling.coupling.method import PROBES, Method, cheapest
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.spectra import COLUMNS
from tlcoupling.errors import InsufficientMemoryError
from tlcoupling.forward.block import Topology
from tlcoupling.jacobian.autograd import vectors_at_once
from tlcoupling.jacobian.cost import Cost, layer_costs
from tlcoupling.linalg.work import Work
from tlcoupling.memory import free_memory

STACKED = 2**22  # numbers in the matrices that a worker decomposes together
KEPT_SHARE = 0.5  # of the free memory, at most, for matrices that are kept
SLACK = 1.15  # assumed: memory that the allocator holds beyond what tensors fill
BUFFERS = 64 * 2**20  # assumed: bytes of a linear algebra library's buffers and of threads, for each worker
STAGES = ("Jacobians", "decomposition", "comparison")
# Fixed costs in module calls, estimated from a profile
RUN_CALLS, CERTIFICATE_CALLS, JACOBIAN_CALLS, PAIR_CALLS = 150.0, 250.0, 60.0, 2.0


@dataclass(frozen=True)
class Comparison:
    """A comparison of Jacobians, as far as its cost depends on it.

    Attributes:
        model: the model.
        topology: topology of its blocks.
        n_tokens: length of the prompt.
        dtype: dtype of the linear algebra.
        sublayers: what is measured of each layer.
        groups: the Jacobians compared with each other.
        options: how they are made, decomposed and compared.
    """

    model: Any
    topology: Topology
    n_tokens: int
    dtype: torch.dtype
    sublayers: tuple[str, ...]
    groups: Sequence[Group]
    options: Options

    @property
    def layers(self) -> list[int]:
        """The layers that it needs."""
        return sorted({place.layer for group in self.groups for place in group.places})

    @property
    def columns(self) -> int:
        """The most bases that a Jacobian is compared with."""
        return max(len(group.columns) for group in self.groups)

    @property
    def devices(self) -> set[torch.device]:
        """Devices of the layers."""
        return {next(self.model.blocks[layer].parameters()).device for layer in self.layers}

    def method(self, priced: Any, keep: bool) -> Method:
        """Return the cheapest method for a Jacobian; ``keep`` tells whether matrices may be kept."""
        return cheapest(priced, self.model.cfg.d_model, max(self.options.k), self.columns, self.options.solver, keep)


@dataclass(frozen=True)
class Schedule:
    """How a comparison is done.

    Attributes:
        comparison: the comparison.
        batches: groups that are worked on together.
        keep: whether matrices may be kept.
        workers: threads that decompose Jacobians side by side.
        stack: places whose Jacobians each of them decomposes together.
        engines: ``"analytic"`` or ``"autograd"``, by layer and sublayer, as far as shapes tell.
        methods: by layer and sublayer.
        stages: the work by sublayer and stage (``"Jacobians"``, ``"decomposition"``, ``"comparison"``).
        running: work of running the model's own blocks again, certificates included.
        fitted_bytes: memory of tensors, at most, with the allocator's slack. It was fitted into what was free.
        free_bytes: memory that was free.
    """

    comparison: Comparison
    batches: list[Sequence[Group]]
    keep: bool
    workers: int
    stack: int
    engines: dict[tuple[int, str], str]
    methods: dict[tuple[int, str], Method]
    stages: dict[tuple[str, str], Work]
    running: Work
    fitted_bytes: float
    free_bytes: float

    @property
    def peak_bytes(self) -> float:
        """Memory needed beyond the model, at most: of tensors, and of libraries' buffers."""
        return self.fitted_bytes + self.workers * BUFFERS

    def method_names(self, sublayer: str) -> str:
        """Return the methods of a sublayer's Jacobians, separated by commas where its layers differ."""
        names = {method.name for (_, name), method in self.methods.items() if name == sublayer}
        return ", ".join(sorted(names))


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
    workers = _most_workers(comparison, costs.values())
    groups = comparison.groups
    size = len(groups)
    while (kept := _kept_bytes(comparison, groups[:size])) > KEPT_SHARE * free and size > 1:
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
    each = [(layer, name) for layer in costs for name in comparison.sublayers]
    methods = {(layer, name): comparison.method(costs[layer][name], keep) for layer, name in each}
    stages, running = _work(comparison, batches, costs, methods)
    return Schedule(
        comparison,
        batches,
        keep,
        workers,
        stack,
        {(layer, name): costs[layer][name].engine for layer, name in each},
        methods,
        stages,
        running,
        peak,
        free,
    )


def _costs(comparison: Comparison) -> dict[int, dict[str, Cost]]:
    """Return what a Jacobian of each layer and sublayer costs; a head's closed form is a share of its attention's."""
    model, options = comparison.model, comparison.options
    costs = layer_costs(model, comparison.layers, comparison.topology, comparison.n_tokens, options.engine)
    if all(place.head is None for group in comparison.groups for place in group.places):
        return costs
    heads = int(model.cfg.n_heads)

    def share(cost: Cost) -> Cost:
        if cost.engine == "autograd":
            return cost
        return replace(cost, product_flops=cost.product_flops / heads, dense_flops=cost.dense_flops / heads)

    return {layer: {name: share(cost) for name, cost in by_name.items()} for layer, by_name in costs.items()}


def _work(
    comparison: Comparison,
    batches: Sequence[Sequence[Group]],
    costs: dict[int, dict[str, Cost]],
    methods: dict[tuple[int, str], Method],
) -> tuple[dict[tuple[str, str], Work], Work]:
    """Return the work of each sublayer's stages, and of running blocks again."""
    names, d, k = comparison.sublayers, comparison.model.cfg.d_model, max(comparison.options.k)
    places = Counter(visit.place.layer for batch in batches for visit in visits(batch))
    pairs = Counter[int]()
    for group in comparison.groups:
        for place in group.rows:
            pairs[place.layer] += len(group.columns)
    stages: dict[tuple[str, str], Work] = dict.fromkeys(product(names, STAGES), Work())
    running = Work()
    for layer, count in places.items():
        whole = costs[layer].get("block")
        for name in names:
            cost, method = costs[layer][name], methods[layer, name]
            by_autograd = cost.engine == "autograd"
            # a block's closed form is made of the matrices of its sublayers
            shared = name != "block" and "block" in names and whole is not None and whole.engine == "analytic"
            forming = method.forming * (0.5 if by_autograd else 0.0 if shared else 1.0)  # a pull is half a product
            stages[name, "Jacobians"] += (forming + Work(calls=JACOBIAN_CALLS)) * count
            stages[name, "decomposition"] += method.decomposing * count
            overlaps = Work(thin=4.0 * d * k**2, calls=PAIR_CALLS)
            per_pair = method.comparing * (1 / comparison.columns) + overlaps
            stages[name, "comparison"] += per_pair * pairs[layer]
            runs = count if by_autograd else 1
            running += Work(matmul=cost.run_flops, calls=RUN_CALLS if by_autograd else CERTIFICATE_CALLS) * runs
    return stages, running


def _most_workers(comparison: Comparison, costs: Iterable[dict[str, Cost]]) -> int:
    """Return how many Jacobians can be worked on at once: one per core, for closed forms on the CPU."""
    by_autograd = any(cost.engine == "autograd" for by_name in costs for cost in by_name.values())
    if by_autograd or any(device.type != "cpu" for device in comparison.devices):
        return 1
    return min(torch.get_num_threads(), max(len(group.places) for group in comparison.groups))


def _longest_stack(comparison: Comparison) -> int:
    """Return how many places a worker decomposes together: enough for long steps, few enough for its caches."""
    most = max(len(group.places) for group in comparison.groups)
    return max(1, min(most, STACKED // (len(comparison.sublayers) * comparison.model.cfg.d_model**2)))


def _held(groups: Sequence[Group]) -> int:
    """Return the most Jacobians that are held at once."""
    held = most = 0
    for visit in visits(groups):
        most = max(most, held + 1)
        held += 1 - len(visit.dropped)
    return most


def _kept_bytes(comparison: Comparison, groups: Sequence[Group]) -> float:
    """Return the memory of the matrices that are kept."""
    d, item = comparison.model.cfg.d_model, comparison.dtype.itemsize
    return float(_held(groups) * len(comparison.sublayers) * d**2 * item)


def _peak_bytes(
    comparison: Comparison,
    costs: Iterable[dict[str, Cost]],
    groups: Sequence[Group],
    keep: bool,
    workers: int,
    stack: int,
    free: float,
) -> float:
    """Return the most memory that is held at once, while each worker has ``stack`` places at work."""
    d, k, item = comparison.model.cfg.d_model, max(comparison.options.k), comparison.dtype.itemsize
    bases = 2.0 * _held(groups) * len(comparison.sublayers) * d * k * item
    projected = item * comparison.columns * k * (2.0 * d + 3.0 * k)
    pairs = sum(len(group.rows) * len(group.columns) for group in comparison.groups)
    results = 5.0 * pairs * len(comparison.options.k) * len(comparison.sublayers)
    at_work = 0.0
    for cost in (by_name[name] for by_name in costs for name in comparison.sublayers):
        method = comparison.method(cost, keep).name
        by_autograd = cost.engine == "autograd"
        at_once = min(COLUMNS, max(PROBES, comparison.columns * k))
        products = cost.column_bytes * (vectors_at_once(cost.column_bytes, free) if by_autograd else at_once)
        forming = cost.dense_bytes + 5.0 * len(comparison.sublayers) * item * d**2  # and the decomposition of a place's
        forming += products if by_autograd else 0.0
        needed = {"matrix kept": forming, "matrix dropped": max(forming, products), "products": products}[method]
        at_work = max(at_work, cost.run_bytes + needed)
    kept = _kept_bytes(comparison, groups) if keep else 0.0
    tensors = kept + bases + item * results + workers * stack * (projected + at_work)
    return SLACK * tensors


def _refusal(comparison: Comparison, costs: Iterable[dict[str, Cost]], peak: float, free: float) -> str:
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
    if any(cost.engine == "autograd" for by_name in costs for cost in by_name.values()):
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
