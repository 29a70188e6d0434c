"""Intervals of means over units: how often they cover, which units count, and when there is no interval."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import t

from tlcoupling.errors import ArgumentError
from tlcoupling.results.intervals import LEAST, mean_interval


def ends(values: torch.Tensor, confidence: float = 0.95) -> dict[str, torch.Tensor]:
    return mean_interval(values, confidence, "coupling")


@pytest.mark.parametrize("n", [6, 8, 20])
@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_intervals_cover_as_often_as_they_say(kind: str, n: int):
    """At least 93 % of 20 000 samples, which tell a share of 93 % to 0.2 %; and not 97 %: they are not just wide."""
    values = torch.randn(n, 20_000, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    truth = 0.0 if kind == "normal" else math.exp(0.125)
    found = ends(values if kind == "normal" else (0.5 * values).exp())
    share = float(((found["low"] < truth) & (truth < found["high"])).double().mean())
    assert 0.93 - 2 * 0.002 < share < 0.97


def test_the_ends_solve_the_transformed_equation():
    """T(w) is Student's quantile at the ends, found here by root search on the definition."""
    x = torch.tensor([1.0, 1.2, 1.3, 1.9, 2.5, 6.0, 7.0], dtype=torch.float64)
    found, n, m, s = ends(x[:, None], 0.9), len(x), float(x.mean()), float(x.std())
    k = float(((x - m) ** 3).mean() / x.var(correction=0) ** 1.5) * math.sqrt(n * (n - 1)) / (n - 2)

    def transformed(mu: float) -> float:
        w = (m - mu) / s
        return math.sqrt(n) * (w + k * w**2 / 3 + k**2 * w**3 / 27 + k / (6 * n))

    quantile = float(t.ppf(0.95, n - 1))
    for name, value in (("low", quantile), ("high", -quantile)):
        expected = brentq(lambda mu, value=value: transformed(mu) - value, -100, 100)
        assert float(found[name][0]) == pytest.approx(expected, abs=1e-6)
    assert float(found["standard_error"][0]) == pytest.approx(s / math.sqrt(n))
    assert found["high"] - m > m - found["low"] > 0  # the long tail lies above


def test_few_units_have_a_mean_and_no_interval():
    values = torch.randn(LEAST, 2, dtype=torch.float64)
    values[2, 1] = math.nan
    with pytest.warns(UserWarning) as raised:
        found = ends(values)
    messages = sorted(str(one.message) for one in raised)
    assert messages == [
        "interval of coupling: 1 of 6 prompts have no value and are left out",
        "interval of coupling: 5 prompts are too few, the ends are NaN: 6 or more are needed",
    ]
    torch.testing.assert_close(found["estimate"], values.nanmean(0))
    assert found["units"].tolist() == [6, 5] and found["low"].isnan().tolist() == [False, True]
    assert float(found["standard_error"][1]) == pytest.approx(float(values[[0, 1, 3, 4, 5], 1].std()) / math.sqrt(5))
    with pytest.warns(UserWarning, match="0 prompts are too few"):
        found = ends(torch.full((4, 1), math.nan))
    assert found["estimate"].isnan().all() and found["units"].tolist() == [0]
    with pytest.warns(UserWarning, match="1 prompts are too few"):
        found = ends(torch.ones(1, 1))
    assert float(found["estimate"]) == 1 and found["standard_error"].isnan().all()


def test_no_spread_no_interval():
    with pytest.warns(UserWarning, match="all 7 prompts are equal"):
        found = ends(torch.full((7, 1), 0.1 + 0.2, dtype=torch.float64))
    assert all(found[name].isnan().all() for name in ("low", "high", "standard_error"))
    assert float(found["estimate"]) == pytest.approx(0.3) and found["units"].tolist() == [7]


@settings(max_examples=15)
@given(shift=st.floats(-5, 5), scale=st.floats(0.1, 10), seed=st.integers(0, 1000))
def test_intervals_move_with_their_data(shift: float, scale: float, seed: int):
    values = torch.randn(12, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain, moved, turned = ends(values), ends(shift + scale * values), ends(-values)
    for name, other in (("estimate", "estimate"), ("low", "high"), ("high", "low")):
        torch.testing.assert_close(moved[name], shift + scale * plain[name])
        torch.testing.assert_close(turned[name], -plain[other])
    assert ends(values, 0.5)["low"] > plain["low"]


def test_a_level_beyond_one_is_an_error():
    with pytest.raises(ArgumentError, match=r"confidence=95\b.*between 0 and 1"):
        ends(torch.randn(8, 1), 95.0)
