"""Everything at once: what an analysis holds of tokens and attention is what each measurement gives alone."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from cases import CASES, TOKENS, Case

import tlcoupling as tlc
import tlcoupling.analysis.analyze
from tlcoupling.analysis.analyze import _patterns
from tlcoupling.coupling.result import Wanted, measure
from tlcoupling.errors import ArgumentError
from tlcoupling.progress import ticking
from tlcoupling.results.base import Result

MODEL = CASES[0]
TOGETHER = {
    "bridge-llama": [("auto", False), ("auto", True), ("autograd", False)],
    "bridge-phi": [("auto", False)],
    "bridge-mixtral": [("auto", False)],
    "native-attention-only": [("auto", False), ("auto", True)],
}  # engines, and whether hooks act


@pytest.fixture(scope="module")
def analysis() -> tlc.Analysis:
    return tlc.analyze(MODEL.model(), TOKENS, k=4, token_layers=[0, -1])


def assert_same(found: Result, expected: Result) -> None:
    assert found.provenance.settings == expected.provenance.settings
    for name, (axes, array) in expected._arrays().items():
        assert found._arrays()[name][0] == axes
        assert torch.equal(found._arrays()[name][1], array), name


def test_tokens_are_compared_in_the_layers_asked_for(analysis: tlc.Analysis) -> None:
    assert_same(analysis.token_coupling, tlc.token_coupling(analysis.trace, 4, layers=[0, 2]))
    assert_same(analysis.context_src, tlc.context_coupling(analysis.trace, "src", 0, 4, layers=[0, 2]))
    assert_same(analysis.context_dest, tlc.context_coupling(analysis.trace, "dest", -1, 4, layers=[0, 2]))
    assert analysis.provenance.settings["token_layers"] == [0, 2]
    without = tlc.analyze(MODEL.model(), TOKENS, k=4)
    assert list(without.parts) == ["coupling", "linearity", "growth"]
    assert_same(analysis.coupling, without.coupling)
    every = tlc.analyze(MODEL.model(), TOKENS, k=4, token_layers="all")
    assert every.token_coupling.layers == every.context_src.layers == (0, 1, 2)


def doubled(tensor: torch.Tensor, hook: object) -> torch.Tensor:
    return 2 * tensor


@pytest.mark.filterwarnings("ignore::UserWarning")  # where autograd computes, and why
@pytest.mark.parametrize(
    ("case", "engine", "hooked"), [(case, *how) for case in CASES for how in TOGETHER.get(case.name, [])], ids=str
)
def test_what_is_measured_together_is_what_each_call_measures(case: Case, engine: str, hooked: bool) -> None:
    hooks = [("blocks.1.hook_attn_out", lambda tensor, hook: 2 * tensor)] if hooked else []
    how = {"k": 2, "basis_layers": 0, "engine": engine}
    found = tlc.analyze(case.model(), TOKENS, token_layers=[1, 0], fwd_hooks=hooks, **how)
    how["layers"] = [1, 0]
    for name, alone in {
        "token_coupling": lambda: tlc.token_coupling(found.trace, **how),
        "context_src": lambda: tlc.context_coupling(found.trace, "src", **how),
        "context_dest": lambda: tlc.context_coupling(found.trace, "dest", **how),
    }.items():
        together, expected = getattr(found, name), alone()
        assert together.provenance.settings == expected.provenance.settings
        assert together.provenance.engine == expected.provenance.engine
        for field in ("values", "null", "overlap_u", "overlap_v", "singular_values", "frobenius"):
            # a mixture reads its experts for all tokens of a layer in one product, which may round otherwise
            torch.testing.assert_close(getattr(together, field), getattr(expected, field), rtol=1e-6, atol=1e-6)


def test_attention_is_that_of_every_layer(analysis: tlc.Analysis) -> None:
    _, cache = MODEL.model().run_with_cache(TOKENS[None])
    assert analysis.attention_layers == (0, 1, 2)
    for layer in analysis.attention_layers:
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0].float()
        torch.testing.assert_close(analysis.attention[layer], pattern, atol=1e-6, rtol=0)  # float32


def test_patterns_are_read_without_a_graph() -> None:
    """What is only looked at holds no graph meanwhile."""
    traced, modes = tlc.trace(MODEL.model(), TOKENS), []
    handle = traced.model.blocks[1].register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    try:
        patterns = _patterns(traced, [1])
    finally:
        handle.remove()
    assert modes == [False] and torch.is_grad_enabled()
    assert patterns is not None and not patterns.requires_grad


def test_progress_is_shown_where_it_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    model = MODEL.model()
    tlc.analyze_many(model, [TOKENS], k=2)
    assert capsys.readouterr().err == ""
    tlc.analyze_many(model, [TOKENS], k=2, progress=True)
    assert "prompts: 100%" in capsys.readouterr().err
    tlc.depth_coupling(tlc.trace(model, TOKENS), 2, progress=True)
    assert "coupling: " in capsys.readouterr().err


@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize("terminal", [False, True])
def test_long_work_shows_its_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool, asked: bool | None
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for delay, long in ((0.01, True), (1e3, False)):
        monkeypatch.setattr("tlcoupling.progress.DELAY", delay)
        for _ in ticking(range(3), "layers", asked):
            time.sleep(0.06)
        assert ("layers" in capsys.readouterr().err) == (asked or (asked is None and terminal and long))


def test_attention_of_long_prompts_is_kept_of_chosen_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODEL.model()
    numbers = 3 * model.cfg.n_heads * len(TOKENS) ** 2
    monkeypatch.setattr(tlcoupling.analysis.analyze, "ATTENTION_LIMIT", numbers)
    assert tlc.analyze(model, TOKENS, k=4).attention_layers == (0, 1, 2)
    monkeypatch.setattr(tlcoupling.analysis.analyze, "ATTENTION_LIMIT", numbers - 1)
    middle, chosen = tlc.analyze(model, TOKENS, k=4), tlc.analyze(model, TOKENS, k=4, token_layers=[2, 0])
    assert middle.attention_layers == (1,) and middle.attention.shape[0] == 1
    assert chosen.attention_layers == (2, 0)
    assert torch.equal(chosen.attention[1], tlc.analyze(model, TOKENS, k=4, token_layers=0).attention[0])


def test_an_analysis_of_tokens_comes_back_whole(analysis: tlc.Analysis, tmp_path: Path) -> None:
    back = tlc.load(analysis.save(tmp_path / "analysis.safetensors"))
    assert list(back.parts) == list(analysis.parts)
    for name, part in analysis.parts.items():
        assert_same(back.parts[name], part)
    assert torch.equal(back.attention, analysis.attention) and back.attention_layers == (0, 1, 2)
    assert tlc.viz.render_html(back) == tlc.viz.render_html(analysis)
    table = analysis.to_dataframe()
    assert set(table["measurement"]) == set(analysis.parts)
    row = table.query(
        "measurement == 'context_dest' and quantity == 'excess' and sublayer == 'attn' and layer == 2 and k == 4 "
        "and pos == 5 and basis_pos == 1"
    )
    assert row["value"].item() == pytest.approx(float(analysis.context_dest.excess[1, 1, 0, 5, 1]))


def test_what_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODEL.model()
    with pytest.raises(ArgumentError, match="token_layers=0 .* single token"):
        tlc.analyze(model, TOKENS[:1], k=4, token_layers=0)
    with pytest.raises(ArgumentError, match="token_layers=3"):
        tlc.analyze(model, TOKENS, k=4, token_layers=3)

    def refuse(trace: tlc.Trace, wanted: list[Wanted], *arguments: object) -> list[Result]:
        if any("fixed" in each.labels for each in wanted):
            raise ArgumentError("k", 4, "at most 3 (attn of layer 0, token 0 to token 1)")
        return measure(trace, wanted, *arguments)

    monkeypatch.setattr(tlcoupling.analysis.analyze, "measure", refuse)
    with pytest.warns(UserWarning, match=r"fixed (src|dest) is left out: k=4 .* \(attn of layer 0"):
        partly = tlc.analyze(model, TOKENS, k=4, token_layers=0)
    assert list(partly.parts) == ["coupling", "token_coupling", "linearity", "growth"]
    panes = tlc.viz.panes.pairs(partly.tokens, partly, {"token_coupling": partly.token_coupling}, 0)
    titles = [kind["name"] for kind in panes["kinds"]]
    assert titles == ["token"]
