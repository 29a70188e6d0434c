"""What each layer does: each column from its definition in float64, and what noise gives."""

from __future__ import annotations

import importlib.util
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import TOKENS, Case, fresh
from oracle import REPRESENTATIVE
from scipy.stats import spearmanr

import tlcoupling as tlc
from tlcoupling.dynamics.depth_profile import AGAINST, _write, linearity_scores, spearman
from tlcoupling.errors import ArgumentError
from tlcoupling.results.intervals import mean_interval

FEW = pytest.mark.filterwarnings("ignore:linearity over:UserWarning")
PROMPTS = {"first": TOKENS, "second": (TOKENS[:5] + 5) % 50, "third": (TOKENS[:6] + 16) % 50}


def loss_of(model: Any, tokens: torch.Tensor, hooks: list[Any]) -> float:
    """Return the mean next-token loss, token by token."""
    with torch.no_grad():
        logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0].double()
    return float(-torch.stack([row.log_softmax(0)[i] for row, i in zip(logits[:-1], tokens[1:], strict=True)]).mean())


@FEW
@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_each_column_is_its_definition(case: Case):
    model, layer = case.model(), 1
    found = tlc.depth_profile(model, [TOKENS], 3, include_sinks=True)
    _, cache = model.run_with_cache(TOKENS[None])
    before, after = (cache[f"blocks.{layer}.hook_resid_{each}"][0] for each in ("pre", "post"))
    writes = {"block": (before, after - before), "attn": (before, cache[f"blocks.{layer}.hook_attn_out"][0])}
    if "mlp" in found.sublayers:
        reads = cache[f"blocks.{layer}.hook_resid_mid"][0] if case.topology == "sequential" else before
        writes["mlp"] = (reads, cache[f"blocks.{layer}.hook_mlp_out"][0])
    assert found.sublayers == tuple(writes)
    tight = {"rel": 1e3 * case.tolerance, "abs": 1e-10}
    for s, (x, w) in enumerate(writes.values()):
        pairs = list(zip(x.numpy(), w.numpy(), strict=True))
        cosines = [a @ (a + b) / np.linalg.norm(a) / np.linalg.norm(a + b) for a, b in pairs]
        ratios = [np.linalg.norm(b) / np.linalg.norm(a) for a, b in pairs]
        expected = {
            "influence": np.mean([1 - cosine for cosine in cosines]),
            "influence_null": np.mean([1 - math.cos(math.atan(ratio)) for ratio in ratios]),
            "angular_distance": np.mean([math.acos(cosine) / math.pi for cosine in cosines]),
            "angular_null": np.mean([math.atan(ratio) / math.pi for ratio in ratios]),
            "cosine": np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]),
        }
        for name, value in expected.items():
            assert float(getattr(found, name)[0, s, layer]) == pytest.approx(float(value), **tight), name
    # leaving a block out is reading its input again in the next one
    kept: list[torch.Tensor] = []
    skip = [
        (f"blocks.{layer}.hook_resid_pre", lambda tensor, hook: kept.append(tensor.clone())),
        (f"blocks.{layer + 1}.hook_resid_pre", lambda tensor, hook: kept[-1]),
    ]
    plain = loss_of(model, TOKENS, [])
    assert float(found.loss[0]) == pytest.approx(plain, **tight)
    effect = loss_of(model, TOKENS, skip) - plain
    assert float(found.loss_effect[0, 0, layer]) == pytest.approx(effect, rel=1e-5, abs=1e-7)
    # leaving the last sublayer out of a block is to go on with what it reads
    if case.topology == "sequential":
        mid: list[torch.Tensor] = []
        skip = [
            (f"blocks.{layer}.hook_resid_mid", lambda tensor, hook: mid.append(tensor.clone())),
            (f"blocks.{layer + 1}.hook_resid_pre", lambda tensor, hook: mid[-1]),
        ]
        effect = loss_of(model, TOKENS, skip) - plain
        assert float(found.loss_effect[0, 2, layer]) == pytest.approx(effect, rel=1e-5, abs=1e-7)
    excess = tlc.depth_coupling(tlc.trace(model, TOKENS), 3).excess[:, 0, 0]
    others = [each for each in range(3) if each != layer]
    mean = sum(excess[:, layer, each] + excess[:, each, layer] for each in others) / (2 * len(others))
    torch.testing.assert_close(found.coupling[0, :, layer].float(), mean.float())


