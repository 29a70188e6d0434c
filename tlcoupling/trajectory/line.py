"""Batched least-squares lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Line:
    """Least-squares lines y = intercept + slope x.

    Attributes:
        slope: slope of each line.
        intercept: intercept of each line.
        r_squared: explained share of the variance of y; NaN if y does not vary.
    """

    slope: Float[Tensor, "*rest"]
    intercept: Float[Tensor, "*rest"]
    r_squared: Float[Tensor, "*rest"]


def fit_line(x: Float[Tensor, " n"], y: Float[Tensor, "n *rest"]) -> Line:
    """Return the least-squares line of each column of y on x; NaN if x has only one value."""
    center, shape = x.mean(), (-1, *[1] * (y.ndim - 1))
    spread, deviation = (x - center).reshape(shape), y - y.mean(0)
    slope = (spread * deviation).sum(0) / spread.square().sum()
    left = (deviation - slope * spread).square().sum(0)
    total = deviation.square().sum(0)
    r_squared = torch.where(total > 0, 1 - left / total, torch.nan)
    return Line(slope, y.mean(0) - slope * center, r_squared)
