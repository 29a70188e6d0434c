"""The command line: what it prints and writes, and how it refuses."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from analyses import HOSTILE_TOKENS, make_analysis
from cases import CASES, D_MODEL, tiny_tokenizer
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app

PROMPT = "w5 w7 w9 w11 w13"
Report = Callable[..., Any]


def words_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model, for a while with a tokenizer of words like w5; of others it makes 1."""
    if model.tokenizer is None:
        monkeypatch.setattr(model, "tokenizer", tiny_tokenizer())
    monkeypatch.setattr(
        model,
        "to_tokens",
        lambda text: torch.tensor([[int(word[1:]) if word[1:].isdigit() else 1 for word in text.split()]]),
    )
    monkeypatch.setattr(model, "to_str_tokens", lambda tokens: [f" w{token}" for token in tokens.tolist()])
    return model


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
        arguments = ["report", "tiny", "--prompt", prompt, "--k", "4", "--output", str(folder), *options]
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})

    return run


def assert_refused(result: Any, *parts: str) -> None:
    """Exit code 1 and one line on stderr that holds the parts, and nothing on stdout."""
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


def test_report_prints_saves_and_draws(report: Report, tmp_path: Path) -> None:
    result = report("--tokens", "0,-1", "--token-layers", "1,-1")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    analysis = tlc.load(out / "result.safetensors")
    assert analysis.coupling.positions == (0, 4)
    assert analysis.coupling.ks == (4,)
    assert analysis.token_coupling.layers == analysis.context_dest.layers == (1, 2)
    assert len(pandas.read_csv(out / "result.csv")) == len(analysis.to_dataframe())
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    for name in ("result.safetensors", "result.csv", "report.html"):
        assert str(out / name) in result.stdout
    mean, null = analysis.coupling.mean()[0].mean(), analysis.coupling.mean("null")[0].mean()
    (block,) = (line for line in result.stdout.splitlines() if line.startswith("block") and " 4 " in line[:14])
    assert block.split()[2:4] == [f"{mean:.4f}", f"{null:.4f}"]
    assert f"{analysis.growth.expodistance.nanquantile(0.5):.3f}" in result.stdout


def test_output_in_a_pipe_is_plain_and_fits_80_columns(report: Report) -> None:
    result = report("--k", "0.25")
    tables = result.stdout.split("\nresult ")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert all(char.isprintable() or char == "\n" for char in result.stdout)
    assert result.stderr == ""


def test_repeated_k_and_fractions(report: Report, tmp_path: Path) -> None:
    result = report("--k", "0.25", "--tokens", "all")
    assert result.exit_code == 0, result.output
    analysis = tlc.load(tmp_path / "out" / "result.safetensors")
    assert analysis.coupling.ks == (4, D_MODEL // 4)
    assert analysis.coupling.positions == tuple(range(5))


def test_defaults_are_the_offline_model_and_the_prompt_landmarks(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prompts: dict[str, str]
) -> None:
    asked = []

    def analyze(model: Any, prompt: str, **options: Any) -> tlc.Analysis:
        asked.append((prompt, options))
        return make_analysis()

    monkeypatch.setattr("tlcoupling.analysis.analyze.analyze", analyze)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 0, result.output
    assert loaded == ["smollm2-135m"]
    ((prompt, options),) = asked
    assert prompt == prompts["landmarks"]
    assert options["k"] == [10] and options["tokens"] == [-1] and options["engine"] == "auto"
    assert options["token_layers"] == [0, 1, 2]
    assert (tmp_path / "tlcoupling-report" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "option", "layers"),
    [(5, [], [0, 1, 2]), (1, [], None), (6, [], None), (6, ["--token-layers", "0,-1"], [0, -1])],
)
def test_tokens_are_compared_in_some_layers_of_short_prompts(
    report: Report, monkeypatch: pytest.MonkeyPatch, words: int, option: list[str], layers: list[int] | None
) -> None:
    asked = []
    monkeypatch.setattr("tlcoupling.cli.report.SHORT", 5)
    monkeypatch.setattr(
        "tlcoupling.analysis.analyze.analyze", lambda *args, **options: asked.append(options) or make_analysis()
    )
    assert report(*option, prompt=" ".join(["w5"] * words)).exit_code == 0
    assert [options["token_layers"] for options in asked] == [layers]


