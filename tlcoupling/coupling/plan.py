"""The plan of a comparison: its work and its memory, known from shapes before anything is run.

A plan says which Jacobians are worked on together and whether their matrices are kept, takes the cheapest way that
fits into memory, and refuses what fits in no way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tlcoupling.coupling.groups import Group, schedule
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.spectra import COLUMNS, PROBES, Way, cheapest
from tlcoupling.errors import InsufficientMemoryError
from tlcoupling.forward.block import Topology
from tlcoupling.jacobian.autograd import vectors_at_once
from tlcoupling.jacobian.cost import Cost, layer_costs
from tlcoupling.memory import free_memory

STACKED = 2**22  # numbers in the matrices that a worker decomposes together
KEPT_SHARE = 0.5  # of what is free, at most, for matrices that are kept


@dataclass(frozen=True)
class Job:
    """A comparison, as far as its cost depends on it.

    Attributes:
        model: the model.
        topology: of its blocks.
        n_tokens: length of the prompt.
        dtype: of the linear algebra.
        sublayers: what is measured of each layer.
        groups: the Jacobians compared with each other.
        options: how.
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
        """Bases that a Jacobian is compared with, at most."""
        return max(len(group.columns) for group in self.groups)

    @property
    def devices(self) -> set[torch.device]:
        """Where the layers lie."""
        return {next(self.model.blocks[layer].parameters()).device for layer in self.layers}


@dataclass(frozen=True)
class Plan:
    """How a comparison is done.

    Attributes:
        batches: groups that are worked on together.
        keep: whether matrices may be kept.
        workers: threads that decompose Jacobians side by side.
        stack: places whose Jacobians each of them decomposes together.
        ways: by sublayer, the way of its Jacobians and how many there are.
        run_flops: floating-point operations of running the model's own blocks.
        peak_bytes: memory needed beyond the model, at most.
        free_bytes: memory that was free.
    """

    batches: list[Sequence[Group]]
    keep: bool
    workers: int
    stack: int
    ways: dict[str, tuple[Way, int]]
    run_flops: float
    peak_bytes: float
    free_bytes: float


def make_plan(job: Job, free: float | None = None) -> Plan:
    """The cheapest plan that fits into memory.

    Args:
        job: the comparison.
        free: bytes that may be used; by default what is free now on the fullest device.

    Raises:
        InsufficientMemoryError: none fits; the message says what would.
    """
    free = min(free_memory(device) for device in job.devices) if free is None else free
    costs = layer_costs(job.model, job.layers, job.topology, job.n_tokens, job.options.engine)
    workers = _most_workers(job, costs.values())
    size = len(job.groups)
    while (kept := _kept_bytes(job, job.groups[:size])) > KEPT_SHARE * free and size > 1:
        size = (size + 1) // 2
    keep = kept <= KEPT_SHARE * free
    stack = _longest_stack(job)
    while (peak := _peak_bytes(job, costs.values(), job.groups[:size], keep, workers * stack, free)) > free:
        if stack > 1:
            stack //= 2
        elif workers > 1:
            workers //= 2
        elif keep or size > 1:
            keep, size = keep and size > 1, (size + 1) // 2
        else:
            break
    if peak > free:
        raise InsufficientMemoryError(_refusal(job, costs.values(), peak, free))
    batches = [job.groups[start : start + size] for start in range(0, len(job.groups), size)]
    count = sum(len(schedule(batch)) for batch in batches)
    some = costs[job.layers[0]]
    ways = {name: (_way(job, some[name], keep), count) for name in job.sublayers}
    if "block" in ways and some["block"].engine == "analytic":  # whose matrix is made of those of its sublayers
        ways |= {name: (replace(way, formed=0.0), count) for name, (way, _) in ways.items() if name != "block"}
    return Plan(
        batches,
        keep,
        workers,
        stack,
        ways,
        len(batches) * sum(max(by_name[name].run_flops for name in job.sublayers) for by_name in costs.values()),
        peak,
        free,
    )


