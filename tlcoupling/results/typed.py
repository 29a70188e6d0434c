"""Build dataclasses of values from files, whose types nothing else checks."""

from __future__ import annotations

import functools
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union

BuiltT = TypeVar("BuiltT")
Check = Callable[[Any], bool]
_INT64 = 2**63


def build(kind: type[BuiltT], values: Mapping[str, Any]) -> BuiltT:
    """Return a dataclass of the given values; missing ones take their defaults.

    Raises:
        TypeError: a value has another type than its field, is missing, or is of no field.
    """
    hints = _hints(kind)
    for name, value in values.items():
        if name in hints and not check_of(hints[name])(value):
            raise TypeError(f"{kind.__name__}.{name} is {reprlib.repr(value)}, which is not of type {hints[name]}")
    return kind(**values)


@functools.cache
def check_of(hint: Any) -> Check:
    """Return a function that says whether a value has the type of an annotation, all its items included.

    Integers are of 64 bits. The annotations are those of results and cells: plain types, classes, ``None``, ``Any``,
    unions, ``Literal``, ``tuple[X, ...]``, ``Mapping[K, V]`` and jaxtyping's arrays.
    """
    if hint is Any:
        return lambda value: True
    if hint is int:
        return lambda value: type(value) is int and -_INT64 <= value < _INT64
    if hint is float:
        return lambda value: type(value) in (int, float)
    if hint in (str, bool):
        return lambda value: type(value) is hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return lambda value: any(type(value) is type(one) and value == one for one in arguments)
    if origin is None:
        return lambda value: isinstance(value, hint)
    first, *others = [check_of(one) for one in arguments if one is not ...]
    if origin in (Union, types.UnionType):
        return lambda value: first(value) or any(check(value) for check in others)
    if origin is tuple:
        return lambda value: type(value) is tuple and all(map(first, value))
    (second,) = others  # of a mapping
    return lambda value: isinstance(value, dict) and all(map(first, value)) and all(map(second, value.values()))


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
