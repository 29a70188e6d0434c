"""Figures: what is drawn is the numbers, legible at any size, with any text, in every format."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from analyses import HOSTILE_TOKENS, make_analysis, projected_by_hand
from cases import TOKENS, fresh
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.text import Text

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, ResultFileError
from tlcoupling.results.base import Provenance
from tlcoupling.results.intervals import mean_interval
from tlcoupling.viz import figures
from tlcoupling.viz.figures.style import DIVERGING, SEQUENTIAL, SUBLAYER_COLORS, depth_colors, label, matrix_colors

HOSTILE = (*HOSTILE_TOKENS, "$\\frac{1$", "a_b^c", "\\", "{", "%d", "漢字", "\x00", "مرحبا")


@pytest.fixture(autouse=True)
def _no_warning_and_no_global_state() -> Iterator[None]:
    """No figure warns (of glyphs, of layout), and none leaves a trace in matplotlib."""
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def components(tokens: tuple[str, ...], depth: int, n: int = 2) -> tlc.TrajectoryComponents:
    """Trajectories made by hand, of random steps."""
    generator = torch.Generator().manual_seed(0)
    return tlc.TrajectoryComponents(
        provenance=Provenance(model_name="maker/tiny"),
        coordinates=torch.randn(depth, len(tokens), n, generator=generator).cumsum(0),
        components=torch.eye(n),
        explained=torch.linspace(0.6, 0.1, n),
        center=torch.zeros(n),
        positions=tuple(range(len(tokens))),
        tokens=tokens,
    )


def table(n: int = 8, **columns: Any) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    x = np.linspace(0.05, 0.4, n)
    return {
        "model": [f"model-{index}" for index in range(n)],
        "coupling": x,
        "null": 0.1 * x,
        "score": 30 + 80 * x + generator.normal(0, 2, n),
        "d_model": 256 * 2.0 ** np.arange(n),
        **columns,
    }


@pytest.mark.parametrize(
    ("draw", "given", "remedy"),
    [
        (figures.coupling_by_distance, "many", r"tlc.analyze\(model, prompt\); ManyAnalyses keeps means alone"),
        (figures.depth_coupling, "linearity", r"tlc.depth_coupling\(trace\)"),
        (figures.distributions, "coupling", r"tlc.analyze_many\("),
        (figures.singular_values, "coupling", r"tlc.singular_value_profile\(coupling\)"),
        (figures.trajectories, "linearity", r"tlc.trajectory_components\(trace\)"),
        (figures.projected_jacobians, "coupling", r"tlc.projected_jacobians\("),
        (figures.sensitivity_atlas, "coupling", r"tlc.sensitivity_atlas\("),
        (figures.training, "linearity", r"monitor.table\(\)"),
        (figures.coupling_against_score, "linearity", r"tlc.correlate\("),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
@pytest.mark.usefixtures("unchecked")
def test_a_figure_of_another_result_says_what_it_draws(draw: Any, given: str, remedy: str):
    model = fresh(0)
    wrong = (
        tlc.analyze_many(model, [TOKENS], k=2)
        if given == "many"
        else getattr(tlc.analyze(model, TOKENS, k=2, attention=False), given)
    )
    with pytest.raises(ArgumentError, match=remedy):
        draw(wrong)


def test_figures_of_coupling_and_of_distributions_take_analyses():
    analysis = make_analysis()
    for result in (analysis, [analysis], {"a": analysis}):
        assert len(figures.coupling_by_distance(result).axes) == 3
    assert len(figures.distributions(analysis).axes) == 2


def profile_of(coupling: tlc.DepthCoupling) -> tlc.SingularValueProfile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a line through two layers is no fit, and says so
        return tlc.singular_value_profile(coupling)


def every_figure(n_layers: int, tokens: tuple[str, ...]) -> dict[str, Figure]:
    """One figure of each kind."""
    analysis = make_analysis(tokens, n_layers=n_layers, positions=(0, len(tokens) - 1))
    names = [*tokens, *(f"m{index}" for index in range(8))][:8]
    return {
        "depth_coupling": figures.depth_coupling({tokens[0]: analysis.coupling, "b": analysis.coupling}),
        "projected_jacobians": figures.projected_jacobians(projected_by_hand(min(n_layers, 12), tokens[0])),
        "singular_values": figures.singular_values(profile_of(analysis.coupling), token=0),
        "trajectories": figures.trajectories(components(tokens, n_layers + 1, 3)),
        "distributions": figures.distributions({tokens[0]: analysis, "random": [analysis, analysis]}),
        "coupling_by_distance": figures.coupling_by_distance(analysis.coupling, baseline=analysis.coupling),
        "coupling_against_score": figures.coupling_against_score(table(model=names)),
    }


def texts_of(figure: Figure) -> list[Text]:
    return [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]


def images_of(figure: Figure) -> list[np.ma.MaskedArray]:
    return [np.ma.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


# projected Jacobians


# what is drawn is the numbers


@pytest.mark.parametrize("token", [None, 0])
def test_depth_coupling_draws_its_matrices(token: int | None):
    """Mean over tokens or one of them, the K asked for, one scale for coupling and null, the diagonal left out."""
    coupling = make_analysis(n_layers=5, positions=(0, 2), ks=(3, 7)).coupling
    figure = figures.depth_coupling(coupling, token=token, k=7)
    drawn = images_of(figure)
    assert len(drawn) == 9
    off = ~np.eye(5, dtype=bool)
    expected = []
    for sublayer in range(3):
        for quantity in (coupling.values, coupling.null, coupling.excess):
            cells = quantity[sublayer, :, 1].double()
            expected.append((cells.mean(0) if token is None else cells[0]).numpy())
    for found, truth in zip(drawn, expected, strict=True):
        assert found.mask[np.eye(5, dtype=bool)].all() and not found.mask[off].any()
        np.testing.assert_allclose(found.data[off], truth[off], rtol=1e-6)
    shared = [truth[off] for index, truth in enumerate(expected) if index % 3 != 2]
    norms = [axes.images[0].norm for axes in figure.axes if axes.images]
    for norm in norms[0::3] + norms[1::3]:
        assert (norm.vmin, norm.vmax) == (pytest.approx(np.min(shared)), pytest.approx(np.max(shared)))
    assert all(norm.vmin == -norm.vmax for norm in norms[2::3])
    assert max(np.abs(truth[off]).max() for truth in expected[2::3]) == pytest.approx(norms[2].vmax)
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.images]
    assert titles[0] == f"coupling, mean {expected[0][off].mean():.4f}"
    assert ("mean over 2 tokens" in " ".join(text.get_text() for text in figure.texts)) is (token is None)


def test_models_share_the_scales_of_depth_coupling():
    trained, random = make_analysis(n_layers=4).coupling, make_analysis(n_layers=4).coupling
    random = replace(random, values=random.values * 0.1)
    figure = figures.depth_coupling({"trained": trained, "random": random})
    norms = [axes.images[0].norm for axes in figure.axes if axes.images]
    assert len(norms) == 6, "the excess of each sublayer, side by side"
    assert len({(norm.vmin, norm.vmax) for norm in norms}) == 1
    assert max(figure.get_size_inches()) <= 10, "a page"
    for row, name in enumerate(trained.sublayers):
        titles = [axes.get_title(loc="left") for axes in figure.axes if axes.images][2 * row : 2 * row + 2]
        means = [float(one.mean("excess")[row, 0, 0]) for one in (trained, random)]
        assert titles == [f"trained: excess, mean {means[0]:.4f}", f"random: excess, mean {means[1]:.4f}"], name
    several = figures.depth_coupling({"trained": trained, "random": random}, quantities=["coupling", "excess"])
    norms = [axes.images[0].norm for axes in several.axes if axes.images]
    assert len(norms) == 12 and len({(norm.vmin, norm.vmax) for norm in norms}) == 2


def test_a_diagonal_that_is_not_one_by_definition_is_drawn():
    coupling = replace(make_analysis(n_layers=3).coupling, bases="vu")
    drawn = images_of(figures.depth_coupling(coupling))[0]
    assert not drawn.mask.any()
    np.testing.assert_allclose(drawn, coupling.values[0, 0, 0].double())


def test_pairs_without_a_number_are_left_out():
    coupling = make_analysis(n_layers=3).coupling
    values = coupling.values.clone()
    values[0, 0, 0, 0, 1] = torch.nan
    assert images_of(figures.depth_coupling(replace(coupling, values=values)))[0].mask[0, 1]


def test_undetermined_bases_have_a_dot_and_a_legend():
    """Layer 2's second singular vectors of the attention, at one of two tokens: K = 3 uses them, K = 1 does not."""
    coupling = make_analysis(positions=(0, -1), ks=(1, 3)).coupling
    uncertainty = torch.zeros_like(coupling.singular_values)
    uncertainty[1, 1, 2, 1] = 1.0
    coupling = replace(coupling, uncertainty=uncertainty)
    for k, token, marked in ((3, None, True), (3, 3, True), (3, 0, False), (1, None, False)):
        figure = figures.depth_coupling(coupling, k=k, token=token)
        lines = [[line for line in axes.lines if line.get_gid() == "undetermined"] for axes in figure.axes[:9]]
        dots = [[tuple(dot) for line in each for dot in line.get_xydata()] for each in lines]
        column = [(2.0, 0.0), (2.0, 1.0), (2.0, 3.0)] if marked else []  # the diagonal is 1 whatever the bases
        assert dots == [[], [], [], column, [], column, [], [], []]
        assert any("dot: bases not determined" in text.get_text() for text in texts_of(figure)) is marked


