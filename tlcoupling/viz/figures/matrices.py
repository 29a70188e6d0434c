"""Layer x layer matrices: depth coupling with its null, and the projected Jacobians behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.arguments import as_list, check_name
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.coupling.projected import ProjectedJacobians
from tlcoupling.errors import ArgumentError
from tlcoupling.viz.figures.select import chosen_k, depth_of, index_of, measured_on, named, require_kind
from tlcoupling.viz.figures.style import (
    DIVERGING,
    FIT,
    SEQUENTIAL,
    WIDTH,
    heading,
    label,
    matrix_colors,
    new_figure,
    settle,
    style,
    token_label,
)
from tlcoupling.viz.plain import formula

MOST_LAYERS = 12  # more panels are too small to read
_TICKS = 7
_FIELDS = {"coupling": "values", "null": "null", "excess": "excess"}


def depth_coupling(
    result: DepthCoupling | Analysis | Mapping[str, DepthCoupling | Analysis],
    *,
    token: int | None = None,
    k: int | None = None,
    quantities: str | Sequence[str] | None = None,
) -> Figure:
    """Draw coupling, null and excess of all pairs of layers, one row per sublayer, on shared scales.

    Coupling and null share one scale, from the smallest to the largest value off the diagonal. The excess has a
    diverging scale around 0. With the ``"uv"`` bases the diagonal is 1 by definition: it is grey and does not affect
    the scales. An undefined pair (NaN) is grey too. A dot marks a pair whose bases are not determined
    (``values_determined``), at one of the tokens at least.

    Args:
        result: a depth coupling, or several by name (such as trained and random), side by side on the same scales.
        token: a measured position; by default the mean over all of them.
        k: a measured K; by default the first.
        quantities: what is drawn of ``"coupling"``, ``"null"`` and ``"excess"``; by default all of one result, and the
            excess of several.

    Raises:
        ArgumentError: a token, K or quantity was not measured, there are fewer than two layers, or the results differ
            in sublayers or metric.
    """
    results = {name: depth_of("result", one) for name, one in named("result", result).items()}
    first = next(iter(results.values()))
    if len(first.layers) < 2:
        raise ArgumentError("result", first, "a coupling of two layers or more")
    for one in results.values():
        if (one.sublayers, one.bases, one.absolute, one.normalizer) != (
            first.sublayers,
            first.bases,
            first.absolute,
            first.normalizer,
        ):
            raise ArgumentError("result", one, f"the sublayers and the metric of {first!r}")
    shown: Sequence[Any] = as_list(quantities or (tuple(_FIELDS) if len(results) == 1 else "excess"))
    for what in shown:
        check_name("quantities", what, tuple(_FIELDS))
    columns = [(what, name) for what in shown for name in results]
    panes = {
        (row, what, name): _pane(one, _FIELDS[what], row, token, chosen_k(one, k))
        for row in range(len(first.sublayers))
        for what in shown
        for name, one in results.items()
    }
    unsure = {
        (row, name): _undetermined(one, row, token, chosen_k(one, k))
        for row in range(len(first.sublayers))
        for name, one in results.items()
    }
    above = np.concatenate([pane.compressed() for (_, what, _), pane in panes.items() if what != "excess"] or [[]])
    around = np.concatenate([pane.compressed() for (_, what, _), pane in panes.items() if what == "excess"] or [[]])
    most = np.abs(around).max(initial=0) or 1
    scales = {
        False: (Normalize(above.min(), above.max()) if len(above) else None, SEQUENTIAL, "coupling c and null"),
        True: (Normalize(-most, most), DIVERGING, "excess, c − null"),
    }
    with style():
        side = WIDTH / max(len(columns), 3)
        figure = new_figure(side * max(len(columns), 2), 1.05 + (side - 0.11) * len(first.sublayers))
        grid: Any = figure.subplots(len(first.sublayers), len(columns), squeeze=False)
        images: dict[bool, AxesImage] = {}
        for (row, sublayer), (column, (what, name)) in product(enumerate(first.sublayers), enumerate(columns)):
            axes, pane, is_excess = grid[row, column], panes[row, what, name], what == "excess"
            norm, colors, _ = scales[is_excess]
            images[is_excess] = show_matrix(axes, pane, norm, colors)
            if what != "null":  # it does not depend on the bases
                dots = np.argwhere(unsure[row, name] & ~np.ma.getmaskarray(pane))
                axes.plot(dots[:, 1], dots[:, 0], "o", color=FIT, markersize=2, gid="undetermined")
            title = f"{label(name, 20)}: {what}" if name else what
            axes.set_title(f"{title}, mean {round(float(pane.mean()), 4) + 0.0:.4f}" if pane.count() else title)
            layer_ticks(axes, results[name].layers)
            if column == 0:
                axes.set_ylabel(f"{sublayer}\nlayer of the Jacobian")
            if row == len(first.sublayers) - 1:
                axes.set_xlabel("layer of the bases")
        for is_excess, image in images.items():
            under = [index for index, (what, _) in enumerate(columns) if (what == "excess") == is_excess]
            symbol = f"{scales[is_excess][2]}, K = {chosen_k(first, k)[1]}"
            shape = {"location": "bottom", "shrink": 0.8, "aspect": 22 * len(under), "pad": 0.02}
            figure.colorbar(image, ax=grid[:, under], label=symbol, **shape)
        legend = " · dot: bases not determined" if any(marks.any() for marks in unsure.values()) else ""
        heading(figure, "Coupling of residual Jacobians across depth", _described(results, token) + legend)
        settle(figure)
    return figure


def projected_jacobians(result: ProjectedJacobians, *, sublayer: str | None = None) -> Figure:
    """Draw the matrices |U2^T J1 V2| of all pairs of layers, relative to the largest singular value of J1.

    All panels share one logarithmic scale, which starts at the power of ten below half of the chance level. The mark on
    the colour bar is the mean of an entry under independent random bases. Each panel shows its coupling, with the null
    in brackets.

    Args:
        result: the result of ``tlc.projected_jacobians``.
        sublayer: a measured sublayer; by default the first.

    Raises:
        ArgumentError: the sublayer was not measured, or there are more than twelve layers.
    """
    require_kind("result", result, ProjectedJacobians, "tlc.projected_jacobians(trace, layers)")
    which = index_of("sublayer", sublayer, result.sublayers)
    n, k = len(result.layers), result.values.shape[-1]
    if n > MOST_LAYERS:
        raise ArgumentError("result", result, f"at most {MOST_LAYERS} layers: more panels are too small to read")
    largest = result.singular_values[which, :, 0].double()
    shown = (result.values[which].double().abs() / largest[:, None, None, None]).numpy()
    chance = (result.null_entry[which].double() / largest).numpy()
    norm = LogNorm(10 ** math.floor(math.log10(chance.min() / 2)), 1.0, clip=True)
    couplings, null = result.coupling[which], result.null[which]
    with style():
        size = min(1.6, max(0.8, 6.0 / n))
        figure = new_figure(n * size + 1.3, n * (size + 0.1) + 0.7)
        grid: Any = figure.subplots(n, n, squeeze=False)
        for row, layer in enumerate(result.layers):
            for column, other in enumerate(result.layers):
                pane = grid[row, column]
                image = show_matrix(pane, np.ma.masked_invalid(shown[row, column]), norm, SEQUENTIAL)
                pane.set_xticks([])
                pane.set_yticks([])
                text = f"{couplings[row, column]:.2f} ({null[row]:.2f})"
                pane.set_title("S₁" if row == column else text, fontsize=7, pad=2, loc="center")
                if row == n - 1:
                    pane.set_xlabel(f"bases of {other}")
                if column == 0:
                    pane.set_ylabel(f"J of layer {layer}")
        projected = "|uᵀ J₁ v|" if result.bases == "uv" else "|vᵀ J₁ u|"
        bar = figure.colorbar(image, ax=grid, shrink=min(1.0, 3.0 / (n * size)), aspect=30)
        bar.set_label(f"{projected} / s₁(J₁)")
        ticks = 10.0 ** np.arange(round(math.log10(norm.vmin or 1)), 1)
        bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
        bar.ax.minorticks_off()
        mean = float(np.exp(np.log(chance).mean()))
        bar.ax.axhline(mean, color=FIT, linewidth=1.5)
        bar.ax.annotate(
            "chance",
            (0, mean),
            (-2, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=7,
            xycoords=("axes fraction", "data"),
        )
        heading(
            figure,
            f"One layer's Jacobian in another's singular vectors: {result.sublayers[which]}",
            f"{measured_on(result)} · {token_label(result.position, result.token)} · K = {k} · above each panel: "
            "coupling (null)",
        )
        settle(figure)
    return figure


def _pane(
    result: DepthCoupling, quantity: str, sublayer: int, token: int | None, k: tuple[int, int]
) -> np.ma.MaskedArray:
    """Return a matrix of layers; undefined cells, and a diagonal of 1 by definition, are masked."""
    chosen = slice(None) if token is None else index_of("token", token, result.positions)
    cells = getattr(result, quantity)[sublayer, :, k[0]][chosen].double().numpy()
    mean = cells.mean(0) if cells.ndim == 3 else cells
    hidden = np.eye(len(mean), dtype=bool) if result.bases == "uv" else np.zeros(mean.shape, dtype=bool)
    return np.ma.masked_array(mean, hidden | ~np.isfinite(mean))


def _undetermined(result: DepthCoupling, sublayer: int, token: int | None, k: tuple[int, int]) -> np.ndarray:
    """Return which pairs of layers compare bases that are not determined, at one of the tokens shown."""
    n, determined = len(result.layers), result.values_determined
    if determined is None:
        return np.zeros((n, n), dtype=bool)
    chosen = slice(None) if token is None else index_of("token", token, result.positions)
    return (~determined[sublayer, :, k[0]][chosen]).reshape(-1, n, n).any(0).numpy()


def _described(results: Mapping[str, DepthCoupling], token: int | None) -> str:
    first = next(iter(results.values()))
    models = " and ".join(dict.fromkeys(measured_on(one) for one in results.values()))
    if token is None and len(first.positions) > 1:
        where = f"mean over {len(first.positions)} tokens"
    else:
        index = 0 if token is None else index_of("token", token, first.positions)
        where = token_label(first.positions[index], first.tokens[index])
    return f"{models} · {where} · {formula(first)}" + (" · diagonal: 1" if first.bases == "uv" else "")


def show_matrix(axes: Axes, matrix: np.ndarray, norm: Normalize | None, colors: Colormap) -> AxesImage:
    """Draw a matrix; cells without a value are grey."""
    axes.spines[:].set_visible(False)
    return axes.imshow(matrix, norm=norm, cmap=matrix_colors(colors), interpolation="nearest", aspect="equal")


def layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    """Label a few layers with their indices."""
    step = next(size for size in (1, 2, 5, 10, 20, 50, 100, 200) if len(layers) <= _TICKS * size)
    ticks = range(0, len(layers), step)
    names = [str(layers[index]) for index in ticks]
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
