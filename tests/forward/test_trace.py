"""Traces: what a forward pass leaves behind, and every input that is refused."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from cases import CASES, OF_EACH_CLASS, TOKENS, Case

import tlcoupling as tlc
from tlcoupling.errors import (
    ArgumentError,
    MissingHookError,
    NonFiniteActivationError,
    ResidualIdentityError,
    StaleTraceError,
    UnsupportedModelError,
)
from tlcoupling.forward.stream import relative_gap

each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def model() -> torch.nn.Module:
    return CASES[0].model()


@each_case
def test_a_trace_holds_the_stream_of_run_with_cache(case: Case):
    model = case.model()
    trace = tlc.trace(model, TOKENS)
    _, cache = model.run_with_cache(TOKENS[None])
    for layer in range(3):
        torch.testing.assert_close(trace.resid[layer], cache[f"blocks.{layer}.hook_resid_pre"][0])
        torch.testing.assert_close(trace.attn_out[layer], cache[f"blocks.{layer}.hook_attn_out"][0])
        if trace.mlp_out is not None:
            torch.testing.assert_close(trace.mlp_out[layer], cache[f"blocks.{layer}.hook_mlp_out"][0])
        if trace.topology == "sequential":
            torch.testing.assert_close(trace.resid_mid[layer], cache[f"blocks.{layer}.hook_resid_mid"][0])
    # before the final norm
    torch.testing.assert_close(trace.resid[3], cache["blocks.2.hook_resid_post"][0])
    assert trace.topology == case.topology


def test_prompts_may_be_text_ids_or_a_batch_of_one():
    if not CASES[0].name.startswith("bridge"):
        pytest.skip("the small HookedTransformers have no tokenizer")
    model = CASES[0].model()
    model.cfg.default_prepend_bos = False
    text = tlc.trace(model, "w7 w23 w3")
    assert text.tokens.tolist() == [7, 23, 3]
    assert text.str_tokens == ("w7", "w23", "w3")
    for prompt in ([7, 23, 3], torch.tensor([7, 23, 3]), torch.tensor([[7, 23, 3]])):
        assert torch.equal(tlc.trace(model, prompt).resid, text.resid)


@pytest.mark.parametrize("length", [1, 2])
@each_case
def test_short_prompts_work(case: Case, length: int):
    trace = tlc.trace(case.model(), TOKENS[:length])
    found = tlc.residual_jacobian(trace, 1, "block").dense()
    truth = tlc.residual_jacobian(trace, 1, "block", engine="autograd").dense()
    assert (found - truth).norm() <= case.tolerance * truth.norm()


def test_a_cache_becomes_a_trace(model: torch.nn.Module):
    _, cache = model.run_with_cache(TOKENS[None])
    trace = tlc.Trace.from_cache(model, cache, TOKENS)
    torch.testing.assert_close(trace.resid, tlc.trace(model, TOKENS).resid)
    assert tlc.depth_coupling(trace, 4).values.isfinite().all()


def test_a_cache_of_other_tokens_is_refused(model: torch.nn.Module):
    _, cache = model.run_with_cache(TOKENS[None])
    with pytest.raises(StaleTraceError, match="other weights, other tokens"):
        tlc.Trace.from_cache(model, cache, TOKENS.flip(0))
    with pytest.raises(ArgumentError, match=r"tokens='6 tokens' .*the 7 tokens of the cache"):
        tlc.Trace.from_cache(model, cache, TOKENS[:6])


def massive_first(size: float) -> list:
    """Hooks that lengthen the first token's stream, as trained models do."""

    def lengthen(x: torch.Tensor, hook: object) -> torch.Tensor:
        x = x.clone()
        x[:, 0] *= size
        return x

    return [("blocks.0.hook_resid_pre", lengthen)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", OF_EACH_CLASS, ids=str)
def test_a_cache_is_held_against_the_model_at_each_position(case: Case, dtype: torch.dtype):
    """The first token's norm, thousands of times the others', hides no other last token."""
    model, hooks = case.model(dtype), massive_first(5000.0)
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(TOKENS[None])
        _, other = model.run_with_cache(torch.cat([TOKENS[:-1], TOKENS[:1]])[None])
    streams = [
        torch.stack([each[f"blocks.{layer}.hook_resid_pre"][0].float() for layer in range(3)])
        for each in (cache, other)
    ]
    # all that one norm over all positions sees: within half precision's tolerance
    assert (streams[0] - streams[1]).norm() < 2e-2 * streams[0].norm()
    trace = tlc.Trace.from_cache(model, cache, TOKENS, fwd_hooks=hooks)
    assert trace.resid.dtype == torch.float32
    with pytest.raises(StaleTraceError, match="position 6: .* off"):
        tlc.Trace.from_cache(model, other, TOKENS, fwd_hooks=hooks)


@pytest.mark.parametrize("case", OF_EACH_CLASS, ids=str)
def test_a_block_of_which_a_part_has_been_converted_is_refused(case: Case):
    """What has to be lifted is known from before; the block's first parameter is that of another part."""
    model = case.build(torch.float32).eval()
    trace = tlc.trace(model, TOKENS)
    tlc.residual_jacobian(trace, 1)
    model.blocks[1].mlp.bfloat16()
    with pytest.raises(StaleTraceError, match="mlp of layer 1"):
        tlc.residual_jacobian(trace, 1)


@pytest.mark.parametrize("case", OF_EACH_CLASS, ids=str)
def test_a_model_that_has_changed_at_one_short_position_is_refused(case: Case):
    model = case.model(torch.float32)
    trace = tlc.trace(model, TOKENS, fwd_hooks=massive_first(1e4))

    def nudge(x: torch.Tensor, hook: object) -> torch.Tensor:
        x = x.clone()
        x[:, 5] *= 1.01
        return x

    change = 0.01 * trace.resid[2, 5].norm()
    assert change < 1e-4 * trace.resid[2].norm()  # within the tolerance of one norm over all positions
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", nudge)]),
        pytest.raises(StaleTraceError, match="block of layer 1 .*off at position 5"),
    ):
        tlc.residual_jacobian(trace, 1, "block")


