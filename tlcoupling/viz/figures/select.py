"""Select the part of a result that a figure shows, and name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tlcoupling.coupling.result import Coupling
from tlcoupling.errors import ArgumentError
from tlcoupling.results.base import Result
from tlcoupling.viz.figures.style import label

T = TypeVar("T")


def named(argument: str, given: T | Mapping[str, T]) -> dict[str, T]:
    """Return results by name; a single result has the empty name.

    Raises:
        ArgumentError: the mapping is empty.
    """
    if not isinstance(given, Mapping):
        return {"": given}
    if not given:
        raise ArgumentError(argument, given, "at least one result")
    return {str(name): one for name, one in given.items()}


def index_of(argument: str, value: Any, measured: Sequence[Any]) -> int:
    """Return the index of a value among those measured; None selects the first.

    Raises:
        ArgumentError: the value was not measured.
    """
    if value is None:
        return 0
    if value not in measured:
        raise ArgumentError(argument, value, f"one that was measured: {', '.join(map(str, measured))}")
    return list(measured).index(value)


def chosen_k(result: Coupling, k: int | None) -> tuple[int, int]:
    """Return the index of a K among those measured, and the K.

    Raises:
        ArgumentError: the value was not measured.
    """
    index = index_of("k", k, result.ks)
    return index, result.ks[index]


def measured_on(result: Result) -> str:
    """Return the model's name, without the account that publishes it."""
    return label(result.provenance.model_name.rpartition("/")[2])
