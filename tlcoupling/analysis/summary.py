"""The few numbers that stand for an analysis: for the terminal, the head of the page and the table of a sweep."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.metric import off_diagonal_mean
from tlcoupling.trajectory.growth import Growth
from tlcoupling.trajectory.linearity import Linearity


@dataclass(frozen=True)
class CouplingRow:
    """One sublayer's coupling: means over the ordered pairs of different layers and over the measured tokens.

    Attributes:
        sublayer: ``block``, ``attn`` or ``mlp``.
        k: number of singular vectors compared.
        coupling: c_K.
        null: what independent random bases would give.
        null_std: standard deviation of that for a single pair.
        excess: coupling minus null.
        overlap_u: overlap of the spaces that two layers write.
        overlap_v: overlap of the spaces that two layers read.
        overlap_null: the overlap of random subspaces, K / d_model.
    """

    sublayer: str
    k: int
    coupling: float
    null: float
    null_std: float
    excess: float
    overlap_u: float
    overlap_v: float
    overlap_null: float


@dataclass(frozen=True)
class LinearityRow:
    """The line-shape scores of one path, over tokens; ``random`` is sqrt(n), that of n independent random steps."""

    path: str
    steps: int
    mean: float
    lowest: float
    highest: float
    random: float


@dataclass(frozen=True)
class GrowthSummary:
    """Growth over tokens: rates and slopes are per layer, and the two shares add up to the rate.

    The shares are None unless blocks are sequential.
    """

    median_expodistance: float
    mean_rate: float
    attn_share: float | None
    mlp_share: float | None
    mean_slope: float
    mean_r_squared: float


def coupling_rows(coupling: DepthCoupling) -> list[CouplingRow]:
    """One row per sublayer and K, all sublayers of the first K before the second."""
    means = {
        name: off_diagonal_mean(getattr(coupling, name)).double().nanmean(1)
        for name in ("values", "null", "null_std", "excess", "overlap_u", "overlap_v")
    }  # [sublayer, k] each
    return [
        CouplingRow(
            sublayer,
            k,
            *(mean[row, column].item() for mean in means.values()),
            overlap_null=coupling.overlap_null[column].item(),
        )
        for column, k in enumerate(coupling.ks)
        for row, sublayer in enumerate(coupling.sublayers)
    ]


def linearity_rows(linearity: Linearity) -> list[LinearityRow]:
    """One row per path."""
    rows = []
    for path, steps, scores in zip(linearity.paths, linearity.steps, linearity.lss, strict=True):
        finite = scores[scores.isfinite()]
        lowest, highest = (finite.min(), finite.max()) if len(finite) else (scores[0], scores[0])
        rows.append(LinearityRow(path, steps, finite.mean().item(), lowest.item(), highest.item(), math.sqrt(steps)))
    return rows


def growth_summary(growth: Growth) -> GrowthSummary:
    """Median or mean over tokens, leaving out those for which a number is not defined."""
    attn, mlp = growth.attn_share, growth.mlp_share
    return GrowthSummary(
        median_expodistance=growth.expodistance.nanquantile(0.5).item(),
        mean_rate=growth.rate.nanmean().item(),
        attn_share=None if attn is None else attn.nanmean().item(),
        mlp_share=None if mlp is None else mlp.nanmean().item(),
        mean_slope=growth.slope.nanmean().item(),
        mean_r_squared=growth.r_squared.nanmean().item(),
    )


def by_straightness(scores: Float[Tensor, " pos"]) -> list[int]:
    """Positions from the straightest token to the least straight one, without those whose score is NaN."""
    return [pos for pos in scores.argsort().tolist() if math.isfinite(scores[pos])]


def d_model_of(coupling: DepthCoupling) -> int:
    """The width that the null of the overlap was computed for."""
    return round(coupling.ks[0] / coupling.overlap_null[0].item())
