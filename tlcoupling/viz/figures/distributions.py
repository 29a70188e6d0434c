"""Distributions over tokens: line-shape score and expodistance, trained against random."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.headline import without_sinks
from tlcoupling.analysis.many import ManyAnalyses
from tlcoupling.arguments import as_list
from tlcoupling.errors import ArgumentError
from tlcoupling.text import counted
from tlcoupling.viz.figures.select import index_of, measured_on, require_kind
from tlcoupling.viz.figures.style import (
    NULL,
    RANDOM,
    SUBLAYER_COLORS,
    TRAINED,
    WIDTH,
    heading,
    label,
    new_figure,
    plain_log,
    settle,
    style,
)

Runs: TypeAlias = ManyAnalyses | Analysis | Mapping[str, Analysis | Sequence[Analysis]]
_BINS = 24
_OTHERS = (TRAINED, RANDOM, *SUBLAYER_COLORS.values())


def distributions(result: Runs, *, path: str = "block", include_sinks: bool = False) -> Figure:
    """Draw histograms of the tokens' line-shape scores and expodistances, for one or several models.

    All models share the bins of a panel. Each model's bars add up to 100 % of its tokens. Dashed lines are medians.
    Tokens with an undefined value (NaN) are omitted; the legend counts them.

    Args:
        result: the result of ``tlc.analyze_many``, whose ``baseline`` is drawn as "random"; an analysis; or analyses of
            one or several prompts by model name: ``{"trained": [...], "random": [...]}``. Analyses contribute all
            tokens of a prompt, not only those at which coupling was measured.
        path: the path whose score is drawn.
        include_sinks: whether sinks (``Growth.sinks``) count. They are left out by default, and the legend has the
            median with and without them. ``tlc.analyze_many`` does not keep the norms that tell sinks, so its tokens
            all count.

    Raises:
        ArgumentError: the path is unknown, there is no analysis, or there are more than five models.
    """
    scores, distances, sinks, steps, model = _gathered(result, path)
    if include_sinks:
        sinks = {name: np.zeros_like(some) for name, some in sinks.items()}
    if len(scores) > len(_OTHERS):
        raise ArgumentError("result", list(scores), f"at most {len(_OTHERS)} models")
    with style():
        figure = new_figure(WIDTH, 2.9)
        left, right = figure.subplots(1, 2)
        _histogram(left, scores, sinks, logarithmic=False)
        if steps is not None:
            _mark_random_steps(left, steps)
        left.set_xlabel(f"line-shape score of the {path} path (1: straight)")
        left.set_ylabel("share of tokens")
        logarithmic = all((values[_kept(values, sinks[name])] > 0).all() for name, values in distances.items())
        _histogram(right, distances, sinks, logarithmic)
        right.set_xlabel("expodistance (0: exactly exponential growth)")
        heading(figure, "How straight trajectories run, and how evenly norms grow", f"{model} · over tokens")
        settle(figure)
    return figure


def _mark_random_steps(axes: Axes, steps: int) -> None:
    """Mark the score of independent random steps, about sqrt(n)."""
    axes.axvline(math.sqrt(steps), color=NULL, linestyle=":", linewidth=1.0)
    axes.annotate(
        f"√{steps}: random steps",
        (math.sqrt(steps), 1.0),
        xycoords=("data", "axes fraction"),
        fontsize=6.5,
        color=NULL,
        va="bottom",
        ha="center",
    )


def _gathered(
    result: Runs, path: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray], int | None, str]:
    """Return scores, expodistances and sinks by model, the path's number of steps (if known) and the model's name."""
    if isinstance(result, ManyAnalyses):
        both = {"trained": result} if result.baseline is None else {"trained": result, "random": result.baseline}
        index = index_of("path", path, result.paths)
        scores = {name: one.lss[:, index].double().numpy() for name, one in both.items()}
        distances = {name: one.expodistance.double().numpy() for name, one in both.items()}
        return (
            scores,
            distances,
            {name: np.zeros(len(one), bool) for name, one in scores.items()},
            None,
            measured_on(result),
        )
    if isinstance(result, Analysis):
        result = {result.provenance.model_name: result}
    require_kind("result", result, Mapping, 'tlc.analyze_many(...), or analyses by model name, {"trained": [...]}')
    lists: dict[str, list[Analysis]] = {str(name): as_list(given) for name, given in result.items()}
    for one in (one for many in lists.values() for one in many):
        require_kind("result", one, Analysis, "analyses by model name, of tlc.analyze(model, prompt)")
    if not lists or not all(lists.values()):
        raise ArgumentError("result", result, "one analysis or more of each model")
    first = next(iter(lists.values()))[0]
    index = index_of("path", path, first.linearity.paths)
    scores = {
        name: np.concatenate([one.linearity.lss[index].double().numpy() for one in many])
        for name, many in lists.items()
    }
    distances = {
        name: np.concatenate([one.growth.expodistance.double().numpy() for one in many]) for name, many in lists.items()
    }
    sinks = {
        name: np.concatenate([(~without_sinks(one.growth)).numpy() for one in many]) for name, many in lists.items()
    }
    return scores, distances, sinks, first.linearity.steps[index], measured_on(first)


def _kept(values: np.ndarray, sinks: np.ndarray) -> np.ndarray:
    """Return which tokens have a value and are not sinks."""
    return np.isfinite(values) & ~sinks


def _histogram(
    axes: Axes, values: Mapping[str, np.ndarray], sinks: Mapping[str, np.ndarray], logarithmic: bool
) -> None:
    """Draw each model's share of tokens per bin, in shared bins."""
    finite = {name: each[_kept(each, sinks[name])] for name, each in values.items()}
    cloud = np.concatenate(list(finite.values()))
    low, high = (cloud.min(), cloud.max()) if len(cloud) else (0.5, 1.5)
    low, high = (low, high) if high > low else (low * 0.9, high * 1.1 or 1.0)
    edges = np.geomspace(low, high, _BINS + 1) if logarithmic else np.linspace(low, high, _BINS + 1)
    for (name, each), color in zip(finite.items(), _OTHERS, strict=False):
        notes = []
        if missing := int((~np.isfinite(values[name])).sum()):
            notes.append(f"{missing} undefined")
        everything = values[name][np.isfinite(values[name])]
        if (left_out := len(everything) - len(each)) and len(each):
            medians = f"median {np.median(each):.2f}, with {np.median(everything):.2f}"
            notes.append(f"without {counted(left_out, 'sink')}: {medians}")
        text = f"{label(name)}, {counted(len(each), 'token')}" + (f" ({'; '.join(notes)})" if notes else "")
        weights = np.full(len(each), 1 / max(len(each), 1))
        axes.hist(each, list(edges), weights=weights, color=color, alpha=0.45, label=text)
        axes.hist(each, list(edges), weights=weights, color=color, histtype="step", linewidth=1.0)
        if len(each):
            axes.axvline(float(np.median(each)), color=color, linestyle=(0, (4, 2)), linewidth=1.2)
    if logarithmic:
        axes.set_xscale("log")
        plain_log(axes.xaxis)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper right")
