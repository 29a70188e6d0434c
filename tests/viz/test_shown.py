"""Every result displays its headline numbers, and draws itself."""

from __future__ import annotations

import math
import re
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from analyses import HOSTILE_TOKENS, make_analysis
from cases import TOKENS, fresh

import tlcoupling as tlc
from tlcoupling.analysis.shared import SharedDirections
from tlcoupling.errors import ArgumentError
from tlcoupling.results.base import Provenance, Result
from tlcoupling.viz.shown import Lines, Matrix, shown
from tlcoupling.viz.thumbnail import CELLS

LIMIT = 30_000  # bytes of a result's HTML
BASES = {"Coupling", "OrderedCoupling", "WithinLayers", "LabelledResult"}  # nothing is measured as these


def classes() -> list[str]:
    """Every class of results in the library. A new one has to be measured in ``results`` below."""
    assert tlc.viz
    return sorted(
        name for name, one in Result._kinds.items() if one.__module__.startswith("tlcoupling.") and name not in BASES
    )


def readout() -> tlc.DirectionReadout:
    """The tokens of directions, made by hand: the small models have no tokenizer."""
    generator = torch.Generator().manual_seed(0)
    words = ("a", "</td><script>", "שלום")
    return tlc.DirectionReadout(
        provenance=Provenance(model_name="maker/tiny"),
        scores=torch.rand(2, 2, 2, 3, generator=generator).sort(descending=True).values,
        ids=torch.zeros(2, 2, 2, 3, dtype=torch.long),
        null=torch.tensor([[0.3, 0.2, 0.1], [0.03, 0.02, 0.01]]),
        singular_values=torch.tensor([2.0, 1.0]),
        left=torch.eye(4)[:, :2],
        right=torch.eye(4)[:, :2],
        texts=(((words, words), (words, words)),) * 2,
        layer=1,
        sublayer="block",
        position=3,
    )