def published_score(x: torch.Tensor, y: torch.Tensor) -> float:
    """``procrustes_similarity`` of llm-microscope, restated: its own name for least squares."""
    x, y = x - x.mean(0, keepdim=True), y - y.mean(0, keepdim=True)
    x, y = x / x.norm(), y / y.norm()
    return 1 - float((x @ torch.linalg.lstsq(x, y).solution - y).square().sum())


def test_linearity_is_the_published_score():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 400, 24, generator=generator, dtype=torch.float64)
    write = 0.3 * (x @ torch.randn(24, 24, generator=generator, dtype=torch.float64)).tanh() + 0.1 * noise + 2
    found = linearity_scores(x, write)
    assert float(found["linearity"]) == pytest.approx(published_score(x, x + write), rel=1e-10)
    assert float(found["linearity_of_write"]) == pytest.approx(published_score(x, write), rel=1e-10)
    exact = linearity_scores(x, x @ torch.randn(24, 24, generator=generator, dtype=torch.float64) - 1)
    assert float(exact["linearity"]) == pytest.approx(1) and float(exact["linearity_of_write"]) == pytest.approx(1)


def test_linearity_is_the_score_of_llm_microscope():
    package = importlib.util.find_spec("llm_microscope")  # whose __init__ (0.0.7) imports what it does not install
    if package is None:
        pytest.skip("no llm-microscope: pip install llm-microscope")
    score = runpy.run_path(str(Path(str(package.origin)).parent / "functions.py"))["procrustes_similarity"]
    model, generator = fresh(0), torch.Generator().manual_seed(0)
    traces = [tlc.trace(model, torch.randint(50, (16,), generator=generator)) for _ in range(12)]
    for layer, sublayer in ((layer, name) for layer in range(3) for name in traces[0].sublayers):
        everything = torch.ones(16, dtype=torch.bool)
        steps = zip(*(_write(trace, layer, sublayer, everything) for trace in traces), strict=True)
        x, write = (torch.cat(each).double() for each in steps)  # twice as many tokens as dimensions
        found = linearity_scores(x, write)
        assert float(found["linearity"]) == pytest.approx(score(x, x + write), abs=1e-9)
        assert float(found["linearity_of_write"]) == pytest.approx(score(x, write), abs=1e-9)


def test_noise_has_the_linearity_of_its_chance_level():
    """Unrelated noise is perfectly linear over fewer tokens than the width: three standard errors over 20 draws."""
    generator = torch.Generator().manual_seed(1)
    for tokens, expected in ((28, 1.0), (600, 57 / 599)):
        drawn = [linearity_scores(*torch.randn(2, tokens, 57, generator=generator).double()) for _ in range(20)]
        assert float(drawn[0]["linearity_null"]) == pytest.approx(expected)
        scores = torch.stack([each["linearity_of_write"] for each in drawn])
        assert abs(float(scores.mean()) - expected) <= 3 * float(scores.std()) / math.sqrt(20) + 1e-9


def test_the_scores_are_of_all_prompts_together():
    model = fresh(0)
    with pytest.warns(UserWarning, match=r"linearity over 18 tokens .* any noise, 1\.00: give 10 d_model = 960"):
        found = tlc.depth_profile(model, PROMPTS, 2, sublayers=["block", "mlp"], include_sinks=True)
    traces = [tlc.trace(model, prompt) for prompt in PROMPTS.values()]
    x, write = (
        torch.cat(each) for each in zip(*((one.resid_mid[2], one.writes["mlp"][2]) for one in traces), strict=True)
    )
    for name, value in linearity_scores(x, write).items():
        assert float(getattr(found, name)[1, 2]) == pytest.approx(float(value)), name
    assert found.n_tokens == 18 and found.prompts == tuple(PROMPTS) and (found.linearity_null == 1).all()
    first, *others = PROMPTS.values()
    alike = {"sublayers": ["block", "mlp"], "include_sinks": True, "baseline": fresh(1)}
    with pytest.warns(UserWarning, match="linearity over 18 tokens"):
        apart = tlc.depth_profile(model, [first], 2, texts=others, **alike)
    torch.testing.assert_close(apart.linearity, found.linearity)
    torch.testing.assert_close(apart.loss, found.loss[:1])
    assert apart.prompts == ("0",) and apart.baseline is not None and apart.baseline.n_tokens == 18


