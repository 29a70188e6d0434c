"""Growth: its numbers by hand, and properties of expodistance."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import CASES, TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
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


@settings(max_examples=50)
@given(rate=st.floats(0.01, 3.0), n=st.integers(2, 40), scale=st.floats(0.1, 10.0))
def test_expodistance_of_exponential_growth_is_zero(rate: float, n: int, scale: float):
    alpha = torch.full((n, 1), rate, dtype=torch.float64)
    assert expodistance(alpha) < 1e-20
    uneven = alpha + torch.linspace(-rate / 2, rate / 2, n, dtype=torch.float64)[:, None]
    torch.testing.assert_close(expodistance(scale * uneven), expodistance(uneven))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_that_hardly_move_have_no_expodistance(dtype: torch.dtype):
    """Position 1 keeps its norm, 2 returns to it, 3 moves by rounding, 4 is zero; 0 and 5 grow, 5 by 1e-4 in all."""
    eps = torch.finfo(dtype).eps
    norms = torch.tensor([[1, 2, 4], [7, 7, 7], [3, 5, 3], [90, 90 * (1 - eps), 90 * (1 + eps)], [0, 1, 2]]).mT
    norms = torch.cat([norms.double(), torch.tensor([[1.0], [1.00002], [1.0001]]).double()], dim=1).to(dtype)
    tokens = tuple("abcdef")
    with pytest.warns(UserWarning, match=r"NaN at position 1 \('b'\), 2 \('c'\), 3 \('d'\), 4 \('e'\):"):
        found = growth_of_norms(norms, None, Provenance("model"), tokens)
    assert found.expodistance.isnan().tolist() == found.cv.isnan().tolist() == [False, True, True, True, True, False]
    assert found.expodistance[0] < 1e-12  # doubles in each layer
    # increments of 2e-5 and 8e-5: (3e-5 / 5e-5)^2
    torch.testing.assert_close(found.expodistance[5], torch.tensor(0.36, dtype=dtype), rtol=0.02, atol=0)


def test_growth_does_not_depend_on_the_scale_of_the_stream():
    """At 1e-25 the square of a float32 number is zero: norms were zero, and growth NaN."""
    stream = {
        name: value[0]
        for name, value in CASES[0].model(torch.float32).run_with_cache(TOKENS[None])[1].items()
        if name.startswith("blocks.")
    }
    expected = tlc.growth(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tlc.growth({name: value * 1e-25 for name, value in stream.items()})
    torch.testing.assert_close(found.alpha, expected.alpha, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.expodistance, expected.expodistance, rtol=1e-3, atol=0)
