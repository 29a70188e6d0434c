"""Two results of one cell: what counts as rounding, and what as a difference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tlcoupling.results.base import Provenance
from tlcoupling.sweeps.agreement import differences
from tlcoupling.trajectory.growth import Growth, growth_of_norms

NORMS = torch.tensor([[1.0, 2.0], [3.0, 5.0], [8.0, 9.0]], dtype=torch.float64)
GROWTH = growth_of_norms(NORMS, None, Provenance("made by hand"), ("a", "b"))


def differing(first: Growth, second: Growth) -> list[str]:
    """The names in which two results differ, the same in either order."""
    names = differences((first, {}), (second, {}))
    assert differences((second, {}), (first, {})) == names
    return names


@pytest.mark.parametrize(
    ("share", "differs"),
    [
        (1e-5, False),  # float32, another solver
        (1e-3, True),  # weights rounded to bfloat16
    ],
)
def test_rounding_of_float32_agrees_and_that_of_bfloat16_does_not(share: float, differs: bool):
    moved = dataclasses.replace(GROWTH, norms=GROWTH.norms * (1 + share))
    assert differing(GROWTH, moved) == ([f"result.norms (by {share:.1g} of its size)"] if differs else [])


def test_numbers_that_are_zero_but_for_rounding_agree():
    one, two = (dataclasses.replace(GROWTH, slope=torch.full((2,), size)) for size in (1e-7, -3e-7))
    assert differing(one, two) == []


@pytest.mark.parametrize("at", [(0,), (0, 1)])
def test_a_number_does_not_agree_with_nan_nor_with_infinity(at: tuple[int, ...]):
    for value in (math.nan, math.inf):
        undefined = GROWTH.rate.clone()
        undefined[list(at)] = value
        other = dataclasses.replace(GROWTH, rate=undefined)
        assert differing(GROWTH, other) == ["result.rate (by inf of its size)"]
        assert differing(other, other) == []


def test_what_depends_on_the_machine_is_left_out():
    elsewhere = dataclasses.replace(GROWTH.provenance, seconds=9.0, versions={"torch": "2.6"}, engine={"block": "x"})
    assert differing(GROWTH, dataclasses.replace(GROWTH, provenance=elsewhere)) == []
    another = dataclasses.replace(GROWTH.provenance, model_name="another")
    other = dataclasses.replace(GROWTH, provenance=another, tokens=("a", "c"))
    assert differing(GROWTH, other) == ["result.provenance.model_name", "result.tokens"]
