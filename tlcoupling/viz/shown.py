"""What each kind of result shows of itself: its headline numbers with their chance level, and a picture.

``shown`` has one entry for each kind. ``thumbnail`` makes HTML of it for a notebook, and ``figures.pictures`` draws the
pictures of those kinds that have no figure of their own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import singledispatch
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.headline import without_sinks
from tlcoupling.analysis.many import ManyAnalyses
from tlcoupling.analysis.shared import SharedDirections
from tlcoupling.analysis.summary import growth_summary, linearity_rows
from tlcoupling.coupling.alignment import HeadAlignment
from tlcoupling.coupling.chance import CouplingTest
from tlcoupling.coupling.metric import off_diagonal_mean
from tlcoupling.coupling.projected import ProjectedJacobians
from tlcoupling.coupling.result import Coupling, WithinLayers
from tlcoupling.directions.causal import CausalEffect
from tlcoupling.directions.readout import ENDS, SIDES, DirectionReadout
from tlcoupling.dynamics.components import TrajectoryComponents
from tlcoupling.dynamics.depth_profile import DepthProfile
from tlcoupling.dynamics.geometry import MAPS, WITH_NULL, EigenGeometry
from tlcoupling.dynamics.linearized import LinearizationGap
from tlcoupling.dynamics.lyapunov import LyapunovSpectrum
from tlcoupling.dynamics.spectrum import SingularValueProfile
from tlcoupling.parity import PublishedMisalignment
from tlcoupling.results.base import Result
from tlcoupling.results.intervals import Interval
from tlcoupling.scores.correlate import Correlations
from tlcoupling.slices.atlas import OVERLAPS, SensitivityAtlas
from tlcoupling.slices.detached import DetachedComparison
from tlcoupling.slices.features import FeatureMap
from tlcoupling.slices.lens import JacobianLens
from tlcoupling.slices.lens_coupling import LensCoupling
from tlcoupling.slices.relations import SliceRelations
from tlcoupling.slices.steering import CONTROLS, SteeringEffect
from tlcoupling.text import counted, visible
from tlcoupling.trajectory.growth import Growth
from tlcoupling.trajectory.head_steps import HeadSteps
from tlcoupling.trajectory.linearity import Linearity

MOST_ROWS, MOST_LINES = 12, 4
_AGAINST_NULL = ("coupling", "null", "excess")
BASELINE, CHANCE_OF_BASELINE = "baseline", "chance of the baseline"
_MEANS = ("mean", "chance", BASELINE, "its chance")
_OF_MAPS = ("symmetric", "rotation", "departure", "effective_rank", "stable_rank")
_CHANCE_IS_ZERO = ("cosine", "coupling")
_CHANCE_OF = {name: f"{name}_null" for name in (*WITH_NULL, "influence", "linearity")}
_CHANCE_OF |= {"angular_distance": "angular_null", "linearity_of_write": "linearity_null"}


@dataclass(frozen=True)
class Matrix:
    """A heat map.

    Attributes:
        title: what the numbers are.
        values: the numbers, ``[row, column]``; NaN where there is none.
        axes: names of rows and columns.
        labels: labels of rows and columns.
        centred: whether colours diverge around 0.
        zero: what 0 is, in words.
    """

    title: str
    values: Tensor
    axes: tuple[str, str]
    labels: tuple[Sequence[Any], Sequence[Any]]
    centred: bool = True
    zero: str = "chance"


@dataclass(frozen=True)
class Lines:
    """Curves.

    Attributes:
        title: what the numbers are.
        axis: name of the horizontal axis.
        labels: labels along it.
        values: the curves by name, ``[label]`` each.
        chance: the chance level along them; None without one.
        band: lower and upper end around the first curve; None without one.
        logarithmic: whether the vertical axis is logarithmic.
        group: the quantity, where each sublayer has curves of it; the page shows those of a group side by side.
    """

    title: str
    axis: str
    labels: Sequence[Any]
    values: Mapping[str, Tensor]
    chance: Tensor | None = None
    band: tuple[Tensor, Tensor] | None = None
    logarithmic: bool = False
    group: str = ""


@dataclass(frozen=True)
class Shown:
    """What a result shows of itself.

    Attributes:
        below: what was measured, for the line under the name.
        columns: headings of the table, that of the rows' names included.
        rows: the table: name and numbers of each row.
        pictures: the first is the thumbnail; empty where nothing was measured that can be drawn.
        note: what a reader has to know.
    """

    below: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    pictures: Sequence[Matrix | Lines] = field(default=())
    note: str = ""


@singledispatch
def shown(result: Result) -> Shown:
    """Return what a result shows of itself."""
    raise NotImplementedError(f"{type(result).__name__} has no entry in tlcoupling.viz.shown")


@shown.register
def _coupling(result: Coupling) -> Shown:
    size = len(result.sublayers)
    means = {
        name: result.mean(quantity)[..., 0].reshape(size, -1).nanmean(1).tolist()
        for name, quantity in zip(_AGAINST_NULL, ("values", "null", "excess"), strict=True)
    }
    rows = [(name, *numbers) for name, *numbers in zip(result.sublayers, *means.values(), strict=True)]
    axes = result._axes["values"][-2:]
    members, compared = list(result._coords()[axes[0]]), result._compared()
    pictures = []
    for quantity in ("excess", "values", "null"):
        cells = getattr(result, quantity)[..., 0, :, :].double().reshape(size, -1, *compared.shape).nanmean(1)
        for name, matrix in zip(result.sublayers, cells.where(compared, torch.nan), strict=True):
            title = f"{'coupling' if quantity == 'values' else quantity} of {name}"
            pictures.append(Matrix(title, matrix, (axes[0], axes[1]), (members, members), quantity == "excess"))
    shares = isinstance(result, WithinLayers) and bool(result._shared().any())
    note = "" if not shares else (
        "The null is that of unrelated bases. Tokens of one layer share its weights and couple in a fresh model too: "
        "compare with tlc.random_baseline(model)."
    )  # fmt: skip
    return Shown(f"{result._described()}, K = {result.ks[0]}", ("", *_AGAINST_NULL), rows, pictures, note)


@shown.register
def _analysis(result: Analysis) -> Shown:
    found = result._findings(False)
    fresh = result.baseline is not None
    others = {one.name: one.value for one in result._fresh_findings(False)}
    rows = [
        (
            one.name,
            one.value,
            one.chance,
            *([others.get(one.name, math.nan)] if fresh else []),
            one.found if one.found or math.isfinite(one.chance) else math.nan,  # nothing to differ from
        )
        for one in found
    ]
    columns = ("", "value", "chance", *(["fresh weights"] if fresh else []), "found")
    missing = "" if fresh else " Fresh weights were not measured: analyze(..., baseline='fresh')."
    note = f"{result!r}"[len("Analysis(") : -1]
    return Shown(
        counted(len(result.tokens), "token"), columns, rows, shown(result.coupling).pictures[:1], note + missing
    )


@shown.register
def _many(result: ManyAnalyses) -> Shown:
    def means(one: ManyAnalyses, quantity: Any) -> Tensor:
        return one._by_prompt(quantity).nanmean(0)

    rows: list[tuple[Any, ...]] = []
    other = result.baseline
    for index, name in enumerate(result.sublayers):
        numbers = [float(means(result, quantity)[index, 0]) for quantity in _AGAINST_NULL]
        rows.append((f"coupling of {name}", *numbers, float(means(other, "excess")[index, 0]) if other else math.nan))
    straight = f"line-shape score of the {result.paths[0]} path"
    for name, quantity in ((straight, "lss"), ("expodistance", "expodistance"), ("growth rate", "rate")):
        here, there = (
            math.nan if one is None else float(means(one, quantity).reshape(-1)[0]) for one in (result, other)
        )
        rows.append((name, here, math.nan, math.nan, there))
    by_prompt = {"excess of " + result.sublayers[0]: result._by_prompt("excess")[:, 0, 0]}
    picture = Lines("excess by prompt", "prompt", result.names, by_prompt, chance=torch.zeros(len(result.names)))
    columns = ("", "value", "null", "excess", "baseline: excess, or value")
    return Shown(
        f"{counted(len(result.names), 'prompt')}, K = {result.ks[0]}",
        columns if other else columns[:-1],
        rows if other else [row[:-1] for row in rows],
        [picture],
        "Means over prompts. interval() has their confidence intervals.",
    )


@shown.register
def _test(result: CouplingTest) -> Shown:
    names, sets = result.labels[0], [str(one) for one in result.labels[-1]]
    firsts = {
        name: getattr(result, name).reshape(len(names), -1, len(sets))[:, 0]
        for name in ("excess", "chance_std", "low", "high", "p")
    }
    chosen = [index for index, one in enumerate(sets) if not one.startswith("distance ")]
    rows = [
        (f"{name}, {sets[at]}" if len(chosen) > 1 else name, *(firsts[each][row, at].item() for each in firsts))
        for row, name in enumerate(names)
        for at in chosen
    ]
    apart = [index for index in range(len(sets)) if index not in chosen] or chosen
    axis = "distance" if len(apart) < len(sets) else "pairs"
    pictures = [
        Lines(
            f"excess of {name}",
            axis,
            [sets[at].removeprefix("distance ") for at in apart],
            {"excess": firsts["excess"][row, apart]},
            torch.zeros(len(apart)),
            (firsts["low"][row, apart], firsts["high"][row, apart]),
        )
        for row, name in enumerate(names)
    ]
    columns = ("", "excess", "chance's std", "low", "high", "p")
    where = "".join(f", {axis} {one[0]}" for axis, one in zip(result.axes[1:-1], result.labels[1:-1], strict=True))
    below = f"{result.draws} draws, {result.confidence:.0%} intervals: the excess less what chance adds{where}"
    return Shown(below, columns, rows, pictures)


@shown.register
def _interval(result: Interval) -> Shown:
    coords = torch.cartesian_prod(*(torch.arange(len(each)) for each in result.labels)).reshape(-1, len(result.axes))
    names = [", ".join(str(result.labels[axis][at]) for axis, at in enumerate(row)) for row in coords.tolist()]
    columns = ("estimate", "low", "high", "units")
    rows = list(zip(names, *(getattr(result, name).reshape(-1).tolist() for name in columns), strict=True))
    flat = {name: getattr(result, name).reshape(-1) for name in ("estimate", "low", "high")}
    zero = torch.zeros(len(names)) if "excess" in result.quantity else None  # chance
    picture = Lines(
        result.quantity, ", ".join(result.axes), names, {"mean": flat["estimate"]}, zero, (flat["low"], flat["high"])
    )
    below = f"{result.quantity}, {result.confidence:.0%} over {result.by}s"
    return Shown(below, (", ".join(result.axes), *columns), rows, [picture])


@shown.register
def _projected(result: ProjectedJacobians) -> Shown:
    couplings = off_diagonal_mean(result.coupling).tolist()
    null = result.null.mean(1).tolist()
    rows = [(name, c, chance, c - chance) for name, c, chance in zip(result.sublayers, couplings, null, strict=True)]
    other = min(1, len(result.layers) - 1)
    ranks = range(result.singular_values.shape[-1])
    relative = result.values[0, 0, other].abs() / result.singular_values[0, 0, 0]
    title = f"|U₂ᵀ J₁ V₂| / s₁, layer {result.layers[0]} in the bases of {result.layers[other]}"
    picture = Matrix(title, relative.double(), ("left", "right"), (ranks, ranks), centred=False)
    below = f"layers {', '.join(map(str, result.layers))}, token {result.position}, K = {len(ranks)}"
    return Shown(below, ("", *_AGAINST_NULL), rows, [picture])


@shown.register
def _shared(result: SharedDirections) -> Shown:
    note = "texts, scores and null: the tokens that the layers' bases write and read."
    return replace(shown(result.projected), note=note)


@shown.register
def _alignment(result: HeadAlignment) -> Shown:
    null = float(result.null[0])
    heads = range(result.writes.shape[-1])
    rows, pictures = [], []
    for name, share in (("writes", result.writes[:, 0]), ("reads", result.reads[:, 0])):
        rows.append((name, float(share.mean()), null, float(share.mean()) - null))
        excess = (share - null).double()
        pictures.append(Matrix(f"excess share of {name}", excess, ("layer", "head"), (result.layers, heads)))
    note = "A head is part of its block: one with a large share of it aligns with it in a fresh model too."
    below = f"heads with the {result.of}, token {result.position}, K = {result.ks[0]}"
    return Shown(below, ("share along the top directions", "mean", "null", "excess"), rows, pictures, note)


@shown.register
def _linearity(result: Linearity) -> Shown:
    pos = range(len(result.tokens))
    rows = [(row.path, row.mean, row.random, row.mean - row.random) for row in linearity_rows(result)]
    pictures = [
        Lines(f"line-shape score of the {path} path", "token", pos, {path: scores}, torch.full((len(pos),), n**0.5))
        for path, n, scores in zip(result.paths, result.steps, result.lss, strict=True)
    ]
    columns = ("line-shape score", "mean", "random steps", "difference")
    return Shown(f"{counted(len(pos), 'token')}; 1: straight", columns, rows, pictures, "All tokens, sinks too.")


@shown.register
def _growth(result: Growth) -> Shown:
    kept = without_sinks(result)
    whole = growth_summary(result)
    left = {"rate": result.rate, "attention's share": result.attn_share, "MLP's share": result.mlp_share}
    rows: list[tuple[Any, ...]] = [
        (name, float(each[..., kept].nanmean()), float(each.nanmean()))
        for name, each in left.items()
        if each is not None
    ]
    rows.append(("expodistance", float(result.expodistance[kept].nanquantile(0.5)), whole.median_expodistance))
    rows.append(("R² of the line", float(result.r_squared[kept].nanmean()), whole.mean_r_squared))
    norms = result.norms[:, kept].double()
    middle, *ends = (norms.nanquantile(share, dim=1) for share in (0.5, 0.25, 0.75))
    picture = Lines(
        "median norm, middle half of the tokens",
        "depth",
        range(len(norms)),
        {"median": middle},
        band=(ends[0], ends[1]),
        logarithmic=True,
    )
    sinks = counted(int((result.sinks & ~kept).sum()), "sink")
    note = "Growth has no closed-form chance level: norms grow in fresh weights too."
    below = f"{counted(len(result.tokens), 'token')}, {counted(len(result.alpha), 'layer')}"
    return Shown(below, ("per layer", f"without {sinks}", "all tokens"), rows, [picture], note)


@shown.register
def _head_steps(result: HeadSteps) -> Shown:
    share = result.share.double().nanmean(-1)  # [layer, head]
    parts = {"attention": result.attn_share, "its bias": result.bias_share, "MLP": result.mlp_share}
    rows = [(name, float(each.nanmean())) for name, each in parts.items() if each is not None]
    n_heads = share.shape[1]
    for index in share.abs().nan_to_num().flatten().argsort(descending=True)[:3].tolist():
        rows.append((f"head {index % n_heads} of layer {index // n_heads}", float(share.flatten()[index])))
    labels = (range(len(share)), range(n_heads))
    picture = Matrix("share of the step, mean over tokens", share, ("layer", "head"), labels, zero="0")
    below = f"{counted(len(share), 'layer')}, {counted(len(result.tokens), 'token')}; shares of a step sum to 1"
    return Shown(below, ("share of the block's step", "mean"), rows, [picture])


@shown.register
def _gap(result: LinearizationGap) -> Shown:
    ends = zip(result.sizes, result.gap[:, -1], result.rounding[:, -1], result.cosine[:, -1], strict=True)
    rows = [(f"{size:g}", *(float(each) for each in numbers)) for size, *numbers in ends]
    lines = {f"size {size:g}": row for size, row in zip(result.sizes, result.gap.double(), strict=True)}
    picture = Lines("gap of the linearised system", "depth", result.depths, lines, logarithmic=True)
    below = f"token {result.position} perturbed at layer {result.depths[0]}"
    note = "A gap of the size of rounding means nothing."
    return Shown(below, ("size", "gap at the end", "rounding alone", "cosine"), rows, [picture], note)


@shown.register
def _components(result: TrajectoryComponents) -> Shown:
    rows = [(f"component {index + 1}", share) for index, share in enumerate(result.explained.tolist())]
    depths = range(len(result.coordinates))
    lines = {f"token {pos}": result.coordinates[:, at, 0] for at, pos in enumerate(result.positions)}
    left = f", {counted(len(result.left_out), 'sink')} left out" if result.left_out else ""
    picture = Lines("first component", "depth", depths, lines)
    return Shown(counted(len(lines), "token") + left, ("", "share of the variance"), rows, [picture])


@shown.register
def _spectrum(result: SingularValueProfile) -> Shown:
    first = result.singular_values[:, -1, :, 0]
    fits = (each[:, -1, 0].tolist() for each in (result.slope, result.r_squared))
    rows = list(zip(result.sublayers, *first[:, [0, -1]].T.tolist(), *fits, strict=True))
    lines = dict(zip(result.sublayers, first, strict=True))
    columns = ("", "s₁, first layer", "last", "slope of 1/s₁", "R²")
    picture = Lines("largest singular value", "layer", result.layers, lines, logarithmic=True)
    below = f"{counted(len(result.layers), 'layer')}, token {result.positions[-1]}; Residual Alignment predicts slope 1"
    return Shown(below, columns, rows, [picture])


def _by_layer(
    result: EigenGeometry | DepthProfile, quantity: str, group: str, sublayer: str, select: Callable[[Tensor], Tensor]
) -> tuple[Lines, list[float]]:
    """Return a quantity over layers beside its chance level and the same of the baseline, and the means of the four.

    Args:
        result: the result.
        quantity: the name of a field.
        group: what the numbers are.
        sublayer: of which sublayer.
        select: the curve over layers in a field.
    """

    def curves(one: EigenGeometry | DepthProfile) -> tuple[Tensor, Tensor | None]:
        values = select(getattr(one, quantity))
        if quantity in _CHANCE_IS_ZERO:
            return values, torch.zeros_like(values)
        return values, select(getattr(one, _CHANCE_OF[quantity])) if quantity in _CHANCE_OF else None

    (values, chance), (beside, its) = (
        curves(result),
        (None, None) if result.baseline is None else curves(result.baseline),
    )
    named = {quantity.replace("_", " "): values, BASELINE: beside, CHANCE_OF_BASELINE: its}
    same = its is None or chance is None or torch.equal(its, chance)
    lines = {name: line for name, line in named.items() if line is not None and not (line is its and same)}
    means = [math.nan if line is None else float(line.double().mean()) for line in (values, chance, beside, its)]
    title, logarithmic = f"{group}, {sublayer}", quantity.endswith("rank")
    return Lines(title, "layer", result.layers, lines, chance, logarithmic=logarithmic, group=group), means


@shown.register
def _geometry(result: EigenGeometry) -> Shown:
    rows, pictures = [], []
    for quantity, at in ((quantity, at) for at in range(len(MAPS)) for quantity in _OF_MAPS):
        for sublayer, name in enumerate(result.sublayers):
            group, select = f"{quantity.replace('_', ' ')} of {MAPS[at]}", itemgetter((sublayer, -1, slice(None), at))
            picture, means = _by_layer(result, quantity, group, name, select)
            values = next(iter(picture.values.values()))
            rows.append((picture.title, *values[[0, -1]].tolist(), *means))
            pictures.append(picture)
    note = (
        "symmetric, rotation: 1 and 0 for a symmetric matrix. Chance: random bases with the same singular values. "
        "Nearly all eigenvalues of any large random matrix are complex, and a small J makes any I + J nearly symmetric."
    )
    below = f"{counted(len(result.layers), 'layer')}, token {result.positions[-1]}"
    return Shown(below, ("", "first layer", "last", *_MEANS), rows, pictures, note)


@shown.register
def _lyapunov(result: LyapunovSpectrum) -> Shown:
    beside = {"": result} if result.baseline is None else {"": result, "baseline": result.baseline}
    n = len(result.exponents)
    rows = [
        (f"exponent {index + 1}", *(float(one.exponents[index]) for one in beside.values()))
        for index in dict.fromkeys((0, n // 4, n // 2, 3 * n // 4, n - 1))
    ]
    rows += [
        (f"ln s₁ by {name}", *(float(one.growth[:, at, 0].sum()) for one in beside.values()))
        for at, name in enumerate(result.sublayers)
    ]
    pictures = [
        Lines(
            "Lyapunov exponents, per layer",
            "exponent",
            range(n),
            {label or "exponent": one.exponents for label, one in beside.items()},
        )
    ]
    pictures += [
        Lines(
            f"what a layer adds to ln s₁, {name}",
            "layer",
            range(len(result.growth)),
            {label or name: one.growth[:, at, 0] for label, one in beside.items()},
            group="what a layer adds to ln s₁",
        )
        for at, name in enumerate(result.sublayers)
    ]
    for quantity in ("effective_rank", "stable_rank"):
        ranks = {
            label or "rank": values for label, one in beside.items() if (values := getattr(one, quantity)) is not None
        }
        if ranks:
            name = quantity.replace("_", " ")
            rows.append((f"{name} at the end", *(float(values[-1]) for values in ranks.values())))
            depths = range(len(result.growth) + 1)
            pictures.append(Lines(f"{name} of the product", "depth", depths, ranks, logarithmic=True))
    note = "Exponents have no closed-form chance level" + (
        "." if len(beside) > 1 else ", and fresh weights were not measured: lyapunov_spectrum(..., baseline='fresh')."
    )
    below = f"{counted(len(result.growth), 'layer')}, token {result.position}"
    return Shown(below, ("", "value", "baseline")[: 1 + len(beside)], rows, pictures, note)


@shown.register
def _profile(result: DepthProfile) -> Shown:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few prompts: the ends are then missing
        with_coupling = result.correlation()
    names, shape = with_coupling.labels[0], result.coupling.shape[1:]
    rows, pictures = [], []
    for quantity in (*(each for each in names if each != "layer"), "coupling"):
        for at, sublayer in enumerate(result.sublayers):

            def of_sublayer(field: Tensor, at: int = at) -> Tensor:
                return field.reshape(-1, *shape).mean(0)[at]  # over prompts, where the field has them

            picture, means = _by_layer(result, quantity, quantity.replace("_", " "), sublayer, of_sublayer)
            rho = [
                float(getattr(with_coupling, end)[names.index(quantity), at]) if quantity in names else math.nan
                for end in ("estimate", "low", "high")
            ]
            rows.append((picture.title, *means, *rho))
            pictures.append(picture)
    columns = ("", *_MEANS, "rho with coupling", "low", "high")
    below = f"{counted(len(result.prompts), 'prompt')}, {counted(result.n_tokens, 'token')}"
    note = (
        "rho: Spearman's over layers, its mean over prompts; smooth profiles go together by chance. See correlation(). "
        f"Linearity is over {counted(result.n_tokens, 'token')}, where noise has {result.linearity_null.mean():.2f}."
    )
    return Shown(below, columns, rows, pictures, note)


@shown.register
def _correlations(result: Correlations) -> Shown:
    order = result.r_squared.nan_to_num().argsort(descending=True)[:MOST_ROWS].tolist()
    columns = ("r_squared", "r", "low", "high", "p", "by_null")
    rows = [(result.predictors[at], *(float(getattr(result, name)[at]) for name in columns)) for at in order]
    best = order[0]
    by_score = result.scores.argsort()
    picture = Lines(
        f"{result.predictors[best]}, models in the order of their score",
        "model",
        [result.models[at] for at in by_score.tolist()],
        {result.predictors[best]: result.values[best][by_score]},
    )
    headings = ("predictor", "R²", "r", "low", "high", "p", "R² of its null")
    return Shown(f"{len(result.models)} models", headings, rows, [picture])


@shown.register
def _directions(result: DirectionReadout) -> Shown:
    rows = []
    for (side, texts), (rank, s) in (
        (pair, one)
        for one in enumerate(result.singular_values.tolist())
        for pair in zip(SIDES, result.texts, strict=True)
    ):
        words = [" ".join(f"“{visible(text)}”" for text in texts[rank][end][:3]) for end in range(len(ENDS))]
        at = SIDES.index(side)
        numbers = (s, float(result.scores[at, rank, 0, 0]), float(result.null[at, 0]))
        rows.append((f"{side}, direction {rank + 1}", *words, *numbers))
    places = range(result.scores.shape[-1])
    pictures = [
        Lines(
            f"scores of {side}, + end",
            "place",
            places,
            {f"direction {rank + 1}": scores[0] for rank, scores in enumerate(result.scores[at])},
            result.null[at],
        )
        for at, side in enumerate(SIDES)
    ]
    columns = ("", "+ end", "− end", "s", "top score", "of random directions")
    return Shown(f"{result.sublayer} of layer {result.layer}, token {result.position}", columns, rows, pictures)


@shown.register
def _causal(result: CausalEffect) -> Shown:
    parts = (result.effect, result.control_mean, result.excess, result.share)
    per_layer = [each.double().mean(0) for each in parts]
    best = int(per_layer[2].abs().nan_to_num().argmax())
    rows = [
        ("mean over layers", *(float(each.mean()) for each in per_layer)),
        (f"layer {result.layers[best]}, the largest", *(float(each[best]) for each in per_layer)),
    ]
    spread = result.control_std.double().mean(0).nan_to_num()
    lines = {"random directions": per_layer[1], "the directions": per_layer[0]}
    band = (per_layer[1] - spread, per_layer[1] + spread)
    picture = Lines("change of the loss, nats", "layer", result.layers, lines, band=band)
    columns = ("change of the loss, nats", "the directions", "random ones", "excess", "share of the write's norm")
    below = f"{result.sublayer}, K = {result.k}, {counted(len(result.prompts), 'prompt')}"
    return Shown(below, columns, rows, [picture])


@shown.register
def _steering(result: SteeringEffect) -> Shown:
    kl, loss, gap = (each.double().mean(0) for each in (result.kl, result.loss, result.linear_gap))
    controls, losses = (each.double().mean((0, 3)).unbind(1) for each in (result.control_kl, result.control_loss))
    columns = [kl, *controls, loss, *losses, gap]
    rows = [
        (f"scale {scale:g}", *numbers)
        for scale, *numbers in zip(result.scales, *(each.tolist() for each in columns), strict=True)
    ]
    random = {f"random, same {name}": values for name, values in zip(CONTROLS, controls, strict=True)}
    lines = {"the direction": kl, **random}
    picture = Lines("KL of the next token, nats", "scale", [f"{scale:g}" for scale in result.scales], lines)
    headings = ("KL, nats", "the direction", *random, "change of the loss", *random, "linear gap")
    below = f"behind layer {result.layer}, {counted(len(result.prompts), 'prompt')}"
    reach = result.reach().nan_to_num(0.0).abs().median()
    note = f"The linear prediction of the logits is off by a tenth or less up to scale {reach:g} (median; 0: at none)."
    return Shown(below, headings, rows, [picture], note)


@shown.register
def _lens(result: JacobianLens) -> Shown:
    norms, errors = result.matrices.double().flatten(1).norm(dim=1), result.error.double()
    chosen = dict.fromkeys((0, len(norms) // 2, len(norms) - 1))
    rows = [(f"layer {result.layers[at]}", float(norms[at]), float(errors[at])) for at in chosen]
    picture = Lines("‖J‖_F of the transport", "layer", result.layers, {"to the last layer": norms})
    cotangents = "all cotangents" if result.sketched is None else counted(result.sketched, "random cotangent")
    below = f"{counted(result.n_prompts, 'prompt')}, {cotangents}"
    return Shown(below, ("", "‖J‖_F", "standard error, relative"), rows, [picture])


@shown.register
def _lens_coupling(result: LensCoupling) -> Shown:
    rows = [
        (name, float(value.double().mean()), float(null.double().mean()))
        for name, value, null in (
            ("coupling", result.values, result.null),
            ("overlap, writes", result.overlap_u, result.overlap_null_u),
            ("overlap, reads", result.overlap_v, result.overlap_null_v),
        )
    ]
    title, labels = "coupling of lens and block - null", (result.layers, result.blocks)
    picture = Matrix(title, result.excess.double().mean(0), ("layer of the lens", "block"), labels)
    below = f"K = {result.k}, {counted(len(result.positions), 'token')}"
    return Shown(below, ("mean over pairs", "measured", "null"), rows, [picture])


@shown.register
def _detached(result: DetachedComparison) -> Shown:
    maps = result._coords()["map"]
    errors = result.prediction.double().mean(-1)
    rows = [
        ("error of reconstruction", *result.reconstruction.tolist(), math.nan),
        *(
            (f"error of prediction, size {size:g}", *numbers, math.nan)
            for size, numbers in zip(result.sizes, errors.mT.tolist(), strict=True)
        ),
        ("largest singular value", *result.singular_values[:, 0].tolist(), math.nan),
        *(
            (f"overlap of the two, {side}", overlap, overlap, null)
            for side, overlap, null in zip(
                result._coords()["side"], result.overlap.tolist(), result.null.tolist(), strict=True
            )
        ),
    ]
    values = dict(zip(maps, result.singular_values.double(), strict=True))
    picture = Lines("singular values", "rank", range(result.singular_values.shape[1]), values)
    return Shown(f"{result.source} → {result.target}", ("", *maps, "chance"), rows, [picture])


@shown.register
def _features(result: FeatureMap) -> Shown:
    effects = (result.values * result.source_acts).double()
    best = effects.abs().flatten().topk(min(4, effects.numel())).indices.tolist()
    rows = []
    for at in best:
        row, column = divmod(at, effects.shape[1])
        name = f"feature {result.source_features[column]} → {result.target_features[row]}"
        rows.append(
            (name, float(result.values[row, column]), float(result.null[row, column]), float(effects[row, column]))
        )
    labels = (result.target_features, result.source_features)
    axes = ("target feature", "source feature")
    picture = Matrix("derivative, in units of chance", (result.values / result.null).double(), axes, labels, zero="0")
    below = f"{result.source} at {result.src} → {result.target} at {result.dest}"
    return Shown(below, ("", "derivative", "random direction, root mean square", "effect"), rows, [picture])


@shown.register
def _relations(result: SliceRelations) -> Shown:
    gains, stds = result.gain[:, 0].double().mean(1), result.gain[:, 0].double().std(1)
    overlaps = result.overlap.double()
    order = sorted(range(len(result.pairs)), key=lambda at: result.pairs[at][1] - result.pairs[at][0])
    names = [f"{a} to {b}" for a, b in result.pairs]
    rows = [
        (f"x^{names[at]}", *overlaps[at].tolist(), result.null, float(gains[at]), float(stds[at]))
        for at in order[:MOST_ROWS]
    ]
    values = {f"overlap, {side}": overlaps[order, column] for column, side in enumerate(result._coords()["side"])}
    chance = torch.full((len(order),), result.null, dtype=torch.float64)
    picture = Lines("slice and product of top parts", "slice", [names[at] for at in order], values, chance=chance)
    columns = ("slice", "overlap of writes", "of reads", "chance", "gain by coupling", "its spread over draws")
    return Shown(f"token {result.position}, K = {result.k}", columns, rows, [picture])


@shown.register
def _atlas(result: SensitivityAtlas) -> Shown:
    table = result.summary()
    chosen = table.iloc[sorted({0, len(table) // 2, len(table) - 1})]
    columns = ["s", "baseline", "norm_product", *OVERLAPS, "null"]
    rows = [
        (f"target − source = {distance}", *numbers)
        for distance, *numbers in chosen[["distance", *columns]].itertuples(index=False)
    ]
    labels, axes = (result.layers, result.layers), ("source", "target")
    pictures = [
        Matrix("log₁₀ of the largest singular value", result.singular_values[..., 0].log10(), axes, labels, False)
    ]
    left = int((~result.converged & result.singular_values.isfinite()).sum())
    note = "Skip connections are part of a slice. null: the overlap of independent subspaces. " + (
        f"{counted(left, 'triplet')} not converged." if left else ""
    )
    below = (
        f"{result.source_site} to {result.target_site}, {counted(len(result.pairs), 'pair')} of layers, K = {result.k}"
    )
    headings = ("mean over pairs", "s₁", "s₁ of the baseline", "product of norms", "reads as first", "writes as last")
    return Shown(below, (*headings, "reads source", "null"), rows, pictures, note)


@shown.register
def _published(result: PublishedMisalignment) -> Shown:
    rows = [
        ("pairs of different layers", float(result.mean_coupling(include_diagonal=False)[0]), math.nan),
        ("all pairs, as published", float(result.mean_coupling()[0]), math.nan),
    ]
    layers = range(len(result.singular_values))
    cells = (1 - result.misalignment[0]).double()
    picture = Matrix("coupling, 1 − misalignment", cells, ("layer", "basis_layer"), (layers, layers), centred=False)
    note = "The published procedure gives no chance level: tlc.depth_coupling does."
    return Shown(f"{len(layers)} layers, K = {result.ks[0]}", ("", "coupling", "null"), rows, [picture], note)
