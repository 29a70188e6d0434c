"""The same weights as every kind of model that TransformerLens makes of them, processed or not.

Folding the norms leaves every residual Jacobian as it was. Centring the weights that write to the stream (done where
the norms are LayerNorms) projects what a block writes: J becomes C J with C = I - 1 1^T / d.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from cases import (
    CONTEXT,
    D_HEAD,
    D_MLP,
    D_MODEL,
    N_HEADS,
    N_LAYERS,
    TOKENS,
    VOCABULARY,
    randomise,
    relative_error,
    tiny_tokenizer,
)

import tlcoupling as tlc
from tlcoupling.models.load import _hooked_transformer, _transformer_bridge
from tlcoupling.models.smollm2 import hooked_config

FAMILIES = ("gpt2", "llama")
HOOKED = ("hooked", "hooked-processed", "hooked-processed-in-place") * (_hooked_transformer() is not None)
BRIDGES = ("bridge", "bridge-compatible") * (_transformer_bridge() is not None)
KINDS = HOOKED + BRIDGES
PAIRS = [(6, 6), (2, 5)]

each_family = pytest.mark.parametrize("family", FAMILIES)
each_kind = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def huggingface(family: str) -> Any:
    """The weights, in float64: LayerNorm and biases (GPT-2), or RMSNorm, rotary, grouped queries (Llama)."""
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            n_embd=D_MODEL,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            n_inner=D_MLP,
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            bos_token_id=0,
            eos_token_id=0,
        )
        config.architectures = ["GPT2LMHeadModel"]
    else:
        config = transformers.LlamaConfig(
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            num_key_value_heads=2,
            intermediate_size=D_MLP,
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
        )
        config.architectures = ["LlamaForCausalLM"]
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return randomise(model).double().eval()


def as_bridge(family: str, compatible: bool) -> Any:
    hf_model, name = copy.deepcopy(huggingface(family)), {"gpt2": "gpt2", "llama": "meta-llama/Llama-3.2-1B"}[family]
    boot = _transformer_bridge().boot_transformers
    model = boot(name, hf_model=hf_model, tokenizer=tiny_tokenizer(), dtype=torch.float64)
    if compatible:
        model.enable_compatibility_mode(disable_warnings=True)
    return model


def as_hooked(family: str, processing: str | None) -> Any:
    """Processed while the weights are loaded, as ``from_pretrained`` does it, or in place afterwards, or not at all."""
    import transformer_lens
    from transformer_lens.pretrained import weight_conversions

    hf_model = huggingface(family)
    if family == "gpt2":
        cfg = transformer_lens.HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=D_MODEL,
            n_ctx=CONTEXT,
            d_head=D_HEAD,
            n_heads=N_HEADS,
            d_mlp=D_MLP,
            d_vocab=VOCABULARY,
            act_fn="gelu_new",
            normalization_type="LN",
            original_architecture="GPT2LMHeadModel",
            device="cpu",
            dtype=torch.float64,
        )
        weights = weight_conversions.convert_gpt2_weights(hf_model, cfg)
    else:
        cfg = hooked_config(hf_model.config, n_ctx=CONTEXT, device="cpu", dtype=torch.float64)
        weights = weight_conversions.convert_llama_weights(hf_model, cfg)
    fold = processing == "loading"
    if fold:
        cfg.normalization_type += "Pre"
    model = _hooked_transformer()(cfg)
    weights = {name: weight.detach().clone() for name, weight in weights.items()}
    model.load_and_process_state_dict(
        weights, fold_ln=fold, center_writing_weights=fold, center_unembed=fold, fold_value_biases=fold
    )
    if processing == "in place":
        model.process_weights_()
        model.setup()  # transformer-lens 2 has put new norms in, which its hook_dict does not know yet
    return model


BUILD: dict[str, Callable[[str], Any]] = {
    "hooked": lambda family: as_hooked(family, None),
    "hooked-processed": lambda family: as_hooked(family, "loading"),
    "hooked-processed-in-place": lambda family: as_hooked(family, "in place"),
    "bridge": lambda family: as_bridge(family, False),
    "bridge-compatible": lambda family: as_bridge(family, True),
}


@functools.cache
def traced(family: str, kind: str) -> tlc.Trace:
    return tlc.trace(BUILD[kind](family).eval(), TOKENS)


def tolerance(family: str, kind: str) -> float:
    """Relative error allowed between the engines in float64; HuggingFace's Llama casts to float32 inside."""
    return 1e-5 if family == "llama" and kind in BRIDGES else 1e-9


