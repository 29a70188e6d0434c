"""benchmarks/gpu.py with small sizes on the CPU: every part runs and prints its rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tlcoupling.models.load import _transformer_bridge

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(_transformer_bridge() is None, reason="its models are bridges")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    yield gpu
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def test_each_part_runs(gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    parts = ["solvers", "deep", "widest", "table", "growth", "functions"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--parts", *parts])
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert printed.endswith("failed: nothing\n") and all(f"[{part}: " in printed for part in parts)
    shown = {line.split(": ")[0] for line in printed.splitlines()}
    assert {"8 tokens, the last one", "12 tokens, the last one", "one block of d = 96, 28 tokens"} <= shown
    monkeypatch.setattr("gpu.smollm2.rows", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small", "--parts", "table", "solvers"])
    assert gpu.main() == 1  # a part that fails does not hide what the next one prints
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed and "[solvers: " in printed and printed.endswith("failed: table\n")
