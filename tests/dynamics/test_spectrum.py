"""Singular values along depth, against their law and against ordinary least squares."""

from __future__ import annotations

import pytest
import torch
from cases import FEW, TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.results.base import Provenance


def coupling_of(values: torch.Tensor, layers: tuple[int, ...] | None = None) -> tlc.DepthCoupling:
    """What the profile reads of a DepthCoupling."""
    fields = {name: None for name in tlc.DepthCoupling.__dataclass_fields__}
    fields |= dict(
        provenance=Provenance("made by hand"),
        singular_values=values,
        sublayers=("block",),
        positions=(0,),
        tokens=("a",),
        layers=tuple(range(values.shape[2])) if layers is None else layers,
    )
    made = object.__new__(tlc.DepthCoupling)
    made.__dict__.update(fields)
    return made


@settings(max_examples=30)
@given(a=st.floats(0.1, 10.0), b=st.floats(0.5, 20.0), n=st.integers(3, 40))
def test_the_law_is_found_where_it_holds(a: float, b: float, n: int):
    depth = torch.arange(n, dtype=torch.float64)
    values = (a / (depth + b))[None, None, :, None]
    found = tlc.singular_value_profile(coupling_of(values))
    assert float(found.slope) == pytest.approx(1 / a, rel=1e-6)
    assert float(found.intercept) == pytest.approx(b / a, rel=1e-6)
    assert float(found.r_squared) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(found.fitted, values)


def test_the_depths_are_those_of_the_measured_layers():
    """Every third layer from the fourth on, of s(l) = 2 / (l + 5)."""
    layers = (3, 6, 9, 12)
    values = (2 / (torch.tensor(layers, dtype=torch.float64) + 5))[None, None, :, None]
    found = tlc.singular_value_profile(coupling_of(values, layers))
    assert float(found.slope) == pytest.approx(1 / 2) and float(found.intercept) == pytest.approx(5 / 2)
    torch.testing.assert_close(found.fitted, values)


def test_equal_steps_along_a_line_give_a_slope_of_one():
    """Residual Alignment: h_{l+1} = (1 + s_l) h_l with equal steps means s_l = 1 / (l + b)."""
    h = 3.0 + torch.arange(20, dtype=torch.float64)
    values = (h.diff() / h[:-1])[None, None, :, None]
    found = tlc.singular_value_profile(coupling_of(values))
    assert float(found.slope) == pytest.approx(1) and float(found.intercept) == pytest.approx(3)


def test_the_profile_of_a_model_is_an_ordinary_least_squares_fit():
    coupling = tlc.depth_coupling(tlc.trace(FEW[0].model(), TOKENS), 3, tokens=[2, -1])
    found = tlc.singular_value_profile(coupling)
    design = torch.stack([torch.ones(3), torch.arange(3.0)], dim=1).double()
    for s in range(len(found.sublayers)):
        for rank in range(3):
            inverse = 1 / coupling.singular_values[s, 1, :, rank].double()
            solution = torch.linalg.lstsq(design, inverse[:, None]).solution[:, 0]
            torch.testing.assert_close(found.intercept[s, 1, rank].double(), solution[0])
            torch.testing.assert_close(found.slope[s, 1, rank].double(), solution[1])
            left = (inverse - design @ solution).square().sum()
            r_squared = 1 - left / (inverse - inverse.mean()).square().sum()
            torch.testing.assert_close(found.r_squared[s, 1, rank].double(), r_squared)


def test_too_few_layers_and_constant_singular_values_have_no_fit():
    with pytest.warns(UserWarning, match="2 layers is not a fit"):
        found = tlc.singular_value_profile(coupling_of(torch.rand(1, 1, 2, 1)))
    assert found.slope.isnan().all() and found.r_squared.isnan().all()
    flat = tlc.singular_value_profile(coupling_of(torch.ones(1, 1, 5, 1)))
    assert float(flat.slope) == 0 and flat.r_squared.isnan().all()
    rising = tlc.singular_value_profile(coupling_of(torch.tensor([1.0, 50.0, 60.0])[None, None, :, None]))
    assert float(rising.slope) < 0 and rising.fitted.isnan().any()  # the line falls below 0: no 1 / s there