def test_projected_panels_draw_their_matrices_and_chance():
    result = projected_by_hand(3)
    figure = figures.projected_jacobians(result)
    drawn = images_of(figure)
    for index, (row, column) in enumerate(itertools.product(range(3), repeat=2)):
        truth = result.values[0, row, column].abs() / result.singular_values[0, row, 0]
        np.testing.assert_allclose(drawn[index], truth, rtol=1e-6)
    panels = [axes for axes in figure.axes if axes.images]
    assert all(isinstance(axes.images[0].norm, LogNorm) for axes in panels)
    titles = [axes.get_title() for axes in panels]
    assert titles[1] == f"{result.coupling[0, 0, 1]:.2f} ({result.null[0, 0]:.2f})"
    chance = result.null_entry[0] / result.singular_values[0, :, 0]
    bar = figure.axes[-1]
    assert any(line.get_ydata()[0] == pytest.approx(chance.log().mean().exp().item()) for line in bar.lines)


def test_singular_values_and_their_fit_are_drawn():
    coupling = make_analysis(n_layers=6, ks=(4,), positions=(0, 2)).coupling
    result = tlc.singular_value_profile(coupling)
    figure = figures.singular_values(result)
    for which, axes in enumerate(figure.axes[:3]):
        curves = {tuple(np.round(line.get_ydata(), 6)) for line in axes.lines}
        for rank in range(4):  # of the last token measured
            assert tuple(np.round(result.singular_values[which, 1, :, rank].double().numpy(), 6)) in curves
        fitted = axes.lines[-1].get_ydata()
        np.testing.assert_allclose(fitted, result.fitted[which, 1, :, 0].double())
        assert f"R² = {result.r_squared[which, 1, 0]:.2f}" in axes.get_legend().get_texts()[0].get_text()
        assert axes.get_yscale() == "log"