def _way(job: Job, cost: Cost, keep: bool) -> Way:
    return cheapest(cost, job.model.cfg.d_model, max(job.options.k), job.columns, job.options.solver, keep)


def _most_workers(job: Job, costs: Iterable[dict[str, Cost]]) -> int:
    """Jacobians that can be worked on at once: one a core, where they are closed forms on the CPU."""
    by_autograd = any(cost.engine == "autograd" for by_name in costs for cost in by_name.values())
    if by_autograd or any(device.type != "cpu" for device in job.devices):
        return 1
    return min(torch.get_num_threads(), max(len(group.places) for group in job.groups))


def _longest_stack(job: Job) -> int:
    """Places whose Jacobians a worker decomposes together: enough for long steps, few enough for its caches."""
    most = max(len(group.places) for group in job.groups)
    return max(1, min(most, STACKED // (len(job.sublayers) * job.model.cfg.d_model**2)))


def _held(groups: Sequence[Group]) -> int:
    """The most Jacobians that are held at once."""
    held = most = 0
    for step in schedule(groups):
        most = max(most, held + 1)
        held += 1 - len(step.dropped)
    return most


def _kept_bytes(job: Job, groups: Sequence[Group]) -> float:
    """Of the matrices that are kept."""
    return float(_held(groups) * len(job.sublayers) * job.model.cfg.d_model**2 * job.dtype.itemsize)


def _peak_bytes(
    job: Job, costs: Iterable[dict[str, Cost]], groups: Sequence[Group], keep: bool, places: int, free: float
) -> float:
    """All that is held at once, at most, with as many ``places`` at work."""
    d, k, item = job.model.cfg.d_model, max(job.options.k), job.dtype.itemsize
    bases = 2.0 * _held(groups) * len(job.sublayers) * d * k * item
    comparison = item * job.columns * k * (2.0 * d + 3.0 * k)
    results = sum(5.0 * len(g.rows) * len(g.columns) for g in job.groups) * len(job.options.k) * len(job.sublayers)
    at_work = 0.0
    for cost in (by_name[name] for by_name in costs for name in job.sublayers):
        way = _way(job, cost, keep).name
        by_autograd = cost.engine == "autograd"
        at_once = min(COLUMNS, max(PROBES, job.columns * k))
        products = cost.column_bytes * (vectors_at_once(cost.column_bytes, free) if by_autograd else at_once)
        forming = cost.dense_bytes + 5.0 * len(job.sublayers) * item * d**2  # and the decomposition of a place's
        forming += products if by_autograd else 0.0
        needed = {"matrix kept": forming, "matrix dropped": max(forming, products), "products": products}[way]
        at_work = max(at_work, cost.run_bytes + needed)
    kept = _kept_bytes(job, groups) if keep else 0.0
    return kept + bases + item * results + places * (comparison + at_work)


def _refusal(job: Job, costs: Iterable[dict[str, Cost]], peak: float, free: float) -> str:
    """Why a comparison does not fit, and what would."""
    costs = list(costs)
    advice = []
    for k in range(max(job.options.k) - 1, 0, -1):
        smaller = replace(job, options=replace(job.options, k=(k,)))
        if _peak_bytes(smaller, costs, job.groups[:1], False, 1, free) <= free:
            advice.append(f"K up to {k}")
            break
    if job.options.engine == "autograd":
        advice.append("engine='auto'")
    if any(cost.engine == "autograd" for by_name in costs for cost in by_name.values()):
        advice.append("a shorter prompt")
    if job.columns > 2:
        advice.append(f"fewer than {job.columns} Jacobians compared with each other (layers= or tokens=)")
    from rich.filesize import decimal

    where = ", ".join(sorted(map(str, job.devices)))
    return (
        f"coupling of {sum(len(group.places) for group in job.groups)} Jacobians at K = {max(job.options.k)} needs "
        f"{decimal(int(peak))} beyond the model, and {decimal(int(free))} are free on {where}; smaller: "
        + ", or ".join(advice or ["a smaller model"])
    )
