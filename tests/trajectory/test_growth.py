"""Growth: properties of expodistance."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlcoupling.trajectory.growth import expodistance


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0.01, 3.0), n=st.integers(2, 40), scale=st.floats(0.1, 10.0))
def test_expodistance_of_exponential_growth_is_zero(rate: float, n: int, scale: float):
    alpha = torch.full((n, 1), rate, dtype=torch.float64)
    assert expodistance(alpha) < 1e-20
    uneven = alpha + torch.linspace(-rate / 2, rate / 2, n, dtype=torch.float64)[:, None]
    torch.testing.assert_close(expodistance(scale * uneven), expodistance(uneven))