def test_the_atlas_draws_singular_values_their_ratio_and_overlaps_beside_chance():
    trace, other = (tlc.trace(fresh(seed, n_layers=5), TOKENS) for seed in (0, 1))
    atlas = tlc.sensitivity_atlas(trace, 2, baseline=other)
    figure = figures.sensitivity_atlas(atlas, rank=1)
    values, ratio, _, reads, writes, overlaps = figure.axes[:6]
    drawn = [np.ma.filled(axes.images[0].get_array(), np.nan) for axes in (values, ratio, reads, writes)]
    assert atlas.baseline is not None
    s, beside = (one.singular_values[..., 1].numpy() for one in (atlas, atlas.baseline))
    np.testing.assert_allclose(drawn[0], s)
    np.testing.assert_allclose(drawn[1], np.log2(s / beside), rtol=1e-5, atol=1e-6)
    for matrix, name in zip(drawn[2:], ("reads_as_first", "writes_as_last"), strict=True):
        np.testing.assert_allclose(matrix[np.triu_indices(5, 1)], atlas.by_pair()[name] - atlas.null, atol=1e-6)
    first, *_, chance = overlaps.lines
    np.testing.assert_allclose(first.get_ydata(), atlas.summary()["reads_as_first"], rtol=1e-5)
    assert set(chance.get_ydata()) == {atlas.null}
    single = figures.sensitivity_atlas(replace(atlas, baseline=None))
    assert "what the source writes" in single.axes[1].get_title(loc="left")
    with pytest.raises(ArgumentError, match="rank=2 "):
        figures.sensitivity_atlas(atlas, rank=2)


