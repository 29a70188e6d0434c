"""The live report: what is chosen or asked in the page goes in, a page with more in it or an answer comes out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from analyses import make_analysis
from cases import TOKENS, fresh
from chromium import browser, numbers, opened

import tlcoupling as tlc
import tlcoupling.analysis.analyze
from tlcoupling.errors import ArgumentError

__all__ = ["browser"]  # a fixture


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


def pair(of: str, row: dict[str, int], column: dict[str, int], sublayer: str = "attn") -> dict[str, Any]:
    """What the page asks for a pair of Jacobians."""
    return {"what": "pair", "of": of, "sublayer": sublayer, "k": 2, "pair": [row, column]}


def test_a_pair_of_layers_tokens_or_heads_is_answered_with_what_it_shares(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model, tokens=[1, 3], token_layers=1))
    before, result = live.page, live.result
    heads = tlc.head_coupling(result.trace, 2, token=3, layers=1)
    at = {"src": 3, "dest": 3}
    for asked, expected, null in (
        (
            pair("layer", {"layer": 2, **at}, {"layer": 0, **at}),
            result.coupling.values[0, 1, 0, 2, 0],
            result.coupling.null[0, 1, 0, 2, 0],
        ),
        (
            pair("token", {"layer": 1, **at}, {"layer": 1, "src": 1, "dest": 1}),
            result.token_coupling.values[0, 0, 0, 3, 1],
            result.token_coupling.null[0, 0, 0, 3, 1],
        ),
        (
            pair("head", {"layer": 1, **at, "head": 2}, {"layer": 1, **at, "head": 0}),
            heads.values[0, 0, 2, 0],
            heads.null[0, 0, 2, 0],
        ),
    ):
        live.asked = asked
        assert live.answer["asked"] == asked
        found = live.answer["found"]
        assert found["coupling"] == pytest.approx(float(expected), abs=1e-4)  # the solver's random start differs
        assert found["null"] == pytest.approx(float(null), abs=1e-4)
        assert len(found["values"]) == len(found["texts"][0]) == found["k"] == 2
    live.asked = {"what": "heads", "layer": 1, "token": 3, "k": 2}
    torch.testing.assert_close(torch.tensor(live.answer["found"]["values"]), heads.values[0, 0], rtol=1e-3, atol=1e-4)
    assert live.page == before and live.result is result


def test_fresh_weights_stand_beside_a_pair_where_the_analysis_has_them(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model, token_layers=1, baseline="fresh"))
    live.asked = pair("token", {"layer": 1, "src": 3, "dest": 3}, {"layer": 1, "src": 1, "dest": 1})
    other = live.result.baseline.token_coupling  # pyright: ignore[reportOptionalMemberAccess]
    assert live.answer["found"]["fresh"] == pytest.approx(float(other.values[0, 0, 0, 3, 1]), abs=1e-4)


def test_what_was_opened_stays_in_the_next_page(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model, token_layers=1))
    live.asked = pair("token", {"layer": 1, "src": 3, "dest": 3}, {"layer": 1, "src": 1, "dest": 1})
    opened = live.answer
    live.chosen = {"layer": 0, "token": 3, "k": 2}
    assert live.page == tlc.viz.render_html(live.result, live.chosen, [opened])


HOST = """<!doctype html><body style="background: %s"><div id="cell"></div><script type="module">
%s
const state = %s, listeners = {};
const model = {
  get: (name) => state[name],
  set: (name, value) => (state[name] = value),
  on: (event, run) => (listeners[event] ??= []).push(run),
  async save_changes() {
    const changed = await window.kernel({ chosen: state.chosen, asked: state.asked });
    Object.assign(state, changed);
    for (const name of Object.keys(changed)) (listeners[`change:${name}`] ?? []).forEach((run) => run());
  },
};
widget.render({ model, el: document.getElementById("cell") });
</script>"""


@contextmanager
def hosted(browser: Any, live: Any, folder: Path, **options: Any) -> Iterator[Any]:
    """A page that frames a live report as a notebook does, with the report's own script, and this process as kernel."""
    state = {name: getattr(live, name) for name in ("page", "status", "key", "chosen", "asked", "answer")}
    widget = str(live._esm).replace("export default", "const widget =")
    path = folder / "notebook.html"
    written = json.dumps(state).replace("</", "<\\/")
    path.write_text(HOST % (options.pop("background", "white"), widget, written), encoding="utf-8")

    def kernel(sent: dict[str, Any]) -> dict[str, Any]:
        before = dict(state)
        for name in ("asked", "chosen"):
            if sent[name] != getattr(live, name):
                setattr(live, name, sent[name])
        state.update({name: getattr(live, name) for name in before})
        return {name: state[name] for name in ("page", "answer", "status") if state[name] != before[name]}

    with opened(browser, path, **options) as page:
        page.expose_function("kernel", kernel)
        page.frame_locator("iframe").locator("html[data-drawn]").wait_for(state="attached")
        yield page


