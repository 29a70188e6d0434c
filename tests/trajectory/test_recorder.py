"""The recorder: the numbers of a cache, without one."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from cases import CASES, FEW, TOKENS, Case, built_here

import tlcoupling as tlc
from tlcoupling.errors import (
    ArgumentError,
    MissingHookError,
    NonFiniteActivationError,
    ResidualIdentityError,
    UnsupportedModelError,
)

FIELDS = {
    "linearity": ("lss", "straightness"),
    "growth": ("norms", "alpha", "attn_share", "mlp_share", "expodistance", "rate", "slope", "r_squared", "cv"),
}


def require_same(recorder: tlc.TrajectoryRecorder, source: Any, tolerance: float) -> None:
    for measure, names in FIELDS.items():
        found, truth = getattr(recorder, measure)(), getattr(tlc, measure)(source)
        for name in names:
            expected = getattr(truth, name)
            if expected is None:
                assert getattr(found, name) is None
            else:
                torch.testing.assert_close(getattr(found, name), expected, rtol=tolerance, atol=tolerance)
    assert recorder.linearity().paths == tlc.linearity(source).paths
    assert recorder.linearity().steps == tlc.linearity(source).steps
    assert recorder.growth().tokens == tlc.growth(source).tokens


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_recorded_run_gives_the_numbers_of_a_cache(case: Case):
    model = case.model()
    recorder = tlc.TrajectoryRecorder(model)
    logits = model.run_with_hooks(TOKENS[None], fwd_hooks=recorder.fwd_hooks)
    expected, cache = model.run_with_cache(TOKENS[None])
    torch.testing.assert_close(logits, expected)
    require_same(recorder, cache, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_half_precision_is_lifted(case: Case, dtype: torch.dtype):
    model = case.model(dtype)
    recorder = tlc.TrajectoryRecorder(model)
    model.run_with_hooks(TOKENS[None], fwd_hooks=recorder.fwd_hooks)
    _, cache = model.run_with_cache(TOKENS[None])
    assert recorder.linearity().lss.dtype == recorder.growth().alpha.dtype == torch.float32
    require_same(recorder, cache, 1e-4)  # sums of float32 in another order; ED divides by a square of theirs


@pytest.mark.parametrize("case", FEW, ids=str)
def test_behind_hooks_of_the_users_it_sees_what_they_do(case: Case):
    """A mean ablation of TransformerLens's kind and steering, and our measures of the same run, in one call."""
    model = case.model()
    recorder = tlc.TrajectoryRecorder(model)

    def mean_ablate(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:, :, 1] = z[:, :, 1].mean(1, keepdim=True)
        return z

    mine = [
        ("blocks.1.attn.hook_z", mean_ablate),
        ("blocks.2.hook_resid_pre", lambda stream, hook: stream + 1.0),
    ]
    logits = model.run_with_hooks(TOKENS[None], fwd_hooks=[*mine, *recorder.fwd_hooks])
    torch.testing.assert_close(logits, model.run_with_hooks(TOKENS[None], fwd_hooks=mine))
    trace = tlc.trace(model, TOKENS, fwd_hooks=mine)
    torch.testing.assert_close(recorder.linearity().lss, tlc.linearity(trace).lss)
    for name in ("alpha", "attn_share", "mlp_share"):
        torch.testing.assert_close(getattr(recorder.growth(), name), getattr(tlc.growth(trace), name))


def test_each_run_starts_afresh():
    model = FEW[0].model()
    recorder = tlc.TrajectoryRecorder(model)
    with model.hooks(fwd_hooks=recorder.fwd_hooks):
        model(TOKENS.flip(0)[None])
        model(TOKENS[None, :5])
    assert repr(recorder).endswith("one run recorded)")
    require_same(recorder, tlc.trace(model, TOKENS[:5]).model.run_with_cache(TOKENS[None, :5])[1], 1e-12)


