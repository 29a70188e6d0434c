"""Small random configurations of decoder families, booted offline as ``TransformerBridge``."""

from __future__ import annotations

from typing import Any

import transformers as hf

D_MODEL, N_LAYERS, N_HEADS, D_HEAD, D_MLP, VOCABULARY, CONTEXT = 32, 3, 4, 8, 48, 50, 32
WINDOW = 3  # shorter than the prompts of the tests

_COMMON: dict[str, Any] = dict(
    hidden_size=D_MODEL,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=N_HEADS,
    intermediate_size=D_MLP,
    vocab_size=VOCABULARY,
    max_position_embeddings=CONTEXT,
    pad_token_id=None,
    bos_token_id=0,
    eos_token_id=1,
)
_GROUPED: dict[str, Any] = dict(_COMMON, num_key_value_heads=2)
_WIDE_HEADS: dict[str, Any] = dict(_GROUPED, head_dim=12)  # as in Qwen 3 and Gemma: n_heads * d_head is not d_model
_FALCON: dict[str, Any] = {"ffn_hidden_size": D_MLP, **_COMMON}
del _FALCON["intermediate_size"]
_LATENT: dict[str, Any] = dict(
    _COMMON,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=D_HEAD,
    head_dim=4,  # of what is rotated, as in the real models
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    n_shared_experts=1,
    moe_intermediate_size=20,
    experts_implementation="eager",
)
_EXPERTS: dict[str, Any] = dict(
    _WIDE_HEADS, num_experts_per_tok=2, moe_intermediate_size=20, experts_implementation="eager"
)
_LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
    rope_theta=100.0,
)


def families() -> dict[str, tuple[str, str, Any]]:
    """Name of the test case: name on the hub, architecture, configuration."""
    known = {
        "gpt2": (
            "gpt2",
            "GPT2LMHeadModel",
            hf.GPT2Config(
                n_embd=D_MODEL,
                n_layer=N_LAYERS,
                n_head=N_HEADS,
                n_inner=D_MLP,
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
            ),
        ),
        "gptj": (
            "EleutherAI/gpt-j-6b",
            "GPTJForCausalLM",
            hf.GPTJConfig(
                n_embd=D_MODEL,
                n_layer=N_LAYERS,
                n_head=N_HEADS,
                n_inner=D_MLP,
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
                rotary_dim=4,
            ),
        ),
        "pythia": ("EleutherAI/pythia-70m", "GPTNeoXForCausalLM", hf.GPTNeoXConfig(**_COMMON, rotary_pct=0.25)),
        "pythia-sequential": (
            "EleutherAI/pythia-70m",
            "GPTNeoXForCausalLM",
            hf.GPTNeoXConfig(**_COMMON, rotary_pct=0.25, use_parallel_residual=False),
        ),
        "llama": ("meta-llama/Llama-3.2-1B", "LlamaForCausalLM", hf.LlamaConfig(**_GROUPED)),
        "llama3-rope": (
            "meta-llama/Llama-3.2-1B",
            "LlamaForCausalLM",
            hf.LlamaConfig(**_GROUPED, rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True),
        ),
        "mistral": (
            "mistralai/Mistral-7B-v0.1",
            "MistralForCausalLM",
            hf.MistralConfig(**_GROUPED, sliding_window=WINDOW),
        ),
        "qwen2": ("Qwen/Qwen2-0.5B", "Qwen2ForCausalLM", hf.Qwen2Config(**_GROUPED)),
        "qwen3": ("Qwen/Qwen3-0.6B", "Qwen3ForCausalLM", hf.Qwen3Config(**_WIDE_HEADS)),
        "gemma2": (
            "google/gemma-2-2b",
            "Gemma2ForCausalLM",
            hf.Gemma2Config(
                **_WIDE_HEADS,
                sliding_window=WINDOW,
                query_pre_attn_scalar=6,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=5.0,
            ),
        ),
        "gemma3": (
            "google/gemma-3-1b-pt",
            "Gemma3ForCausalLM",
            hf.Gemma3TextConfig(
                **_WIDE_HEADS, sliding_window=WINDOW, query_pre_attn_scalar=6, sliding_window_pattern=2
            ),
        ),
        "olmo2": ("allenai/OLMo-2-0425-1B", "Olmo2ForCausalLM", hf.Olmo2Config(**_GROUPED)),
        "phi": ("microsoft/phi-2", "PhiForCausalLM", hf.PhiConfig(**_COMMON, partial_rotary_factor=0.5)),
        "falcon": (
            "tiiuae/falcon-7b",
            "FalconForCausalLM",
            hf.FalconConfig(
                **_FALCON,
                multi_query=True,
                parallel_attn=True,
                bias=False,
                new_decoder_architecture=False,
            ),
        ),
        "falcon-alibi": (
            "tiiuae/falcon-rw-1b",
            "FalconForCausalLM",
            hf.FalconConfig(
                **_FALCON,
                multi_query=False,
                parallel_attn=False,
                bias=True,
                alibi=True,
                new_decoder_architecture=False,
            ),
        ),
        "falcon-two-norms": (
            "tiiuae/falcon-40b",
            "FalconForCausalLM",
            hf.FalconConfig(
                **_FALCON,
                num_kv_heads=2,
                multi_query=False,
                parallel_attn=True,
                bias=False,
                new_decoder_architecture=True,
            ),
        ),
        "opt": (
            "facebook/opt-125m",
            "OPTForCausalLM",
            hf.OPTConfig(
                hidden_size=D_MODEL,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=N_HEADS,
                ffn_dim=D_MLP,
                vocab_size=VOCABULARY,
                max_position_embeddings=CONTEXT,
                word_embed_proj_dim=D_MODEL,
                pad_token_id=1,
            ),
        ),
        "bloom": (
            "bigscience/bloom-560m",
            "BloomForCausalLM",
            hf.BloomConfig(hidden_size=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, vocab_size=VOCABULARY),
        ),
        "mpt": (
            "mosaicml/mpt-7b",
            "MPTForCausalLM",
            hf.MptConfig(
                d_model=D_MODEL,
                n_heads=N_HEADS,
                n_layers=N_LAYERS,
                expansion_ratio=2,
                vocab_size=VOCABULARY,
                max_seq_len=CONTEXT,
            ),
        ),
        "mixtral": (
            "mistralai/Mixtral-8x7B-v0.1",
            "MixtralForCausalLM",
            hf.MixtralConfig(
                **_GROUPED,
                num_local_experts=4,
                num_experts_per_tok=2,
                experts_implementation="eager",
                sliding_window=None,
            ),
        ),
        "deepseek-v3": (
            "deepseek-ai/DeepSeek-V3",
            "DeepseekV3ForCausalLM",
            hf.DeepseekV3Config(**_LATENT, q_lora_rank=12),
        ),
        "phi3": ("microsoft/Phi-3-mini-4k-instruct", "Phi3ForCausalLM", hf.Phi3Config(**_GROUPED)),
        "glm": ("THUDM/glm-4-9b", "GlmForCausalLM", hf.GlmConfig(**_WIDE_HEADS, partial_rotary_factor=0.5)),
        "cohere-qk-norm": (
            "CohereForAI/c4ai-command-r-plus",
            "CohereForCausalLM",
            hf.CohereConfig(**_GROUPED, use_qk_norm=True),
        ),
        "stablelm-qk-norm": (
            "stabilityai/stablelm-2-12b",
            "StableLmForCausalLM",
            hf.StableLmConfig(**_GROUPED, qk_layernorm=True, use_parallel_residual=True),
        ),
        "granite": (
            "ibm-granite/granite-3.0-2b-base",
            "GraniteForCausalLM",
            hf.GraniteConfig(**_GROUPED, residual_multiplier=0.5, attention_multiplier=0.3),
        ),
        "gpt-neo": (
            "EleutherAI/gpt-neo-125M",
            "GPTNeoForCausalLM",
            hf.GPTNeoConfig(
                hidden_size=D_MODEL,
                num_layers=N_LAYERS,
                num_heads=N_HEADS,
                intermediate_size=D_MLP,
                attention_types=[[["global"], 1], [["local"], 2]],
                window_size=WINDOW,
                vocab_size=VOCABULARY,
                max_position_embeddings=CONTEXT,
            ),
        ),
    }
    recent = _recent() if hasattr(hf, "AfmoeConfig") else {}  # not in the transformers beside transformer-lens 2
    return known | recent


