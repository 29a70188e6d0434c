"""Arguments as users pass them: integers of any library are accepted, bools and floats are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, TOKENS
from hypothesis import given
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.arguments import (
    as_plain,
    check_index,
    check_int,
    check_name,
    resolve_indices,
    resolve_k,
    resolve_one_k,
    resolve_sublayers,
)
from tlcoupling.errors import ArgumentError

INTEGERS = [int, np.int64, np.int32, np.uint8, np.array, torch.tensor]
NOT_INTEGERS = [True, np.True_, torch.tensor(True), 1.0, np.float32(1), torch.tensor(1.0), "1", None]
SEVERAL = [list, tuple, np.array, torch.tensor, lambda items: (item for item in items)]


@pytest.mark.parametrize("kind", INTEGERS)
def test_an_integer_of_any_library_is_an_int(kind: Any):
    for result in (check_int("n", kind(2), 1, 3), check_index("n", kind(2), 3), resolve_k(kind(2), 4)[0]):
        assert type(result) is int and result == 2
    assert resolve_indices("n", kind(2), 3) == (2,)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
def test_bools_floats_and_strings_are_not_integers(value: Any):
    for check in (
        lambda: check_int("n", value, 0),
        lambda: check_index("n", value, 3),
        lambda: resolve_k(value, 4, "n"),
        lambda: resolve_indices("n", [value], 3),
    ):
        with pytest.raises(ArgumentError, match="^n="):
            check()


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_come_in_any_iterable(kind: Any):
    assert resolve_indices("n", kind([0, -1, 1]), 4) == (0, 3, 1)
    assert resolve_k(kind([1, 3]), 4) == (1, 3)
    assert as_plain(kind([0, -1])) == [0, -1]


def test_a_mask_is_not_a_list_of_indices():
    for mask in (np.array([True, False]), torch.tensor([True, False])):
        with pytest.raises(ArgumentError, match="^tokens="):
            resolve_indices("tokens", mask, 2)


@given(size=st.integers(1, 50), value=st.integers(-100, 100))
def test_indices_are_those_of_a_list(size: int, value: int):
    items = list(range(size))
    if -size <= value < size:
        assert check_index("n", value, size) == items[value]
    else:
        with pytest.raises(ArgumentError, match=f"an int from {-size} to {size - 1}"):
            check_index("n", value, size)


@given(d_model=st.integers(2, 5000), fraction=st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_a_fraction_of_the_width_is_rounded_down_to_at_least_one(d_model: int, fraction: float):
    assert resolve_k(fraction, d_model) == (max(1, int(fraction * d_model)),)


@pytest.mark.parametrize("value", [0, 5, -1, 1.5, float("nan"), np.float64(2)])
def test_k_out_of_range_is_refused(value: Any):
    with pytest.raises(ArgumentError, match="an int from 1 to d_model = 4, or a fraction"):
        resolve_k(value, 4)


@pytest.mark.usefixtures("unchecked")
def test_no_indices_twice_the_same_and_several_ks_for_one_are_refused():
    for check in (
        lambda: resolve_indices("n", [], 3),
        lambda: resolve_indices("n", [0, -3], 3),
        lambda: resolve_k([], 4, "n"),
        lambda: resolve_one_k("n", [1, 2], 4),
        lambda: check_name("n", "c", ("a", "b")),
    ):
        with pytest.raises(ArgumentError, match="^n="):
            check()
    assert resolve_indices("n", "all", 3) == resolve_indices("n", None, 3) == (0, 1, 2)
    with pytest.raises(ArgumentError, match="'all'"):
        resolve_indices("n", "every", 3)


@pytest.mark.usefixtures("unchecked")
def test_sublayers_are_one_several_or_all_that_the_model_has():
    available = ("block", "attn")
    assert resolve_sublayers(None, available) == available
    assert resolve_sublayers("attn", available) == ("attn",)
    for wrong in ("mlp", ["block", "mlp"], []):
        with pytest.raises(ArgumentError, match=r"^sublayers=.*block, attn in this model"):
            resolve_sublayers(wrong, available)


@pytest.mark.usefixtures("unchecked")
def test_measurements_take_them_and_remember_plain_numbers(tmp_path: Any):
    """What JSON cannot hold would only show when the result is saved."""
    trace = tlc.trace(CASES[0].model(), TOKENS)
    measured = tlc.depth_coupling(trace, np.int64(2), layers=np.arange(2), tokens=torch.tensor([1, -1]))
    plain = tlc.depth_coupling(trace, 2, layers=[0, 1], tokens=[1, -1])
    assert torch.equal(measured.values, plain.values)
    assert tlc.load(measured.save(tmp_path / "one")).provenance.settings == plain.provenance.settings
    many = tlc.analyze_many(trace.model, [TOKENS], k=np.int64(2), tokens=np.int64(2), progress=False)
    assert many.provenance.settings["tokens"] == 2
    many.save(tmp_path / "many")
    jacobian = tlc.residual_jacobian(trace, np.int64(1), src=np.int64(2), dest=torch.tensor(-1))
    assert torch.equal(jacobian.dense(), tlc.residual_jacobian(trace, 1, src=2, dest=-1).dense())
