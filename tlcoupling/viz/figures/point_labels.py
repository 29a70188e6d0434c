"""Write names beside points without covering other names or points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from tlcoupling.viz.figures.style import NULL

_GAP = 4.0  # distance between a mark and its name, in typographic points
_SHARE = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
_LEADER = {"arrowstyle": "-", "linewidth": 0.4, "color": NULL, "shrinkA": 0}
_REACH = (1.0, 2.5, 4.5)  # possible distances of a name in gaps; beyond the first, a thin line joins it to its point
# possible positions of a name: offset in gaps, and the alignment of the name there
_SIDES = [
    ((1, 0), "left", "center"),
    ((-1, 0), "right", "center"),
    ((0, 1), "center", "bottom"),
    ((0, -1), "center", "top"),
    ((0.8, 0.8), "left", "bottom"),
    ((0.8, -0.8), "left", "top"),
    ((-0.8, 0.8), "right", "bottom"),
    ((-0.8, -0.8), "right", "top"),
]


def label_points(
    figure: Figure,
    axes: Axes,
    points: np.ndarray,
    texts: Sequence[str],
    size: float = 6.0,
    avoid: np.ndarray | None = None,
) -> int:
    """Write a name beside each point that has room for one, earlier points first.

    Call it after ``settle``, because it needs the final layout.

    Args:
        figure: the figure.
        axes: the axes of the points.
        points: positions in data units, ``[n, 2]``.
        texts: the names, as ``label`` returns them; empty names are skipped.
        size: font size in typographic points.
        avoid: further positions that no name may cover, in data units, ``[m, 2]``.

    Returns:
        The number of names written.
    """
    canvas = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    within = axes.get_window_extent(canvas)
    marks = axes.transData.transform(points if avoid is None else np.concatenate([points, avoid]))
    taken: list[Bbox] = []
    written = 0
    for point, text in zip(points, texts, strict=True):
        if not text.strip() or not np.isfinite(point).all():
            continue
        width, height = _extent(axes, text, size, canvas)
        for reach, ((right, up), horizontal, vertical) in product(_REACH, _SIDES):
            offset = np.array([right, up]) * reach * _GAP
            start = axes.transData.transform(point) + offset * figure.dpi / 72
            start -= np.array([width * _SHARE[horizontal], height * _SHARE[vertical]])
            box = Bbox.from_bounds(start[0], start[1], width, height)
            inside = within.x0 <= box.x0 and box.x1 <= within.x1 and within.y0 <= box.y0 and box.y1 <= within.y1
            covers = ((marks > box.min) & (marks < box.max)).all(1).any()
            if inside and not covers and not any(box.overlaps(other) for other in taken):
                name = axes.annotate(
                    text,
                    point,
                    tuple(offset),
                    textcoords="offset points",
                    ha=horizontal,
                    va=vertical,
                    fontsize=size,
                    color="#303030",
                    bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.2},
                    arrowprops=None if reach == 1 else _LEADER,
                    zorder=4,
                )
                name.set_in_layout(False)
                taken.append(box)
                written += 1
                break
    return written


def _extent(axes: Axes, text: str, size: float, canvas: Any) -> tuple[float, float]:
    """Return the width and height of a text in pixels."""
    probe = axes.text(0, 0, text, fontsize=size)
    box = probe.get_window_extent(canvas)
    probe.remove()
    return box.width, box.height