def test_coupling_by_distance_takes_no_two_models_for_two_prompts():
    one = make_analysis(n_layers=4).coupling
    other = replace(one, provenance=replace(one.provenance, model_name="other"))
    with pytest.raises(ArgumentError, match="result=.*'other'.*those of another as baseline="):
        figures.coupling_by_distance({"one": one, "other": other})
    figures.coupling_by_distance(one, baseline=other)


def test_coupling_by_distance_draws_profiles_nulls_and_intervals():
    prompts = [replace(make_analysis(n_layers=6).coupling) for _ in range(6)]
    for index, one in enumerate(prompts):
        prompts[index] = replace(one, values=one.values * (1 + 0.1 * index))
    baseline = replace(prompts[0], values=prompts[0].null)
    figure = figures.coupling_by_distance({str(index): one for index, one in enumerate(prompts)}, baseline=baseline)
    for which, axes in enumerate(figure.axes):
        values, null = (
            torch.stack([one.profile(name)[which, 0, 0].double() for one in prompts]) for name in ("values", "null")
        )
        coupling, chance, other, _ = (line.get_ydata() for line in axes.lines)
        np.testing.assert_allclose(coupling, values.mean(0))
        np.testing.assert_allclose(chance, null.mean(0))
        np.testing.assert_allclose(other, baseline.profile("values")[which, 0, 0].double())
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), range(1, 6))
        interval = mean_interval(values, 0.95, "coupling")
        corners = axes.collections[0].get_paths()[0].vertices
        for end in ("low", "high"):
            for distance, height in enumerate(interval[end].tolist(), start=1):
                assert np.isclose(corners, [distance, height]).all(1).any()


def test_layers_that_are_chosen_keep_their_distance():
    coupling = make_analysis(n_layers=4).coupling
    even, uneven = replace(coupling, layers=(0, 10, 20, 30)), replace(coupling, layers=(0, 1, 7, 30))
    axes = figures.coupling_by_distance(even).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [10, 20, 30])
    assert axes.get_xlabel() == "layers apart"
    assert figures.coupling_by_distance(uneven).axes[0].get_xlabel() == "distance in the list of measured layers"
    ticks = [text.get_text() for text in figures.depth_coupling(uneven).axes[0].get_xticklabels()]
    assert ticks == ["0", "1", "7", "30"]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_trajectories_are_drawn_step_by_step(n: int):
    result = components(("a", "b", "c"), 5, n)
    figure = figures.trajectories(result)
    points = result.coordinates.double().numpy()
    for other, axes in enumerate(figure.axes[:-1], start=1):
        x = points[:, :, 0] if n > 1 else np.broadcast_to(np.arange(5.0)[:, None], (5, 3))
        paths = np.stack([x, points[:, :, other if n > 1 else 0]], axis=-1)
        lines = next(each for each in axes.collections if isinstance(each, LineCollection))
        truth = [paths[[step, step + 1], token] for token in range(3) for step in range(4)]
        np.testing.assert_allclose(np.stack(lines.get_segments()), truth)
        np.testing.assert_array_equal(lines.get_array(), [0, 1, 2, 3] * 3)
        np.testing.assert_allclose(axes.collections[-1].get_offsets(), paths[-1])
        if n > 1:
            assert axes.get_aspect() == 1  # a straight line looks no straighter than it is
    assert (
        f"component {min(n, 2)} ({result.explained[min(n, 2) - 1]:.0%} of the variance)" in figure.axes[0].get_ylabel()
    )


