"""The store of a sweep: what is kept of a cell, and how stores are joined."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sweeps import contents_apart_from_times
from sweep_cells import cell_of, measured

import tlcoupling as tlc
from tlcoupling.errors import ResultFileError, StoreError


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
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
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
