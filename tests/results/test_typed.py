"""Values from files, held against annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.results.typed import build, check_of


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -(2**63)], [True, 1.0, "1", None, 2**63]),
        (float, [1, 0.5, float("nan")], [True, "1", None]),
        (bool, [True], [1, None]),
        (str, ["", "a"], [b"a", None, ["a"]]),
        (int | None, [1, None], ["1", True]),
        (Literal["all"], ["all"], ["any", None]),
        (str | tuple[int, ...], ["a", (1, 2), ()], [[1], (1, "a")]),
        (tuple[tuple[Any, ...], ...], [((1, "a"), ())], [(1,), ("a",)]),
        (Mapping[str, str], [{}, {"a": "b"}], [{"a": 1}, {1: "b"}, [], None]),
        (Mapping[str, Any], [{"a": 1}], [[("a", 1)]]),
        (Float[Tensor, "layer pos"] | None, [torch.zeros(2, 3), None], [torch.zeros(2), torch.zeros(2, 3).long(), 1]),
    ],
)
def test_a_value_has_the_type_of_an_annotation_or_not(hint: Any, right: list[Any], wrong: list[Any]):
    check = check_of(hint)
    assert all(map(check, right)) and not any(map(check, wrong))


@dataclass(frozen=True)
class Point:
    name: str
    at: tuple[int, ...] = ()


def test_a_dataclass_is_built_of_values_of_its_types():
    assert build(Point, {"name": "a"}) == Point("a")
    for values in ({}, {"name": 1}, {"name": "a", "at": (1, "b")}, {"name": "a", "more": 1}):
        with pytest.raises(TypeError, match="Point"):
            build(Point, values)