def test_distributions_are_shares_of_the_tokens():
    trained, random = (make_analysis([str(i) for i in range(n)], n_layers=4) for n in (40, 30))
    random.linearity.lss[0, 3] = torch.nan
    figure = figures.distributions({"trained": trained, "random": random})
    left, right = figure.axes
    for axes, pair in (
        (left, (trained.linearity.lss[0], random.linearity.lss[0])),
        (right, (trained.growth.expodistance, random.growth.expodistance)),
    ):
        filled = [each for each in axes.containers]
        for bars, values in zip(filled[0::2], pair, strict=False):
            edges = np.array([*(bar.get_x() for bar in bars), bars[-1].get_x() + bars[-1].get_width()])
            finite = values[values.isfinite()].double().numpy()
            inside = np.clip(finite, edges[0], edges[-1])  # the last bit of an edge
            heights = [bar.get_height() for bar in bars]
            np.testing.assert_allclose(heights, np.histogram(inside, edges)[0] / len(finite), atol=1 / len(finite))
            assert sum(heights) == pytest.approx(1)
        medians = [line.get_xdata()[0] for line in axes.lines]
        for values in pair:
            assert np.isclose(medians, np.nanmedian(values.double())).any()
    assert np.isclose([line.get_xdata()[0] for line in left.lines], math.sqrt(4)).any()
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "trained, 40 tokens",
        "random, 29 tokens (1 undefined)",
    ]


def test_distributions_leave_sinks_out_and_say_both_medians():
    analysis = make_analysis([str(i) for i in range(9)], n_layers=4)
    analysis.growth.norms[2, 0] = 1e4
    analysis.linearity.lss[0, 0] = 90.0
    scores = analysis.linearity.lss[0].numpy()
    without, whole = (
        figures.distributions({"a": analysis}, include_sinks=include).axes[0] for include in (False, True)
    )
    medians = np.median(scores[1:]), np.median(scores)
    assert without.get_xlim()[1] < 10 < whole.get_xlim()[1]
    assert [text.get_text() for text in without.get_legend().get_texts()] == [
        f"a, 8 tokens (without 1 sink: median {medians[0]:.2f}, with {medians[1]:.2f})"
    ]
    assert np.isclose([line.get_xdata()[0] for line in without.lines], medians[0]).any()
    assert [text.get_text() for text in whole.get_legend().get_texts()] == ["a, 9 tokens"]


def test_distributions_of_many_prompts_stand_beside_their_baseline():
    model = fresh(1)
    many = tlc.analyze_many(model, {"a": TOKENS, "b": TOKENS.flip(0)}, k=2, tokens="all", baseline=fresh(2))
    figure = figures.distributions(many)
    assert many.baseline is not None
    for axes, name in zip(figure.axes, ("lss", "expodistance"), strict=True):
        medians = sorted(line.get_xdata()[0] for line in axes.lines)
        truth = sorted(
            float(np.median(getattr(one, name).double().numpy().reshape(14, -1)[:, 0])) for one in (many, many.baseline)
        )
        np.testing.assert_allclose(medians, truth)


def test_coupling_against_score_draws_points_nulls_and_the_line():
    given = table(9)
    given["score"][4] = np.nan
    figure = figures.coupling_against_score(given)
    kept = np.isfinite(given["score"])
    x, y = given["coupling"][kept], given["score"][kept]
    axes = figure.axes[0]
    joins, nulls, points = axes.collections
    np.testing.assert_allclose(points.get_offsets(), np.stack([x, y], axis=1))
    np.testing.assert_allclose(nulls.get_offsets(), np.stack([given["null"][kept], y], axis=1))
    np.testing.assert_allclose(points.get_array(), given["d_model"][kept])
    assert len(joins.get_segments()) == 8
    slope, intercept, r, *_ = __import__("scipy.stats", fromlist=["linregress"]).linregress(x, y)
    ends = axes.lines[0].get_xdata()
    np.testing.assert_allclose(axes.lines[0].get_ydata(), intercept + slope * np.array(ends))
    below = " ".join(text.get_text() for text in figure.texts)
    assert "8 models" in below and f"R² = {r**2:.2f}" in below
    assert {text.get_text() for text in axes.texts} == {f"model-{index}" for index in range(9) if index != 4}


def test_the_published_points_have_the_published_fit():
    """The paper's figure states R^2 = 0.80; its points have no null, and their width shows."""
    points = pd.read_csv(Path(tlc.__file__).parent / "data" / "published_coupling.csv")
    figure = figures.coupling_against_score(points, score="leaderboard_score")
    below = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "28 models" in below and "R² = 0.80" in below and "no null" in below
    np.testing.assert_allclose(figure.axes[0].collections[0].get_array(), points["d_model"])


def test_a_table_without_nulls_says_so():
    given = {name: column for name, column in table().items() if name not in ("null", "d_model")}
    figure = figures.coupling_against_score(given)
    assert "no null in the table" in " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert len(figure.axes) == 1  # no width, no colour bar


