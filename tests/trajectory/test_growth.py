"""Growth: its numbers by hand, and properties of expodistance."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlcoupling.results.base import Provenance
from tlcoupling.trajectory.growth import expodistance, growth_of_norms


def test_growth_by_hand():
    """Of two layers that multiply a norm by e and by e^3: the variance is the population's, (1 + 1) / 2."""
    norms = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64).exp()[:, None]
    between = norms[:-1] * 2, norms[1:]
    found = growth_of_norms(norms, between, Provenance("made by hand"), ("a",))
    expected = {"alpha": [[1.0], [3.0]], "rate": [2.0], "expodistance": [1 / 2**2], "cv": [1 / 2], "slope": [2.0]}
    # ln ||x^l|| = 0, 1, 4 misses its line -1/3, 5/3, 11/3 by 1/3, -2/3, 1/3; its own variation is 26/3
    expected |= {"r_squared": [1 - (6 / 9) / (26 / 3)]}
    expected |= {"attn_share": [[math.log(2)]] * 2, "mlp_share": [[1 - math.log(2)], [3 - math.log(2)]]}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), torch.tensor(value, dtype=torch.float64))


@settings(max_examples=50, deadline=None)
@given(rate=st.floats(0.01, 3.0), n=st.integers(2, 40), scale=st.floats(0.1, 10.0))
def test_expodistance_of_exponential_growth_is_zero(rate: float, n: int, scale: float):
    alpha = torch.full((n, 1), rate, dtype=torch.float64)
    assert expodistance(alpha) < 1e-20
    uneven = alpha + torch.linspace(-rate / 2, rate / 2, n, dtype=torch.float64)[:, None]
    torch.testing.assert_close(expodistance(scale * uneven), expodistance(uneven))
