"""Partial correlation and shares of variance, against residuals and by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from tlcoupling.scores.partial_correlation import partial_correlation, r_squared_of_groups

RNG = np.random.default_rng(0)


def test_partial_correlation_is_that_of_residuals():
    x, y, *given_ = RNG.normal(size=(4, 15))
    design = np.stack([np.ones(15), *given_], 1)
    left = [each - design @ np.linalg.lstsq(design, each, rcond=None)[0] for each in (x, y)]
    r, _ = scipy.stats.pearsonr(*left)
    t = r * np.sqrt(11 / (1 - r * r))
    for sign in (1, -1):
        found = partial_correlation(x, sign * y, given_)
        assert found.r == pytest.approx(sign * r, abs=1e-12) and found.freedom == 15 - 2 - 2
        assert found.p == pytest.approx(2 * scipy.stats.t.sf(abs(t), 11), rel=1e-9)


def test_partial_correlation_within_groups_by_hand():
    x, y, groups = [1.0, 2.0, 3.0, 10.0, 12.0], [2.0, 1.0, 3.0, 0.0, 4.0], list("aaabb")
    centred_x, centred_y = np.array([-1, 0, 1, -1, 1.0]), np.array([0, -1, 1, -2, 2.0])
    expected = centred_x @ centred_y / np.linalg.norm(centred_x) / np.linalg.norm(centred_y)
    found = partial_correlation(x, y, within=groups)
    assert found.r == pytest.approx(expected, abs=1e-12) and found.freedom == 5 - 2 - 1
    # a group of one says nothing
    assert partial_correlation([*x, 99.0], [*y, -99.0], within=[*groups, "c"]).r == pytest.approx(expected, abs=1e-12)


def test_share_between_groups_is_that_of_an_analysis_of_variance():
    x, groups = RNG.normal(size=12), list("aabbbccccddd")
    means = pd.Series(x).groupby(groups).transform("mean")
    expected = np.square(means - x.mean()).sum() / np.square(x - x.mean()).sum()
    assert r_squared_of_groups(x, groups) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(r_squared_of_groups(np.ones(4), list("aabb")))