def test_correlations_draw_the_null_of_a_coupling_and_none_of_an_excess():
    result = tlc.correlate()
    for predictor, null in (("coupling", "null"), ("excess", None)):
        axes = result.plot(coupling=predictor).axes[0]
        _, *nulls, points = axes.collections if null else (None, *axes.collections)
        drawn = [np.asarray(one.get_offsets())[:, 0] for one in (points, *nulls)]
        assert len(drawn) == (2 if null else 1)
        for name, x in zip((predictor, null), drawn, strict=False):
            np.testing.assert_allclose(x, result.by_model()[name])


def test_names_cover_neither_each_other_nor_points():
    given = table(20, coupling=np.linspace(0.1, 0.11, 20), score=50 + np.linspace(0, 0.5, 20) ** 2)
    figure = figures.coupling_against_score(given)
    figure.draw_without_rendering()
    canvas: Any = figure.canvas
    renderer = canvas.get_renderer()
    boxes = []
    for text in figure.axes[0].texts:
        text.update_positions(renderer)
        boxes.append(Text.get_window_extent(text, renderer))
    assert len(boxes) >= 15
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = figure.axes[0].transData.transform(np.stack([given["coupling"], given["score"]], axis=1))
    assert not any(((points > box.min) & (points < box.max)).all(1).any() for box in boxes)


def monitored(model: str = "m") -> pd.DataFrame:
    """A table as ``TrainingMonitor`` gives it, of numbers made by hand."""
    generator = np.random.default_rng(0)
    cells = itertools.product((0, 50, 100), range(4), ("block", "attn", "mlp"), (3, 5))
    rows = [
        dict(zip(("step", "prompt_id", "sublayer", "k"), cell, strict=True), model=model, null=0.1, ed=2.0 + cell[1])
        for cell in cells
    ]
    return pd.DataFrame(rows).assign(coupling=generator.random(len(rows)), lss=1 + generator.random(len(rows)))


def test_training_draws_means_over_prompts_beside_the_null():
    rows = monitored()
    loss = {0: 3.0, 60: 1.0, 100: 0.5}
    figure = figures.training(rows, loss, k=5)
    shown = {axes.get_ylabel(): axes for axes in figure.axes}
    for index, sublayer in enumerate(("block", "attn", "mlp")):
        part = rows[(rows.sublayer == sublayer) & (rows.k == 5)]
        coupling, null = shown["coupling c, K = 5"].lines[2 * index : 2 * index + 2]
        np.testing.assert_allclose(coupling.get_ydata(), part.groupby("step").coupling.mean())
        np.testing.assert_allclose(null.get_ydata(), [0.1] * 3)
        line = shown["line-shape score (1: straight)"].lines[index]
        np.testing.assert_allclose(line.get_ydata(), part.groupby("step").lss.mean())
        np.testing.assert_array_equal(line.get_xdata(), [0, 50, 100])
    np.testing.assert_allclose(shown["expodistance (0: exponential)"].lines[0].get_ydata(), [3.5] * 3)
    np.testing.assert_allclose(shown["loss"].lines[0].get_xydata(), [[0, 3.0], [60, 1.0], [100, 0.5]])
    assert len(figures.training(rows).axes) == 3


