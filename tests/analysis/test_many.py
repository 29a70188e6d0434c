"""Many prompts: rows against single analyses, and intervals over prompts."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import FEW, TOKENS, Case

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, EveryPromptFailedError
from tlcoupling.jacobian.analytic import AnalyticLayer
from tlcoupling.jacobian.evidence import Evidence

PROMPTS = [TOKENS[:4], TOKENS, TOKENS.flip(0), torch.tensor([1, 2, 3, 40, 45]), TOKENS[2:], TOKENS[:5].flip(0)]
QUANTITIES = ("coupling", "null", "excess", "lss", "expodistance", "rate")


@pytest.fixture(scope="module")
def many() -> tlc.ManyAnalyses:
    return tlc.analyze_many(FEW[0].model(), PROMPTS, k=[2, 4], tokens="all")


@pytest.mark.parametrize("case", FEW, ids=str)
def test_each_row_is_a_single_analysis(case: Case):
    prompts = {"short": PROMPTS[0], "long": PROMPTS[1]}
    found = tlc.analyze_many(case.model(), prompts, k=[2, 4], tokens=[0, -1])
    assert found.names == ("short", "long") and found.errors == (None, None)
    assert found.prompt.tolist() == [0, 0, 1, 1] and found.pos.tolist() == [0, 3, 0, 6]
    for index, prompt in enumerate(prompts.values()):
        trace = tlc.trace(case.model(), prompt)
        coupling = tlc.depth_coupling(trace, [2, 4], tokens=[0, -1])
        rows = found.prompt == index
        for at in range(2):
            torch.testing.assert_close(found.coupling[rows][at], coupling.mean()[:, at])
            torch.testing.assert_close(found.null[rows][at], coupling.mean("null")[:, at])
            torch.testing.assert_close(found.excess[rows][at], coupling.mean("excess")[:, at])
        ends = [0, -1]
        torch.testing.assert_close(found.lss[rows], tlc.linearity(trace).lss.mT[ends])
        torch.testing.assert_close(found.expodistance[rows], tlc.growth(trace).expodistance[ends])
        torch.testing.assert_close(found.rate[rows], tlc.growth(trace).rate[ends])
    assert found.sublayers == coupling.sublayers and found.paths == tlc.linearity(trace).paths


def test_settings_reach_the_measurement():
    changed = dict(normalizer="trace", bases="vu", absolute=False, engine="autograd", solver="dense")
    model = FEW[0].model()
    found = tlc.analyze_many(model, PROMPTS[:1], k=2, sublayers="attn", **changed)
    expected = tlc.depth_coupling(tlc.trace(model, PROMPTS[0]), 2, sublayers="attn", **changed)
    torch.testing.assert_close(found.coupling[0], expected.mean()[:, 0])
    assert found.provenance.engine == {"attn": "autograd"}
    assert {name: found.provenance.settings[name] for name in changed} == changed


def test_a_refused_certificate_of_any_prompt_shows(monkeypatch: pytest.MonkeyPatch):
    """The provenance says what computed each prompt, not only the last one."""
    refusal = Evidence.refusal

    def refuse_short(evidence: Evidence, closed: AnalyticLayer, *arguments: Any) -> str | None:
        # so are windows of the others' last positions, which are shorter still: then all positions are run
        return "refused" if len(closed.resid_pre) <= 4 else refusal(evidence, closed, *arguments)

    monkeypatch.setattr(Evidence, "refusal", refuse_short)
    model, prompts = FEW[0].model(), {"long": TOKENS, "short": TOKENS[:4], "other": TOKENS.flip(0)}
    said = {"attn": "analytic (2 of 3 prompts, first 'long'), autograd (1 of 3 prompts, first 'short')"}
    with pytest.warns(UserWarning, match="by autograd"):
        found = tlc.analyze_many(model, prompts, k=2, sublayers="attn")
    assert found.provenance.engine == said
    with pytest.warns(UserWarning, match="by autograd"):
        effect = tlc.causal_effect(model, prompts, 2, sublayer="attn", layers=[1], draws=1)
    assert effect.provenance.engine == said
    monkeypatch.undo()
    assert tlc.analyze_many(model, prompts, k=2, sublayers="attn").provenance.engine == {"attn": "analytic"}


def test_a_baseline_is_measured_the_same_way():
    model = FEW[0].model()
    random = tlc.random_baseline(model)
    found = tlc.analyze_many(model, PROMPTS, k=2, baseline=random)
    alone = tlc.analyze_many(random, PROMPTS, k=2)
    assert isinstance(found.baseline, tlc.ManyAnalyses) and alone.baseline is None
    assert torch.equal(found.baseline.coupling, alone.coupling)
    assert torch.equal(found.baseline.prompt, found.prompt)


def test_a_prompt_that_fails_leaves_the_others():
    prompts = {"good": PROMPTS[0], "ids": torch.tensor([999]), "empty": "", "other": PROMPTS[1]}
    with pytest.warns(UserWarning, match="prompt 'ids' could not be measured"):
        found = tlc.analyze_many(FEW[0].model(), prompts, k=2)
    assert found.prompt.tolist() == [0, 3]
    assert [error is None for error in found.errors] == [True, False, False, True]
    assert found.errors[1].startswith("ArgumentError: prompt=") and "token ids from 0 to 49" in found.errors[1]
    assert "2 of 4 prompts" in repr(found)


def test_a_failure_of_any_kind_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    import tlcoupling.analysis.many as module

    measure = module.depth_coupling

    def out_of_memory(trace: Any, *args: Any, **kwargs: Any) -> Any:
        if trace.n_tokens == 7:
            raise RuntimeError("out of memory")
        return measure(trace, *args, **kwargs)

    monkeypatch.setattr(module, "depth_coupling", out_of_memory)
    with pytest.warns(UserWarning, match="RuntimeError: out of memory"):
        found = tlc.analyze_many(FEW[0].model(), PROMPTS[:4], k=2)
    assert found.prompt.tolist() == [0, 3]


def test_only_if_all_fail_is_it_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(EveryPromptFailedError, match="none of 2 prompts .* first: ArgumentError: k=") as raised:
            tlc.analyze_many(FEW[0].model(), PROMPTS[:2], k=999)
    assert isinstance(raised.value.__cause__, ArgumentError)
    for prompts in ("one prompt", [], {}):
        with pytest.raises(ArgumentError, match="prompts="):
            tlc.analyze_many(FEW[0].model(), prompts)


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_a_prompt_is_one_unit_whatever_its_length(many: tlc.ManyAnalyses, quantity: str):
    values = getattr(many, quantity).double()
    units = torch.stack([values[many.prompt == index].mean(0) for index in range(len(many.names))])
    found = many.interval(quantity)
    assert (found.units == len(PROMPTS)).all()
    torch.testing.assert_close(found.estimate.flatten(), units.mean(0).flatten())
    torch.testing.assert_close(found.standard_error.flatten(), units.std(0).flatten() / len(units) ** 0.5)
    assert (found.low < found.estimate).all() and (found.estimate < found.high).all()


def test_the_difference_of_two_models_is_taken_prompt_by_prompt(many: tlc.ManyAnalyses):
    """Prompts differ far more than the models: the paired interval sees the shift that a single one hides."""
    shifts = 0.01 * (1 + torch.arange(len(PROMPTS)) / 10)
    other = replace(many, rate=many.rate - shifts[many.prompt])
    found = many.interval("rate", minus=other)
    assert float(found.estimate) == pytest.approx(float(shifts.mean()), rel=1e-4)
    assert float(found.standard_error) == pytest.approx(float(shifts.std()) / len(PROMPTS) ** 0.5, rel=1e-3)
    assert found.quantity == "difference in rate" and found.low > 0
    with pytest.warns(UserWarning, match="1 of 6 prompts have no value"):
        fewer = replace(other, **{name: getattr(other, name)[4:] for name in (*other._axes, "prompt", "pos", "tokens")})
        assert many.interval("rate", minus=fewer).units.tolist() == [5]
    by_trace = replace(other.provenance, settings={**other.provenance.settings, "normalizer": "trace"})
    for wrong in (
        replace(other, names=tuple("abcdef")),
        replace(other, pos=other.pos + 1),
        replace(other, tokens=tuple(f"{token}s" for token in other.tokens)),  # other prompts, under the same names
        replace(other, provenance=by_trace),
    ):
        with pytest.raises(ArgumentError, match="minus=.*the prompts, tokens, sublayers and K of"):
            many.interval("rate", minus=wrong)


def test_a_few_prompts_and_equal_prompts_have_no_interval():
    model = FEW[0].model()
    single = tlc.analyze_many(model, [TOKENS], k=2)
    with pytest.warns(UserWarning, match="interval of excess: 1 prompts are too few"):
        found = single.interval()
    assert found.low.isnan().all() and not found.estimate.isnan().any()
    equal = tlc.analyze_many(model, [TOKENS[:4]] * 6, k=2)
    with pytest.warns(UserWarning, match="all 6 prompts are equal"):
        assert equal.interval("rate").high.isnan().all()


def test_bad_arguments_are_named(many: tlc.ManyAnalyses, unchecked: None):
    for argument, wrong in {
        "quantity": {"quantity": "loss"},
        "confidence": {"confidence": 95},
    }.items():
        with pytest.raises(ArgumentError) as raised:
            many.interval(**wrong)
        assert raised.value.name == argument


def test_tables_and_files(many: tlc.ManyAnalyses, tmp_path):
    found = tlc.analyze_many(FEW[0].model(), PROMPTS[:2], k=2, baseline=FEW[0].model())
    for result in (found, many.interval("lss"), many.interval("rate"), many.interval("excess")):
        back = tlc.load(result.save(tmp_path / "result.safetensors"))
        assert repr(back) == repr(result) and "\n" not in repr(result)
        table = back.to_dataframe()
        assert len(table) == sum(array.numel() for _, array in result._arrays().values())
        assert table["value"].notna().all()
    table = many.to_dataframe().query("quantity == 'excess' and sublayer == 'mlp' and k == 4")
    row = table.query("prompt == '1' and pos == 5")
    index = int(((many.prompt == 1) & (many.pos == 5)).nonzero())
    assert row["value"].item() == pytest.approx(float(many.excess[index, 2, 1]))
    assert row["token"].item() == many.tokens[index]
    interval = many.interval("excess").to_dataframe().query("quantity == 'high' and sublayer == 'attn' and k == 2")
    assert interval["value"].item() == float(many.interval("excess").high[1, 0])
