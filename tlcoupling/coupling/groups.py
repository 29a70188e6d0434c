"""Jacobians compared in sets: which are needed, and in which order they are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


def groups_of_layers(
    layers: Sequence[int], basis_layers: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> list[Group]:
    """Return one group for each layer: its Jacobians at all pairs (src, dest), with the bases of a basis layer."""
    return [
        Group(*(tuple(Place(which, dest, src) for src, dest in pairs) for which in both))
        for both in zip(layers, basis_layers, strict=True)
    ]


@dataclass(frozen=True)
class Visit:
    """One Jacobian in the order in which they are made.

    Attributes:
        place: the Jacobian.
        finished: indices of the groups that it completes.
        dropped: Jacobians that no later group needs.
    """

    place: Place
    finished: list[int]
    dropped: list[Place]


def visits(groups: Sequence[Group]) -> list[Visit]:
    """List all Jacobians of the groups by layer, and within a layer by dest."""
    order = sorted(set().union(*(group.places for group in groups)))
    by_place = {place: Visit(place, [], []) for place in order}
    needed_until: dict[Place, Place] = {}
    for index, group in enumerate(groups):
        last = max(group.places)
        by_place[last].finished.append(index)
        for place in group.places:
            needed_until[place] = max(needed_until.get(place, last), last)
    for place, last in needed_until.items():
        by_place[last].dropped.append(place)
    return list(by_place.values())
