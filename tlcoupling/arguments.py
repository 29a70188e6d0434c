"""Checks of arguments as users pass them: integers, indices, names, sublayers and K.

An integer is anything with ``__index__``: an int, a numpy integer, an integer tensor of one element. Several are any
iterable of them: a list, a range, an array, a 1-d tensor. Bools and floats are not integers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, Literal, SupportsIndex

import torch

from tlcoupling.errors import ArgumentError

KSpec = SupportsIndex | float | Iterable[SupportsIndex | float]
Indices = SupportsIndex | Iterable[SupportsIndex] | Literal["all"]


def as_int(value: Any) -> int | None:
    """Return an integer as an int, or None if it is not an integer."""
    if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_list(value: Any) -> list[Any]:
    """Return an argument that is one item or several as a list of items; a string is one item."""
    if isinstance(value, str):
        return [value]
    try:
        return list(value)
    except TypeError:
        return [value]


def as_plain(value: Any) -> Any:
    """Return one integer as an int, several items as a list with its integers as ints, and a string as it is."""
    if isinstance(value, str):
        return value
    number = as_int(value)
    if number is not None:
        return number
    return [item if as_int(item) is None else as_int(item) for item in as_list(value)]


def check_int(name: str, value: Any, low: int, high: int | None = None, note: str = "") -> int:
    """Return an integer argument as an int.

    Args:
        name: the argument's name, for the error.
        value: the argument.
        low: the smallest value allowed.
        high: the largest value allowed; None for no limit.
        note: what the limit is, for the error.

    Raises:
        ArgumentError: the value is not an integer, or is out of range.
    """
    number = as_int(value)
    if number is None or number < low or (high is not None and number > high):
        limits = f"an int of at least {low}" if high is None else f"an int from {low} to {high}"
        raise ArgumentError(name, value, f"{limits}, {note}" if note else limits)
    return number


def check_index(name: str, value: Any, size: int, note: str = "") -> int:
    """Return an index as an int from 0 to ``size - 1``; a negative one counts from the end, as in Python.

    Raises:
        ArgumentError: the value is not an integer, or is out of range.
    """
    return check_int(name, value, -size, size - 1, note) % size


def check_name(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Check that an argument is one of several names.

    Raises:
        ArgumentError: the value is none of them.
    """
    if value not in allowed:
        raise ArgumentError(name, value, f"one of {', '.join(allowed)}")


def check_sublayer(name: str, value: Any, available: Sequence[str], refusal: str | None = None) -> None:
    """Check that the model has a sublayer.

    Args:
        name: the argument's name, for the error.
        value: the sublayer.
        available: the sublayers of the model, as ``Trace.sublayers`` lists them.
        refusal: why there are no more of them, as ``Trace.refusal`` says.

    Raises:
        ArgumentError: the model does not have it.
    """
    if value not in available:
        reason = f", which is not split into sublayers: {refusal}" if refusal else ""
        raise ArgumentError(name, value, f"{', '.join(available)} in this model{reason}")


def resolve_sublayers(
    value: str | Sequence[str] | None, available: Sequence[str], refusal: str | None = None
) -> tuple[str, ...]:
    """Return the sublayers to measure: one, several, or all that the model has for None.

    Raises:
        ArgumentError: the model does not have one of them, or the list is empty.
    """
    names = tuple(available if value is None else as_list(value))
    for item in names or (value,):
        check_sublayer("sublayers", item, available, refusal)
    return names


def resolve_indices(name: str, value: Indices | None, size: int) -> tuple[int, ...]:
    """Return indices from 0 to ``size - 1``: one, several, or all for ``"all"`` and None.

    Raises:
        ArgumentError: an index is out of range or given twice, or the list is empty.
    """
    if value is None or (isinstance(value, str) and value == "all"):
        return tuple(range(size))
    if isinstance(value, str):
        raise ArgumentError(name, value, f"an int, several, or 'all' ({size} in total)")
    indices = tuple(check_index(name, item, size, "several of them, or 'all'") for item in as_list(value))
    if not indices or len(set(indices)) < len(indices):
        raise ArgumentError(name, value, "one or more different indices")
    return indices


def resolve_basis_layers(value: Indices | None, layers: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Return the layer that gives the bases for each of ``layers``: one for all, one for each, or themselves for None.

    Raises:
        ArgumentError: an index is out of range, or there are as many as neither one nor ``layers``.
    """
    if value is None:
        return tuple(layers)
    others = as_list(value) if as_int(value) is None else [value] * len(layers)
    if len(others) != len(layers):
        raise ArgumentError("basis_layers", value, f"one layer, or one for each of the {len(layers)} layers")
    return tuple(check_index("basis_layers", layer, n_layers) for layer in others)


def resolve_k(k: KSpec, d_model: int, name: str = "k") -> tuple[int, ...]:
    """Return K as ints. A fraction of d_model is rounded down, to at least 1.

    Args:
        k: one value or several.
        d_model: width of the residual stream.
        name: the argument's name, for the error.

    Raises:
        ArgumentError: a value is below 1, above d_model or not a number, or the list is empty.
    """
    resolved = []
    for item in as_list(k):
        number = as_int(item)
        if number is None and isinstance(item, Real) and 0 < float(item) < 1:
            number = max(1, int(float(item) * d_model))
        if number is None or not 1 <= number <= d_model:
            raise ArgumentError(
                name, item, f"an int from 1 to d_model = {d_model}, or a fraction of it between 0 and 1"
            )
        resolved.append(number)
    if not resolved:
        raise ArgumentError(name, k, "at least one number")
    return tuple(resolved)


def resolve_one_k(name: str, value: KSpec, d_model: int) -> int:
    """Return a single K as an int.

    Raises:
        ArgumentError: as ``resolve_k``, or several values.
    """
    first, *others = resolve_k(value, d_model, name)
    if others:
        raise ArgumentError(name, value, "one number")
    return first
