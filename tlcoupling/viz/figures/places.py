"""Names beside points, where they cover neither each other nor the points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from tlcoupling.viz.figures.style import NULL

_GAP = 4.0  # points between a mark and its name
_SHARE = {"left": 0.0, "bottom": 0.0, "center": 0.5, "right": 1.0, "top": 1.0}
_LEADER = {"arrowstyle": "-", "linewidth": 0.4, "color": NULL, "shrinkA": 0}
_REACH = (1.0, 2.5, 4.5)  # how far a name may lie, in gaps; a thin line leads to one that is not beside its point
# where a name may lie: offsets in gaps, and which side of the name lies there
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


def write_beside(
    figure: Figure,
    axes: Axes,
    points: np.ndarray,
    texts: Sequence[str],
    size: float = 6.0,
    avoid: np.ndarray | None = None,
) -> int:
    """Write a name beside each point that has room for one, earlier points first.

    Call it when the figure is settled: the room is that of the final layout.

    Args:
        figure: the figure.
        axes: where the points are.
        points: their places in the data's units, ``[n, 2]``.
        texts: their names, as ``label`` gives them; an empty one is not written.
        size: of the type.
        avoid: further places that no name may cover, ``[m, 2]``.

    Returns:
        How many were written.
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
    """Width and height of a text in pixels."""
    probe = axes.text(0, 0, text, fontsize=size)
    box = probe.get_window_extent(canvas)
    probe.remove()
    return box.width, box.height
