"""What of a result a figure shows, and how it names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tlcoupling.coupling.result import Coupling
from tlcoupling.errors import ArgumentError
from tlcoupling.results.base import Result
from tlcoupling.viz.figures.style import label

T = TypeVar("T")


def named(argument: str, given: T | Mapping[str, T]) -> dict[str, T]:
    """Results by name; a single one has the empty name.

    Raises:
        ArgumentError: none.
    """
    if not isinstance(given, Mapping):
        return {"": given}
    if not given:
        raise ArgumentError(argument, given, "at least one result")
    return {str(name): one for name, one in given.items()}


def index_of(argument: str, value: Any, measured: Sequence[Any]) -> int:
    """Where a value stands among those measured; None stands for the first.

    Raises:
        ArgumentError: it was not measured.
    """
    if value is None:
        return 0
    if value not in measured:
        raise ArgumentError(argument, value, f"one that was measured: {', '.join(map(str, measured))}")
    return list(measured).index(value)


def chosen_k(result: Coupling, k: int | None) -> tuple[int, int]:
    """The place of a K among those measured, and the K.

    Raises:
        ArgumentError: it was not measured.
    """
    index = index_of("k", k, result.ks)
    return index, result.ks[index]


def measured_on(result: Result) -> str:
    """The model's own name, without the account that publishes it."""
    return label(result.provenance.model_name.rpartition("/")[2])
