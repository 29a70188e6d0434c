"""The tables of sweeps: their columns and units, and the counts of a report."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from sweep_cells import cell_of
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app
from tlcoupling.cli.sweep_tables import print_report
from tlcoupling.sweeps.run import SweepReport

SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def test_times_are_right_in_every_unit(tmp_path: Path):
    """A machine that is four times slower takes four times as long, whichever unit suits the time."""
    (tmp_path / "plan.toml").write_text(
        'models = [{ name = "big", shape = { n_layers = 4, d_model = 64, n_heads = 4 } }]\nprompts = { text = "a" }'
    )
    times, units = [], []
    for power in range(9):
        result = CliRunner().invoke(
            app, ["sweep", str(tmp_path / "plan.toml"), "--dry-run", "--rate", f"{1e-6 / 4**power}"]
        )
        assert result.exit_code == 0, result.output
        (line,) = (line.split() for line in result.stdout.splitlines() if line.startswith("big "))
        times.append(float(line[-2]) * SECONDS[line[-1]])
        units.append(line[-1])
    assert {"min", "h", "d"} <= set(units)
    for faster, slower in pairwise(times):
        assert slower / faster == pytest.approx(4, rel=0.12)  # each time has two digits, so is off by up to 5 %


def test_a_report_counts_each_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    store = tlc.SweepStore(tmp_path / "store", create=True)
    failed = {cell_of((1, 2)): "ValueError: no", cell_of((3, 4)): "ValueError: no", cell_of((5, 6)): "OSError: full"}
    print_report(SweepReport(store, 15, 7, 4, failed, (cell_of((7, 8)),), ("worker 1 was killed",), 2.5))
    text = " ".join(capsys.readouterr().out.split())
    assert "15 cells: 4 measured in 2.5 s, 7 measured before, 3 failed, 1 unfinished" in text
    assert "2 x ValueError: no" in text and "1 x OSError: full" in text and "worker 1 was killed" in text
    print_report(SweepReport(store, 7, 7, 0, {}, (), (), 0.1))
    text = capsys.readouterr().out
    assert "7 cells: 0 measured in 0.1 s, 7 measured before\n" in text and "again" not in text
