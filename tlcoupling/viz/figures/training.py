"""Draw measurements against training steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlcoupling.errors import ArgumentError
from tlcoupling.sweeps.table import require_one_kind
from tlcoupling.text import counted
from tlcoupling.viz.figures.select import index_of, require_kind
from tlcoupling.viz.figures.style import NULL, SUBLAYER_COLORS, WIDTH, heading, label, new_figure, settle, style

_NEEDED = ("step", "sublayer", "k", "coupling", "null", "lss", "ed", "model")


def training(
    table: pd.DataFrame, loss: Mapping[int, float] | None = None, *, k: int | None = None, loss_label: str = "loss"
) -> Figure:
    """Draw coupling with its null, line-shape score and expodistance against training steps.

    Lines are means over prompts; bands are the middle half of the prompts. The null is dashed, in its sublayer's
    colour. Fresh weights (a plan's ``random_baseline``) have no step: their mean is a dotted line across each panel.

    Args:
        table: the table of ``tlc.TrainingMonitor.table()``, or of a sweep over the checkpoints of one model.
        loss: the loss by step, drawn in its own panel.
        k: a measured K; by default the smallest.
        loss_label: the axis label of that panel.

    Raises:
        ArgumentError: the table lacks columns or steps, has several models, or several settings or weights at one step;
            or K was not measured.
    """
    require_kind("table", table, pd.DataFrame, "monitor.table(), or the table of a sweep over checkpoints")
    missing = [column for column in _NEEDED if column not in table]
    if missing:
        raise ArgumentError("table", list(table), f"one that also has the columns {', '.join(missing)}")
    rows: Any = table[table["step"].notna() & table["coupling"].notna()]
    is_fresh = rows["random_seed"].notna() if "random_seed" in rows else rows["step"].isna()
    rows, fresh = rows[~is_fresh], rows[is_fresh]
    names = sorted(set(rows["model"]))
    if len(names) != 1:
        raise ArgumentError("table", names, "measured steps of one model")
    require_one_kind(rows, ["model", "step"])
    ks = sorted({int(value) for value in rows["k"]})
    shown = ks[index_of("k", k, ks)]
    rows, fresh = rows[rows["k"] == shown], fresh[(fresh["k"] == shown) & (fresh["model"] == names[0])]
    sublayers = [name for name in SUBLAYER_COLORS if name in set(rows["sublayer"])]
    with style():
        figure = new_figure(WIDTH, 2.7 if loss is None else 4.5)
        panels: Any = figure.subplots(1, 3) if loss is None else figure.subplots(2, 2).ravel()[[1, 2, 3, 0]]
        coupling, linearity, growth = panels[:3]
        for name in sublayers:
            part, color = rows[rows["sublayer"] == name], SUBLAYER_COLORS[name]
            untrained = fresh[fresh["sublayer"] == name]
            _level(coupling, untrained, "coupling", color)
            _level(linearity, untrained, "lss", color)
            _line(coupling, part, "coupling", color, "-", name)
            _line(coupling, part, "null", color, (0, (3, 2)), "")
            _line(linearity, part, "lss", color, "-", name)
        coupling.plot([], [], color=NULL, linestyle=(0, (3, 2)), label="null")
        if len(fresh):
            coupling.plot([], [], color=NULL, linestyle=":", label="random")
        coupling.legend(loc="best")
        linearity.legend(loc="best")
        coupling.set_ylabel(f"coupling c, K = {shown}")
        linearity.set_ylabel("line-shape score (1: straight)")
        _level(growth, fresh[fresh["sublayer"] == sublayers[0]], "ed", "#000000")
        _line(growth, rows[rows["sublayer"] == sublayers[0]], "ed", "#000000", "-", "")
        growth.set_ylabel("expodistance (0: exponential)")
        if loss is not None:
            panels[3].plot(list(loss), list(loss.values()), color="#000000", linewidth=1.0)
            panels[3].set_ylabel(label(loss_label))
        for axes in panels:
            axes.set_xlabel("training step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        prompts = rows.groupby("step").size() / len(sublayers)
        heading(
            figure,
            "Coupling, linearity and growth along training",
            f"{label(names[0].rpartition('/')[2])} · mean over {counted(int(prompts.max()), 'prompt')} · band: their "
            "middle half" + (" · dotted: random weights" if len(fresh) else ""),
        )
        settle(figure)
    return figure


def _level(axes: Axes, rows: Any, column: str, color: str) -> None:
    """Draw the mean of fresh weights, if there are any, as a horizontal line."""
    if len(rows):
        axes.axhline(rows[column].mean(), color=color, linestyle=":", linewidth=1.0)


def _line(axes: Axes, rows: Any, column: str, color: str, line: Any, name: str) -> None:
    """Draw the mean over prompts at each step, with a band for the middle half of the prompts."""
    steps: Any = rows.groupby("step")[column]
    x = np.asarray(list(steps.groups), dtype=float)
    axes.plot(x, steps.mean().to_numpy(), color=color, linestyle=line, label=name or "_", linewidth=1.2)
    if column != "null":
        low, high = (steps.quantile(share).to_numpy() for share in (0.25, 0.75))
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
