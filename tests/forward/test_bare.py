"""A bare HuggingFace model: what takes it measures what the model computes, and the rest says what to pass instead."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from cases import TOKENS, randomise, relative_error, tiny_tokenizer

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, StaleTraceError, UnsupportedModelError
from tlcoupling.models.load import _transformer_bridge

if _transformer_bridge() is None:
    pytest.skip("a HuggingFace model is seen through a bridge", allow_module_level=True)


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return randomise(transformers.LlamaForCausalLM(config)).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def test_the_stream_is_the_models_own_and_the_model_is_left_as_it_was(model: Any):
    modules = list(model.named_modules())
    trace = tlc.trace(model, TOKENS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        hidden = model(TOKENS[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(trace.resid[:-1], torch.cat(hidden[:-1]), rtol=1e-5, atol=1e-5)
    assert list(model.named_modules()) == modules
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


TAKES: dict[str, Callable[[Any], torch.Tensor]] = {
    "analyze": lambda model: tlc.analyze(model, TOKENS, k=3).coupling.values,
    "analyze_many": lambda model: tlc.analyze_many(model, [TOKENS], k=3).coupling,
    "causal_effect": lambda model: tlc.causal_effect(model, [TOKENS], 2, layers=[1], draws=1).effect,
    "check": lambda model: torch.tensor([one.outcome == "holds" for one in tlc.check(model, TOKENS).findings]),
    "estimate": lambda model: torch.tensor(tlc.estimate(model, TOKENS, 3).flops),
}


@pytest.mark.parametrize("name", TAKES)
def test_the_same_comes_of_it_as_of_its_bridge(name: str, model: Any):
    torch.testing.assert_close(TAKES[name](model), TAKES[name](tlc.trace(model, TOKENS).model))


@pytest.mark.parametrize("takes_no_bare_model", [tlc.random_baseline, tlc.TrajectoryRecorder])
def test_the_others_take_the_bridge_of_a_trace(takes_no_bare_model: Callable[[Any], Any], model: Any):
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM is neither .*trace.model is a bridge around it"):
        takes_no_bare_model(model)
    takes_no_bare_model(tlc.trace(model, TOKENS, tokenizer=tiny_tokenizer()).model)


def test_text_needs_the_models_tokenizer(model: Any):
    with pytest.raises(ArgumentError, match="no tokenizer"):
        tlc.trace(model, "w5 w6")
    trace = tlc.trace(model, "w5 w6", tokenizer=tiny_tokenizer(), prepend_bos=False)
    assert trace.str_tokens == ("w5", "w6")
    with pytest.raises(ArgumentError, match="tokenizer=.*this model has its own"):
        tlc.trace(trace.model, "w5 w6", tokenizer=tiny_tokenizer())


def test_a_step_of_training_shows_in_an_earlier_trace():
    model = llama()
    trace = tlc.trace(model, TOKENS)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    with pytest.raises(StaleTraceError, match="layer 1"):
        tlc.residual_jacobian(trace, 1)
    assert (tlc.trace(model, TOKENS).resid[2] - trace.resid[2]).norm() > 1e-3


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["o_proj", "down_proj", "gate_proj"]])
def test_a_lora_model_goes_straight_in_and_is_the_merged_one(targets: list[str]):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    lora = peft.get_peft_model(llama(), config).eval()
    trace = tlc.trace(lora, TOKENS)
    merged = tlc.trace(copy.deepcopy(lora).merge_and_unload().eval(), TOKENS)
    assert relative_error(trace.resid, merged.resid) < 1e-5  # float32, the products in another order
    assert relative_error(trace.resid[-1], tlc.trace(llama(), TOKENS).resid[-1]) > 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # adapters go to autograd
        for sublayer in trace.sublayers:
            ours, theirs = (tlc.residual_jacobian(one, 1, sublayer, 2, 4).dense() for one in (trace, merged))
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5), sublayer
            ours, theirs = (tlc.residual_jacobian(one, 1, sublayer).dense() for one in (trace, merged))
            assert relative_error(ours, theirs) < 1e-4, sublayer
        coupling, exact = (tlc.depth_coupling(one, 3).values for one in (trace, merged))
    assert (coupling - exact).abs().max() < 1e-3
    assert any("lora" in name for name, _ in lora.named_parameters())  # left as it was
