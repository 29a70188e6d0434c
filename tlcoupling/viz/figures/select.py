"""Select the part of a result that a figure shows, and name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.many import ManyAnalyses
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.result import Coupling
from tlcoupling.errors import ArgumentError
from tlcoupling.results.base import Result
from tlcoupling.viz.figures.style import label

T = TypeVar("T")


def require_kind(argument: str, given: Any, kinds: type | tuple[type, ...], allowed: str) -> None:
    """Check that a figure is given the result that it draws.

    Raises:
        ArgumentError: it is given something else; the message says how to get the right one.
    """
    if not isinstance(given, kinds):
        raise ArgumentError(argument, type(given).__name__, allowed)


def depth_of(argument: str, given: Any) -> DepthCoupling:
    """Return a depth coupling, or that of an analysis.

    Raises:
        ArgumentError: another result.
    """
    coupling: Any = given.coupling if isinstance(given, Analysis) else given
    means = "; ManyAnalyses keeps means alone" if isinstance(given, ManyAnalyses) else ""
    require_kind(argument, coupling, DepthCoupling, f"tlc.depth_coupling(trace) or tlc.analyze(model, prompt){means}")
    return coupling


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
