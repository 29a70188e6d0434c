"""Linearity and growth: properties of the measures, and agreement with a plain computation on small models."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, TOKENS, Case
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.trajectory.linearity import line_shape_score

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), d=st.integers(2, 64))
def test_line_shape_score_is_at_least_one(seed: int, n: int, d: int):
    torch.manual_seed(seed)
    steps = torch.randn(n, d, dtype=torch.float64)
    score = line_shape_score(steps)
    assert score >= 1 - 1e-12
    torch.testing.assert_close(line_shape_score(steps * torch.rand(n, 1, dtype=torch.float64)), score)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q
    torch.testing.assert_close(line_shape_score(steps @ rotation), score)
    straight = torch.rand(n, 1, dtype=torch.float64) * torch.randn(d, dtype=torch.float64)
    torch.testing.assert_close(line_shape_score(straight), torch.ones((), dtype=torch.float64))


def test_random_directions_score_the_root_of_their_number():
    scores = line_shape_score(torch.randn(200, 100, 5000))
    # E || sum of n unit vectors ||^2 = n, up to a relative spread of 1 / sqrt(2 d)
    assert abs(scores.mean() - math.sqrt(100)) < 0.1


@each_case
def test_the_measures_are_their_formulas(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    straight, grown = tlc.linearity(trace), tlc.growth(trace)
    for pos in range(len(TOKENS)):
        x = trace.resid[:, pos]
        steps = {"block": [x[i + 1] - x[i] for i in range(3)], "attn": list(trace.attn_out[:, pos])}
        if trace.mlp_out is not None:
            steps["mlp"] = list(trace.mlp_out[:, pos])
        if trace.topology == "sequential":
            steps["sublayer"] = [d for pair in zip(steps["attn"], steps["mlp"], strict=True) for d in pair]
        assert set(straight.paths) == set(steps)
        for path, vectors in steps.items():
            total = sum(d / d.norm() for d in vectors)
            score = len(vectors) / total.norm()
            index = straight.paths.index(path)
            assert straight.steps[index] == len(vectors)
            torch.testing.assert_close(straight.lss[index, pos], score)
            way = sum(vectors).norm() / sum(d.norm() for d in vectors)
            torch.testing.assert_close(straight.straightness[index, pos], way)
        alpha = torch.stack([(x[i + 1].norm() / x[i].norm()).log() for i in range(3)])
        torch.testing.assert_close(grown.alpha[:, pos], alpha)
        ed = ((alpha - alpha.mean()) ** 2).mean() / alpha.mean() ** 2
        torch.testing.assert_close(grown.expodistance[pos], ed)
        torch.testing.assert_close(grown.cv[pos] ** 2, ed)
        logs = x.norm(dim=1).log()
        design = torch.stack([torch.ones(4), torch.arange(4.0)], dim=1).double()
        fit = torch.linalg.lstsq(design, logs[:, None])
        torch.testing.assert_close(grown.slope[pos], fit.solution[1, 0])
        left = (logs - (design @ fit.solution)[:, 0]).square().sum()
        torch.testing.assert_close(grown.r_squared[pos], 1 - left / (logs - logs.mean()).square().sum())
    if trace.topology == "sequential":
        torch.testing.assert_close(grown.attn_share + grown.mlp_share, grown.alpha)
        middle = trace.resid_mid.norm(dim=-1)
        torch.testing.assert_close(grown.attn_share, (middle / trace.resid[:-1].norm(dim=-1)).log())
    else:
        assert grown.attn_share is None


def test_an_unknown_path_is_named():
    straight = tlc.linearity(tlc.trace(CASES[0].model(), TOKENS))
    assert straight.path("attn").equal(straight.lss[straight.paths.index("attn")])
    with pytest.raises(ArgumentError, match=r"name='attention' .*one of block, sublayer, attn, mlp"):
        straight.path("attention")


@each_case
def test_a_cache_alone_gives_the_same(case: Case):
    model = case.model()
    trace = tlc.trace(model, TOKENS)
    _, cache = model.run_with_cache(TOKENS[None])
    for measure, field in ((tlc.linearity, "lss"), (tlc.growth, "alpha")):
        expected = getattr(measure(trace), field)
        torch.testing.assert_close(getattr(measure(cache), field), expected)
        without_batch = {name: value[0] for name, value in cache.items()}
        torch.testing.assert_close(getattr(measure(without_batch), field), expected)


def test_a_step_of_length_zero_is_nan_and_named():
    case = CASES[0]
    model = case.model()
    _, cache = model.run_with_cache(TOKENS[None])
    activations = {name: value.clone() for name, value in cache.items()}
    # block 1 does nothing to position 4, and the later stream moves along
    for name in ("hook_attn_out", "hook_mlp_out"):
        activations[f"blocks.1.{name}"][0, 4] = 0
    before = activations["blocks.1.hook_resid_pre"][0, 4].clone()
    shift = before - activations["blocks.2.hook_resid_pre"][0, 4]
    activations["blocks.1.hook_resid_mid"][0, 4] = before
    activations["blocks.2.hook_resid_pre"][0, 4] = before
    for name in ("blocks.2.hook_resid_mid", "blocks.2.hook_resid_post"):
        activations[name][0, 4] += shift
    with pytest.warns(UserWarning) as said:
        found = tlc.linearity(activations)
    # the sublayers' path takes two steps a layer
    for path, times in (("block", 1), ("sublayer", 2), ("attn", 1), ("mlp", 1)):
        start = f"the {path} step of layer 1 has no direction at position 4"
        assert sum(str(one.message).startswith(start) for one in said) == times
    assert sum("has no direction" in str(one.message) for one in said) == 5
    assert found.path("block").isnan().tolist() == [False] * 4 + [True] + [False] * 2
    assert found.path("sublayer").isnan()[4]


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1.0, 1e25])
def test_the_score_does_not_depend_on_the_scale_of_the_steps(scale: float):
    """Squares of 1e-25 and 1e25 are zero and infinite in float32."""
    steps = torch.randn(12, 40)
    torch.testing.assert_close(line_shape_score(steps * scale), line_shape_score(steps))
    assert line_shape_score(torch.cat([steps, torch.zeros(1, 40)])).isnan()


def moved_by(size: float) -> dict[str, torch.Tensor]:
    """Activations whose block 1 moves position 4 by ``size`` of its norm, half of it by each sublayer."""
    _, cache = CASES[0].model(torch.float32).run_with_cache(TOKENS[None])
    activations = {name: value.clone() for name, value in cache.items()}
    before = activations["blocks.1.hook_resid_pre"][0, 4].clone()
    write = 0.5 * size * before.norm() * torch.nn.functional.normalize(torch.randn(len(before)), dim=0)
    after = before + 2 * write
    shift = after - activations["blocks.2.hook_resid_pre"][0, 4]
    for name in ("hook_attn_out", "hook_mlp_out"):
        activations[f"blocks.1.{name}"][0, 4] = write
    activations["blocks.1.hook_resid_mid"][0, 4] = before + write
    activations["blocks.1.hook_resid_post"][0, 4] = after
    activations["blocks.2.hook_resid_pre"][0, 4] = after
    for name in ("blocks.2.hook_resid_mid", "blocks.2.hook_resid_post"):
        activations[name][0, 4] += shift
    return activations


@pytest.mark.parametrize("size", [1e-25, 1e-8])
def test_a_block_that_moves_a_token_by_rounding_has_no_direction(size: float):
    """The writes of its sublayers are no differences: short as they are, their directions are exact."""
    with pytest.warns(UserWarning, match="block step of layer 1 has no direction at position 4") as caught:
        found = tlc.linearity(moved_by(size))
    assert sum("no direction" in str(one.message) for one in caught) == 1
    assert found.path("block").isnan().nonzero().tolist() == [[4]]
    for path in ("sublayer", "attn", "mlp"):
        assert found.path(path).isfinite().all()


def test_a_short_step_keeps_its_direction():
    assert tlc.linearity(moved_by(1e-5)).path("block").isfinite().all()
