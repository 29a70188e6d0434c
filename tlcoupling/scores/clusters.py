"""P-values and intervals of correlations whose rows come in clusters, such as the checkpoints of training runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tlcoupling.results.intervals import EQUAL

LEAST = 4  # clusters with which p-values and intervals hold
_ONE = 1 - 1e-12  # a larger |r| is rounding alone


class Uncertainty(NamedTuple):
    """The two-sided p-value of r and the ends of its interval.

    All are NaN with fewer than 4 clusters, where r is NaN with all clusters or without one of them, and where r is the
    same without any of them, such as a rank correlation of 1: nothing then tells how far it varies.
    """

    p: float
    low: float
    high: float


def jackknife(
    correlation: Callable[[NDArray[np.bool_]], float], clusters: Sequence[str], confidence: float
) -> Uncertainty:
    r"""Return how certain a correlation is, given that only different clusters are independent.

    With z = artanh r, and z_(g) the same without cluster g of G, the standard error is
    sqrt((G - 1) / G sum_g (z_(g) - mean z_(g))^2) (Efron 1982), and z over it has nearly Student's distribution with
    G - 2 degrees of freedom. Clusters may differ in size; each row may be its own. Simulated at 4 to 28 clusters of
    1 or 10 rows (random walks, trends, shared levels), 3 to 6 % of p-values are at most 0.05 by chance, and 95 %
    intervals cover in 94 to 98 % of samples (``benchmarks/chance.py``). Rows with heavy tails (lognormal, sigma 1)
    reach 10 %.

    Args:
        correlation: the correlation of the rows that a mask selects.
        clusters: each row's cluster.
        confidence: level of the interval.
    """
    from scipy.stats import t

    of, names = np.array(clusters), list(dict.fromkeys(clusters))
    count = len(names)
    if count < LEAST:
        return Uncertainty(np.nan, np.nan, np.nan)
    whole = correlation(np.ones(len(of), bool))
    if not np.isfinite(whole):
        return Uncertainty(np.nan, np.nan, np.nan)
    without = np.array([correlation(of != name) for name in names])
    z, each = np.arctanh(np.clip(whole, -_ONE, _ONE)), np.arctanh(np.clip(without, -_ONE, _ONE))
    error = np.sqrt((count - 1) / count * np.square(each - each.mean()).sum())
    if not error > EQUAL * np.abs(each).max():
        return Uncertainty(np.nan, np.nan, np.nan)
    half = t.ppf((1 + confidence) / 2, count - 2) * error
    p = float(2 * t.sf(abs(z) / error, count - 2))
    return Uncertainty(p, float(np.tanh(z - half)), float(np.tanh(z + half)))
