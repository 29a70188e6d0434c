"""The import contract of pyproject.toml: a folder uses those below it, and no modules import each other in a circle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLIMBS, CIRCLE = "A folder uses those below it BROKEN", "No circles between modules BROKEN"


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    """What ``make lint`` runs, on the package in a folder."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )


def test_the_package_keeps_the_contract():
    result = linted(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        (
            "linalg/dense.py",
            "def late():\n    from tlcoupling.forward.trace import Trace\n",
            "A folder uses those below it BROKEN",
        ),
        (
            "errors.py",
            "if TYPE_CHECKING:\n    from tlcoupling.precision import full_precision\n",
            "A folder uses those below it BROKEN",
        ),
        (
            "results/files.py",
            "def late():\n    from tlcoupling.results.base import Result\n",
            "No circles between modules BROKEN",
        ),
        ("new_folder.py", "", "new_folder"),  # one that no layer names
    ],
)
def test_what_breaks_it_is_noticed(tmp_path: Path, module: str, line: str, said: str):
    """Imports inside functions and for type checkers count."""
    shutil.copytree(ROOT / "tlcoupling", tmp_path / "tlcoupling", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "tlcoupling" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}")
    result = linted(tmp_path)
    assert result.returncode != 0
    assert said in result.stdout + result.stderr