def test_reading_before_a_whole_run_is_an_error():
    model = FEW[0].model()
    recorder = tlc.TrajectoryRecorder(model)
    for read in (recorder.linearity, recorder.growth):
        with pytest.raises(MissingHookError, match="seen no run: give its fwd_hooks to model.run_with_hooks"):
            read()
    model.run_with_hooks(TOKENS[None], fwd_hooks=recorder.fwd_hooks)
    recorder.linearity()

    def break_off(activation: torch.Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    hooks = [*recorder.fwd_hooks, ("blocks.1.hook_attn_out", break_off)]
    with pytest.raises(KeyboardInterrupt):
        model.run_with_hooks(TOKENS[None], fwd_hooks=hooks)
    for read in (recorder.linearity, recorder.growth):
        with pytest.raises(MissingHookError, match="stopped in block 1"):
            read()


def test_a_batch_is_refused_when_it_is_read_and_breaks_off_no_run():
    model = FEW[0].model()
    recorder = tlc.TrajectoryRecorder(model)
    logits = model.run_with_hooks(TOKENS.repeat(2, 1), fwd_hooks=recorder.fwd_hooks)
    torch.testing.assert_close(logits, model(TOKENS.repeat(2, 1)))
    for read in (recorder.linearity, recorder.growth):
        with pytest.raises(ArgumentError, match="batch=2 .*batch of one"):
            read()
    model.run_with_hooks(TOKENS[None], fwd_hooks=recorder.fwd_hooks)
    assert recorder.linearity().lss.isfinite().all()


def test_activations_of_an_unknown_dtype_are_refused_when_they_are_read():
    recorder = tlc.TrajectoryRecorder(FEW[0].model())
    recorder.fwd_hooks[0][1](torch.zeros(1, 7, 4, dtype=torch.int32), None)
    with pytest.raises(UnsupportedModelError, match="torch.int32; allowed: float64, float32, float16, bfloat16"):
        recorder.growth()


@pytest.mark.parametrize(
    ("name", "edit", "error", "message"),
    [
        ("blocks.1.hook_resid_post", lambda x: 1.1 * x, ResidualIdentityError, "block 1: .*of its norm"),
        ("blocks.1.hook_resid_mid", lambda x: 1.1 * x, ResidualIdentityError, "block 1: .*hook_attn_out instead"),
        ("blocks.0.hook_mlp_out", lambda x: x / 0, NonFiniteActivationError, "enters block 1"),
    ],
)
def test_what_a_cache_would_refuse_is_refused_when_it_is_read(name: str, edit: Any, error: type, message: str):
    model = FEW[0].model()
    recorder = tlc.TrajectoryRecorder(model)
    hooks = [(name, lambda activation, hook: edit(activation)), *recorder.fwd_hooks]
    assert model.run_with_hooks(TOKENS[None], fwd_hooks=hooks).shape[1] == len(TOKENS)  # the run is the user's
    for read in (recorder.linearity, recorder.growth):
        with pytest.raises(error, match=message):
            read()


def test_a_step_of_length_zero_is_nan_and_named():
    model = FEW[0].model()
    recorder = tlc.TrajectoryRecorder(model)

    def still(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation[:, 4] = 0.0
        return activation

    mine = [("blocks.1.hook_mlp_out", still)]
    model.run_with_hooks(TOKENS[None], fwd_hooks=[*mine, *recorder.fwd_hooks])
    with pytest.warns(UserWarning, match="the sublayer step of layer 1 has no direction at position 4"):
        assert recorder.linearity().path("sublayer").isnan().nonzero().tolist() == [[4]]


def held(recorder: tlc.TrajectoryRecorder) -> int:
    """Numbers in the tensors that a recorder refers to, other than norms (one per layer and token)."""
    seen: dict[int, torch.Tensor] = {}
    pending: list[Any] = [vars(recorder)]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            seen[id(item)] = item
        elif isinstance(item, (dict, list, tuple)) or type(item).__module__.startswith("tlcoupling"):
            pending += gc.get_referents(item)
    return sum(tensor.numel() for tensor in seen.values() if tensor.ndim == 2)


def test_memory_does_not_grow_with_depth():
    sizes = []
    for depth in (2, 12):
        model = built_here({"n_layers": depth})
        recorder = tlc.TrajectoryRecorder(model)
        model.run_with_hooks(TOKENS[None], fwd_hooks=recorder.fwd_hooks)
        sizes.append(held(recorder))
    assert sizes[0] == sizes[1] > 0
