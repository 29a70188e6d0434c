"""Many prompts: rows against single analyses, and intervals against resampling by hand."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from cases import FEW, TOKENS, Case
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, EveryPromptFailedError
from tlcoupling.jacobian.analytic import AnalyticLayer
from tlcoupling.jacobian.evidence import Evidence
from tlcoupling.results.intervals import bootstrap_mean

PROMPTS = [TOKENS[:4], TOKENS, TOKENS.flip(0), torch.tensor([1, 2, 3, 40, 45])]
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
        return "refused" if len(closed.resid_pre) == 4 else refusal(evidence, closed, *arguments)

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
        found = tlc.analyze_many(FEW[0].model(), PROMPTS, k=2)
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


def units_of(many: tlc.ManyAnalyses, quantity: str, by: str) -> torch.Tensor:
    values = getattr(many, quantity).double()
    if by == "token":
        return values
    return torch.stack([values[many.prompt == index].mean(0) for index in range(len(many.names))])


@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("by", ["prompt", "token"])
def test_the_interval_is_that_of_resampled_units(many: tlc.ManyAnalyses, quantity: str, by: str):
    """Mean and standard error by hand; the ends lie where a bootstrap with fresh draws, skewness aside, puts them."""
    found = many.interval(quantity, by=by)
    units = units_of(many, quantity, by)
    assert (found.units == len(units)).all() and len(units) == (4 if by == "prompt" else 23)
    torch.testing.assert_close(found.estimate.flatten(), units.mean(0).flatten())
    draws = units[torch.randint(len(units), (20_000, len(units)))].mean(1)
    error = draws.std(0).flatten()
    # a standard error of 9999 draws is good to 1 %, the ends of BCa move with the skewness of few units
    torch.testing.assert_close(found.standard_error.flatten(), error, rtol=0.05, atol=0)
    assert (found.low < found.estimate).all() and (found.estimate < found.high).all()
    low, high = draws.quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
    assert ((found.low.flatten() - low.flatten()).abs() < 1.5 * error).all()
    assert ((found.high.flatten() - high.flatten()).abs() < 1.5 * error).all()
    again = many.interval(quantity, by=by)
    assert torch.equal(found.low, again.low) and torch.equal(found.high, again.high)
    assert (many.interval(quantity, 0.5, by).low > found.low).all()


def test_a_prompt_is_one_unit_whatever_its_length(many: tlc.ManyAnalyses):
    """Tokens of one prompt are alike: the interval over prompts knows, the one over tokens does not."""
    count = many.prompt.bincount()
    level = torch.randn(len(many.names), generator=torch.Generator().manual_seed(0)).repeat_interleave(count)
    alike = tlc.ManyAnalyses(**{**vars(many), "rate": level})
    prompt, token = (alike.interval("rate", by=by) for by in ("prompt", "token"))
    means = level[[0, *count.cumsum(0)[:-1].tolist()]].double()
    assert float(prompt.estimate) == pytest.approx(float(means.mean()))
    assert float(prompt.standard_error) > 1.5 * float(token.standard_error)


def ends(values: torch.Tensor, by: str = "prompt") -> dict[str, torch.Tensor]:
    return bootstrap_mean(values, 0.95, 999, 0, "coupling", by)


def test_no_spread_no_interval():
    same = torch.full((5, 1), 0.1 + 0.2, dtype=torch.float64)
    with pytest.warns(UserWarning, match="all 5 prompts are equal, so resampling shows no spread"):
        found = ends(same)
    assert found["low"].isnan().all() and found["high"].isnan().all() and found["standard_error"].isnan().all()
    assert float(found["estimate"]) == pytest.approx(0.3) and found["units"].tolist() == [5]
    with pytest.warns(UserWarning, match="fewer than two prompts \\(1\\) have no spread"):
        found = ends(torch.ones(1, 1))
    assert found["low"].isnan().all() and float(found["estimate"]) == 1
    gaps = torch.randn(6, 2, dtype=torch.float64)
    gaps[2, 0] = torch.nan
    with pytest.warns(UserWarning, match="1 of 6 tokens have no value and are left out"):
        found = ends(gaps, "token")
    assert found["units"].tolist() == [5, 6] and not found["low"].isnan().any()
    torch.testing.assert_close(found["estimate"][0], gaps[:, 0].nanmean())
    with pytest.warns(UserWarning, match="fewer than two"):
        found = ends(torch.full((4, 1), torch.nan))
    assert found["estimate"].isnan().all() and found["units"].tolist() == [0]


def test_a_single_prompt_and_equal_prompts_have_no_interval():
    model = FEW[0].model()
    single = tlc.analyze_many(model, [TOKENS], k=2)
    with pytest.warns(UserWarning, match="interval of excess: fewer than two prompts"):
        found = single.interval()
    assert found.low.isnan().all() and not found.estimate.isnan().any()
    thrice = tlc.analyze_many(model, [TOKENS] * 3, k=2)
    with pytest.warns(UserWarning, match="all 3 prompts are equal"):
        assert thrice.interval("rate").high.isnan().all()


@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-5, 5), scale=st.floats(0.1, 10), seed=st.integers(0, 1000))
def test_intervals_move_with_their_data(shift: float, scale: float, seed: int):
    values = torch.randn(12, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plain, moved = ends(values), ends(shift + scale * values)
    for name in ("estimate", "low", "high"):
        torch.testing.assert_close(moved[name], shift + scale * plain[name])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """95 % intervals of 30 normal numbers, 200 times: the bootstrap's own shortfall is 1 to 2 points at this size."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, 200, generator=generator, dtype=torch.float64)
    found = ends(values)
    share = float(((found["low"] < 0) & (found["high"] > 0)).double().mean())
    assert 0.88 < share < 0.99


def test_bad_arguments_are_named(many: tlc.ManyAnalyses, unchecked: None):
    for argument, wrong in {
        "quantity": {"quantity": "loss"},
        "by": {"by": "layer"},
        "confidence": {"confidence": 95},
        "resamples": {"resamples": 3},
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
