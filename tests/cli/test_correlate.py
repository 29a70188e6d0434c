"""``tlcoupling correlate``: what it prints and writes, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cases import CASES, TOKENS
from command_line import assert_refused
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app
from tlcoupling.sweeps.cells import Cell, ModelFacts, Settings

pytest.importorskip("matplotlib")


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """A table of six models and their scores."""
    names = ["gpt2-a", "gpt2-b", "llama-a", "llama-b", "qwen-a", "qwen-b"]
    table = pd.DataFrame(
        {"model": names, "coupling": [0.1, 0.3, 0.2, 0.5, 0.4, 0.8], "null": [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]}
    )
    table = table.assign(excess=table["coupling"] - table["null"], d_model=[64, 64, 128, 128, 256, 256])
    table.to_csv(tmp_path / "table.csv", index=False)
    pd.DataFrame({"model": names, "score": [1, 2, 2, 4, 3, 7]}).to_csv(tmp_path / "scores.csv", index=False)
    return str(tmp_path / "table.csv"), str(tmp_path / "scores.csv")


def run(output: Path, *arguments: str) -> Any:
    return CliRunner().invoke(
        app, ["correlate", "--output", str(output), "--resamples", "200", *arguments], env={"COLUMNS": "80"}
    )


def test_the_published_points_are_the_default(tmp_path: Path):
    result = run(tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "coupling correlates with the score at R² = 0.80. Its null explains 93% of its variance" in " ".join(
        result.stdout.split()
    )
    assert max(map(len, result.stdout.split("\nresult ")[0].splitlines())) <= 80
    out = tmp_path / "out"
    found = tlc.load(out / "correlations.safetensors")
    numbers = json.loads((out / "correlations.json").read_text())
    assert numbers["coupling"]["r_squared"] == found.of("coupling")["r_squared"] == pytest.approx(0.7998, abs=1e-4)
    assert numbers["coupling"]["by_null"] == pytest.approx(0.9307, abs=1e-4)
    assert numbers["parameters"]["partial given null"] is None
    written, table = pd.read_csv(out / "correlations.csv"), found.to_dataframe()
    assert list(written["quantity"]) == list(table["quantity"])
    assert written["value"].to_list() == pytest.approx(table["value"].to_list(), nan_ok=True)
    assert (out / "coupling.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_and_scores_of_ones_own(files: tuple[str, str], tmp_path: Path):
    table, scores = files
    result = run(tmp_path / "out", table, "--scores", scores)
    assert result.exit_code == 0, result.output
    found = tlc.correlate(table, scores, resamples=200)
    line = next(line for line in result.stdout.splitlines() if line.startswith("coupling "))
    of = found.of("coupling")
    assert line.split()[1:3] == ["6", f"{of['r_squared']:.2f}"]
    assert f"{of['low']:+.2f} to {of['high']:+.2f}" in line
    assert "6 models, 3 families" in result.stdout


def test_a_store_is_a_table(tmp_path: Path):
    """The folder of a sweep's results, whose outdated and failed cells are no measurements."""
    case, store = CASES[0], tlc.SweepStore(tmp_path / "store", create=True)
    model = case.model(torch.float32)
    analysis, settings = tlc.analyze(model, TOKENS.tolist(), k=2, attention=False), Settings(k=(2,))
    for index, name in enumerate(("a-1", "a-2", "b-1", "b-2")):
        values = analysis.coupling.values * (1 + index**2)
        changed = dataclasses.replace(analysis, coupling=dataclasses.replace(analysis.coupling, values=values))
        store.save(Cell(name, tuple(TOKENS.tolist()), settings), changed, ModelFacts.of(model))
    store.fail(Cell("c-1", (1, 2), settings), ValueError("no"))
    (tmp_path / "scores.csv").write_text("model,score\na-1,1\na-2,2\nb-1,5\nb-2,10\n")
    result = run(tmp_path / "out", str(store.folder), "--scores", str(tmp_path / "scores.csv"))
    assert result.exit_code == 0, result.output
    numbers = json.loads((tmp_path / "out" / "correlations.json").read_text())
    assert numbers["coupling block K=2"]["n"] == 4 and numbers["coupling block K=2"]["r"] == pytest.approx(1.0)
    assert "4 models, 2 families" in result.stdout


def test_a_model_without_a_score_is_named_with_the_nearest(files: tuple[str, str], tmp_path: Path):
    table, scores = files
    frame = pd.read_csv(scores)
    frame.replace({"qwen-b": "qwen-b-chat"}).to_csv(scores, index=False)
    assert_refused(
        run(tmp_path / "out", table, "--scores", scores), "'qwen-b' (nearest: 'qwen-b-chat')", "--drop-missing"
    )
    result = run(tmp_path / "out", table, "--scores", scores, "--drop-missing")
    assert result.exit_code == 0 and "5 models, 3 families" in result.stdout


def test_what_cannot_be_read_or_written_is_one_line(files: tuple[str, str], tmp_path: Path):
    table, scores = files
    assert_refused(run(tmp_path / "out", str(tmp_path / "nowhere.csv")), "table=", "nowhere.csv")
    assert_refused(
        run(tmp_path / "out", table, "--scores", scores, "--score", "mmlu"), "--score 'mmlu'", "model, score"
    )
    assert_refused(run(tmp_path / "out", table), "--scores is not given", "no column 'score'")
    (tmp_path / "file").write_text("")
    assert_refused(run(tmp_path / "file", table, "--scores", scores), "--output '", "folder")
