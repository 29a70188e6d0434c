"""Bootstrap intervals of means: which units count, and when there is no interval."""

from __future__ import annotations

import math

import pytest
import torch

from tlcoupling.results.intervals import bootstrap_mean


def test_two_units_have_an_interval_and_one_has_none():
    values = torch.tensor([[1.0, 5.0], [3.0, math.nan]])
    with pytest.warns(UserWarning, match=r"fewer than two prompts \(1\)"):
        found = bootstrap_mean(values, 0.95, 9999, 0, "coupling", "prompt")
    assert found["estimate"].tolist() == [2.0, 5.0] and found["units"].tolist() == [2, 1]
    assert 1 <= found["low"][0] < 2 < found["high"][0] <= 3
    # means of two draws of 1 and 3 are 1, 2, 2 and 3: a variance of 1/2, and 9999 draws tell its root to 1 %
    assert float(found["standard_error"][0]) == pytest.approx(math.sqrt(1 / 2), rel=0.03)
    assert all(found[name][1].isnan() for name in ("low", "high", "standard_error"))