def _recent() -> dict[str, tuple[str, str, Any]]:
    """Families that only transformers 5 has, or has in the form of today."""
    return {
        "deepseek-v2": (
            "deepseek-ai/DeepSeek-V2-Lite",
            "DeepseekV2ForCausalLM",
            hf.DeepseekV2Config(**_LATENT, q_lora_rank=None),
        ),
        "gpt-oss": (
            "openai/gpt-oss-20b",
            "GptOssForCausalLM",
            hf.GptOssConfig(
                **_WIDE_HEADS,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=WINDOW,
                experts_implementation="eager",
            ),
        ),
        "qwen3-next": (
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            "Qwen3NextForCausalLM",
            hf.Qwen3NextConfig(
                **_EXPERTS,
                layer_types=["full_attention"] * N_LAYERS,
                num_experts=4,
                shared_expert_intermediate_size=12,
            ),
        ),
        "afmoe": (
            "arcee-ai/Trinity-Mini",
            "AfmoeForCausalLM",
            hf.AfmoeConfig(
                **_EXPERTS,
                num_experts=4,
                num_shared_experts=1,
                num_dense_layers=1,
                sliding_window=WINDOW,
                global_attn_every_n_layers=2,
            ),
        ),
        "llama4": (
            "meta-llama/Llama-4-Scout-17B-16E",
            "Llama4ForCausalLM",
            hf.Llama4TextConfig(
                **_WIDE_HEADS,
                intermediate_size_mlp=40,
                num_local_experts=4,
                num_experts_per_tok=1,
                interleave_moe_layer_step=2,
                no_rope_layers=[1, 0, 1],
                floor_scale=2,
                attn_scale=0.5,
                attention_chunk_size=CONTEXT,
            ),
        ),
        "ministral3": (
            "mistralai/Ministral-3-3B-Base-2512",
            "Ministral3ForCausalLM",
            hf.Ministral3Config(
                **_WIDE_HEADS,
                sliding_window=None,
                rope_parameters=dict(
                    rope_type="yarn",
                    factor=4.0,
                    original_max_position_embeddings=3,
                    rope_theta=100.0,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    mscale=1.0,
                    mscale_all_dim=1.0,
                    llama_4_scaling_beta=0.3,
                ),
            ),
        ),
        "modernbert-decoder": (
            "jhu-clsp/ettin-decoder-17m",
            "ModernBertDecoderForCausalLM",
            hf.ModernBertDecoderConfig(**{**_COMMON, "pad_token_id": 0}, local_attention=2 * WINDOW),
        ),
    }
