"""Whatever is in force around a call, its numbers are the same bit for bit, and what was in force comes back."""

from __future__ import annotations

import copy
import functools
import threading
import timeit
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import full_model_jacobian
from torch_settings import default_dtype, matmul_precision

import tlcoupling as tlc
from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.context import in_eval_mode, in_training_mode, measuring, require_own_state
from tlcoupling.precision import full_precision

# of each generation of TransformerLens that is installed: what is native to it, and a gated model with grouped queries
_NAMES = {"bridge-gpt2", "bridge-llama", "native-layernorm", "hooked-layernorm", "hooked-gated"}
MODELS = [case for case in CASES if case.name in _NAMES]
BRIDGE = pytest.mark.skipif(not any(case.name == "bridge-llama" for case in CASES), reason="needs a TransformerBridge")


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "default device": lambda: torch.device("meta"),  # as set_default_device: any draw without a device fails
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "products in bfloat16": lambda: matmul_precision("medium"),
}
OF_THE_PROCESS = {"default dtype float64", "default dtype bfloat16", "products in bfloat16"}


@contextmanager
def within(names: tuple[str, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(CONTEXTS[name]())
        before = state()
        yield
        assert state() == before


def state() -> tuple[Any, ...]:
    """All that is in force here."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.empty(0).device,
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )


def used(trace: tlc.Trace) -> dict[str, torch.Tensor]:
    """What is measured on a trace."""
    vector = torch.linspace(-1, 1, trace.d_model, dtype=trace.resid.dtype, device="cpu")
    closed = tlc.residual_jacobian(trace, 1)
    oracle = tlc.residual_jacobian(trace, 1, "attn", src=1, engine="autograd")
    coupling = tlc.depth_coupling(trace, 2)
    heads = tlc.head_steps(trace)
    return {
        "mid": trace.resid_mid,
        "J x": closed.mv(vector),
        "J^T y": closed.rmv(vector),
        "J": closed.dense(),
        "J x by autograd": oracle.mv(vector),
        "J^T y by autograd": oracle.rmv(vector),
        "singular values": tlc.truncated_svd(closed, 2, "krylov").s,
        "coupling": coupling.values,
        "error of the norm": coupling.frobenius,
        "profile": coupling.profile("excess"),
        "tokens": tlc.token_coupling(trace, 2, layers=[1]).values,
        "projected": tlc.projected_jacobians(trace, [0, 1], 2).values,
        "directions": tlc.read_directions(trace, 1, k=1, top=2).scores,
        "linearized": tlc.linearized(trace, vector, layer=1, tokens="all"),
        "gap": tlc.linearization_gap(trace, sizes=[0.1]).gap,
        "growth": tlc.growth(trace).expodistance,
        "linearity": tlc.linearity(trace).lss,
        "components": tlc.trajectory_components(trace).explained,
        "heads": heads.attn_share,
        "spectrum": tlc.singular_value_profile(coupling).fitted,
    }


def same(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    for name, tensor in truth.items():
        assert torch.equal(found[name].detach().nan_to_num(), tensor.detach().nan_to_num()), name


@functools.cache
def reference(case: Case, dtype: torch.dtype) -> tuple[tlc.Trace, dict[str, torch.Tensor]]:
    """A trace and its measurements with nothing in force."""
    trace = tlc.trace(case.model(dtype), TOKENS)
    return trace, used(trace)


def test_the_reference_is_what_autograd_says_of_the_whole_model():
    """To the tolerance of the engines in float64."""
    for case in MODELS:
        _, found = reference(case, torch.float64)
        truth = full_model_jacobian(case, 1, "block", len(TOKENS) - 1, len(TOKENS) - 1)
        assert (found["J"] - truth).norm() <= case.tolerance * truth.norm()


combinations = st.lists(st.sampled_from(sorted(CONTEXTS)), max_size=4, unique=True).map(tuple)


@pytest.mark.slow
@settings(max_examples=30, derandomize=True)
@given(st.sampled_from(MODELS), st.sampled_from([torch.float32, torch.float64]), combinations, combinations)
@pytest.mark.filterwarnings("ignore")
def test_contexts_in_any_combination_change_no_bit(
    case: Case, dtype: torch.dtype, taken: tuple[str, ...], later: tuple[str, ...]
):
    """A trace is taken in some and used in others."""
    trace, truth = reference(case, dtype)
    with within(taken):
        own = tlc.trace(case.model(dtype), TOKENS)
    with within(later):
        found = used(own)
    assert torch.equal(own.resid, trace.resid)
    same(found, truth)


@pytest.mark.slow
@settings(max_examples=5, derandomize=True)
@given(st.sampled_from(MODELS), st.lists(combinations, min_size=2, max_size=2))
@pytest.mark.filterwarnings("ignore")
def test_threads_with_contexts_of_their_own_change_no_bit(case: Case, chosen: list[tuple[str, ...]]):
    _, truth = reference(case, torch.float32)
    shared = tuple(name for name in chosen[0] if name in OF_THE_PROCESS)
    start = threading.Barrier(len(chosen))

    def measure(names: tuple[str, ...]) -> dict[str, torch.Tensor]:
        with ExitStack() as stack:
            for name in names:
                stack.enter_context(CONTEXTS[name]())
            start.wait()
            return used(tlc.trace(case.model(torch.float32), TOKENS))

    with within(shared), ThreadPoolExecutor(len(chosen)) as pool:
        own = [tuple(name for name in names if name not in OF_THE_PROCESS) for names in chosen]
        for found in pool.map(measure, own):
            same(found, truth)


def elsewhere() -> dict[str, torch.Tensor]:
    """What the entry points that start from a model give."""
    model = MODELS[0].model(torch.float32)
    effect = tlc.causal_effect(model, [TOKENS], 2, layers=[1], draws=1)
    many = tlc.analyze_many(model, [TOKENS, TOKENS[:4]], k=2)
    return {
        "analyze": tlc.analyze(model, TOKENS, k=2).attention,
        "many": many.coupling,
        "interval": many.interval("excess").estimate,
        "effect": effect.effect,
        "control": effect.control,
        "published": tlc.parity.published(model, TOKENS, k=2, final_norm_in_last_block=True).misalignment,
        "loss": tlc.coupling_loss(model, TOKENS, 2, layers=[0, 1]),
        "alignment": tlc.head_alignment(tlc.trace(model, TOKENS), 2, layers=[1]).writes,
        "baseline": tlc.trace(tlc.random_baseline(model), TOKENS).resid,
        "check": torch.tensor(tlc.check(model, TOKENS).passed, device="cpu"),
    }


@pytest.fixture(scope="module")
def given_elsewhere() -> dict[str, torch.Tensor]:
    return elsewhere()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(CONTEXTS))
def test_other_entry_points(name: str, given_elsewhere: dict[str, torch.Tensor]):
    with within((name,)):
        found = elsewhere()
    same(found, given_elsewhere)


def test_a_cache_of_inference_mode_is_used_outside():
    model = MODELS[0].model(torch.float32)
    trace, _ = reference(MODELS[0], torch.float32)
    recorder = tlc.TrajectoryRecorder(model)
    with torch.inference_mode():
        _, cache = model.run_with_cache(TOKENS[None])
        model.run_with_hooks(TOKENS[None], fwd_hooks=recorder.fwd_hooks)
        within_it = tlc.growth(cache).expodistance
    assert torch.equal(tlc.Trace.from_cache(model, cache, TOKENS).resid, trace.resid)
    truth = tlc.growth(trace).expodistance
    for found in (within_it, tlc.growth(cache).expodistance, recorder.growth().expodistance):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)  # the cache's own kernels, in float32


def test_tensors_of_inference_mode_may_be_arguments():
    model = MODELS[0].model(torch.float32)
    with torch.inference_mode():
        tokens, vector = TOKENS.clone(), torch.ones(32)[: model.cfg.d_model]
    trace = tlc.trace(model, tokens)
    for engine in ("auto", "autograd"):
        jacobian = tlc.residual_jacobian(trace, 1, engine=engine)
        assert torch.equal(jacobian.mv(vector), jacobian.mv(vector.clone()))
    assert torch.equal(tlc.coupling_loss(model, tokens, 2), tlc.coupling_loss(model, TOKENS, 2))


def test_a_hooks_tensor_of_inference_mode_is_told():
    model = MODELS[0].model(torch.float32)
    with torch.inference_mode():
        gain = torch.full((model.cfg.d_model,), 1.5)
    trace = tlc.trace(model, TOKENS, fwd_hooks=[("blocks.1.hook_mlp_out", lambda tensor, hook: tensor * gain)])
    with pytest.raises(UnsupportedModelError, match=r"made under torch.inference_mode\(\) takes part.*Clone it"):
        tlc.residual_jacobian(trace, 1)


def test_everything_comes_back_after_an_error():
    model = MODELS[0].model(torch.float32)

    def fail(tensor: torch.Tensor, hook: Any) -> None:
        assert state() == (False, False, False, torch.device("cpu"), torch.float32, "highest")
        raise KeyError("the user's own")

    names = ("default dtype float64", "products in bfloat16", "autocast", "default device", "inference_mode")
    with within(names), pytest.raises(KeyError, match="the user's own"):
        tlc.trace(model, TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", fail)])
    with ThreadPoolExecutor(1) as pool:  # the model's lock is free again
        pool.submit(tlc.trace, model, TOKENS).result(60)


def test_one_module_in_training_mode_is_refused():
    """Each module of the model and of the wrapped one by itself, whatever the flag of the whole says."""
    for case in MODELS:
        model = case.build(torch.float32).eval()
        truth = tlc.trace(model, TOKENS).resid
        parts = [model.blocks[1], model.blocks[0].attn]
        if hasattr(model, "original_model"):
            parts.append(model.original_model)
        for part in parts:
            part.train()
            with pytest.raises(UnsupportedModelError, match=r"is in training mode.*model.eval\(\)"):
                tlc.trace(model, TOKENS)
            part.eval()
        model.blocks[1].training = True
        with pytest.raises(UnsupportedModelError, match=r"^training mode: blocks.1 is in training mode"):
            tlc.trace(model, TOKENS)
        model.eval()
        assert torch.equal(tlc.trace(model, TOKENS).resid, truth)


class _PassesOn(torch.nn.Module):
    """Sets its flag on the module that it wraps, as the modules of a bridge do on transformer-lens 3.0 to 3.6."""

    def __init__(self) -> None:
        super().__init__()
        self.original_component = torch.nn.Linear(2, 2)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value) if name != "training" else self.original_component.train(value)


def test_eval_mode_reaches_modules_that_pass_the_flag_on():
    model = torch.nn.Sequential(_PassesOn())
    assert in_training_mode(model.eval())
    with pytest.raises(UnsupportedModelError, match=r"^training mode: 0 is .* transformer-lens 3\.0 to 3\.6"):
        require_own_state(model)
    require_own_state(in_eval_mode(model))


def test_dropout_of_one_block_has_no_coupling_loss():
    model = MODELS[0].build(torch.float32).eval()
    model.blocks[1].mlp.register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.5, module.training)
    )
    tlc.coupling_loss(model, TOKENS, 2)
    model.blocks[1].train()
    with pytest.raises(UnsupportedModelError, match="two runs give different streams"):
        tlc.coupling_loss(model, TOKENS, 2)


class _Looped(torch.nn.ModuleList):
    def __getitem__(self, index: Any) -> Any:
        return [*self, *self] if isinstance(index, slice) else super().__getitem__(index)


@BRIDGE
def test_a_looped_decoder_is_refused():
    """HuggingFace's models run ``layers[:n]``: here twice."""
    model = next(case for case in CASES if case.name == "bridge-llama").build(torch.float32).eval()
    model.blocks.__class__ = _Looped
    with pytest.raises(UnsupportedModelError, match="looped depth: .*calls block 0 as number 4"):
        tlc.trace(model, TOKENS)


def test_weights_of_inference_mode_are_refused_and_the_way_out_works():
    case = MODELS[0]
    with torch.inference_mode():
        model = case.build(torch.float32).eval()
    with pytest.raises(UnsupportedModelError, match=r"was made under torch.inference_mode\(\).*copy.deepcopy\(model\)"):
        tlc.trace(model, TOKENS)
    trace, truth = reference(case, torch.float32)
    own = tlc.trace(copy.deepcopy(model), TOKENS)
    assert torch.equal(own.resid, trace.resid)
    same({"J": tlc.residual_jacobian(own, 1).dense()}, {"J": truth["J"]})


@pytest.mark.slow
def test_two_threads_trace_one_model():
    """A hundred traces each, of different prompts: all hold their own stream."""
    model = MODELS[0].model(torch.float32)
    prompts = [TOKENS, TOKENS.flip(0)]
    truths = [tlc.trace(model, prompt).resid for prompt in prompts]

    def right(index: int) -> int:
        return sum(torch.equal(tlc.trace(model, prompts[index]).resid, truths[index]) for _ in range(100))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(right, range(2))) == [100, 100]


def test_threads_wait_for_their_own_model_alone():
    first, second = MODELS[0].model(torch.float32), MODELS[-1].model(torch.float64)
    with ThreadPoolExecutor(2) as pool:
        with measuring(first):
            tlc.trace(first, TOKENS)  # the same thread enters again
            pool.submit(tlc.trace, second, TOKENS).result(60)
            waits = pool.submit(tlc.trace, first, TOKENS)
            with pytest.raises(TimeoutError):
                waits.result(0.2)
        waits.result(60)


@BRIDGE
def test_bridges_around_one_huggingface_model_share_its_lock():
    from types import SimpleNamespace

    model = next(case for case in CASES if case.name == "bridge-llama").model(torch.float32)
    other = torch.nn.Module()
    other.original_model = model.original_model
    with ThreadPoolExecutor(1) as pool, measuring(SimpleNamespace(model=other)):
        waits = pool.submit(tlc.trace, model, TOKENS)
        with pytest.raises(TimeoutError):
            waits.result(0.2)


def test_settings_of_the_process_outlast_threads_that_leave_in_another_order():
    """The first to enter leaves first: the second still has full precision, and the caller's setting comes back."""
    entered, left = threading.Event(), threading.Event()

    def second() -> tuple[Any, ...]:
        with full_precision():
            entered.set()
            left.wait(60)
            return torch.get_float32_matmul_precision(), torch.get_default_dtype()

    with within(("products in bfloat16", "default dtype float64")), ThreadPoolExecutor(1) as pool:
        with full_precision():
            inside = pool.submit(second)
            entered.wait(60)
        assert torch.get_float32_matmul_precision() == "highest"
        left.set()
        assert inside.result(60) == ("highest", torch.float32)
        assert (torch.get_float32_matmul_precision(), torch.get_default_dtype()) == ("medium", torch.float64)


def test_a_setting_that_is_made_within_is_kept():
    with matmul_precision("high"):
        with full_precision():
            torch.set_float32_matmul_precision("medium")
        assert torch.get_float32_matmul_precision() == "medium"


def test_entering_costs_next_to_nothing():
    """A block of a small model takes a millisecond; bounds are ten times what one thread takes."""
    model = MODELS[0].model(torch.float32)

    def enter() -> None:
        with measuring(model):
            pass

    first = min(timeit.repeat(enter, number=200, repeat=5)) / 200
    with measuring(model):
        again = min(timeit.repeat(enter, number=200, repeat=5)) / 200
    assert first < 500e-6 and again < 200e-6
