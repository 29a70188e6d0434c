"""Small models whose linear layers are packed in 4 bits by bitsandbytes, beside the same with dequantised weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from cases import randomise, tiny_tokenizer
from torch import nn

from tlcoupling.forward.offline import booted


def packed_and_plain(kind: str, on_avx512: bool, **changes: int) -> tuple[Any, Any]:
    """A small Llama in 4 bits, and the same with the dequantised weights in float32; ``changes`` are of its sizes."""
    import bitsandbytes as bnb
    import transformers as hf
    from transformer_lens.model_bridge import TransformerBridge

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, **changes}
    config = hf.LlamaConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    packed = randomise(hf.LlamaForCausalLM(config)).eval()
    plain = copy.deepcopy(packed)
    for name, linear in list(plain.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            size = (linear.in_features, linear.out_features)
            layer = bnb.nn.Linear4bit(*size, bias=False, compute_dtype=torch.float32, quant_type=kind)
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind, module=layer)
            layer = layer.to("cpu").eval()
            layer.support_avx512bf16_for_cpu = on_avx512
            packed.model.layers.set_submodule(name, layer)
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            linear.weight.data = weight.float()

    first, second = (
        booted(TransformerBridge, "meta-llama/Llama-3.2-1B", each, tiny_tokenizer()) for each in (packed, plain)
    )
    return first, second
