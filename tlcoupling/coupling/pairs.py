"""Jacobians compared in sets: which are needed, in which order they are made, and what is measured on each set.

A kind of coupling (depth, token, context, head) is a list of ``Group``: the Jacobians that are compared with each
other. ``compare_groups`` visits a layer once and asks for all that is needed of it, and drops a Jacobian as soon as its
groups are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from einops import einsum
from torch import Tensor

from tlcoupling.coupling.arguments import Options
from tlcoupling.coupling.metric import coupling, null_coupling, null_std, subspace_overlap
from tlcoupling.coupling.spectra import Spectrum, matrices_fit, matrix_spectrum, prefers_products, product_spectrum
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.trace import Trace


class Place(NamedTuple):
    """Which Jacobian; in the order in which they are made."""

    layer: int
    dest: int
    src: int
    head: int | None = None

    def __str__(self) -> str:
        """As an error names it."""
        where = f"layer {self.layer}, token {self.src}"
        if self.src != self.dest:
            where += f" to token {self.dest}"
        return where if self.head is None else f"head {self.head} of {where}"


@dataclass(frozen=True)
class Group:
    """Jacobians that are compared.

    Attributes:
        rows: those that give J1.
        columns: those that give the bases, U2 and V2.
    """

    rows: tuple[Place, ...]
    columns: tuple[Place, ...]

    @classmethod
    def of(cls, places: Sequence[Place]) -> Group:
        """Each with each."""
        return cls(tuple(places), tuple(places))

    @property
    def places(self) -> set[Place]:
        """All of them."""
        return {*self.rows, *self.columns}


def compare_groups(
    trace: Trace,
    jacobians: JacobianEngine,
    sublayers: Sequence[str],
    groups: Sequence[Group],
    options: Options,
    progress: bool,
) -> dict[str, Tensor]:
    """All that is measured on each group, by field name, ``[sublayer, group, ...]`` on the CPU.

    Raises:
        ArgumentError: K above the rank of a Jacobian.
    """
    batches, fits = _batches(trace, groups, len(sublayers))
    schedules = [_schedule(batch) for batch in batches]
    ticks = _ticks(len(sublayers) * sum(map(len, schedules)), progress)
    columns = max(len(group.columns) for group in groups)
    cells: list[dict[str, dict[str, Tensor]]] = []
    for batch, schedule in zip(batches, schedules, strict=True):
        held: dict[str, dict[Place, Spectrum]] = {name: {} for name in sublayers}
        compared: dict[int, dict[str, dict[str, Tensor]]] = {}
        for step in schedule:
            for name in sublayers:
                next(ticks)
                held[name][step.place] = decompose(jacobians, name, step.place, options, columns, fits)
            for index in step.finished:
                group = batch[index]
                compared[index] = {
                    name: _compare([known[p] for p in group.rows], [known[p] for p in group.columns], options)
                    for name, known in held.items()
                }
            for name, place in product(sublayers, step.dropped):
                del held[name][place]
        cells += [compared[index] for index in range(len(batch))]
    next(ticks, None)
    return {
        field: torch.stack([torch.stack([cell[name][field] for cell in cells]) for name in sublayers]).cpu()
        for field in cells[0][sublayers[0]]
    }


@dataclass(frozen=True)
class _Step:
    """One Jacobian's turn: the groups that are complete with it, and the Jacobians that none needs after it."""

    place: Place
    finished: list[int]
    dropped: list[Place]


def _schedule(groups: Sequence[Group]) -> list[_Step]:
    """All Jacobians of the groups, those of a layer in a row, and within it those of a dest."""
    order = sorted(set().union(*(group.places for group in groups)))
    steps = {place: _Step(place, [], []) for place in order}
    needed_until: dict[Place, Place] = {}
    for index, group in enumerate(groups):
        last = max(group.places)
        steps[last].finished.append(index)
        for place in group.places:
            needed_until[place] = max(needed_until.get(place, last), last)
    for place, last in needed_until.items():
        steps[last].dropped.append(place)
    return list(steps.values())


