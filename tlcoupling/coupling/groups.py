"""Jacobians compared in sets: which are needed, and in which order they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from tlcoupling.forward.split import POSITIONWISE


class Place(NamedTuple):
    """Which Jacobian of a sublayer."""

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

    def of(self, sublayers: Sequence[str]) -> tuple[str, ...]:
        """Return those of some sublayers that have a Jacobian here: an MLP reaches no other position."""
        return tuple(name for name in sublayers if self.src == self.dest or name not in POSITIONWISE)


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

    def compared(self, sublayers: Sequence[str]) -> tuple[str, ...]:
        """Return those of some sublayers that have a Jacobian at all places."""
        return tuple(name for name in sublayers if all(place.of((name,)) for place in self.places))


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


def stacks(order: Sequence[Visit], size: int, alone: Set[int] = frozenset()) -> Iterator[list[Visit]]:
    """Yield visits in stacks, in order: those of a stack are worked on together, and what they drop is held until then.

    Groups across depth end in a row, each with a Jacobian of the last layer: a stack goes on over all of them.

    Args:
        order: the visits.
        size: the most of a stack.
        alone: layers whose visits wait for no other.
    """
    stack: list[Visit] = []
    for visit, following in zip(order, [*order[1:], None], strict=True):
        stack.append(visit)
        ends = visit.finished and not (following and following.finished)
        if len(stack) == size or ends or visit.place.layer in alone:
            yield stack
            stack = []


def visits(groups: Sequence[Group]) -> list[Visit]:
    """List all Jacobians of the groups by layer, and within a layer by dest.

    The last dest comes first: a group of all that reach it then ends before the others of the layer are begun.
    """
    every = set().union(*(group.places for group in groups))
    order = sorted(every, key=lambda place: place._replace(dest=-place.dest))
    by_place = {place: Visit(place, [], []) for place in order}
    at = {place: index for index, place in enumerate(order)}
    needed_until: dict[Place, Place] = {}
    for index, group in enumerate(groups):
        last = max(group.places, key=at.__getitem__)
        by_place[last].finished.append(index)
        for place in group.places:
            needed_until[place] = max(needed_until.get(place, last), last, key=at.__getitem__)
    for place, last in needed_until.items():
        by_place[last].dropped.append(place)
    return list(by_place.values())
