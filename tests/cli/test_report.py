"""``tlcoupling report``: what it prints and writes, and how it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from analyses import HOSTILE_TOKENS, make_analysis
from cases import D_MODEL
from command_line import PROMPT, Report, assert_refused
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app
from tlcoupling.cli.terminal import print_analysis
from tlcoupling.coupling.chance import p_value
from tlcoupling.errors import UnsupportedModelError


def test_report_prints_saves_and_draws(report: Report, tmp_path: Path) -> None:
    result = report("--tokens", "0,-1", "--token-layers", "1,-1", "--csv")
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
    block, overlap = (line for line in result.stdout.splitlines() if line.startswith("block") and " 4 " in line[:14])
    assert block.split()[2:4] == [f"{mean:.4f}", f"{null:.4f}"]
    of_chance = analysis.coupling.mean("overlap_null_v")[0].mean()
    assert overlap.split()[-1] == f"{of_chance:.4f}" > "0.1250"  # a norm projects a direction out of 32
    assert f"{analysis.growth.expodistance.nanquantile(0.5):.3f}" in result.stdout


def test_output_in_a_pipe_is_plain_and_fits_80_columns(report: Report) -> None:
    result = report("--k", "0.25")
    tables = result.stdout.split("\nresult ")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert all(char.isprintable() or char == "\n" for char in result.stdout)
    assert result.stderr == ""


def test_fresh_weights_stand_beside_the_model(report: Report, tmp_path: Path) -> None:
    result = report("--baseline")
    assert result.exit_code == 0, result.output
    analysis = tlc.load(tmp_path / "out" / "result.safetensors")
    assert analysis.headline().split()[:4] == result.stdout.split("\n\n")[1].split()[:4]
    tables = result.stdout.split("\nresult ")[0]
    assert max(map(len, tables.splitlines())) <= 80 and "…" not in tables and "Fresh weights were not" not in tables
    block, _ = (line for line in result.stdout.splitlines() if line.startswith("block") and " 4 " in line[:14])
    fresh = analysis.baseline.coupling.mean("excess")[0].mean()
    assert float(block.split()[5]) == pytest.approx(float(fresh), abs=6e-5)
    test = analysis.coupling.test(draws=199)
    ends = f"{test.low[0, 0, 0, 0]:.4f} to {test.high[0, 0, 0, 0]:.4f}"
    assert ends in block and block.split()[-1] == p_value(float(test.p[0, 0, 0, 0]), 199).split()[-1]
    assert "Fresh weights were not measured" in report().stdout


def test_what_layers_share_is_in_the_report(report: Report, tmp_path: Path) -> None:
    assert report("--directions").exit_code == 0
    analysis = tlc.load(tmp_path / "out" / "result.safetensors")
    projected = analysis.shared.projected
    torch.testing.assert_close(projected.coupling[0], analysis.coupling.values[0, 0, 0], atol=1e-5, rtol=0)
    assert report().exit_code == 0  # --no-directions
    assert tlc.load(tmp_path / "out" / "result.safetensors").shared is None


@pytest.mark.filterwarnings("ignore:linearity over")  # of a few tokens
def test_measures_on_request_stand_beside_fresh_weights(report: Report, tmp_path: Path) -> None:
    result = report("--baseline", "--measures", "geometry,profile", "--token-layers", "0,1", "--basis-layers", "2")
    assert result.exit_code == 0, result.output
    analysis = tlc.load(tmp_path / "out" / "result.safetensors")
    assert analysis.lyapunov is None
    assert analysis.geometry.baseline is not None and analysis.profile.baseline is not None
    assert analysis.token_coupling.basis_layers == analysis.context_src.basis_layers == (2, 2)
    assert 'id="measures"' in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert report("--measures", "lyapunov").exit_code == 0
    assert tlc.load(tmp_path / "out" / "result.safetensors").lyapunov.baseline is None
    assert_refused(report("--measures", "geometry,curvature"), "--measures 'curvature'", "lyapunov, profile")


def test_what_cannot_be_measured_beside_is_said(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise UnsupportedModelError("no embeddings")

    monkeypatch.setattr("tlcoupling.analysis.shared.reader", refuse)
    asked = report("--directions")
    assert asked.exit_code == 1 and "no embeddings" in asked.stderr
    by_default = CliRunner().invoke(app, ["report", "--prompt", PROMPT, "--k", "4", "--output", str(tmp_path)])
    assert by_default.exit_code == 0, by_default.output
    assert "shared directions were not measured: no embeddings" in by_default.stderr


def test_a_number_that_rounds_to_zero_has_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    analysis = make_analysis()
    coupling = replace(analysis.coupling, values=analysis.coupling.null - 1e-6)
    print_analysis(replace(analysis, coupling=coupling))
    shown = capsys.readouterr().out
    assert "0.0000" in shown and "-0.0000" not in shown


def test_the_long_table_is_written_on_request_alone(report: Report, tmp_path: Path) -> None:
    result = report()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "result.safetensors"]
    assert "result.csv" not in result.stdout


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

    def analyze(model: Any, prompt: Any, **options: Any) -> tlc.Analysis:
        asked.append((prompt, options))
        return tlc.analyze(model, [1, 2, 3] if isinstance(prompt, str) else prompt, **{**options, "k": 4})

    monkeypatch.setattr("tlcoupling.analysis.analyze.analyze", analyze)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report"])
    assert result.exit_code == 0, result.output
    assert loaded == ["smollm2-135m"]
    (prompt, options), (again, fresh) = asked  # the model, and fresh weights beside it
    assert again.tolist() == [1, 2, 3] and fresh["k"] == [10]
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


def test_numbers_that_use_undetermined_vectors_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    analysis = make_analysis(ks=(1, 3))
    sure = torch.zeros_like(analysis.coupling.singular_values)
    print_analysis(replace(analysis, coupling=replace(analysis.coupling, uncertainty=sure)))
    assert "*" not in capsys.readouterr().out
    sure[1, 0, 2, 1] = 1.0  # the second ones of the attention of layer 2: K = 3 uses them
    print_analysis(replace(analysis, coupling=replace(analysis.coupling, uncertainty=sure)))
    said = capsys.readouterr().out
    (row,) = (line.split() for line in said.splitlines() if line.startswith("attn") and line.count("*"))
    assert row[1] == "3" and [cell.startswith("*") for cell in row[2:5]] == [True, False, True]
    assert said.count("*") == 3 and "*: uses singular vectors that are not determined" in said


def test_undefined_numbers_are_dashes(loaded: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    analysis = make_analysis(n_layers=1, sequential=False)
    monkeypatch.setattr("tlcoupling.analysis.analyze.analyze", lambda *args, **options: analysis)
    result = CliRunner().invoke(app, ["report", "--no-baseline", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "nan" not in result.stdout
    assert "–" in result.stdout


def test_unwritable_output_is_found_before_the_work(report: Report, loaded: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(report(output=tmp_path / "file"), "--output '", str(tmp_path / "file"))
    assert loaded == []


def test_result_file_in_the_way_still_prints_the_tables(report: Report, tmp_path: Path) -> None:
    (tmp_path / "out" / "result.csv").mkdir(parents=True)
    result = report("--csv")
    assert result.exit_code == 1
    assert "Coupling of different layers" in result.stdout
    assert "cannot write the table" in result.stderr


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--k", "1000"], ["--k 1000 is not allowed", f"d_model = {D_MODEL}"]),
        (["--k", "0"], ["--k 0 is not allowed", "1"]),
        (["--tokens", "99"], ["--tokens 99"]),
        (["--token-layers", "99"], ["--token-layers 99"]),
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
    for option in (["--output", "out"], ["--csv"], ["--open"], ["--measures", "all"]):
        refused = estimate(*option)
        assert refused.exit_code == 2 and option[0] in refused.stderr and "an estimate writes nothing" in refused.stderr


def test_empty_prompt(report: Report) -> None:
    assert_refused(report(prompt=""), "--prompt '' is not allowed", "empty")


def test_model_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", "./no/such/model", "--output", str(tmp_path)])
    assert_refused(result, "./no/such/model")
