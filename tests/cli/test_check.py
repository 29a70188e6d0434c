"""``tlcoupling check``: what it prints of a model that holds, and of one that is refused."""

from __future__ import annotations

import pytest
import torch
from command_line import PROMPT
from typer.testing import CliRunner

from tlcoupling.cli import app


def test_check_prints_what_holds(loaded: list[str]):
    result = CliRunner().invoke(app, ["check", "tiny", "--prompt", PROMPT], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert loaded == ["tiny"]
    assert "residual identity" in result.stdout
    assert result.stdout.count("closed form, certified") == 3
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_check_of_a_refused_model_ends_with_1(loaded: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tlcoupling.models.load.load_model", lambda name: torch.nn.Linear(2, 2))
    result = CliRunner().invoke(app, ["check", "tiny"], env={"COLUMNS": "80"})
    assert result.exit_code == 1
    assert "refused" in result.stdout
