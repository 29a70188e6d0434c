"""The headline's rules: what may be said of numbers, and that nothing is said of chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from analyses import make_analysis
from cases import CASES, TOKENS, fresh

import tlcoupling as tlc
from tlcoupling.analysis.headline import MARGIN, findings, sentence


def coupled(n: int = 12, level: float = 0.0, **changes: float) -> tlc.DepthCoupling:
    """Depth-wise coupling of n layers at its null of 0.01, plus a level for all pairs, or for each sublayer by name."""
    coupling = make_analysis(n_layers=n).coupling
    null, std = torch.full_like(coupling.null, 0.01), torch.full_like(coupling.null_std, 0.001)
    above = torch.tensor([changes.get(name, level) for name in coupling.sublayers]).reshape(-1, 1, 1, 1, 1)
    return replace(coupling, values=null + above, null=null, null_std=std)


def said(coupling: tlc.DepthCoupling, **options: object) -> str:
    analysis = make_analysis(n_layers=len(coupling.layers))
    return sentence(findings(coupling, analysis.linearity, analysis.growth, **options))


def test_coupling_is_claimed_beyond_three_errors_alone() -> None:
    assert said(coupled(level=2.9e-3)).startswith("Blocks couple no more than chance (0.0129 against 0.0100);")
    assert said(coupled(level=3.1e-3)).startswith("Blocks couple 1.3 times chance (0.0131 against 0.0100);")
    assert "(0.0131 against 0.0100, p = 0.02)" in said(coupled(level=3.1e-3), p=0.02)


def test_coupling_below_chance_and_a_small_p_are_never_called_no_more_than_chance() -> None:
    assert said(coupled(level=-3.1e-3)).startswith("Blocks couple below chance (0.0069 against 0.0100);")
    assert said(coupled(level=-1e-3), p=0.04).startswith("Blocks couple below chance (0.0090 against 0.0100, p = 0.04)")
    assert said(coupled(level=1e-3), p=0.04).startswith("Blocks couple little above chance (0.0110 against 0.0100, p")
    assert said(coupled(level=-1e-3), p=0.06).startswith("Blocks couple no more than chance (0.0090 against")


def test_a_ratio_needs_a_null_well_above_its_own_spread() -> None:
    coupling = coupled(level=0.01)
    wide = replace(coupling, null_std=torch.full_like(coupling.null, 0.0033))
    assert said(wide).startswith("Blocks couple 2.0 times chance")  # 0.01 is 3.03 spreads
    wide = replace(wide, null=wide.null * 0.9, values=wide.values + 0.001)  # 2.7 spreads
    assert said(wide).startswith("Blocks couple 0.0120 above chance (0.0210 against 0.0090)")


def test_a_run_of_layers_is_named_where_it_couples_more_than_twice_as_much() -> None:
    coupling = coupled(level=0.01)
    assert "most in layers" not in said(coupling)
    coupling.values[..., 3:8, 3:8] += 0.1
    assert "most in layers 3 to 7 (described, not tested)" in said(coupling)
    coupling.values[:] -= float((coupling.values - coupling.null).mean())
    assert "most in layers" not in said(coupling), "nothing overall, no layers"


def test_one_sublayer_is_above_the_other_beyond_their_errors() -> None:
    error = 2**0.5 * 1e-3 * MARGIN
    assert "more than" not in said(coupled(block=0.02, attn=0.02, mlp=0.02 + 0.99 * error))
    assert "MLP more than attention" in said(coupled(block=0.02, attn=0.02, mlp=0.02 + 1.01 * error))
    assert "attention more than MLP" in said(coupled(block=0.02, attn=0.03, mlp=0.02))


def test_distance_is_described_where_coupling_was_found() -> None:
    coupling = coupled(level=0.01)
    coupling.values.diagonal(1, -2, -1).add_(0.1)
    coupling.values.diagonal(-1, -2, -1).add_(0.1)
    assert "neighbours 0.120, 8 layers apart 0.020" in said(coupling)
    assert "neighbours" not in said(coupled())


def test_trajectories_are_straight_beyond_what_random_steps_vary() -> None:
    analysis = make_analysis(n_layers=9)  # of width 16: sqrt(9) - 3 sqrt(8 / 32) = 1.5

    def of(*scores: float) -> str:
        lss = analysis.linearity.lss.clone()
        lss[0] = torch.tensor(scores)
        found = findings(analysis.coupling, replace(analysis.linearity, lss=lss), analysis.growth)
        return next(one.text for one in found if one.name == "line-shape score")

    assert of(1.4, 1.5, 1.5, 1.5).startswith("trajectories straighter than random steps")
    assert of(1.6, 1.5, 1.5, 1.5).startswith("trajectories no straighter than random steps")
    analysis = make_analysis(n_layers=1)
    assert of(*[1 - 1e-7] * 4).startswith("trajectories no straighter")  # one step is a line
    assert of(*[float("nan")] * 4) == "no trajectory has a line-shape score"


def test_growth_is_compared_with_fresh_weights_beyond_the_spread_of_tokens_and_weights() -> None:
    analysis = make_analysis()
    growth = replace(analysis.growth, rate=torch.tensor([0.1, 0.1, 0.1, 0.1]))
    # each model's error is at least 1 / (4 layers sqrt(16)) = 0.0625: the margin is 0.265, with equal tokens too
    near, far, wide = (
        replace(analysis.growth, rate=torch.tensor(rates))
        for rates in ([-0.16] * 4, [-0.17] * 4, [-0.12, -0.22, -0.12, -0.22])
    )

    def of(growth: tlc.Growth, fresh: tlc.Growth | None = None) -> str:
        found = findings(analysis.coupling, analysis.linearity, growth, fresh=fresh)
        return next(one.text for one in found if one.name == "growth rate per layer")

    assert of(growth) == "norms grow 11% a layer"
    assert of(growth, near) == "norms grow 11% a layer (no different from fresh weights, -15%)"
    assert of(growth, far) == "norms grow 11% a layer (fresh weights -16%)"
    assert of(growth, wide) == "norms grow 11% a layer (no different from fresh weights, -16%)"


def test_sinks_are_left_out_named_and_brought_back() -> None:
    analysis = make_analysis(positions=(0, 1))
    analysis.growth.norms[1, 0] = 1e4
    analysis.coupling.values[:, 0] = 0.9
    without, all_tokens = (analysis.summary(include_sinks=sinks).set_index("finding") for sinks in (False, True))
    assert "1 sink left out: 0 “The”" in analysis.headline()
    assert "sink" not in analysis.headline(include_sinks=True)
    block = "coupling of blocks"
    assert without["value"][block] == pytest.approx(float(analysis.coupling.mean()[0, 1, 0]), rel=1e-6)
    assert without["with_sinks"][block] == all_tokens["value"][block] > without["value"][block]


def test_coupling_of_sinks_alone_is_called_so() -> None:
    analysis = make_analysis(positions=(0,))
    assert analysis.headline().startswith("Blocks couple ")
    analysis.growth.norms[1, 0] = 1e4
    assert analysis.headline().startswith("Blocks at sinks couple ")
    assert analysis.headline(include_sinks=True).startswith("Blocks couple ")


def test_nothing_is_left_out_where_all_tokens_are_sinks() -> None:
    analysis = make_analysis()
    analysis.growth.norms[:4] = 1 + 99 * torch.eye(4)  # each token at a depth of its own
    assert analysis.growth.sinks.all()
    assert "left out" not in analysis.headline() and " at sinks" not in analysis.headline()


def test_coupling_that_is_undefined_in_some_layers_is_not_said_to_need_more_layers() -> None:
    coupling = coupled(level=0.01)
    coupling.values[:, :, :, 5] = float("nan")
    assert said(coupling).startswith("Coupling of blocks is not defined for every pair of layers;")
    assert said(coupled(n=1)).startswith("Coupling of blocks needs two layers;")


def test_fresh_weights_have_their_own_chance_and_the_same_tokens() -> None:
    baseline = make_analysis()
    baseline = replace(baseline, coupling=replace(baseline.coupling, null=2 * baseline.coupling.null))
    baseline.growth.rate[0] += 1
    analysis = make_analysis(baseline=baseline)
    analysis.growth.norms[1, 0] = 1e4
    table = analysis.summary().set_index("finding")
    coupling, rate = table.loc["coupling of blocks"], table.loc["growth rate per layer"]
    assert coupling["fresh_chance"] == pytest.approx(2 * coupling["chance"], rel=1e-6)
    assert rate["fresh"] == rate["chance"] == pytest.approx(float(baseline.growth.rate[1:].mean()))


def test_no_clause_claims_a_finding_in_fresh_models() -> None:
    """A fast form of benchmarks/headline.py: three models, a prompt of two tokens and one of sixteen.

    Only "below" and "little above" chance, which go by p <= 0.05, may be said: in 2 headlines of 6 at most, which a
    sound test exceeds once in 450 runs.
    """
    tested = 0
    for seed in range(3):
        model, baseline = (fresh(each, n_layers=8) for each in (seed, 100 + seed))
        for length in (2, 16):
            prompt = torch.randint(40, (length,), generator=torch.Generator().manual_seed(seed))
            text = tlc.analyze(model, prompt, k=4, attention=False, baseline=baseline).headline()
            tested += "below chance" in text or "little above" in text
            for claim in ("times chance", "most in", "more than attention", "more than MLP", "neighbours", "(fresh"):
                assert claim not in text, text
            assert "trajectories no straighter" in text, text
    assert tested <= 2


def test_nothing_is_found_in_fresh_weights() -> None:
    model = CASES[0].model()
    analysis = tlc.analyze(tlc.random_baseline(model), TOKENS, k=4, baseline=tlc.random_baseline(model, seed=1))
    text = analysis.headline()
    assert "no more than chance" in text and "no different from fresh weights" in text, text
    assert "most in" not in text and "neighbours" not in text and " more than attention" not in text
    table = analysis.summary()
    assert list(table)[:7] == ["finding", "value", "chance", "error", "found", "with_sinks", "fresh"]
    assert list(table)[7:] == ["fresh_chance", "text"]
    assert not table[table["finding"].str.startswith(("coupling", "excess", "growth"))]["found"].any()
    assert table["fresh"].notna().all()
    assert text[:30] in repr(analysis) and "\n" not in repr(analysis)
    assert ", p = " in text or ", p ≤ " in text