def _batches(trace: Trace, groups: Sequence[Group], n_sublayers: int) -> tuple[list[Sequence[Group]], bool]:
    """Groups that are worked on together, as many as fit into memory as matrices, and whether any do.

    Asked once: what is kept meanwhile must not change the answer from layer to layer.
    """

    def fits(some: Sequence[Group]) -> bool:
        held = most = 0
        for step in _schedule(some):
            most = max(most, held + 1)
            held += 1 - len(step.dropped)
        return matrices_fit(most * n_sublayers, trace.d_model, trace.resid.dtype, trace.resid.device)

    size = len(groups)
    while not (fitting := fits(groups[:size])) and size > 1:
        size = (size + 1) // 2
    return [groups[start : start + size] for start in range(0, len(groups), size)], fitting


def _ticks(total: int, progress: bool) -> Iterator[int]:
    """One item per step of the work, with a progress bar that moves as they are taken."""
    if not progress:
        return iter(range(total))
    from tqdm.auto import tqdm

    return iter(tqdm(range(total), desc="coupling", leave=False))


def decompose(
    jacobians: JacobianEngine, sublayer: str, place: Place, options: Options, columns: int, fits: bool
) -> Spectrum:
    """The top triplets of one Jacobian, as a matrix where that is cheaper and fits."""
    make = partial(jacobians.operator, place.layer, sublayer, place.src, place.dest, place.head)
    operator, k = make(), max(options.k)
    try:
        if fits and not prefers_products(operator, k, columns):
            return matrix_spectrum(operator, k, options.solver)
        return product_spectrum(operator, make, k, options.solver)
    except ArgumentError as error:
        raise ArgumentError(error.name, error.value, f"{error.allowed} ({sublayer} of {place})") from error


def _compare(rows: Sequence[Spectrum], columns: Sequence[Spectrum], options: Options) -> dict[str, Tensor]:
    """All that is measured on a group, by field name: each row's Jacobian in each column's bases."""
    device = rows[0].frobenius.device

    def stacked(spectra: Sequence[Spectrum], name: str) -> Tensor:
        return torch.stack([getattr(one.triplets, name).to(device) for one in spectra])

    (u1, v1), (u2, v2) = ((stacked(spectra, "u"), stacked(spectra, "v")) for spectra in (rows, columns))
    s, frobenius = stacked(rows, "s"), torch.stack([one.frobenius.to(device) for one in rows])
    count, width, rank = u2.shape
    left, right = (u2, v2) if options.bases == "uv" else (v2, u2)
    all_right = right.transpose(0, 1).reshape(width, -1)
    projected = torch.stack(
        [
            left.mT
            @ one.multiply(all_right.to(one.triplets.u.device)).to(device).unflatten(1, (count, rank)).transpose(0, 1)
            for one in rows
        ]
    )  # [row, column, K, K]
    overlaps = {
        name: einsum(basis1, basis2, "row d i, column d j -> row column i j")
        for name, basis1, basis2 in (("overlap_u", u1, u2), ("overlap_v", v1, v2))
    }
    found: dict[str, list[Tensor]] = {name: [] for name in ("values", "null", "null_std", "overlap_u", "overlap_v")}
    for k in options.k:
        top, normalizer, absolute = s[:, :k], options.normalizer, options.absolute
        found["values"].append(coupling(projected[..., :k, :k], top[:, None], normalizer, absolute))
        for name, chance in (("null", null_coupling), ("null_std", null_std)):
            found[name].append(chance(top, frobenius, width, normalizer, absolute)[:, None].expand(len(rows), count))
        for name, inner in overlaps.items():
            found[name].append(subspace_overlap(inner[..., :k, :k]))
    return {
        **{name: torch.stack(cells) for name, cells in found.items()},
        "singular_values": s,
        "frobenius": frobenius,
        "frobenius_error": torch.stack([one.frobenius_error.to(device) for one in rows]),
        "residual": stacked(rows, "residual").amax(-1),
    }
