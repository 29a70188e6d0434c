"""The store of a sweep: what is kept of a cell, and how stores are joined."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_stores import ANALYSIS, FACTS, PLAN, hostile, whole
from small_sweeps import contents_apart_from_times
from sweep_cells import cell_of, measured
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app
from tlcoupling.cli.sweep_tables import print_report
from tlcoupling.errors import ResultFileError, StoreError
from tlcoupling.sweeps import run
from tlcoupling.sweeps.cells import ModelFacts
from tlcoupling.sweeps.source import Source


def test_what_is_saved_comes_back(store: tlc.SweepStore):
    cell = cell_of(step=7)
    analysis, facts = measured(cell)
    assert not store.has(cell)
    store.fail(cell, ValueError("no"), 1.5)
    assert store.failed_keys() == {cell.key}
    assert [one.error for one in store.failures()] == ["ValueError: no"]
    store.save(cell, analysis, facts)
    assert store.has(cell) and store.keys() == {cell.key} and not store.failed_keys()
    back, found, about = store.read(cell.key)
    assert back == cell and about == facts
    assert torch.equal(found.coupling.values, analysis.coupling.values)
    assert list(store.cells()) == [cell]


def test_a_new_failure_of_a_cell_whose_result_is_damaged_is_told(store: tlc.SweepStore):
    cell = cell_of()
    path = store.save(cell, *measured(cell))
    path.write_bytes(path.read_bytes()[:-10])
    assert not store.failed_keys()
    store.fail(cell, ValueError("no"))
    assert store.failed_keys() == {cell.key} and [one.error for one in store.failures()] == ["ValueError: no"]
    assert store.table()[["key", "status", "error"]].to_numpy().tolist() == [[cell.key, "failed", "ValueError: no"]]


def test_equal_cells_are_equal_files_apart_from_their_times(tmp_path: Path):
    cell = cell_of()
    stores = [tlc.SweepStore(tmp_path / name, create=True) for name in "ab"]
    for one in stores:
        one.save(cell, *measured(cell))
    first, second = (one.path(cell.key) for one in stores)
    assert contents_apart_from_times(first) == contents_apart_from_times(second)
    assert first.read_bytes() != second.read_bytes()


def test_a_lost_end_is_no_result(store: tlc.SweepStore):
    cell = cell_of()
    path = store.save(cell, *measured(cell))
    content = path.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert not store.has(cell)
        with pytest.raises(ResultFileError, match="damaged"):
            store.load(cell.key)
    table = store.table()
    assert table["status"].tolist() == ["damaged"]
    assert path.name in table["error"].item()


def test_stores_are_joined(tmp_path: Path):
    ours, theirs = (tlc.SweepStore(tmp_path / name, create=True) for name in "ab")
    both, only = cell_of(), cell_of((5, 6, 7, 8))
    for one in (ours, theirs):
        one.save(both, *measured(both))
    theirs.save(only, *measured(only))
    ours.fail(only, ValueError("once"))
    theirs.fail(cell_of((1,)), ValueError("never"))
    assert ours.add(theirs) == 1
    assert ours.keys() == {both.key, only.key} and ours.failed_keys() == {cell_of((1,)).key}
    assert ours.path(only.key).read_bytes() == theirs.path(only.key).read_bytes()
    assert ours.add(theirs) == 0


def test_a_failure_in_both_stores_keeps_our_reason(tmp_path: Path):
    ours, theirs = (tlc.SweepStore(tmp_path / name, create=True) for name in "ab")
    ours.fail(cell_of(), ValueError("ours"))
    theirs.fail(cell_of(), ValueError("theirs"))
    assert ours.add(theirs) == 0
    assert [one.error for one in ours.failures()] == ["ValueError: ours"]


def test_the_result_of_another_cell_is_not_the_cells(store: tlc.SweepStore):
    """Files may be renamed or copied by hand."""
    cell, other = cell_of(), cell_of((5, 6, 7, 8))
    path = store.save(cell, *measured(cell))
    path.rename(store.path(other.key))
    assert not store.has(other) and not store.has(cell)


def test_stores_that_disagree_are_not_joined(tmp_path: Path):
    ours, theirs = (tlc.SweepStore(tmp_path / name, create=True) for name in "ab")
    cell, only = cell_of(), cell_of((5, 6, 7, 8))
    analysis, facts = measured(cell)
    ours.save(cell, analysis, facts)
    theirs.save(cell, measured(only)[0], facts)
    theirs.save(only, *measured(only))
    files = f"remove the wrong one: '{ours.path(cell.key)}' or '{theirs.path(cell.key)}'"
    with pytest.raises(StoreError, match=f"{cell.key}.*result.*{re.escape(files)}"):
        ours.add(theirs)
    assert ours.keys() == {cell.key}


@pytest.mark.parametrize(
    ("scale", "facts", "named"),
    [
        (1 + 1e-5, {"commit": "an older one"}, ()),  # rounding, and what is the machine's own
        (1.01, {}, ("result.coupling.values (by 0.01 of its size)", "result.coupling.null (by 0.01 of its size)")),
        (1.0, {"n_params": 7}, ("note.model.n_params",)),
    ],
)
def test_stores_of_two_machines_may_differ_by_rounding_and_versions(
    tmp_path: Path, scale: float, facts: dict[str, Any], named: tuple[str, ...]
):
    ours, theirs = (tlc.SweepStore(tmp_path / name, create=True) for name in "ab")
    cell, (analysis, about) = cell_of(), measured(cell_of())
    ours.save(cell, analysis, about)
    coupling = analysis.coupling
    changed = {name: getattr(coupling, name) * scale for name in ("values", "null")}
    moved = dataclasses.replace(
        coupling,
        provenance=dataclasses.replace(coupling.provenance, engine={"block": "autograd"}, versions={"torch": "2.6"}),
        residual=10 * coupling.residual,
        **changed,
    )
    later = dataclasses.replace(analysis.provenance, seconds=7.0)
    other = dataclasses.replace(analysis, coupling=moved, provenance=later)
    theirs.save(cell, other, dataclasses.replace(about, **facts))
    if not named:
        assert ours.add(theirs) == theirs.add(ours) == 0
        return
    with pytest.raises(StoreError, match=re.escape(f"{', '.join(named)} differ by more than rounding")):
        ours.add(theirs)


def test_no_store_is_an_error(tmp_path: Path):
    with pytest.raises(StoreError, match="not a store of sweep results"):
        tlc.SweepStore(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written to"):
        tlc.SweepStore(tmp_path / "file", create=True)


def test_a_malformed_file_costs_one_row_and_is_named(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """50 cells: by the table, by a merge in both directions, and by a sweep, which measures the bad ones again."""
    store, bad = hostile(tmp_path / "one")
    table = store.table()
    assert len(table) == 50
    wrong = table[table["status"] != "measured"]
    assert {row["key"]: bad[row["key"]] for _, row in wrong.iterrows()} == bad
    assert set(wrong["status"]) == {"damaged"} and all(row["key"] in row["error"] for _, row in wrong.iterrows())
    assert table[table["status"] == "measured"]["verified"].all()

    arguments = ["merge", str(store.folder), "--into", str(tmp_path / "all")]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 1, result.output
    skipped = [line for line in result.stdout.splitlines() if line.startswith("  skipped: ")]
    assert len(skipped) == len(bad) and all(any(key in line for line in skipped) for key in bad)
    assert f"{store.folder}: {50 - len(bad)} of " in result.stdout
    merged = tlc.SweepStore(tmp_path / "all")
    assert merged.keys() == {cell.key for cell in PLAN.cells} - bad.keys() and not merged.failed_keys()

    with pytest.warns(UserWarning, match="damaged files were not copied"):
        assert whole(tmp_path / "two").add(store) == 0
    assert store.add(whole(tmp_path / "two")) == len(bad)
    assert store.table()["status"].tolist() == ["measured"] * 50 and not store.damaged()

    monkeypatch.setattr(Source, "open", lambda source: None)
    monkeypatch.setattr(ModelFacts, "of", lambda model: FACTS)
    monkeypatch.setattr(run, "analyze", lambda *args, **kwargs: ANALYSIS)
    again, bad = hostile(tmp_path / "three")
    report = tlc.sweep(PLAN, again)
    assert report.complete and (report.n_kept, report.n_measured) == (50 - len(bad), len(bad))
    assert {cell.key: bad[cell.key] for cell in report.damaged} == bad
    print_report(report)
    said = "".join(capsys.readouterr().out.split())  # the terminal folds long lines
    assert all(key in said for key in bad)
    assert again.table()["status"].tolist() == ["measured"] * 50
    assert len(list(again.folder.rglob("*.aside-*/inside"))) == 2, "a folder in the way is kept under another name"


def test_names_that_are_no_text_are_rows(store: tlc.SweepStore):
    """A file name of any bytes, and half characters in what a file says."""
    (store.folder / "cells" / os.fsdecode(b"\xff\xfe.safetensors")).write_bytes(b"")
    cell = dataclasses.replace(PLAN.cells[0], model="half \ud83e", prompt="\ud83e")
    store.save(cell, ANALYSIS, FACTS)
    store.fail(dataclasses.replace(cell, step=1), ValueError("half \ud83e"))
    table = store.table()
    assert sorted(table["status"]) == ["damaged", "failed", "measured"]
    assert set(table["model"].dropna()) == {"half \\ud83e"} and "\\udcff\\udcfe" in set(table["key"])


def test_a_cell_without_a_checksum_is_copied_as_it_is(tmp_path: Path):
    old = tlc.SweepStore(Path(__file__).parents[1] / "data" / "written_by_0_1_0" / "store")
    store = tlc.SweepStore(tmp_path, create=True)
    assert store.add(old) == 2
    with pytest.warns(UserWarning, match="2 results of the store .* have no checksum"):
        assert not store.table()["verified"].any()