def test_fresh_weights_are_a_line_of_their_own_beside_training():
    """A sweep measures them beside the last checkpoint; they move none of its means."""
    rows = monitored()
    fresh = rows[rows.step == 100].assign(random_seed=0, coupling=0.25, lss=5.0, ed=9.0)
    both = pd.concat([rows.assign(random_seed=np.nan), fresh, fresh.assign(random_seed=1, coupling=0.35)])
    figure = figures.training(both, k=5)
    assert "mean over 4 prompts" in " ".join(text.get_text() for text in texts_of(figure))
    coupling, linearity, growth = figure.axes
    for axes, column, level in ((coupling, "coupling", 0.3), (linearity, "lss", 5.0), (growth, "ed", 9.0)):
        dotted = [line for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
        assert len(dotted) == (1 if column == "ed" else 3)
        assert all(np.asarray(line.get_ydata()) == pytest.approx(level) for line in dotted)
        solid = [line for line in axes.lines if line.get_linestyle() == "-"]
        for line, sublayer in zip(solid, ("block", "attn", "mlp"), strict=False):
            part = rows[(rows.sublayer == sublayer) & (rows.k == 5)]
            np.testing.assert_allclose(line.get_ydata(), part.groupby("step")[column].mean())
    assert [text.get_text() for text in coupling.get_legend().get_texts()] == ["block", "attn", "mlp", "null", "random"]


# text, size, colour


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_any_text_becomes_a_label_that_can_be_drawn(text: str):
    """Of characters that the font has, none of which breaks the line or turns it round."""
    shown = label(text)
    font = matplotlib.font_manager.get_font(matplotlib.font_manager.findfont("DejaVu Sans"))
    assert shown.strip() or not text.strip()
    assert all(font.get_char_index(ord(char)) for char in shown)
    assert not any(char in "\n\r\t\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069" for char in shown)


@pytest.mark.slow
def test_hostile_tokens_are_drawn_as_they_are(tmp_path: Path):
    """No mathtext, no TeX, no markup: the very characters, in the figure and in the SVG."""
    for token in ("$\\frac{1$", "$body ${data}", "a_b^c", "<bos>", "%d"):
        coupling = make_analysis((token, " b"), n_layers=2, positions=(0,), sublayers=("block",)).coupling
        figure = figures.depth_coupling({token: coupling})
        shown = [text for text in texts_of(figure) if label(token, 24) in text.get_text()]
        assert shown and not any(text.get_parse_math() or text.get_usetex() for text in shown), token
    for name, figure in every_figure(4, HOSTILE).items():
        root = ElementTree.parse(figures.save(figure, tmp_path / f"{name}.svg")).getroot()
        assert not any(element.tag.endswith("script") for element in root.iter())
    written = [text.get_text() for text in figures.trajectories(components(HOSTILE, 4)).axes[0].texts]
    assert set(written) <= {label(token.strip() or token, 14) for token in HOSTILE} and len(written) > 10


@pytest.mark.parametrize(("n_layers", "n_tokens"), [(2, 2), pytest.param(80, 512, marks=pytest.mark.slow)])
def test_every_figure_is_legible(n_layers: int, n_tokens: int):
    """No type below six points, tick labels apart, and everything within the page."""
    tokens = tuple(f" token{index}" for index in range(n_tokens))
    for name, figure in every_figure(n_layers, tokens).items():
        canvas: Any = figure.canvas
        page = figure.bbox.padded(1.0)
        assert min(text.get_fontsize() for text in texts_of(figure)) >= 6, name
        for axes in figure.axes:
            assert axes.get_window_extent().width > 20 or axes.get_window_extent().height > 60, name
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                boxes = [
                    tick.label1.get_window_extent(canvas.get_renderer())
                    for tick in axis.get_major_ticks()
                    if tick.label1.get_visible() and tick.label1.get_text() and low <= tick.get_loc() <= high
                ]
                assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), (name, axis)
            box = axes.get_tightbbox(canvas.get_renderer())
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, (name, box)


