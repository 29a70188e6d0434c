"""The sensitivity atlas: heat maps of source x target layers, and curves against their distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tlcoupling.arguments import check_index
from tlcoupling.slices.atlas import OVERLAPS, SensitivityAtlas
from tlcoupling.viz.figures.matrices import layer_ticks, show_matrix
from tlcoupling.viz.figures.select import measured_on, require_kind
from tlcoupling.viz.figures.style import (
    DIVERGING,
    NULL,
    RANDOM,
    SEQUENTIAL,
    SUBLAYER_COLORS,
    TRAINED,
    heading,
    new_figure,
    plain_log,
    settle,
    style,
)

_WIDTH, _HEIGHT = 9.2, 5.9


def sensitivity_atlas(result: SensitivityAtlas, *, rank: int = 0) -> Figure:
    """Draw singular values and overlaps of the slices between all pairs of layers, and both against the distance.

    Above: a singular value of each slice; its ratio to that of the baseline, or the overlap of what the slice reads
    with what the source block writes where there is none; and the geometric mean over pairs of equal distance. Below:
    the overlaps with what the first block of a slice reads and with what its last block writes, on one scale around
    the chance level, and their means.

    Args:
        result: the result of ``tlc.sensitivity_atlas``.
        rank: which singular value, from 0.

    Raises:
        ArgumentError: the rank was not measured.
    """
    require_kind("result", result, SensitivityAtlas, "tlc.sensitivity_atlas(trace)")
    rank = check_index("rank", rank, result.k, "the number of triplets")
    pairs, other = result.by_pair(), result.baseline
    values = result.singular_values[..., rank].double().numpy()
    excess = {name: result.grid(pairs[name]).numpy() - result.null for name in OVERLAPS}
    most = max(np.nanmax(np.abs(one)) for one in excess.values()) or 1.0
    around = Normalize(-most, most)
    with style():
        figure = new_figure(_WIDTH, _HEIGHT)
        grid: Any = figure.subplots(2, 3)
        symbol = f"s_{rank + 1}"
        _heat(figure, grid[0, 0], result, values, LogNorm(), SEQUENTIAL, f"singular value {symbol}")
        if other is None:
            fed = excess["reads_source"]
            _heat(figure, grid[0, 1], result, fed, around, DIVERGING, f"{OVERLAPS['reads_source']}: overlap − chance")
        else:
            ratio = np.log2(values / other.singular_values[..., rank].double().numpy())
            largest = np.nanmax(np.abs(ratio)) or 1.0
            scale = Normalize(-largest, largest)
            _heat(figure, grid[0, 1], result, ratio, scale, DIVERGING, f"log₂ of {symbol} over the baseline's")
        lines = {"this model": (pairs["singular_value"][:, rank], TRAINED)}
        if other is not None:
            lines["baseline"] = (pairs["baseline"][:, rank], RANDOM)
        _curves(grid[0, 2], result, lines, logarithmic=True)
        grid[0, 2].set_title(f"{symbol}, geometric mean")
        for axes, name in zip(grid[1], list(OVERLAPS)[:2], strict=False):
            _heat(figure, axes, result, excess[name], around, DIVERGING, f"{OVERLAPS[name]}: overlap − chance")
        colors = (SUBLAYER_COLORS["attn"], SUBLAYER_COLORS["mlp"], SUBLAYER_COLORS["block"])
        overlaps = {words: (pairs[name], color) for (name, words), color in zip(OVERLAPS.items(), colors, strict=True)}
        _curves(grid[1, 2], result, overlaps, logarithmic=False)
        grid[1, 2].axhline(result.null, color=NULL, linestyle=(0, (4, 2)), label="chance")
        grid[1, 2].set_title("overlap of subspaces, mean")
        grid[1, 2].legend(loc="upper right")
        src, dest = (_positions(each) for each in (result.src, result.dest))
        heading(
            figure,
            "How much each layer moves each later one",
            f"{measured_on(result)} · {result.source_site} at {src} → {result.target_site} at {dest} · "
            f"K = {result.k} · skip connections included",
        )
        settle(figure)
    return figure


def _positions(chosen: tuple[int, ...]) -> str:
    return f"token {chosen[0]}" if len(chosen) == 1 else f"{len(chosen)} tokens"


def _heat(
    figure: Figure,
    axes: Axes,
    result: SensitivityAtlas,
    values: np.ndarray,
    norm: Normalize,
    colors: Colormap,
    title: str,
) -> None:
    image = show_matrix(axes, np.ma.masked_invalid(values), norm, colors)
    bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.02)
    if isinstance(norm, LogNorm):
        plain_log(bar.ax.yaxis)
    axes.set_title(title)
    layer_ticks(axes, result.layers)
    axes.set_ylabel("source layer")
    axes.set_xlabel("target layer")


def _curves(
    axes: Axes, result: SensitivityAtlas, lines: Mapping[str, tuple[torch.Tensor, str]], logarithmic: bool
) -> None:
    """Draw means over pairs of equal distance; geometric ones where the axis is logarithmic."""
    pairs = result.by_pair()
    apart = pairs["target"] - pairs["source"]
    distances = apart.unique()
    for name, (values, color) in lines.items():
        each = values.double().log() if logarithmic else values.double()
        means = torch.stack([each[apart == distance].mean() for distance in distances])
        axes.plot(distances, means.exp() if logarithmic else means, color=color, marker=".", label=name)
    if logarithmic:
        axes.set_yscale("log")
        plain_log(axes.yaxis)
    axes.set_xlabel("target − source")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.legend(loc="best")
