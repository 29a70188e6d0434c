"""Heat maps and curves of the results that have no figure of their own: larger versions of their thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tlcoupling.results.base import Result
from tlcoupling.viz.figures.select import measured_on, require_kind
from tlcoupling.viz.figures.style import (
    DIVERGING,
    NULL,
    SEQUENTIAL,
    SUBLAYER_COLORS,
    TRAINED,
    WIDTH,
    heading,
    label,
    matrix_colors,
    new_figure,
    plain_log,
    settle,
    style,
)
from tlcoupling.viz.shown import CHANCE_OF_BASELINE, Lines, Matrix, shown

COLUMNS = 3
_COLORS = (TRAINED, *SUBLAYER_COLORS.values())


def pictures(result: Result) -> Figure:
    """Draw a result that has no figure of its own: all of its pictures, heat maps of one kind on one scale.

    Args:
        result: any result.
    """
    require_kind("result", result, Result, "a result of tlcoupling")
    one = shown(result)
    drawn = one.pictures
    columns = min(COLUMNS, max(len(drawn), 1))
    rows = -(-len(drawn) // columns) or 1
    groups: set[str] = set()  # whose curves a panel of another sublayer has named
    with style():
        figure = new_figure(WIDTH if columns > 1 else 4.6, 0.6 + 2.5 * rows)
        grid: Any = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(drawn) :]:
            axes.set_axis_off()
        for axes, picture in zip(grid.flat, drawn, strict=False):
            axes.set_title(label(picture.title))
            if isinstance(picture, Matrix):
                _matrix(figure, axes, picture, [other for other in drawn if isinstance(other, Matrix)])
            else:
                _lines(axes, picture, legend=picture.group not in groups)
                groups |= {picture.group} - {""}
        heading(figure, type(result).__name__, f"{measured_on(result)} · {label(one.below, 200)}")
        settle(figure)
    return figure


def _matrix(figure: Figure, axes: Axes, picture: Matrix, others: Sequence[Matrix]) -> None:
    """Draw a heat map, on the scale of all that are centred, or not centred, alike."""
    values = np.concatenate([np.ravel(one.values) for one in others if one.centred == picture.centred])
    values = values[np.isfinite(values)]
    most = np.abs(values).max(initial=0) or 1.0
    norm = (
        Normalize(-most, most) if picture.centred else Normalize(*([values.min(), values.max()] if len(values) else []))
    )
    colors = matrix_colors(DIVERGING if picture.centred else SEQUENTIAL)
    image = axes.imshow(
        np.ma.masked_invalid(np.asarray(picture.values)), norm=norm, cmap=colors, interpolation="nearest", aspect="auto"
    )
    for axis, name, labels in zip((axes.yaxis, axes.xaxis), picture.axes, picture.labels, strict=True):
        axis.set_label_text(name)
        _name(axis, labels)
    figure.colorbar(image, ax=axes, aspect=30, pad=0.02)


def _lines(axes: Axes, picture: Lines, legend: bool) -> None:
    """Draw curves, with chance levels dashed and the band behind the first."""
    x = np.arange(len(picture.labels))
    few = len(picture.values) <= len(_COLORS)
    for at, (name, values) in enumerate(picture.values.items()):
        color = _COLORS[at] if few else None
        look: Any = {"linestyle": (0, (1, 1))} if name == CHANCE_OF_BASELINE else {"marker": "o" if len(x) < 40 else ""}
        axes.plot(x, np.asarray(values.double()), color=color, label=label(name), **look)
    if picture.band is not None:
        low, high = (np.asarray(each.double()) for each in picture.band)
        axes.fill_between(x, low, high, color=_COLORS[0], alpha=0.2, linewidth=0)
    if picture.chance is not None:
        axes.plot(x, np.asarray(picture.chance.double()), color=NULL, linestyle=(0, (4, 2)), label="chance")
    if picture.logarithmic:
        axes.set_yscale("log")
        plain_log(axes.yaxis)
    axes.set_xlabel(picture.axis)
    _name(axes.xaxis, picture.labels)
    if few and legend:
        axes.legend(loc="best")


def _name(axis: Any, labels: Sequence[Any]) -> None:
    """Name whole positions along an axis by their labels."""
    texts = [label(str(one), 12) for one in labels]
    axis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_major_formatter(
        FuncFormatter(lambda at, _: texts[round(at)] if 0 <= at < len(texts) and float(at).is_integer() else "")
    )
