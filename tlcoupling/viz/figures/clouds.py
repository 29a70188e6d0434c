"""Points with names: token trajectories in their principal components, and coupling against score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from tlcoupling.dynamics.components import TrajectoryComponents
from tlcoupling.errors import ArgumentError
from tlcoupling.scores.correlate import Correlations
from tlcoupling.text import counted
from tlcoupling.trajectory.growth import SINK
from tlcoupling.viz.figures.point_labels import label_points
from tlcoupling.viz.figures.select import measured_on, require_kind
from tlcoupling.viz.figures.style import (
    FAINT,
    NULL,
    TRAINED,
    WIDTH,
    depth_colors,
    heading,
    label,
    new_figure,
    settle,
    style,
)

_MOST_NAMES = 60
_MOST_PANELS = 3


def trajectories(result: TrajectoryComponents) -> Figure:
    """Draw token trajectories in their principal components, coloured by depth, with equal units on both axes.

    The first component is drawn against each of the next (at most three panels), or against depth if it is the only
    one. A circle marks x^0 and a dot x^L. Tokens are named if there is room.

    Args:
        result: the result of ``tlc.trajectory_components``.
    """
    require_kind("result", result, TrajectoryComponents, "tlc.trajectory_components(trace)")
    points, shares = result.coordinates.double().numpy(), result.explained.tolist()
    depth, count, n = points.shape
    pairs = [(0, other) for other in range(1, min(n, _MOST_PANELS + 1))]
    texts = [label(text.strip() or text, 14) for text in result.tokens]
    norm, colors = Normalize(0, depth - 1), depth_colors()
    with style():
        panels = max(len(pairs), 1)
        figure = new_figure(4.6 if panels == 1 else WIDTH, 3.9 if panels == 1 else 0.9 + 0.95 * WIDTH / panels)
        grid: Any = figure.subplots(1, panels, squeeze=False)
        drawn = []
        for index, axes in enumerate(grid[0]):
            if pairs:
                paths = points[:, :, list(pairs[index])].transpose(1, 0, 2)
                axes.set_aspect("equal", adjustable="datalim")
                axes.set_xlabel(_component(0, shares))
                axes.set_ylabel(_component(pairs[index][1], shares))
            else:
                depths = np.broadcast_to(np.arange(depth)[:, None], (depth, count))
                paths = np.stack([depths, points[:, :, 0]], axis=-1).transpose(1, 0, 2)
                axes.set_xlabel("depth l of x^l")
                axes.set_ylabel(_component(0, shares))
            _paths(axes, paths, norm, colors)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            drawn.append((axes, paths))
        bar = figure.colorbar(ScalarMappable(norm, colors), ax=grid, aspect=30, pad=0.01)
        bar.set_label("depth l of x^l (block input; last: output)")
        bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        heading(
            figure,
            "Token trajectories in their principal components",
            f"{measured_on(result)} · {counted(count, 'token')}, depth 0 (○) to {depth - 1} (●)" + _left_out(result),
        )
        settle(figure)
        for axes, paths in drawn:
            label_points(figure, axes, paths[:_MOST_NAMES, -1], texts[:_MOST_NAMES], avoid=paths[:, -1])
    return figure


def coupling_against_score(
    table: pd.DataFrame | Mapping[str, Sequence[Any]] | Correlations,
    *,
    name: str = "model",
    coupling: str = "coupling",
    score: str = "score",
    null: str | None = "null",
    width: str | None = "d_model",
) -> Figure:
    """Draw coupling against a score, one point per model, with the least-squares line and its R^2.

    An open grey circle marks each model's null and is joined to its point. If the table has no null, as for published
    points, the figure says so. The colour then still shows the width, with which the null grows.

    Args:
        table: a DataFrame or a mapping of columns, with one row per model; or the result of ``tlc.correlate``, whose
            own width is drawn, and whose own null if ``coupling`` is a coupling.
        name: column with the models' names.
        coupling: column with the coupling, or the excess.
        score: column with the score.
        null: column with the null; if the table lacks it, no nulls are drawn.
        width: column with the width; if the table lacks it, points have one colour.

    Raises:
        ArgumentError: a column is missing, columns differ in length, or fewer than three models have both a coupling
            and a score.
    """
    if isinstance(table, Correlations):
        if coupling not in table.predictors:
            coupling = next((one for one in table.predictors if one.startswith(coupling)), coupling)
        null = coupling.replace("coupling", "null", 1) if coupling.startswith("coupling") else None
        width, table = "width", table.by_model()
    allowed = "a DataFrame or a mapping of columns, or tlc.correlate(...)"
    require_kind("table", table, (Mapping, pd.DataFrame), allowed)
    columns = {title: list(table[title]) for title in table}
    for argument, column in (("name", name), ("coupling", coupling), ("score", score)):
        if column not in columns:
            raise ArgumentError(argument, column, f"a column of the table: {', '.join(map(str, columns))}")
    if len({len(column) for column in columns.values()}) > 1:
        raise ArgumentError("table", {title: len(column) for title, column in columns.items()}, "columns of one length")
    x, y = (np.asarray(columns[column], dtype=float) for column in (coupling, score))
    whole = np.isfinite(x) & np.isfinite(y)
    if whole.sum() < 3:
        raise ArgumentError("table", f"{int(whole.sum())} models", "three models or more with a coupling and a score")
    x, y = x[whole], y[whole]
    texts = [label(str(text), 28) for text, kept in zip(columns[name], whole, strict=True) if kept]
    chance, sizes = (
        np.asarray(columns[column], dtype=float)[whole] if column in columns else None for column in (null, width)
    )
    slope, intercept = np.polyfit(x, y, 1)
    r_squared = np.corrcoef(x, y)[0, 1] ** 2
    with style():
        figure = new_figure(WIDTH, 4.3)
        axes = figure.subplots()
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, intercept + slope * ends, color=FAINT, linewidth=1.0, zorder=1)
        if chance is not None:
            axes.hlines(y, chance, x, color=FAINT, linewidth=0.6, zorder=1)
            axes.scatter(chance, y, s=16, facecolors="none", edgecolors=NULL, linewidths=0.8, zorder=2, label="null")
            axes.legend(loc="upper left")
        marks: dict[str, Any] = {"color": TRAINED}
        if sizes is not None:
            marks = {"c": sizes, "norm": LogNorm(sizes.min(), sizes.max()), "cmap": depth_colors()}
        points = axes.scatter(x, y, s=26, edgecolors="white", linewidths=0.5, zorder=3, **marks)
        axes.margins(0.08)
        axes.set_xlabel(_words(coupling))
        axes.set_ylabel(_words(score))
        if sizes is not None:
            bar = figure.colorbar(points, ax=axes, aspect=30, pad=0.01, label=_words(str(width)))
            ticks = _spread(np.unique(sizes))
            bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
            bar.ax.yaxis.set_minor_formatter(NullFormatter())
            bar.ax.minorticks_off()
        note = "" if chance is not None else " · no null in the table: width alone explains part of this"
        heading(figure, "Coupling against score", f"{len(x)} models · line: least squares, R² = {r_squared:.2f}{note}")
        settle(figure)
        marked = np.stack([x, y], axis=1)
        label_points(figure, axes, marked, texts)
    return figure


def _left_out(result: TrajectoryComponents) -> str:
    """Name the sinks that are not drawn."""
    if not result.left_out:
        return ""
    names = ", ".join(f"token {pos}" for pos in result.left_out)
    return f" · left out: {names} (norm more than {SINK:g} times the median)"


def _component(index: int, shares: Sequence[float]) -> str:
    return f"component {index + 1} ({shares[index]:.0%} of the variance)"


def _words(column: str) -> str:
    """Return a column's name as an axis label."""
    return "width, d_model" if column == "d_model" else label(column.replace("_", " "))


