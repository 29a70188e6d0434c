"""Small random Llamas with a tokenizer of words, in folders as HuggingFace saves them: what sweeps are tried on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit


def word_tokenizer(words: int, end: str = "<end>", **special: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the words w0, w1, ...

    Args:
        words: how many.
        end: the token that ends, pads and stands for every other word; one of the words, or one more.
        **special: more special tokens, as transformers names them: ``bos_token``.
    """
    ids = {f"w{index}": index for index in range(words)}
    ids.setdefault(end, words)
    tokenizer = Tokenizer(WordLevel(ids, unk_token=end))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=end, eos_token=end, pad_token=end, **special
    )


def llama(width: int, layers: int, heads: int, vocabulary: int, **more: Any) -> transformers.LlamaForCausalLM:
    """A Llama with fresh weights, from torch's generator; the last word ends, unless ``more`` says otherwise."""
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
    """Both in one folder, which ``tlc.load_model`` takes."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
