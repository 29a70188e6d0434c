"""Make random Llamas with a word tokenizer for benchmarks: small ones, and ones of the shapes of known models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tlcoupling.forward.offline import booted

# By width: the size of the MLP, the query heads and the key heads of SmolLM2-135M, Llama-3.2-1B, Llama-3-8B and -70B.
SHAPES = {576: (1536, 9, 3), 2048: (8192, 32, 8), 4096: (14336, 32, 8), 8192: (28672, 64, 8)}
VOCABULARY = 256


def word_tokenizer(words: int, end: str = "<end>", **special: str) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1, ...

    Args:
        words: number of words.
        end: the end, padding and unknown token; one of the words, or an additional one.
        **special: further special tokens by their transformers name, such as ``bos_token``.
    """
    ids = {f"w{index}": index for index in range(words)}
    ids.setdefault(end, words)
    tokenizer = Tokenizer(WordLevel(ids, unk_token=end))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=end, eos_token=end, pad_token=end, **special
    )


def llama(width: int, layers: int, heads: int, vocabulary: int, **more: Any) -> transformers.LlamaForCausalLM:
    """Return a Llama with random weights from torch's generator; the last word is the end token by default."""
    config = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": vocabulary - 1,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config | more))


def save(model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> Path:
    """Save both in one folder that ``tlc.load_model`` accepts."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shaped(width: int, layers: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """Return a Llama of a known model's shape with a small vocabulary; the same weights each time."""
    d_mlp, heads, key_heads = SHAPES.get(width, (3 * width, 4, 2))
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    torch.manual_seed(0)
    with device:
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()


def bridge(hf_model: Any) -> Any:
    """Return the model as a ``TransformerBridge``, without a network."""
    from transformer_lens.model_bridge import TransformerBridge

    return booted(TransformerBridge, "meta-llama/Llama-3.2-1B", hf_model, word_tokenizer(VOCABULARY - 1))