def dictionary(seed: int) -> SimpleNamespace:
    """A random dictionary of the stream."""
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = torch.randn(2, 96, 96, generator=generator)
    return SimpleNamespace(W_enc=encoder, W_dec=decoder, b_enc=torch.ones(96))


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    model, other = fresh(0), fresh(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few prompts, of a line through three layers
        analysis = tlc.analyze(model, TOKENS, k=2, token_layers=[0, 2], baseline=other)
        trace: Any = analysis.trace
        many = tlc.analyze_many(model, {"first": TOKENS, "second": TOKENS[:5]}, k=2, baseline=other)
        made: list[Any] = [
            analysis,
            analysis.coupling,
            analysis.token_coupling,
            analysis.context_src,
            tlc.head_coupling(trace, 2),
            tlc.head_alignment(trace, 2),
            analysis.coupling.test(draws=39),
            analysis.linearity,
            analysis.growth,
            tlc.head_steps(trace),
            many,
            many.interval("excess"),
            tlc.projected_jacobians(trace, [0, 2], 2),
            tlc.trajectory_components(trace),
            tlc.singular_value_profile(analysis.coupling),
            tlc.linearization_gap(trace, sizes=(1e-3, 1e-2)),
            tlc.eigen_geometry(trace, baseline=other),
            tlc.lyapunov_spectrum(trace, baseline=other),
            tlc.depth_profile(model, [TOKENS, TOKENS[:5]], 2, baseline=other),
            readout(),
            tlc.causal_effect(model, [TOKENS, TOKENS[:5]], 2, draws=3),
            tlc.correlate(),
            tlc.jacobian_lens(model, [TOKENS[:5], TOKENS], skip_first_positions=0, layers=[0, 1], sketch=8),
            tlc.lens_coupling(tlc.jacobian_lens(model, [TOKENS], skip_first_positions=0, layers=[0, 1]), trace, 3),
            tlc.sensitivity_atlas(trace, 2, baseline=other),
            tlc.steering_effect(model, [TOKENS[:5], TOKENS], torch.ones(96), 1, [0.5, 2.0], draws=3, positions=[-1]),
            tlc.compare_detached(trace, ("resid_post", -1), k=2, draws=1),
            tlc.feature_map(trace, ("resid_pre", 1), ("resid_post", 1), dictionary(1), dictionary(2), most=6),
            tlc.slice_relations(trace, [(0, 1), (0, 3)], k=3, draws=2),
            tlc.parity.published(model, TOKENS, 2),
        ]
    read, projected = readout(), made[12]
    assert isinstance(projected, tlc.ProjectedJacobians)
    scores = read.scores.expand(2, -1, -1, -1, -1)
    made.append(SharedDirections(read.provenance, projected, scores, read.null, (read.texts,) * 2))
    return {type(one).__name__: one for one in made}


class Cells(HTMLParser):
    """The texts of a page's table cells, and its tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells, self.tags, self.attributes, self._inside = [], set(), set(), False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in ("td", "th"):
            self.cells.append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data


@pytest.mark.parametrize("name", classes())
def test_every_result_shows_its_numbers_small_and_without_scripts(name: str, results: dict[str, Result]):
    markup = results[name]._repr_html_()
    assert markup is not None and 500 < len(markup.encode()) < LIMIT
    page = Cells(markup)
    assert not page.tags & {"script", "style", "link", "img", "iframe"}
    assert not {one for one in page.attributes if one.startswith("on") or one in ("href", "src")}
    assert sum(bool(re.fullmatch(r"−?\d+\.\d+(e−?\d+)?", cell)) for cell in page.cells) >= 1
    for drawing in re.findall("<svg.*?</svg>", markup, re.DOTALL):
        assert len(ElementTree.fromstring(drawing)) >= 1
    assert "svg" in page.tags


@pytest.mark.parametrize("name", classes())
def test_every_result_draws_a_figure(name: str, results: dict[str, Result]):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure: Any = results[name].plot()
    drawn = [axes for axes in figure.axes if axes.images or axes.lines or axes.collections or axes.patches]
    assert drawn and figure._repr_png_()
    with pytest.raises(ArgumentError, match=r"no_such=1 is not allowed; allowed: an option of this figure: "):
        results[name].plot(no_such=1)


def test_what_is_shown_is_what_was_measured(results: dict[str, Result]):
    coupling: Any = results["DepthCoupling"]
    one = shown(coupling)
    for row, name in enumerate(coupling.sublayers):
        numbers = [coupling.mean(quantity)[row, 0, 0].item() for quantity in ("values", "null", "excess")]
        assert one.rows[row][0] == name and list(one.rows[row][1:]) == pytest.approx(numbers)
        assert f">{numbers[0]:.4f}</td>".replace("-", "−") in coupling._repr_html_()
    excess = one.pictures[0]
    assert isinstance(excess, Matrix)
    off = ~torch.eye(len(coupling.layers), dtype=torch.bool)
    torch.testing.assert_close(excess.values[off], coupling.excess[0, 0, 0].double()[off])
    assert excess.values.diagonal().isnan().all()


def test_the_chance_level_stands_beside_every_coupling(results: dict[str, Result]):
    for name in ("DepthCoupling", "TokenCoupling", "ContextCoupling", "HeadCoupling", "ProjectedJacobians"):
        assert list(shown(results[name]).columns[1:]) == ["coupling", "null", "excess"]
    scores = shown(results["Linearity"]).pictures[0]
    assert isinstance(scores, Lines) and scores.chance is not None and scores.chance[0] == 3**0.5


def test_weights_are_called_shared_only_within_a_layer(results: dict[str, Result]):
    within: Any = results["ContextCoupling"]
    assert "share its weights" not in shown(results["DepthCoupling"]).note
    assert "share its weights" in shown(within).note
    others = tuple((layer + 1) % 3 for layer in within.layers)
    assert shown(replace(within, basis_layers=others)).note == ""


def test_the_chance_level_stands_beside_every_effect_of_steering(results: dict[str, Result]):
    effect: Any = results["SteeringEffect"]
    one = shown(effect)
    random = [f"random, same {control}" for control in effect._coords()["control"]]
    assert list(one.columns[1:-1]) == ["the direction", *random, "change of the loss", *random]
    for at, row in enumerate(one.rows):
        truth = [
            number
            for own, control in ((effect.kl, effect.control_kl), (effect.loss, effect.control_loss))
            for number in (own[:, at].mean().item(), *(control[:, at, c].mean().item() for c in range(len(random))))
        ]
        assert list(row[1:-1]) == pytest.approx(truth)


def test_only_numbers_with_a_chance_level_of_zero_are_called_above_chance(results: dict[str, Result]):
    assert "blue above chance" in results["DepthCoupling"]._repr_html_()  # pyright: ignore
    assert "blue above 0" in results["HeadSteps"]._repr_html_()  # pyright: ignore


def test_fresh_weights_are_shown_over_the_tokens_of_the_model_beside_them():
    analysis, other = make_analysis(), make_analysis(n_layers=4)
    norms = analysis.growth.norms.clone()
    norms[:, 0] *= 1000  # a sink of the model alone
    scores = other.linearity.lss.clone()
    scores[:, 0] = 40
    other = replace(other, linearity=replace(other.linearity, lss=scores))
    analysis = replace(analysis, growth=replace(analysis.growth, norms=norms), baseline=other)
    summary = analysis.summary()["fresh"]
    for row, fresh_weights in zip(shown(analysis).rows, summary, strict=True):
        assert row[3] == pytest.approx(fresh_weights, nan_ok=True)
    assert dict(zip(analysis.summary()["finding"], summary, strict=True))["line-shape score"] < 3


def test_what_has_no_chance_level_is_not_called_not_found():
    rows = {row[0]: row for row in shown(make_analysis()).rows}
    assert isinstance(rows["line-shape score"][-1], bool)
    assert math.isnan(rows["growth by MLP"][2]) and math.isnan(rows["growth by MLP"][-1])


def test_a_test_says_which_token_and_k_it_shows(results: dict[str, Result]):
    assert shown(results["CouplingTest"]).below.endswith(", pos 6, k 2")


def test_a_large_result_stays_small():
    analysis = make_analysis([f"token {at}" for at in range(600)], n_layers=60, positions=range(20), token_layers=[3])
    for one in (analysis, *analysis.parts.values()):
        markup = one._repr_html_()
        assert markup is not None and len(markup.encode()) < LIMIT
    svg = ElementTree.fromstring(re.findall("<svg.*?</svg>", analysis._repr_html_() or "")[0])
    assert svg.get("viewBox") == f"0 0 {CELLS} {CELLS}"


def test_hostile_text_is_text():
    analysis = make_analysis(HOSTILE_TOKENS, token_layers=[1])
    hostile = "</td><script>alert(1)</script>"
    for one in (analysis, *analysis.parts.values()):
        named = replace(one, provenance=replace(one.provenance, model_name=hostile))
        markup = named._repr_html_() or ""
        assert not Cells(markup).tags & {"script", "img"} and "&lt;script&gt;alert(1)" in markup


def test_undefined_numbers_are_dashes():
    analysis = make_analysis(n_layers=1, sequential=False)
    for one in (analysis, *analysis.parts.values()):
        assert "nan" not in (one._repr_html_() or "nan")
    assert "–" in (analysis.coupling._repr_html_() or "")


def test_light_and_dark_come_from_the_host(results: dict[str, Result]):
    for one in results.values():
        assert "background" not in one._repr_html_() and not re.search(r"[^-]color:", one._repr_html_())


def test_means_have_labels_and_are_tensors(results: dict[str, Result]):
    coupling: Any = results["DepthCoupling"]
    mean, profile = coupling.mean("excess"), coupling.profile("null")
    series = mean.to_series()
    assert series.name == "excess" and list(series.index.names) == ["sublayer", "pos", "k"]
    assert series[("attn", 6, 2)] == mean[1, 0, 0].item()
    assert profile.to_series()[("mlp", 6, 2, 2)] == coupling.profile("null")[2, 0, 0, 1].item()
    assert list(results["HeadCoupling"].mean().to_series().index.names) == ["layer", "k"]  # pyright: ignore
    assert "sublayer" in repr(mean) and "<table" in mean._repr_html_()
    assert isinstance(mean, torch.Tensor) and type(mean + 0) is torch.Tensor is type(mean[0])


def test_a_copy_of_a_labelled_tensor_needs_no_class_of_ours(results: dict[str, Result], tmp_path: Any):
    import copy
    import pickle

    mean = results["DepthCoupling"].mean()  # pyright: ignore
    torch.save(mean, tmp_path / "mean.pt")
    loaded = torch.load(tmp_path / "mean.pt", weights_only=True)
    for one in (copy.deepcopy(mean), pickle.loads(pickle.dumps(mean)), loaded):
        assert type(one) is torch.Tensor and torch.equal(one, mean)
    assert isinstance(pd.DataFrame({"mean": mean.flatten().tolist()}), pd.DataFrame)


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in sys.modules if name.startswith(("tlcoupling.viz.figures", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    yield


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_the_remedy_is_named():
    with pytest.raises(ImportError, match="figures need matplotlib: pip install matplotlib"):
        make_analysis().plot()
    assert make_analysis()._repr_html_()