def tolerance_of_processing(family: str, kind: str) -> float:
    """Relative error allowed to another model; from transformer-lens 3 on, processing rounds weights to float32."""
    return 1e-5 if kind not in ("hooked", "bridge") else tolerance(family, kind)


def jacobian(trace: tlc.Trace, layer: int, sublayer: str, src: int, dest: int, engine: str) -> torch.Tensor:
    return tlc.residual_jacobian(trace, layer, sublayer, src, dest, engine=engine).dense()


@each_family
@each_kind
def test_the_engines_agree_however_the_weights_are_processed(family: str, kind: str):
    trace = traced(family, kind)
    for src, dest in PAIRS:
        for layer in range(N_LAYERS):
            for sublayer in ("block", "attn", "mlp"):
                closed = jacobian(trace, layer, sublayer, src, dest, "analytic")
                truth = jacobian(trace, layer, sublayer, src, dest, "autograd")
                assert relative_error(closed, truth) < tolerance(family, kind), (layer, sublayer, src, dest)


@each_family
@each_kind
def test_the_provenance_tells_how_the_weights_were_processed(family: str, kind: str):
    processed = kind not in ("hooked", "bridge")
    found = tlc.depth_coupling(traced(family, kind), 4).provenance.weight_processing
    assert found["layer_norm_folded"] == processed
    assert found["writes_centered"] == (processed and family == "gpt2")
    assert found["dtype"] == "float64"


@each_family
@each_kind
def test_processing_leaves_the_jacobian_as_it_was_or_centres_what_is_written(family: str, kind: str):
    plain, trace = traced(family, KINDS[0] if kind in HOOKED else BRIDGES[0]), traced(family, kind)
    centring = torch.eye(D_MODEL, dtype=torch.float64)
    if trace.weight_processing["writes_centered"]:
        centring = centring - 1 / D_MODEL
    for src, dest in PAIRS:
        for sublayer in ("block", "attn", "mlp"):
            found = jacobian(trace, 1, sublayer, src, dest, "autograd")
            truth = jacobian(plain, 1, sublayer, src, dest, "autograd")
            assert relative_error(found, centring @ truth) < tolerance_of_processing(family, kind), (
                sublayer,
                src,
                dest,
            )


@pytest.mark.skipif(not (HOOKED and BRIDGES), reason="this transformer-lens has only one of the two classes")
@each_family
def test_the_two_classes_give_the_same_jacobians(family: str):
    """Unprocessed against unprocessed, and processed against processed."""
    for hooked, bridge in (("hooked", "bridge"), ("hooked-processed", "bridge-compatible")):
        allowed = tolerance_of_processing(family, bridge)
        for src, dest in PAIRS:
            for sublayer in ("block", "attn", "mlp"):
                found = jacobian(traced(family, hooked), 1, sublayer, src, dest, "auto")
                other = jacobian(traced(family, bridge), 1, sublayer, src, dest, "auto")
                assert relative_error(found, other) < allowed, (hooked, bridge, sublayer, src, dest)


def test_fresh_weights_are_not_taken_for_folded_ones():
    """Gains of one do not make a folded norm: the model has to say that it was processed."""
    if not BRIDGES:
        pytest.skip("transformer-lens below 3 has no TransformerBridge")
    fresh = transformers.AutoModelForCausalLM.from_config(huggingface("gpt2").config, attn_implementation="eager")
    model = _transformer_bridge().boot_transformers("gpt2", hf_model=fresh.eval(), tokenizer=tiny_tokenizer())
    assert not tlc.trace(model.eval(), TOKENS).weight_processing["layer_norm_folded"]
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    assert not tlc.trace(model, TOKENS).weight_processing["layer_norm_folded"]


@each_family
def test_all_of_them_are_the_same_language_model(family: str):
    with torch.no_grad():
        truth = huggingface(family)(TOKENS[None]).logits.log_softmax(-1)
        for kind in KINDS:
            found = traced(family, kind).model(TOKENS[None]).log_softmax(-1)
            # float32 rounding, of the weights or inside HuggingFace's modules
            torch.testing.assert_close(found, truth, rtol=0, atol=1e-4, msg=kind)
