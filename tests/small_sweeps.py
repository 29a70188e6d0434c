"""What the tests of sweeps share: small models in folders, as HuggingFace saves them, and plans of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY

import tlcoupling as tlc
from tlcoupling.results.base import read_result
from tlcoupling.results.files import FORMAT

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from llamas import llama, save, word_tokenizer

WIDTH, LAYERS = 16, 2
GOOD = """\
models = ["gpt2"]

[prompts]
text = ["a", "b"]
"""


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


def contents_apart_from_times(path: str | Path) -> tuple[Any, bytes]:
    """All of a result file but the seconds that its measurements took: equal for results that are equal to the bit.

    The checksum is left out too, since it covers the seconds.

    Raises:
        ResultFileError: as ``load``.
    """
    read_result(path)  # so that a damaged file is refused, rather than compared
    content = Path(path).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"][FORMAT] = _without_seconds(json.loads(header["__metadata__"][FORMAT]))
    return header, content[8 + size :]


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_seconds(item) for name, item in value.items() if name not in ("seconds", "checksum")}
    return [_without_seconds(item) for item in value] if isinstance(value, list) else value


def read(tmp_path: Path, text: str) -> tlc.Plan:
    """The plan that a file of this text is."""
    (tmp_path / "plan.toml").write_text(text)
    return tlc.Plan.read(tmp_path / "plan.toml")