def lightness(colors: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB colours."""
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_colours_can_be_told_apart_without_colour():
    """Lightness falls evenly along sequential scales, and to both sides of diverging ones."""
    at = np.linspace(0, 1, 64)
    for colors in (matrix_colors(SEQUENTIAL), depth_colors()):
        steps = -np.diff(lightness(colors(at)[:, :3]))
        assert (steps > 0).all() and steps.max() < 2.5 * steps.mean()
    excess = lightness(matrix_colors(DIVERGING)(at)[:, :3])
    assert (np.diff(excess)[:31] > 0).all() and (np.diff(excess)[32:] < 0).all()
    assert np.abs(excess - excess[::-1]).max() < 12
    block, attn, mlp = lightness(np.array([matplotlib.colors.to_rgb(color) for color in SUBLAYER_COLORS.values()]))
    assert min(abs(block - attn), abs(attn - mlp), abs(block - mlp)) > 7


# files


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_saved_files_are_valid_and_equal_for_equal_figures(kind: str, tmp_path: Path):
    coupling = make_analysis(n_layers=4).coupling
    first, second = (figures.save(figures.coupling_by_distance(coupling), tmp_path / f"{n}.{kind}") for n in "ab")
    content = first.read_bytes()
    assert content == second.read_bytes()
    if kind == "png":
        pixels = matplotlib.image.imread(first)
        assert pixels.shape[1] == 2100  # seven inches at 300 dots
        assert pixels[..., :3].std() > 0.05
    elif kind == "svg":
        root = ElementTree.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        words = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "Coupling by distance between layers" in words and "layers apart" in words
    else:
        assert content.startswith(b"%PDF-") and content.rstrip().endswith(b"%%EOF")
        assert b"/FontFile2" in content and b"/Type3" not in content  # text, in a TrueType font


def test_a_figures_own_savefig_keeps_text_as_text(tmp_path: Path):
    figure = figures.coupling_by_distance(make_analysis(n_layers=4).coupling)
    figure.savefig(tmp_path / "own.svg")
    assert b">layers apart</text>" in (tmp_path / "own.svg").read_bytes()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_what_cannot_be_saved_is_an_error(tmp_path: Path):
    figure = figures.coupling_by_distance(make_analysis(n_layers=3).coupling)
    with pytest.raises(ArgumentError, match=r"path='.*figure.jpg' is not allowed; allowed: a name that ends in .png"):
        figures.save(figure, tmp_path / "figure.jpg")
    with pytest.raises(ResultFileError, match="cannot write the figure"):
        figures.save(figure, tmp_path / "no" / "figure.png")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: figures.depth_coupling(a, token=7), "token=7 is not allowed; allowed: one that was measured: 3"),
        (lambda a: figures.depth_coupling(a, k=4), "k=4 is not allowed; allowed: one that was measured: 3"),
        (
            lambda a: figures.depth_coupling(a, quantities="z"),
            "quantities='z' is not allowed; allowed: one of coupling",
        ),
        (lambda a: figures.depth_coupling({}), "result={} is not allowed; allowed: at least one"),
        (
            lambda a: figures.depth_coupling({"a": a, "b": replace(a.coupling, normalizer="trace")}),
            "the sublayers and the metric of",
        ),
        (lambda a: figures.depth_coupling(make_analysis(n_layers=1)), "two layers or more"),
        (lambda a: figures.coupling_by_distance([]), "one depth coupling or several"),
        (
            lambda a: figures.coupling_by_distance(a.coupling, baseline=make_analysis(n_layers=3).coupling),
            "baseline=.* the layers and metric of",
        ),
        (lambda a: figures.projected_jacobians(projected_by_hand(13)), "at most 12 layers"),
        (lambda a: figures.projected_jacobians(projected_by_hand(2), sublayer="mlp"), "sublayer='mlp'"),
        (lambda a: figures.distributions({}), "one analysis or more"),
        (lambda a: figures.distributions({"a": a}, path="head"), "path='head'"),
        (lambda a: figures.training(monitored().drop(columns="step")), "one that also has the columns step"),
        (lambda a: figures.training(pd.concat([monitored(), monitored("n")])), r"table=\['m', 'n'\]"),
        (
            lambda a: figures.training(pd.concat([monitored().assign(settings=name) for name in "ab"])),
            "table='2 different settings'",
        ),
        (
            lambda a: figures.training(pd.concat([monitored().assign(weights=name) for name in "ab"])),
            "table='2 different weights of m@0'",
        ),
        (lambda a: figures.training(monitored(), k=10), "k=10 is not allowed; allowed: one that was measured: 3, 5"),
        (lambda a: figures.distributions({"a": a.growth}), r"result='Growth'.*tlc.analyze\("),
        (lambda a: figures.pictures(a.headline()), "result='str'.*a result of tlcoupling"),
        (lambda a: figures.coupling_against_score(table(2)), "three models or more"),
        (lambda a: figures.coupling_against_score(table(), score="mmlu"), "score='mmlu' .* a column of the table"),
        (lambda a: figures.coupling_against_score(table(null=[1.0])), "columns of one length"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_drawn_is_an_error(call: Any, message: str):
    with pytest.raises(ArgumentError, match=message):
        call(make_analysis())


def test_the_library_is_imported_without_matplotlib():
    """And says what to install where it is not there."""
    code = (
        "import sys; import tlcoupling as tlc; assert 'matplotlib' not in sys.modules;"
        "sys.modules['matplotlib'] = None\n"
        "try: tlc.viz.figures\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "figures need matplotlib: pip install matplotlib"
