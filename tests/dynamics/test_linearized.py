"""Linearised trajectories against real ones, and the derivative of the hooked model."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from cases import CASES, FEW, TOKENS, Case, built_here, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, StaleTraceError

few = pytest.mark.parametrize("case", FEW, ids=str)
EXACT = [case for case in FEW if case.exact]
LAYER, POS = 1, 3


def chain(trace: tlc.Trace, layer: int, stream: torch.Tensor) -> torch.Tensor:
    """x^L as a function of x^layer: a forward pass of the model with its stream replaced by a hook."""
    kept: list[torch.Tensor] = []
    last = trace.n_layers - 1
    trace.model.run_with_hooks(
        trace.tokens[None],
        return_type=None,
        fwd_hooks=[
            (f"blocks.{layer}.hook_resid_pre", lambda tensor, hook: stream[None]),
            (f"blocks.{last}.hook_resid_post", lambda tensor, hook: kept.append(tensor)),
        ],
    )
    return kept[0][0]


@few
def test_the_linearised_system_is_the_derivative_of_the_hooked_model(case: Case):
    """Both kinds against a backward pass through all blocks at once, by hooks on a forward pass of the whole model."""
    trace = tlc.trace(case.model(), TOKENS)
    direction = torch.randn(trace.d_model, dtype=torch.float64)
    leaf = trace.resid[LAYER].clone().requires_grad_()
    out = chain(trace, LAYER, leaf)
    cotangent = torch.randn_like(out)
    (pulled,) = torch.autograd.grad(out, leaf, cotangent, retain_graph=True)
    everywhere = tlc.linearized(trace, direction, layer=LAYER, pos=POS, tokens="all")
    assert everywhere.shape == (trace.n_layers - LAYER + 1, len(TOKENS) - POS, trace.d_model)
    truth = pulled[POS] @ direction
    found = (everywhere[-1] * cotangent[POS:]).sum()
    assert abs(found - truth) < 10 * case.tolerance * everywhere[-1].norm() * cotangent.norm()
    same = tlc.linearized(trace, direction, layer=LAYER, pos=POS)
    assert same.shape == (trace.n_layers - LAYER + 1, 1, trace.d_model)
    # the token itself: attention is causal, so that its own Jacobians are all there is to it
    assert relative_error(same[:, 0], everywhere[:, 0]) < 10 * case.tolerance
    (own,) = torch.autograd.grad(out[POS] @ cotangent[POS], leaf)
    assert abs(same[-1, 0] @ cotangent[POS] - own[POS] @ direction) < 10 * case.tolerance * same[-1].norm() * 10
    assert torch.equal(everywhere[0, 0], direction) and (everywhere[0, 1:] == 0).all()


@few
@pytest.mark.parametrize("tokens", ["same", "all"])
def test_the_gap_is_that_of_the_hooked_model(case: Case, tokens: str):
    trace = tlc.trace(case.model(), TOKENS)
    direction = torch.randn(trace.d_model, dtype=torch.float64)
    found = tlc.linearization_gap(trace, direction, layer=LAYER, pos=POS, sizes=(0.1, 1.0), tokens=tokens)
    assert found.depths == (1, 2, 3) and found.gap.shape == (2, 3)
    unit = direction / direction.norm() * trace.resid[LAYER, POS].norm()
    for index, size in enumerate(found.sizes):
        moved = trace.resid[LAYER].clone()
        moved[POS] += size * unit
        with torch.no_grad():
            real = chain(trace, LAYER, moved) - chain(trace, LAYER, trace.resid[LAYER])
        linear = tlc.linearized(trace, size * unit, layer=LAYER, pos=POS, tokens=tokens)[-1]
        real = real[POS:] if tokens == "all" else real[POS : POS + 1]
        gap = (real - linear).norm() / real.norm()
        # float32 inside some modules, over the size of the smaller perturbation
        assert abs(found.gap[index, -1] - gap) < 100 * case.tolerance
        assert abs(found.real_norm[index, -1] - real.norm()) < 100 * case.tolerance * real.norm()
        assert abs(found.linear_norm[index, -1] - linear.norm()) < 100 * case.tolerance * linear.norm()
        cosine = torch.cosine_similarity(real.flatten(), linear.flatten(), dim=0)
        assert abs(found.cosine[index, -1] - cosine) < 100 * case.tolerance


@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("tokens", ["same", "all"])
def test_the_gap_vanishes_in_proportion_to_the_size(case: Case, tokens: str):
    """Order 1: half the size, half the gap; what is left over is of the order of the size itself."""
    trace = tlc.trace(case.model(), TOKENS)
    found = tlc.linearization_gap(trace, pos=POS, sizes=(1e-4, 5e-5), tokens=tokens)
    assert (found.gap[:, 1:] < 1e-2).all() and (found.gap[:, 1:] > 0).all()
    ratio = found.gap[0, 1:] / found.gap[1, 1:]
    assert ((ratio - 2).abs() < 0.02).all()
    assert (found.cosine > 0.999).all()
    # the perturbation where it enters: nothing but rounding of x + delta - x
    assert (found.gap[:, 0] < 1e3 * found.rounding[:, 0]).all()


def test_in_a_linear_model_the_linearisation_is_exact():
    """Without norms and MLPs, and with queries of zero, attention is an average: the model is linear in its stream."""
    model = built_here({"normalization_type": None, "attn_only": True})
    for name, parameter in model.named_parameters():
        if name.endswith(("W_Q", "b_Q")) or ".q." in name:
            parameter.data.zero_()
    trace = tlc.trace(model, TOKENS)
    for tokens in ("same", "all"):
        found = tlc.linearization_gap(trace, pos=POS, sizes=(1e-3, 1.0, 1e3), tokens=tokens)
        assert (found.gap < 1e-9).all()
        assert found.reach(1e-6).tolist() == [1e3] * 4


def test_derivatives_do_not_need_gradients_switched_on():
    trace = tlc.trace(EXACT[0].model(), TOKENS)
    direction = torch.randn(trace.d_model, dtype=torch.float64)
    for tokens in ("same", "all"):
        expected = tlc.linearized(trace, direction, pos=POS, tokens=tokens, engine="autograd")
        with torch.no_grad():
            found = tlc.linearized(trace, direction, pos=POS, tokens=tokens, engine="autograd")
        torch.testing.assert_close(found, expected)


@settings(max_examples=10)
@given(scale=st.floats(0.1, 10.0), seed=st.integers(0, 1000))
def test_the_linearised_system_is_linear(scale: float, seed: int):
    trace = tlc.trace(EXACT[0].model(), TOKENS)
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, trace.d_model, generator=generator, dtype=torch.float64)
    for tokens in ("same", "all"):
        first, second, both = (
            tlc.linearized(trace, vector, pos=POS, tokens=tokens) for vector in (one, two, scale * one + two)
        )
        assert relative_error(both, scale * first + second) < 1e-9


def test_reach_is_the_largest_size_below_which_all_hold():
    trace = tlc.trace(FEW[0].model(), TOKENS)
    found = tlc.linearization_gap(trace, sizes=(1.0, 1e-3, 1e-1))
    for allowed in (1e-12, 1e-2, 0.5):
        for depth, reach in enumerate(found.reach(allowed).tolist()):
            sizes = []
            for size, gap in sorted(zip(found.sizes, found.gap[:, depth].tolist(), strict=True)):
                if gap > allowed:
                    break
                sizes.append(size)
            assert reach == pytest.approx(max(sizes, default=math.nan), rel=1e-6, nan_ok=True)  # of float32


def test_hooks_of_the_user_act_on_both_systems():
    """A hook that doubles an attention's write changes the linear and the real system alike."""
    case = EXACT[0]
    model = case.model()
    name = "blocks.2.hook_attn_out" if any(c.name.startswith("hooked") for c in CASES) else "blocks.2.attn.hook_out"
    plain = tlc.linearization_gap(tlc.trace(model, TOKENS), layer=1, sizes=(1e-5,))
    with model.hooks(fwd_hooks=[(name, lambda tensor, hook: 2 * tensor)]):
        trace = tlc.trace(model, TOKENS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = tlc.linearization_gap(trace, layer=1, sizes=(1e-5,))
    assert (found.gap < 1e-3).all()
    assert abs(found.real_norm[0, -1] / plain.real_norm[0, -1] - 1) > 1e-3
    for tokens in ("same", "all"):
        with pytest.raises(StaleTraceError):
            tlc.linearization_gap(trace, layer=1, tokens=tokens, engine="autograd")


def test_bad_perturbations_are_named(unchecked: None):
    trace = tlc.trace(FEW[0].model(), TOKENS)
    for argument, call in {
        "layer": lambda: tlc.linearization_gap(trace, layer=3),
        "pos": lambda: tlc.linearization_gap(trace, pos=7),
        "tokens": lambda: tlc.linearization_gap(trace, tokens="later"),
        "sizes": lambda: tlc.linearization_gap(trace, sizes=(0.0,)),
        "direction": lambda: tlc.linearization_gap(trace, torch.zeros(trace.d_model)),
        "perturbation": lambda: tlc.linearized(trace, torch.zeros(3)),
    }.items():
        with pytest.raises(ArgumentError) as raised:
            call()
        assert raised.value.name == argument
    with pytest.raises(ArgumentError, match="a vector of d_model"):
        tlc.linearization_gap(trace, torch.ones(3))


def test_a_change_that_rounding_swallows_is_nan():
    trace = tlc.trace(EXACT[0].model(), TOKENS)
    with pytest.warns(UserWarning, match="nothing to compare"):
        found = tlc.linearization_gap(trace, sizes=(1e-40,))
    assert found.gap[0, 0].isnan() and found.cosine[0, 0].isnan()


def test_results_come_back_from_a_file(tmp_path):
    trace = tlc.trace(FEW[0].model(), TOKENS)
    for result in (
        tlc.linearization_gap(trace),
        tlc.singular_value_profile(tlc.depth_coupling(trace, 2)),
        tlc.trajectory_components(trace),
    ):
        back = tlc.load(result.save(tmp_path / "result.safetensors"))
        assert repr(back) == repr(result) and "\n" not in repr(result)
        assert len(back.to_dataframe()) == sum(array.numel() for _, array in result._arrays().values())