@pytest.mark.parametrize("name", ["blocks.1.hook_attn_out", "blocks.2.hook_resid_post", "blocks.0.hook_resid_pre"])
def test_a_cache_that_lacks_a_hook_names_it(model: torch.nn.Module, name: str):
    _, cache = model.run_with_cache(TOKENS[None])
    activations = {key: value for key, value in cache.items() if key != name}
    with pytest.raises(MissingHookError, match=rf"lacks '{name}'.*run_with_cache.*names_filter"):
        tlc.linearity(activations)
    with pytest.raises(MissingHookError, match=name):
        tlc.Trace.from_cache(model, activations, TOKENS)
    with pytest.raises(MissingHookError, match="no hook point of any block"):
        tlc.growth({"hook_embed": torch.zeros(1, 2, 3)})


def test_the_advice_on_what_to_cache_is_enough(model: torch.nn.Module):
    """A plain dictionary of the hook points that the error names gives the numbers of the whole cache."""
    _, cache = model.run_with_cache(TOKENS[None])
    with pytest.raises(MissingHookError) as raised:
        tlc.linearity({"blocks.0.hook_resid_pre": cache["blocks.0.hook_resid_pre"]})
    advised = set(re.findall(r"hook_\w+", str(raised.value).partition("a measurement needs")[2]))
    activations = {name: value for name, value in cache.items() if name.rpartition(".")[2] in advised}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tlc.linearity(activations).paths == tlc.linearity(cache).paths
        assert tlc.growth(activations).attn_share is not None
        tlc.linearity(cache)  # a cache that knows its model


def test_a_topology_that_is_a_guess_is_said_to_be(model: torch.nn.Module):
    _, cache = model.run_with_cache(TOKENS[None])
    activations = {name: value for name, value in cache.items() if not name.endswith("hook_resid_mid")}
    for measure in (tlc.linearity, tlc.growth, tlc.trajectory_components):
        with pytest.warns(UserWarning, match="taken as parallel: .*cache hook_resid_mid too"):
            measure(activations)


@pytest.mark.parametrize("name", ["hook_attn_out", "hook_resid_mid"])
def test_writes_that_are_not_finite_name_their_block(model: torch.nn.Module, name: str):
    _, cache = model.run_with_cache(TOKENS[None])
    activations = {each: value.clone() for each, value in cache.items()}
    activations[f"blocks.1.{name}"][0, 3] = float("nan")
    with pytest.raises(ResidualIdentityError, match="block 1: .* by nan of its norm"):
        tlc.linearity(activations)


def test_a_batch_is_refused(model: torch.nn.Module):
    with pytest.raises(ArgumentError, match=r"shape \(2, 7\).*one prompt"):
        tlc.trace(model, TOKENS.repeat(2, 1))
    _, cache = model.run_with_cache(TOKENS.repeat(2, 1))
    with pytest.raises(ArgumentError, match="batch=2 .*batch of one"):
        tlc.growth(cache)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "string or integer token ids|empty"),
        (torch.zeros(1, 0, dtype=torch.long), "empty"),
        ([50], "from 0 to 49"),
        ([-1], "from 0 to 49"),
        ([0.5], "integer token ids"),
        (list(range(33)), "at most 32, the model's context length"),
        (object(), "a string or token ids"),
    ],
)
def test_bad_prompts(model: torch.nn.Module, prompt: object, message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.trace(model, prompt)


def test_a_prompt_may_fill_the_context(model: torch.nn.Module):
    assert tlc.trace(model, list(range(model.cfg.n_ctx))).n_tokens == model.cfg.n_ctx == 32


def test_training_mode_is_refused_and_not_switched_off(model: torch.nn.Module):
    model.train()
    try:
        with pytest.raises(UnsupportedModelError, match=r"training mode.*model.eval\(\)"):
            tlc.trace(model, TOKENS)
        assert model.training
    finally:
        model.eval()


def test_what_is_no_hooked_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="not a hooked model: Linear"):
        tlc.trace(torch.nn.Linear(2, 2), TOKENS)


