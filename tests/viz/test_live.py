"""The live report, without a browser: what is chosen in the page goes in, a page with more in it comes out."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from analyses import make_analysis
from cases import TOKENS, fresh

import tlcoupling as tlc
import tlcoupling.analysis.analyze
from tlcoupling.errors import ArgumentError


@pytest.fixture(scope="module")
def model() -> Any:
    return fresh(0)


def measured(model: Any, **options: Any) -> tlc.Analysis:
    return tlc.analyze(model, TOKENS[:4], k=2, sublayers="attn", **options)


def test_a_token_and_a_layer_that_were_not_measured_are_measured_as_the_others_were(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model, tokens=-1, token_layers=2, baseline="fresh"))
    said: list[str] = []
    live.observe(lambda change: said.append(change["new"]), "status")
    live.chosen = {"layer": 0, "token": 1, "k": 2}
    assert said == ["measuring the layers at token 1 …", "measuring the tokens of layer 0 …", ""]
    whole = measured(model, tokens=[1, 3], token_layers=[0, 2], baseline="fresh")
    for one, other in ((live.result, whole), (live.result.baseline, whole.baseline)):
        assert one is not None and other is not None and one.parts.keys() == other.parts.keys()
        for name, part in other.parts.items():
            ours = one.parts[name]
            assert ours._coords() == part._coords()
            for quantity in {"values", "null", "singular_values", "lss", "norms"} & part._arrays().keys():
                # the solver's random start differs from one call to the next
                torch.testing.assert_close(getattr(ours, quantity), getattr(part, quantity), rtol=1e-3, atol=1e-4)
    assert live.result.coupling.positions == (1, 3)
    assert live.page == tlc.viz.render_html(live.result, {"layer": 0, "token": 1, "k": 2})


def test_another_layer_is_compared_in_the_bases_of_the_same_layer(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model, token_layers=2, basis_layers=1))
    live.chosen = {"layer": 0, "token": 3, "k": 2}
    whole = measured(model, token_layers=[0, 2], basis_layers=1)
    assert live.result.token_coupling.basis_layers == (1, 1)
    # the solver's random start differs from one call to the next
    torch.testing.assert_close(live.result.token_coupling.values, whole.token_coupling.values, rtol=1e-3, atol=1e-4)


def test_what_is_measured_already_is_not_measured_again(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model, token_layers=1))
    before, page = live.result, live.page
    live.chosen = {"layer": 1, "token": 3, "k": 2}
    assert live.result is before and live.page == page and live.status == ""


def test_the_rotation_test_runs_again_only_where_other_layers_are_compared(model: Any, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("anywidget")
    ran: list[Any] = []
    test = tlcoupling.analysis.analyze.coupling_test
    monkeypatch.setattr(
        tlcoupling.analysis.analyze, "coupling_test", lambda coupling: ran.append(coupling) or test(coupling)
    )
    live = tlc.viz.Live(measured(model))
    p = live.result.depth_test.p
    live.chosen = {"layer": 1, "token": 3, "k": 2}
    live.chosen = {"layer": 0, "token": 3, "k": 2}
    assert len(ran) == 1 and live.result.token_coupling.layers == (0, 1)
    assert torch.equal(live.result.depth_test.p, p)
    live.chosen = {"layer": 0, "token": 2, "k": 2}  # two tokens have no single test
    assert live.result.depth_test is None


def test_what_cannot_be_measured_is_said(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model))
    live.chosen = {"layer": 99, "token": 3, "k": 2}
    assert (
        live.status == "not measured: layers=99 is not allowed; allowed: an int from -3 to 2, several of them, or 'all'"
    )
    live.chosen = {"layer": 1, "token": 3, "k": 2}
    assert live.status == "" and live.result.token_coupling is not None


def test_another_baseline_than_was_measured_is_refused(model: Any):
    pytest.importorskip("anywidget")
    other = fresh(5)
    result = measured(model, baseline=other)
    wrong = tlc.viz.Live(result)
    wrong.chosen = {"layer": 0, "token": None, "k": 2}
    assert "another model" in wrong.status
    shallow = tlc.viz.Live(result, baseline=fresh(5, n_layers=2))
    shallow.chosen = {"layer": 0, "token": None, "k": 2}
    assert "another model" in shallow.status
    right = tlc.viz.Live(result, baseline=other)
    right.chosen = {"layer": 0, "token": None, "k": 2}
    assert right.status == "" and right.result.baseline.token_coupling.layers == (0,)  # pyright: ignore


def test_the_saved_page_needs_no_kernel(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model))
    assert live._static().count("<iframe") == 1 and live.key in live._static()


@pytest.mark.usefixtures("unchecked")
def test_without_a_trace_there_is_nothing_to_measure_with(model: Any):
    pytest.importorskip("anywidget")
    with pytest.raises(ArgumentError, match="an analysis without its trace.*tlc.analyze returned here"):
        tlc.viz.Live(make_analysis())
    with pytest.raises(ArgumentError, match="result='DepthCoupling'.*an Analysis"):
        tlc.viz.Live(measured(model).coupling)


def test_without_anywidget_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "tlcoupling.viz.live", raising=False)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(ImportError, match="live notebooks need anywidget: pip install anywidget"):
        _ = tlc.viz.Live
