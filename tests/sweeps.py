"""What the tests of sweeps share: small models in folders, as HuggingFace saves them, and plans of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY

import tlcoupling as tlc

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from llamas import llama, save, word_tokenizer

WIDTH, LAYERS = 16, 2


def needs_folders() -> None:
    """Skip where TransformerLens loads no folder."""
    pytest.importorskip("transformer_lens.model_bridge", reason="folders need a TransformerBridge")


def save_model(folder: Path, seed: int = 0) -> Path:
    """A random Llama of width 16 and its tokenizer of words like w5."""
    torch.manual_seed(seed)
    return save(llama(WIDTH, LAYERS, 2, VOCABULARY), word_tokenizer(VOCABULARY - 1), folder)


def words(count: int, start: int = 0) -> list[str]:
    """That many different prompts of four words."""
    return [f"w{i % 40} w{i // 40 % 40} w{(3 * i + 1) % 40} w{(7 * i + 2) % 40}" for i in range(start, start + count)]


def plan_of(folder: Path, models: list[Any], count: int = 3, **more: Any) -> tlc.Plan:
    """A plan of models in a folder and of a number of prompts, measured as cheaply as can be."""
    content = {
        "models": models,
        "prompts": {"text": words(count)},
        "settings": {"k": 2, "sublayers": "block"},
        "local_files_only": True,
        **more,
    }
    return tlc.Plan.of(content, base=folder)
