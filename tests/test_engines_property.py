"""The engines agree on whatever configuration is drawn: from the forward pass to both engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from cases import CASES, TOKENS, built_here, huggingface, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc

HOOKED = any(case.name.startswith("hooked") for case in CASES)
BRIDGED = any(case.name == "bridge-deepseek-v3" for case in CASES)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a small ``HookedTransformer``, or of a native ``TransformerBridge`` where there is none."""
    n_heads = draw(st.sampled_from([1, 2, 4]))
    positions = draw(st.sampled_from(["standard", "rotary", "alibi"] if HOOKED else ["standard", "rotary"]))
    drawn: dict[str, Any] = dict(
        n_layers=1,
        n_heads=n_heads,
        d_head=4,
        d_model=draw(st.sampled_from([8, 15])),
        d_mlp=draw(st.integers(3, 20)),
        normalization_type=draw(st.sampled_from(["LN", "LNPre", "RMS", "RMSPre", *([None] if HOOKED else [])])),
        n_key_value_heads=draw(st.sampled_from([heads for heads in (1, 2, 4) if n_heads % heads == 0])),
        gated_mlp=draw(st.booleans()),
        act_fn=draw(st.sampled_from(["gelu", "relu", "silu"])),
        positional_embedding_type=positions,
        attn_scores_soft_cap=draw(st.sampled_from([-1.0, 1.5])) if positions != "alibi" else -1.0,
    )
    if positions == "rotary":
        drawn["rotary_dim"] = draw(st.sampled_from([2, 4]))
    if HOOKED:
        drawn["parallel_attn_mlp"] = draw(st.booleans())
        drawn["use_qk_norm"] = draw(st.booleans())
        drawn["use_attn_scale"] = draw(st.booleans())
        if drawn["normalization_type"] is not None and not drawn["parallel_attn_mlp"]:
            drawn["use_normalization_before_and_after"] = draw(st.booleans())
    return drawn


@given(drawn=configurations(), dest=st.integers(0, 5), back=st.integers(0, 2))
@settings(max_examples=15, derandomize=True)
def test_the_engines_agree_on_any_configuration(drawn: dict[str, Any], dest: int, back: int):
    trace = tlc.trace(built_here(drawn), TOKENS[:6])
    src = max(dest - back, 0)
    for sublayer in trace.sublayers:
        if sublayer == "mlp" and src != dest:
            continue
        closed = tlc.residual_jacobian(trace, 0, sublayer, src, dest, engine="analytic").dense()
        truth = tlc.residual_jacobian(trace, 0, sublayer, src, dest, engine="autograd").dense()
        # TransformerLens's native RMSNorm casts to float32
        assert relative_error(closed, truth) < (1e-9 if HOOKED else 1e-5), sublayer


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[str, Any]:
    """Architecture and configuration of a small mixture, with an attention sink, latent attention or neither."""
    n_experts, n_heads = draw(st.sampled_from([3, 4, 6])), draw(st.sampled_from([1, 2]))
    sizes: dict[str, Any] = dict(
        hidden_size=draw(st.sampled_from([8, 12])),
        num_hidden_layers=1,
        num_attention_heads=n_heads,
        vocab_size=50,
        max_position_embeddings=16,
        num_experts_per_tok=draw(st.integers(1, n_experts)),
        experts_implementation="eager",
        pad_token_id=None,
        eos_token_id=1,
    )
    width = draw(st.integers(3, 9))
    attention = draw(st.sampled_from(["latent", "sink", "usual"]))
    if attention == "latent":
        compressed = draw(st.booleans())
        return "DeepseekV3ForCausalLM", hf.DeepseekV3Config(
            **{**sizes, "num_experts_per_tok": min(2, n_experts)},
            intermediate_size=width,
            moe_intermediate_size=width,
            n_routed_experts=4,
            n_group=draw(st.sampled_from([1, 2])),
            topk_group=1,
            first_k_dense_replace=0,
            n_shared_experts=draw(st.integers(1, 2)),
            norm_topk_prob=draw(st.booleans()),
            q_lora_rank=5 if compressed else None,
            kv_lora_rank=draw(st.integers(3, 6)),
            qk_nope_head_dim=draw(st.integers(1, 4)),
            qk_rope_head_dim=draw(st.sampled_from([2, 4])),
            v_head_dim=draw(st.integers(2, 5)),
        )
    usual = dict(num_key_value_heads=1, head_dim=4)
    if attention == "sink":
        return "GptOssForCausalLM", hf.GptOssConfig(
            **sizes,
            **usual,
            intermediate_size=width,
            num_local_experts=n_experts,
            sliding_window=draw(st.integers(2, 9)),
        )
    return "Qwen2MoeForCausalLM", hf.Qwen2MoeConfig(
        **sizes,
        **usual,
        num_experts=n_experts,
        intermediate_size=width,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=draw(st.integers(3, 9)),
        norm_topk_prob=draw(st.booleans()),
    )


@pytest.mark.skipif(not BRIDGED, reason="no mixtures on this TransformerLens")
@given(drawn=mixtures(), dest=st.integers(0, 5), back=st.integers(0, 2))
@settings(max_examples=15, derandomize=True)
def test_the_engines_agree_on_any_mixture_sink_and_latent_attention(drawn: tuple[str, Any], dest: int, back: int):
    architecture, config = drawn
    trace = tlc.trace(huggingface(config, architecture, architecture)(torch.float64).eval(), TOKENS[:6])
    src = max(dest - back, 0)
    for sublayer in ("attn", "mlp", "block"):
        if sublayer == "mlp" and src != dest:
            continue
        closed = tlc.residual_jacobian(trace, 0, sublayer, src, dest, engine="analytic").dense()
        truth = tlc.residual_jacobian(trace, 0, sublayer, src, dest, engine="autograd").dense()
        assert relative_error(closed, truth) < 1e-5, sublayer  # HuggingFace's softmax and norms cast to float32
