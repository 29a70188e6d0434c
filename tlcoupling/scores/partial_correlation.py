"""Correlation of two variables across models, and what is left of it when others are held fixed.

The arithmetic of ``statistics``, on plain arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tlcoupling.errors import ArgumentError
from tlcoupling.results.intervals import EQUAL

# What least squares leave of a column that others determine, relative to its length: rounding, at any usual size.
_NOTHING = 1e-9


class Partial(NamedTuple):
    """A correlation with others held fixed.

    Attributes:
        r: Pearson's correlation of the residuals; NaN where the others determine one of the two, or where no degree of
            freedom is left, as of two models, which always lie on a line.
        p: two-sided, by Student's t; NaN with r.
        freedom: degrees of it, n - 2 - (rank of what is held fixed), 0 at least.
    """

    r: float
    p: float
    freedom: int


def partial_correlation(
    x: ArrayLike, y: ArrayLike, given: Sequence[ArrayLike] = (), within: Sequence[object] | None = None
) -> Partial:
    """Pearson's correlation of x and y given other variables: of what is left of both after a linear fit on these.

    Args:
        x: one number per model.
        y: likewise.
        given: variables held fixed, linearly.
        within: labels of groups, such as widths: x and y are compared within them alone, whatever the groups do to
            either (a fixed effect for each).

    Raises:
        ArgumentError: lengths that differ, or values that are not finite.

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
    left = [_left_over(column, basis) for column in columns[:2]]
    freedom = size - basis.shape[1] - 1
    if freedom < 1 or any(each is None for each in left):
        return Partial(np.nan, np.nan, max(freedom, 0))
    r = float(np.clip(left[0] @ left[1], -1.0, 1.0))  # type: ignore[operator]
    return Partial(r, _p_value(r, freedom), freedom)


def r_squared_of_groups(x: ArrayLike, within: Sequence[object]) -> float:
    """The share of x's variance that lies between groups: what the best function of the labels explains (eta^2)."""
    values = _column("x", x)
    total = _left_over(values, _orthonormal(np.ones((len(values), 1))))
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
    """An orthonormal basis of the columns' span."""
    scaled = columns / np.maximum(np.abs(columns).max(0), np.finfo(float).tiny)
    u, s, _ = np.linalg.svd(scaled, full_matrices=False)
    return u[:, s > EQUAL * s[0] * max(scaled.shape)]


def _left_over(column: NDArray[np.float64], basis: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """What is orthogonal to a basis, of length 1; None where nothing is."""
    rest = column - basis @ (basis.T @ column)
    rest = rest - basis @ (basis.T @ rest)  # once more, for the digits that were lost
    length = np.linalg.norm(rest)
    return None if length <= _NOTHING * np.linalg.norm(column) else rest / length