def test_quantised_weights_are_refused(model: torch.nn.Module):
    block = torch.nn.Module()
    block.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    fake = torch.nn.Module()
    fake.cfg, fake.blocks, fake.run_with_cache = model.cfg, torch.nn.ModuleList([block]), None
    fake.hook_dict = {"blocks.0.hook_attn_out": None}
    with pytest.raises(UnsupportedModelError, match=r"blocks.0.weight is quantised \(torch.uint8, in a format"):
        tlc.trace(fake, TOKENS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_first_layer(model: torch.nn.Module, value: float):
    def poison(tensor: torch.Tensor, hook: object) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[0, 3] = value
        return tensor

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", poison)]),
        pytest.raises(NonFiniteActivationError, match=r"enters block 2 .*first at position 3"),
    ):
        tlc.trace(model, TOKENS)


def test_writes_that_do_not_add_up_are_refused(model: torch.nn.Module):
    """What edits the stream behind the writes or between them makes a split by sublayer wrong."""
    _, cache = model.run_with_cache(TOKENS[None])
    activations = {name: value.clone() for name, value in cache.items()}
    activations["blocks.1.hook_attn_out"] *= 1.01
    with pytest.raises(ResidualIdentityError, match=r"block 1: .*hook_resid_post by .*e-0\d of its norm"):
        tlc.growth(activations)
    scale = [("blocks.1.hook_resid_post", lambda tensor, hook: tensor * 1.01)]
    with model.hooks(fwd_hooks=scale):
        _, hooked = model.run_with_cache(TOKENS[None])
    with pytest.raises(ResidualIdentityError, match="block 1: .*a trace with fwd_hooks= tells their share apart"):
        tlc.growth(hooked)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=str)
def test_writes_may_miss_the_stream_by_its_rounding(dtype: torch.dtype, allowed: float):
    _, cache = CASES[0].model(dtype).run_with_cache(TOKENS[None])
    for share in (0.5, 2.0):
        activations = {name: value.clone() for name, value in cache.items()}
        activations["blocks.1.hook_mlp_out"] += share * allowed * activations["blocks.1.hook_resid_post"]
        if share < 1:
            assert tlc.growth(activations).alpha.isfinite().all()
        else:
            with pytest.raises(ResidualIdentityError, match=rf"block 1: .* by 2.00e-\d+ .*allowed: {allowed:.0e}"):
                tlc.growth(activations)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 3}, "layer=3 .*from -3 to 2"),
        ({"layer": 1.0}, "layer=1.0"),
        ({"layer": 0, "src": 7}, "src=7 .*from -7 to 6"),
        ({"layer": 0, "dest": -8}, "dest=-8"),
        ({"layer": 0, "src": 5, "dest": 2}, "src=5 .*not after dest=2"),
        ({"layer": 0, "sublayer": "mlps"}, "^sublayer='mlps'"),
        ({"layer": 0, "sublayer": "block", "head": 0}, "head=0 .*an attention"),
        ({"layer": 0, "sublayer": "attn", "head": 4}, "head=4 .*from -4 to 3"),
    ],
)
def test_bad_indices(model: torch.nn.Module, arguments: dict, message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.residual_jacobian(tlc.trace(model, TOKENS), **arguments)


def test_a_cache_of_some_layers_is_refused(model: torch.nn.Module):
    _, cache = model.run_with_cache(TOKENS[None], stop_at_layer=2)
    for measure in (tlc.growth, tlc.linearity):
        with pytest.raises(MissingHookError, match="ends with block 1, and its model has 3 blocks"):
            measure(cache)


def test_a_short_row_counts_as_long_as_the_shortest_that_is_allowed():
    """Its rounding belongs to the terms that nearly cancel in it."""
    truth = torch.tensor([[3.0, 4.0], [3e-6, 4e-6], [0.0, 0.0]], dtype=torch.float64)
    gaps = relative_gap(truth + torch.tensor([1e-3, 0.0]), truth, shortest=0.5)
    torch.testing.assert_close(gaps, torch.tensor([2e-4, 2e-3, 2e-3], dtype=torch.float64))


@each_case
def test_no_pattern_stays_in_the_model(case: Case):
    """Some attention modules keep it as an attribute: of a long prompt, those of all layers would be gigabytes."""
    model = case.model()
    trace = tlc.trace(model, TOKENS)
    trace.run_block(1, trace.block_input(1), {})
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    # [batch, head, dest, src]; ALiBi's slopes have no batch axis
    assert not any(value.ndim == 4 and value.shape[-2:] == (len(TOKENS), len(TOKENS)) for value in kept)
