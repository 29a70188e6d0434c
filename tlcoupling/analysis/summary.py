"""Summary numbers of an analysis for the terminal, the report page and a sweep's table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from tlcoupling.coupling.chance import CouplingTest
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.metric import off_diagonal_mean
from tlcoupling.trajectory.growth import Growth
from tlcoupling.trajectory.linearity import Linearity


@dataclass(frozen=True)
class CouplingRow:
    """One sublayer's coupling: means over the ordered pairs of different layers and over the measured tokens.

    Attributes:
        sublayer: ``block``, or one of ``trace.sublayers``: ``attn`` (or ``mixer``), ``cross_attn``, ``mlp``.
        k: number of singular vectors compared.
        coupling: c_K.
        null: the coupling expected for independent random bases.
        null_std: its standard deviation for a single pair.
        excess: coupling minus null.
        excess_determined: the same over the pairs whose singular vectors are determined; None without such a pair, or
            if unknown.
        p: p-value of the mean excess (``Coupling.test``); None without a test.
        excess_low: lower end of its interval; likewise.
        excess_high: upper end.
        overlap_u: overlap of the subspaces that two layers write to.
        overlap_v: overlap of the subspaces that two layers read from.
        overlap_null_u: the overlap that random subspaces would have of the first kind, by their effective width.
        overlap_null_v: of the second kind.
        undetermined: how many of the K pairs of singular vectors of all layers and tokens are not determined; None if
            unknown.
    """

    sublayer: str
    k: int
    coupling: float
    null: float
    null_std: float
    excess: float
    excess_determined: float | None
    p: float | None
    excess_low: float | None
    excess_high: float | None
    overlap_u: float
    overlap_v: float
    overlap_null_u: float
    overlap_null_v: float
    undetermined: int | None


@dataclass(frozen=True)
class LinearityRow:
    """The line-shape scores of one path over tokens; ``random`` is sqrt(n), the score of n independent random steps."""

    path: str
    steps: int
    mean: float
    lowest: float
    highest: float
    random: float


@dataclass(frozen=True)
class GrowthSummary:
    """Growth over tokens: rates and slopes are per layer, and the two shares sum to the rate.

    The shares are None unless blocks are sequential.
    """

    median_expodistance: float
    mean_rate: float
    attn_share: float | None
    mlp_share: float | None
    mean_slope: float
    mean_r_squared: float


def coupling_rows(coupling: DepthCoupling, test: CouplingTest | None = None) -> list[CouplingRow]:
    """Return one row per sublayer and K, all sublayers of the first K before those of the second.

    Args:
        coupling: the measurement.
        test: its rotation test; of one token alone, because several tokens are several tests.
    """
    of_width = coupling.overlap_null[:, None, None].expand_as(coupling.values)  # in files of version 0.1
    matrices = {name: getattr(coupling, name) for name in ("values", "null", "null_std", "excess")}
    matrices |= {"overlap_u": coupling.overlap_u, "overlap_v": coupling.overlap_v}
    for name in ("overlap_null_u", "overlap_null_v"):
        matrices[name] = of_width if getattr(coupling, name) is None else getattr(coupling, name)
    means = {name: off_diagonal_mean(matrix).double().nanmean(1) for name, matrix in matrices.items()}
    determined = coupling.determined
    means["coupling"] = means.pop("values")
    some = {} if determined is None else {"excess_determined": coupling.mean("excess", determined=True).nanmean(1)}
    if test is not None:
        some |= {"p": test.p[:, 0, :, 0], "excess_low": test.low[:, 0, :, 0], "excess_high": test.high[:, 0, :, 0]}
    optional = ("excess_determined", "p", "excess_low", "excess_high")

    def numbers(row: int, column: int) -> dict[str, Any]:
        known = {name: each[row, column].item() for name, each in some.items()}
        return {
            **{name: mean[row, column].item() for name, mean in means.items()},
            **{name: known[name] if math.isfinite(known.get(name, math.nan)) else None for name in optional},
        }

    return [
        CouplingRow(
            sublayer,
            k,
            **numbers(row, column),
            undetermined=None if determined is None else int((~determined[row, ..., :k]).sum()),
        )
        for column, k in enumerate(coupling.ks)
        for row, sublayer in enumerate(coupling.sublayers)
    ]


def linearity_rows(linearity: Linearity) -> list[LinearityRow]:
    """Return one row per path."""
    rows = []
    for path, steps, scores in zip(linearity.paths, linearity.steps, linearity.lss, strict=True):
        finite = scores[scores.isfinite()]
        lowest, highest = (finite.min(), finite.max()) if len(finite) else (scores[0], scores[0])
        rows.append(LinearityRow(path, steps, finite.mean().item(), lowest.item(), highest.item(), math.sqrt(steps)))
    return rows


def growth_summary(growth: Growth) -> GrowthSummary:
    """Return medians or means over tokens; NaN values are ignored."""
    attn, mlp = growth.attn_share, growth.mlp_share
    return GrowthSummary(
        median_expodistance=growth.expodistance.nanquantile(0.5).item(),
        mean_rate=growth.rate.nanmean().item(),
        attn_share=None if attn is None else attn.nanmean().item(),
        mlp_share=None if mlp is None else mlp.nanmean().item(),
        mean_slope=growth.slope.nanmean().item(),
        mean_r_squared=growth.r_squared.nanmean().item(),
    )


def straightest(
    scores: Float[Tensor, " pos"], kept: Bool[Tensor, " pos"] | None = None, most: int = 5
) -> tuple[list[int], list[int]]:
    """Return the positions of the most and of the least straight of the kept tokens, the extreme one first.

    No token is in both lists, so both are empty for a single token. Tokens whose score is NaN are left out.
    """
    order = [pos for pos in scores.argsort().tolist() if math.isfinite(scores[pos]) and (kept is None or kept[pos])]
    count = min(most, len(order) // 2)
    return order[:count], order[len(order) - count :][::-1]
