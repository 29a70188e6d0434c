"""The command line as a whole: its version, mistyped options, and what importing it loads."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys

import pytest
import torch
from command_line import Report
from typer.testing import CliRunner

from tlcoupling.cli import app


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


@pytest.mark.parametrize("options", [["--version", "--verbose"], ["--verbose", "--version"]])
def test_the_verbose_version_has_what_a_report_of_a_bug_needs(options: list[str]) -> None:
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tlcoupling ")
    assert lines[1].startswith(f"Python {platform.python_version()}, ")
    assert lines[2].startswith(f"torch {torch.__version__}, ")
    for package in ("transformer-lens", "transformers", "numpy", "circuitsvis", "gguf"):
        assert f"{package} {importlib.metadata.version(package)}" in lines
    assert not [line for line in lines if line.startswith("pytest")]  # of the development alone


def test_importing_the_library_leaves_viewers_alone() -> None:
    heavy = ("matplotlib", "circuitsvis", "pandas", "typer", "rich", "xarray", "scipy")
    script = (
        f"import sys, tlcoupling, tlcoupling.viz; tlcoupling.analyze; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["--version"], 0), (["merge", "--help"], 0), (["report", "--colour", "red"], 2), ([], 2)],
    ids=str,
)
def test_help_and_usage_errors_do_not_wait_for_pytorch(arguments: list[str], code: int) -> None:
    script = (
        "import sys, tlcoupling.cli\n"
        "try:\n    tlcoupling.cli.app(sys.argv[1:])\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} False False"
