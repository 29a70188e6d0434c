"""What the tests of the commands share: a tiny model behind every name, and ``tlcoupling report`` of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from command_line import PROMPT, Report, words_read
from typer.testing import CliRunner

from tlcoupling.cli import app


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes every model name load a tiny model that reads words like w5, others as 1; keeps the names asked for."""
    model, names = words_read(CASES[0].model(torch.float32), monkeypatch), []

    def load_model(name: str) -> Any:
        names.append(name)
        return model

    monkeypatch.setattr("tlcoupling.models.load.load_model", load_model)
    return names


@pytest.fixture
def report(loaded: list[str], tmp_path: Path) -> Report:
    """Runs ``tlcoupling report`` on the tiny model."""

    def run(*options: str, prompt: str = PROMPT, output: Path | None = None) -> Any:
        folder = tmp_path / "out" if output is None else output
        for more in ("baseline", "directions"):  # each takes as long again
            options = options if f"--{more}" in options else (*options, f"--no-{more}")
        arguments = ["report", "tiny", "--prompt", prompt, "--k", "4", "--output", str(folder), *options]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})

    return run
