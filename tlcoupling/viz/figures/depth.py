"""Curves against depth: singular values with their fitted law, and coupling by distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.arguments import as_list
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.dynamics.spectrum import SingularValueProfile
from tlcoupling.errors import ArgumentError
from tlcoupling.results.intervals import LEAST, mean_interval
from tlcoupling.viz.figures.select import chosen_k, depth_of, index_of, measured_on, require_kind
from tlcoupling.viz.figures.style import (
    FIT,
    NULL,
    RANDOM,
    SUBLAYER_COLORS,
    WIDTH,
    depth_colors,
    heading,
    new_figure,
    plain_log,
    settle,
    style,
    token_label,
)
from tlcoupling.viz.plain import formula

_ALONE = 4.2  # inches, for one panel: as wide as its title

Couplings: TypeAlias = (
    DepthCoupling | Analysis | Sequence[DepthCoupling | Analysis] | Mapping[str, DepthCoupling | Analysis]
)


def singular_values(result: SingularValueProfile, *, token: int | None = None) -> Figure:
    """Draw top singular values against depth, one panel per sublayer, and the law 1 / (a + b l) fitted to the largest.

    Args:
        result: the result of ``tlc.singular_value_profile``.
        token: a measured position; by default the last.

    Raises:
        ArgumentError: the token was not measured.
    """
    require_kind("result", result, SingularValueProfile, "tlc.singular_value_profile(coupling)")
    index = len(result.positions) - 1 if token is None else index_of("token", token, result.positions)
    n, ranks = len(result.sublayers), result.singular_values.shape[-1]
    with style():
        figure = new_figure(WIDTH if n > 1 else _ALONE, 3.0)
        grid: Any = figure.subplots(1, n, sharey=True, squeeze=False)
        bounds = BoundaryNorm(np.arange(0.5, ranks + 1), ranks)
        colors = depth_colors().resampled(ranks)
        for which, (axes, name) in enumerate(zip(grid[0], result.sublayers, strict=True)):
            values = result.singular_values[which, index].double().numpy()
            for rank in reversed(range(ranks)):
                axes.plot(result.layers, values[:, rank], color=colors(rank), linewidth=1.0, marker=".", markersize=3)
            slope, start, fit = (
                float(each[which, index, 0]) for each in (result.slope, result.intercept, result.r_squared)
            )
            law = f"1 / ({start:.3g} {'−' if slope < 0 else '+'} {abs(slope):.2g} l)\nR² = {fit:.2f}"
            fitted = result.fitted[which, index, :, 0].double().numpy()
            axes.plot(result.layers, fitted, color=FIT, linestyle=(0, (4, 2)), linewidth=1.6, label=law)
            axes.set_yscale("log")
            axes.set_title(name)
            axes.set_xlabel("layer l")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.legend(loc="upper right", handlelength=2.2, title="fit to s₁(l)", title_fontsize=7, alignment="left")
        plain_log(grid[0, 0].yaxis)
        grid[0, 0].set_ylabel("singular value")
        bar = figure.colorbar(ScalarMappable(bounds, colors), ax=grid, aspect=30, pad=0.01, label="rank k")
        ticks = [rank for rank in range(1, ranks + 1) if ranks <= 10 or rank == 1 or rank % _every(ranks) == 0]
        bar.set_ticks(ticks, labels=[str(rank) for rank in ticks])
        bar.ax.invert_yaxis()
        bar.ax.tick_params(length=0)
        heading(
            figure,
            "Singular values of residual Jacobians against depth",
            f"{measured_on(result)} · {token_label(result.positions[index], result.tokens[index])}",
        )
        settle(figure)
    return figure


def coupling_by_distance(
    result: Couplings, *, baseline: Couplings | None = None, k: int | None = None, confidence: float = 0.95
) -> Figure:
    """Draw the mean coupling of layers at distance 1, 2, ... and the null, one panel per sublayer on one scale.

    The band around the mean is its confidence interval over prompts, from 6 couplings on. A single prompt has no
    interval: its tokens are not independent.

    Args:
        result: a depth coupling or an analysis, or those of several prompts.
        baseline: the same for another model, such as ``tlc.random_baseline(model)``.
        k: a measured K; by default the first.
        confidence: level of the intervals.

    Raises:
        ArgumentError: K was not measured, there are fewer than two layers, the couplings differ in layers or metric, or
            those of one list are of several models.

    Warns:
        UserWarning: several couplings have no interval, because they are fewer than 6 or equal.
    """
    many, other = _listed("result", result), [] if baseline is None else _listed("baseline", baseline)
    first = many[0]
    for one in (*many, *other):
        if (one.layers, one.sublayers, one.bases, one.normalizer, one.absolute) != (
            first.layers,
            first.sublayers,
            first.bases,
            first.normalizer,
            first.absolute,
        ):
            raise ArgumentError("baseline" if one in other else "result", one, f"the layers and metric of {first!r}")
    for argument, group in (("result", many), ("baseline", other)):
        if len(names := sorted({one.provenance.model_name for one in group})) > 1:
            raise ArgumentError(argument, names, "couplings of one model over prompts; those of another as baseline=")
    if len(first.layers) < 2:
        raise ArgumentError("result", first, "a coupling of two layers or more")
    n = len(first.sublayers)
    steps = np.diff(first.layers)
    apart = np.arange(1, len(first.layers)) * (steps[0] if (steps == steps[0]).all() else 1)
    unit = "prompt" if len(many) > 1 else "token"
    count = len(many) if len(many) > 1 else len(first.positions)
    with style():
        figure = new_figure(WIDTH if n > 1 else _ALONE, 2.9)
        grid: Any = figure.subplots(1, n, sharey=True, squeeze=False)
        for axes, name, which in zip(grid[0], first.sublayers, range(n), strict=True):
            color = SUBLAYER_COLORS.get(name, "#000000")
            _curve(axes, apart, _profiles(many, "values", which, k), color, "-", "o", "coupling", confidence)
            _curve(axes, apart, _profiles(many, "null", which, k), NULL, (0, (4, 2)), "", "null")
            if other:
                _curve(axes, apart, _profiles(other, "values", which, k), RANDOM, "-", "s", "baseline", confidence)
                _curve(axes, apart, _profiles(other, "null", which, k), NULL, ":", "", "null of the baseline")
            axes.set_title(name, color=color)
            axes.set_xlabel("layers apart" if (steps == steps[0]).all() else "distance in the list of measured layers")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        grid[0, 0].legend(loc="upper right", handlelength=2.4)
        grid[0, 0].set_ylabel(f"coupling c, K = {chosen_k(first, k)[1]}")
        where = f"mean over {count} {unit}s" if count > 1 else token_label(first.positions[0], first.tokens[0])
        band = f" · band: {confidence:.0%} interval over prompts" if len(many) >= LEAST else ""
        heading(
            figure,
            "Coupling by distance between layers",
            f"{measured_on(first)} · {where}{band} · {formula(first)}",
        )
        settle(figure)
    return figure


def _listed(argument: str, given: Any) -> list[DepthCoupling]:
    """Return the couplings of one or several prompts as a list."""
    several = list(given.values()) if isinstance(given, Mapping) else as_list(given)
    if not several:
        raise ArgumentError(argument, given, "one depth coupling or several")
    return [depth_of(argument, one) for one in several]


def _profiles(couplings: Sequence[DepthCoupling], quantity: Any, sublayer: int, k: int | None) -> torch.Tensor:
    """Return profiles ``[prompt, distance]``, each the mean over the prompt's tokens."""
    return torch.stack(
        [one.profile(quantity)[sublayer, :, chosen_k(one, k)[0]].double().nanmean(0) for one in couplings]
    )


def _curve(
    axes: Axes,
    x: np.ndarray,
    values: torch.Tensor,
    color: str,
    line: Any,
    mark: str,
    name: str,
    confidence: float | None = None,
) -> None:
    """Draw the mean over prompts, and its interval if there are several."""
    axes.plot(x, values.nanmean(0).numpy(), color=color, linestyle=line, marker=mark, label=name, markersize=2.5)
    if confidence is not None and len(values) > 1:
        band = mean_interval(values, confidence, name)
        axes.fill_between(x, band["low"].numpy(), band["high"].numpy(), color=color, alpha=0.2, linewidth=0)


def _every(ranks: int) -> int:
    return next(step for step in (2, 5, 10, 20, 50, 100) if ranks <= 12 * step)
