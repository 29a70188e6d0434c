"""Bootstrap intervals of means."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tlcoupling.arguments import check_int
from tlcoupling.errors import ArgumentError
from tlcoupling.results.base import Result

Unit = Literal["prompt", "token"]

BATCH = 2**24  # resampled numbers held at a time, at most
EQUAL = 1e-12  # relative spread below which numbers differ by rounding alone


@dataclass(frozen=True, repr=False, eq=False)
class Interval(Result):
    """A mean and its bootstrap interval.

    Attributes:
        estimate: the mean over units.
        low: lower end, NaN if there is no interval. Same axes.
        high: upper end. Same axes.
        standard_error: the bootstrap's standard error of the mean. Same axes.
        units: number of units with a value. Same axes.
        quantity: the averaged quantity.
        by: the unit, ``"prompt"`` or ``"token"``.
        confidence: level of the interval.
        axes: names of the axes of the tensors.
        labels: labels of each axis.
    """

    estimate: Float[Tensor, "*axes"]
    low: Float[Tensor, "*axes"]
    high: Float[Tensor, "*axes"]
    standard_error: Float[Tensor, "*axes"]
    units: Int[Tensor, "*axes"]
    quantity: str
    by: str
    confidence: float
    axes: tuple[str, ...]
    labels: tuple[tuple[Any, ...], ...]

    _quantities: ClassVar[tuple[str, ...]] = ("estimate", "low", "high", "standard_error", "units")

    def __repr__(self) -> str:
        """One line: the first number along each label of the first axis."""
        labels = self.labels[0]
        firsts = (getattr(self, name).reshape(len(labels), -1)[:, 0] for name in ("estimate", "low", "high"))
        lines = zip(labels, *firsts, strict=True)
        shown = ", ".join(f"{label} {mean:.4f} [{low:.4f}, {high:.4f}]" for label, mean, low, high in lines)
        return f"Interval({self.quantity}, {self.confidence:.0%} over {self.by}s: {shown})"

    def _arrays(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        return {name: (self.axes, getattr(self, name)) for name in self._quantities}

    def _coords(self) -> dict[str, Sequence[Any]]:
        return dict(zip(self.axes, self.labels, strict=True))


def bootstrap_mean(
    values: Float[Tensor, "unit *axes"], confidence: float, resamples: int, seed: int, quantity: str, unit: Unit
) -> dict[str, Tensor]:
    """Return the mean over units with its bias-corrected and accelerated bootstrap interval (Efron 1987).

    Args:
        values: one number per unit; NaN if a unit has none.
        confidence: level of the interval, between 0 and 1.
        resamples: number of bootstrap samples.
        seed: seed of the resampling.
        quantity: the averaged quantity, for the warnings.
        unit: the unit averaged over.

    Returns:
        ``estimate``, ``low``, ``high``, ``standard_error`` and ``units`` of an ``Interval``.

    Raises:
        ArgumentError: an argument out of range.

    Warns:
        UserWarning: units without a value; fewer than two units, or equal units: the ends are NaN then.
    """
    check_bootstrap(confidence, resamples)
    cells = values.double().flatten(1).T.numpy()
    columns = np.full((5, len(cells)), np.nan)
    reasons = set()
    for index, cell in enumerate(cells):
        present = cell[np.isfinite(cell)]
        columns[4, index] = len(present)
        if len(present) < len(cell):
            reasons.add(f"{len(cell) - len(present)} of {len(cell)} {unit}s have no value and are left out")
        if len(present) > 0:
            columns[0, index] = present.mean()
        if len(present) < 2:
            reasons.add(f"fewer than two {unit}s ({len(present)}) have no spread: the ends are NaN")
        elif np.ptp(present) <= EQUAL * np.abs(present).max():
            reasons.add(f"all {len(present)} {unit}s are equal, so resampling shows no spread: the ends are NaN")
        else:
            columns[1:4, index] = bca((present,), np.mean, confidence, resamples, seed)
    for reason in sorted(reasons):
        warnings.warn(f"interval of {quantity}: {reason}", stacklevel=3)
    tensors = torch.from_numpy(columns).unflatten(1, values.shape[1:])
    names = ("estimate", "low", "high", "standard_error")
    return {**dict(zip(names, tensors, strict=False)), "units": tensors[4].long()}


def check_bootstrap(confidence: float, resamples: int) -> None:
    """Check the arguments that all bootstraps share.

    Raises:
        ArgumentError: an argument out of range.
    """
    if not 0 < confidence < 1:
        raise ArgumentError("confidence", confidence, "a number between 0 and 1")
    check_int("resamples", resamples, 100)


def bca(
    samples: tuple[NDArray[np.float64], ...],
    statistic: Callable[..., Any],
    confidence: float,
    resamples: int,
    seed: int,
) -> tuple[float, float, float]:
    """Return the low end, high end and standard error of a statistic (``scipy.stats.bootstrap``, BCa; Efron 1987).

    Args:
        samples: one array, or several paired arrays that are resampled together.
        statistic: function of the arrays along ``axis``.
        confidence: level of the interval.
        resamples: number of bootstrap samples.
        seed: seed of the resampling.
    """
    from scipy.stats import bootstrap

    result = bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        n_resamples=resamples,
        batch=max(1, BATCH // len(samples[0])),
        confidence_level=confidence,
        method="BCa",
        random_state=np.random.default_rng(seed),  # pyright: ignore[reportCallIssue]  # rng, from 1.15 on
    )
    return (*result.confidence_interval, result.standard_error)