def _paths(axes: Axes, paths: np.ndarray, norm: Normalize, colors: Any) -> None:
    """Draw one line per token, ``[token, depth, 2]``; each step has the colour of its start."""
    count = len(paths)
    thin = float(np.clip(12 / count, 0.25, 1.0))
    steps = np.stack([paths[:, :-1], paths[:, 1:]], axis=2).reshape(-1, 2, 2)
    lines = LineCollection(list(steps), cmap=colors, norm=norm, linewidths=0.4 + 0.8 * thin, alpha=0.35 + 0.65 * thin)
    lines.set_array(np.tile(np.arange(paths.shape[1] - 1), count))
    axes.add_collection(lines)
    first, last = (paths[:, end] for end in (0, -1))
    axes.scatter(*first.T, s=6 + 8 * thin, facecolors="white", edgecolors=[colors(0.0)], linewidths=0.7, zorder=3)
    axes.scatter(*last.T, s=6 + 8 * thin, color=[colors(1.0)], zorder=3)
    axes.margins(0.12)
    axes.autoscale_view()


def _spread(values: np.ndarray, least: float = 0.09) -> list[float]:
    """Return the values whose logarithms are far enough apart to label on a colour bar."""
    logs = np.log(values)
    kept: list[float] = []
    for value in logs:
        if not kept or value - kept[-1] >= least * (logs[-1] - logs[0]):
            kept.append(float(value))
    return [round(float(np.exp(value)), 9) for value in kept]
