"""What the tests of the command line share: a model that reads words like w5, and how a refusal looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import tiny_tokenizer

PROMPT = "w5 w7 w9 w11 w13"
Report = Callable[..., Any]  # the fixture ``report``


def words_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, for a while with a tokenizer of words like w5; of others it makes 1."""
    if model.tokenizer is None:
        monkeypatch.setattr(model, "tokenizer", tiny_tokenizer())
    monkeypatch.setattr(
        model,
        "to_tokens",
        lambda text, truncate: torch.tensor([[int(word[1:]) if word[1:].isdigit() else 1 for word in text.split()]]),
    )
    monkeypatch.setattr(model, "to_str_tokens", lambda tokens: [f" w{token}" for token in tokens.tolist()])
    return model


def assert_refused(result: Any, *parts: str) -> None:
    """Exit code 1 and one line on stderr that holds the parts, and nothing on stdout."""
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