@pytest.mark.slow
def test_a_click_on_a_pair_opens_what_it_shares(browser: Any, model: Any, tmp_path: Path):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model, token_layers=1, baseline="fresh"))
    with hosted(browser, live, tmp_path) as page:
        frame = page.frame_locator("iframe")

        def opened_in(section: str, title: str) -> None:
            """The panel shows the answer to the last question."""
            frame.locator(f"#{section} [data-part=shared-title]").filter(has_text=title).wait_for()
            found = live.answer["found"]
            shown = numbers(frame.locator(f"#{section} [data-part=shared-title]").inner_text())
            assert shown == pytest.approx([found["coupling"], found["null"], found["fresh"]], abs=6e-5)
            frame.locator(f"#{section} [data-part=shared-map]").focus()
            page.keyboard.press("ArrowDown")  # from the first row and second column
            entry = numbers(frame.locator(f"#{section} [data-part=shared-readout]").inner_text())
            assert entry == pytest.approx([found["values"][1][1], found["chance"]], abs=6e-4)
            words = frame.locator(f"#{section} [data-part=shared-tokens] tbody tr").first.inner_text()
            best = max(range(2), key=lambda rank: found["values"][rank][rank])
            assert all(text in words for side in (0, 1) for text in found["texts"][side][best][0])

        assert "shared=True" not in frame.locator("#coupling [data-part=shared]").inner_text(), "a kernel measures it"
        frame.locator("#coupling .panes").first.focus()
        for key in ("ArrowDown", "Enter"):  # layer 1, in the bases of layer 1 itself
            page.keyboard.press(key)
        opened_in("coupling", "attn at token 3: Jacobian of layer 1, bases of layer 1, K = 2: ")
        assert live.answer["found"]["coupling"] == pytest.approx(1, abs=1e-4)
        pane = frame.locator("#coupling .heatmap image").first
        pane.click(position={"x": pane.bounding_box()["width"] / 6, "y": pane.bounding_box()["height"] / 2})
        opened_in("coupling", "attn at token 3: Jacobian of layer 1, bases of layer 0, K = 2: ")

        frame.locator("#pairs [data-part=maps] .zoom").nth(1).focus()  # attention is the first
        for key in ("ArrowDown", "ArrowDown", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        opened_in("pairs", "Layer 1, attn: Jacobian of token 3 ")
        asked = live.answer["asked"]["pair"]
        assert [(place["src"], place["dest"]) for place in asked] == [(3, 3), (1, 1)]

        frame.locator("[data-part=head-ask]").click()
        cells = frame.locator("[data-part=head-map] image")
        cells.wait_for()
        heads = live.answer["found"]
        frame.locator("[data-part=head-map]").focus()
        for key in ("ArrowDown", "Enter"):
            page.keyboard.press(key)
        opened_in("pairs", "Jacobian of head 1, bases of head 1, K = 2: ")
        cells.click(position={"x": 4, "y": cells.bounding_box()["height"] - 4})
        last = len(heads["values"]) - 1
        opened_in("pairs", f"Jacobian of head {last}, bases of head 0, K = 2: ")
        excess, value, null, _ = numbers(frame.locator("[data-part=head-readout]").inner_text())
        assert [value, null] == pytest.approx([heads["values"][last][0], heads["null"][last][0]], abs=6e-5)
        assert excess == pytest.approx(value - null, abs=2e-4)

        # a layer that was not measured brings a new page, in which all of this is still open
        frame.locator("#controls input[type=range]").fill("0")
        frame.locator("#controls [data-part=layer-shown]").filter(has_text="0tokens compared").wait_for()
        opened_in("pairs", f"Jacobian of head {last}, bases of head 0, K = 2: ")
        assert "bases of layer 0" in frame.locator("#coupling [data-part=shared-title]").inner_text()
        assert frame.locator("[data-part=head-map] image").count() == 1


def test_a_pair_that_cannot_be_measured_is_refused_with_the_reason(model: Any):
    pytest.importorskip("anywidget")
    live = tlc.viz.Live(measured(model))
    late = {"layer": 1, "src": 3, "dest": 1}  # the first token's write does not depend on a later one
    live.asked = pair("token", late, {"layer": 1, "src": 1, "dest": 1})
    assert "found" not in live.answer and live.answer["refusal"]


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
