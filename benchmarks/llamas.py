"""Make small random Llamas with a word tokenizer, saved as HuggingFace folders, for benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit


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
