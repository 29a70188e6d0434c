"""Correlation and partial correlation of two variables across models, on plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tlcoupling.errors import ArgumentError
from tlcoupling.results.intervals import EQUAL

# Relative length of a least-squares residual that is rounding alone, at any usual size.
_NOTHING = 1e-9


class Partial(NamedTuple):
    """A partial correlation.

    Attributes:
        r: Pearson's correlation of the residuals. NaN if the fixed variables determine x or y, or if no degree of
            freedom is left (two models always lie on a line).
        p: two-sided p-value, by Student's t; NaN with r.
        freedom: degrees of freedom, n - 2 - (rank of the fixed variables), at least 0.
    """

    r: float
    p: float
    freedom: int


def partial_correlation(
    x: ArrayLike, y: ArrayLike, given: Sequence[ArrayLike] = (), within: Sequence[object] | None = None
) -> Partial:
    """Return Pearson's correlation of the residuals of x and y after a linear fit on other variables.

    Args:
        x: one number per model.
        y: one number per model.
        given: variables held fixed, linearly.
        within: group labels, such as widths. x and y are compared only within groups (a fixed effect for each).

    Raises:
        ArgumentError: unequal lengths, or values that are not finite.

    Example:
        >>> round(partial_correlation([1, 2, 3, 5], [2, 1, 4, 3], within=["a", "a", "b", "b"]).r, 4)
        -0.9487
    """
    columns = [_column("x", x), _column("y", y), *(_column("given", each) for each in given)]
    size = len(columns[0])
    if any(len(column) != size for column in columns) or (within is not None and len(within) != size):
        raise ArgumentError("given", [len(column) for column in columns], "as many values in each variable as in x")
    if size < 3:
        return Partial(np.nan, np.nan, 0)
    held = [np.ones(size), *columns[2:]]
    if within is not None:
        names = list(dict.fromkeys(within))
        held += [np.array([label == name for label in within], float) for name in names]
    basis = _orthonormal(np.stack(held, 1))
    residuals = [_unit_residual(column, basis) for column in columns[:2]]
    freedom = size - basis.shape[1] - 1
    if freedom < 1 or any(each is None for each in residuals):
        return Partial(np.nan, np.nan, max(freedom, 0))
    r = float(np.clip(residuals[0] @ residuals[1], -1.0, 1.0))  # type: ignore[operator]
    return Partial(r, _p_value(r, freedom), freedom)


def r_squared_of_groups(x: ArrayLike, within: Sequence[object]) -> float:
    """Return the share of x's variance between groups, the most that any function of the labels explains (eta^2)."""
    values = _column("x", x)
    total = _unit_residual(values, _orthonormal(np.ones((len(values), 1))))
    if total is None:
        return float("nan")
    inside = sum(
        float(np.square(group - group.mean()).sum())
        for name in dict.fromkeys(within)
        for group in [total[[label == name for label in within]]]
    )
    return 1.0 - inside  # total has length 1


def _p_value(r: float, freedom: int) -> float:
    from scipy.stats import t

    if abs(r) == 1.0:
        return 0.0
    return float(2 * t.sf(abs(r) * np.sqrt(freedom / (1 - r * r)), freedom))


def _column(name: str, values: ArrayLike) -> NDArray[np.float64]:
    column = np.asarray(values, float)
    if column.ndim != 1 or not np.isfinite(column).all():
        raise ArgumentError(name, values, "one finite number per model")
    return column


def _orthonormal(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an orthonormal basis of the columns' span."""
    scaled = columns / np.maximum(np.abs(columns).max(0), np.finfo(float).tiny)
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    return u[:, s > EQUAL * s[0] * max(scaled.shape)]


def _unit_residual(column: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Return the column's component orthogonal to a basis, scaled to length 1; None if it is rounding alone."""
    rest = column - basis @ (basis.T @ column)
    rest = rest - basis @ (basis.T @ rest)  # again, to recover lost digits
    length = np.linalg.norm(rest)
    return None if length <= _NOTHING * np.linalg.norm(column) else rest / length