def test_hostile_tokens_are_printed_as_text(loaded: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokens = (*HOSTILE_TOKENS, "\x1b[31mred", "[bold]x[/nonsense]", "\rover")
    monkeypatch.setattr("tlcoupling.analysis.analyze.analyze", lambda *args, **options: make_analysis(tokens))
    result = CliRunner().invoke(app, ["report", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert not set(result.stdout) & set("\x1b\r\u202e\ud83e")
    assert "[bold]x[/nonsense]" in result.stdout


def test_undefined_numbers_are_dashes(loaded: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    analysis = make_analysis(n_layers=1, sequential=False)
    monkeypatch.setattr("tlcoupling.analysis.analyze.analyze", lambda *args, **options: analysis)
    result = CliRunner().invoke(app, ["report", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "nan" not in result.stdout
    assert "–" in result.stdout


def test_unwritable_output_is_found_before_the_work(report: Report, loaded: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(report(output=tmp_path / "file"), "output=", str(tmp_path / "file"))
    assert loaded == []


def test_result_file_in_the_way_still_prints_the_tables(report: Report, tmp_path: Path) -> None:
    (tmp_path / "out" / "result.csv").mkdir(parents=True)
    result = report()
    assert result.exit_code == 1
    assert "Coupling of different layers" in result.stdout
    assert "cannot write the table" in result.stderr


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--k", "1000"], ["k=1000", f"d_model = {D_MODEL}"]),
        (["--k", "0"], ["k=0", "1"]),
        (["--tokens", "99"], ["tokens=99"]),
        (["--token-layers", "99"], ["token_layers=99"]),
    ],
)
def test_arguments_that_do_not_fit_the_model(report: Report, options: list[str], parts: list[str]) -> None:
    assert_refused(report(*options), *parts)


def test_an_estimate_measures_and_writes_nothing(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def estimate(*options: str) -> Any:
        return CliRunner().invoke(app, ["report", "tiny", "--prompt", PROMPT, "--k", "4", "--estimate", *options])

    result = estimate("--tokens", "all")
    assert result.exit_code == 0, result.output
    assert "block: Jacobians" in result.stdout
    assert "Memory beyond the model: at most" in result.stdout
    assert not list(tmp_path.iterdir())
    assert estimate("--tokens", "99").exit_code == 1
    for option in (["--output", "out"], ["--open"]):
        refused = estimate(*option)
        assert refused.exit_code == 2 and option[0] in refused.stderr and "an estimate writes nothing" in refused.stderr


def test_empty_prompt(report: Report) -> None:
    assert_refused(report(prompt=""), "prompt=''", "empty")


def test_model_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", "./no/such/model", "--output", str(tmp_path)])
    assert_refused(result, "./no/such/model")


@pytest.mark.parametrize(
    "options",
    [["--engine", "magic"], ["--k", "ten"], ["--tokens", "first"], ["--token-layers", "top"], ["--colour", "red"]],
)
def test_mistyped_options_end_with_2_before_the_work(report: Report, loaded: list[str], options: list[str]) -> None:
    result = report(*options)
    assert result.exit_code == 2
    assert options[0] in result.stderr
    assert loaded == []


def test_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "tlcoupling 1.2.3\n")


def test_importing_the_library_leaves_viewers_alone() -> None:
    heavy = ("matplotlib", "circuitsvis", "pandas", "typer", "rich", "xarray", "scipy")
    script = f"import sys, tlcoupling, tlcoupling.viz; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