@FEW
def test_sinks_are_left_out_unless_they_are_asked_for(monkeypatch: pytest.MonkeyPatch):
    from tlcoupling.dynamics import depth_profile as module

    model = fresh(0)
    whole = tlc.depth_profile(model, [TOKENS], 2, sublayers="block", include_sinks=True)
    monkeypatch.setattr(module, "find_sinks", lambda norms: torch.arange(norms.shape[1]) == 0)
    without = tlc.depth_profile(model, [TOKENS], 2, sublayers="block")
    resid = tlc.trace(model, TOKENS).resid[:, 1:]
    truth = 1 - torch.cosine_similarity(resid[:-1], resid[1:], dim=-1).mean(1)
    torch.testing.assert_close(without.influence[0, 0].float(), truth, rtol=1e-4, atol=1e-6)
    assert (without.n_tokens, whole.n_tokens) == (6, 7) and not torch.equal(without.influence, whole.influence)
    assert torch.equal(without.loss_effect, whole.loss_effect)
    monkeypatch.setattr(module, "find_sinks", lambda norms: torch.arange(norms.shape[1]) < 6)
    with pytest.raises(ArgumentError, match="two or more tokens that are not sinks"):
        tlc.depth_profile(model, [TOKENS], 2, sublayers="block")


def test_spearman_is_that_of_scipy():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 6, (2, 4, 9), generator=generator).double()  # with ties
    truth = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman(first, second), truth)
    assert spearman(first[:1], torch.ones(1, 9)).isnan().all()


@FEW
def test_correlations_with_coupling_are_over_layers_and_their_interval_over_prompts():
    prompts = [TOKENS[torch.randperm(7, generator=torch.Generator().manual_seed(seed))] for seed in range(6)]
    found = tlc.depth_profile(fresh(0), prompts, 2, sublayers=["block", "attn"])
    assert found.rho.shape == (6, len(AGAINST), 2)
    truth = spearmanr(found.loss_effect[4, 1], found.coupling[4, 1]).statistic
    assert float(found.rho[4, AGAINST.index("loss_effect"), 1]) == pytest.approx(truth)
    truth = spearmanr(found.linearity[0], found.coupling[3, 0]).statistic
    assert float(found.rho[3, AGAINST.index("linearity"), 0]) == pytest.approx(truth)
    truth = spearmanr([0, 1, 2], found.coupling[2, 0]).statistic
    assert float(found.rho[2, AGAINST.index("layer"), 0]) == pytest.approx(truth)
    interval = found.correlation()
    torch.testing.assert_close(interval.estimate, found.rho.mean(0))
    assert interval.axes == ("against", "sublayer") and interval.labels == (AGAINST, ("block", "attn"))
    beyond = mean_interval(found.rho, 0.95, "rho")
    assert float(beyond["high"].nan_to_num().max()) > 1, "six prompts say little about three layers"
    assert (interval.high.nan_to_num() <= 1).all() and (interval.low.nan_to_num() >= -1).all()
    with pytest.raises(ArgumentError, match="confidence"):
        found.correlation(2.0)


@FEW
def test_a_baseline_stands_beside(tmp_path: Any):
    model, other = fresh(0), fresh(1)
    found = tlc.depth_profile(model, PROMPTS, 2, sublayers="attn", baseline=other)
    alone = tlc.depth_profile(other, PROMPTS, 2, sublayers="attn")
    back: Any = tlc.load(found.save(tmp_path / "profile.safetensors"))
    for one in (found, back):
        assert one.baseline is not None and torch.equal(one.baseline.loss_effect, alone.loss_effect)
        assert one.baseline.prompts == found.prompts
    assert repr(back) == repr(found)
    table = found.to_dataframe().query("quantity == 'loss_effect' and prompt == 'second' and layer == 2")
    assert table["value"].item() == pytest.approx(float(found.loss_effect[1, 0, 2]))


@FEW
@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([TOKENS[:1]], {}, "at least two tokens"),
        ([TOKENS], {"k": 0}, "k=0"),
        ([TOKENS], {"sublayers": "heads"}, "sublayers='heads'"),
        (TOKENS[:0], {}, "prompts="),
    ],
)
def test_bad_arguments(prompts: Any, arguments: dict[str, Any], message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.depth_profile(fresh(0), prompts, **arguments)
