"""The store of a sweep: what is kept of a cell, how stores are joined, and what the table says."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, TOKENS

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, ResultFileError, StoreError
from tlcoupling.files import remove_abandoned, replacing
from tlcoupling.result_files import contents_apart_from_times
from tlcoupling.sweep import Cell, ModelFacts, Settings
from tlcoupling.sweep.table import COLUMNS

SETTINGS = Settings(k=(2, 0.25), tokens=(0, -1))


def cell_of(prompt: tuple[int, ...] = tuple(TOKENS.tolist()), **more) -> Cell:
    return Cell(model="tiny", prompt=prompt, settings=SETTINGS, **more)


def measured(cell: Cell) -> tuple[tlc.Analysis, ModelFacts]:
    model = CASES[0].model(torch.float32)
    return tlc.analyze(model, list(cell.prompt), attention=False, **SETTINGS.arguments()), ModelFacts.of(model)


@pytest.fixture
def store(tmp_path: Path) -> tlc.SweepStore:
    return tlc.SweepStore(tmp_path / "store", create=True)


def test_a_key_is_of_the_contents():
    cell = cell_of()
    assert cell.key == cell_of().key == Cell.from_json(json.loads(json.dumps(cell.to_json()))).key
    others = [
        cell_of((1, 2)),
        cell_of(revision="step1"),
        cell_of(step=1),
        cell_of(weights="0"),
        cell_of(load={"dtype": "float64"}),
        cell_of(random_seed=0),
        dataclasses.replace(cell, settings=Settings.of(k=2)),
        dataclasses.replace(cell, model="other"),
        dataclasses.replace(cell, prompt="7 23"),
    ]
    assert len({cell.key, *(other.key for other in others)}) == 1 + len(others)
    assert Settings.of(k=[2, 0.25], tokens=[0, -1]) == SETTINGS
    assert Settings.of(k=10, tokens=-1, sublayers="mlp") == Settings(sublayers=("mlp",))


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0},
        {"k": []},
        {"k": 1.5},
        {"tokens": "last"},
        {"tokens": []},
        {"sublayers": ["head"]},
        {"normalizer": "max"},
        {"engine": "magic"},
        {"absolute": 1},
        {"prepend_bos": "yes"},
    ],
)
def test_settings_that_no_model_takes_are_refused(wrong, unchecked):
    (name,) = wrong
    with pytest.raises(ArgumentError, match=f"^{name}="):
        Settings.of(**wrong)


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


def test_the_table_has_each_sublayer_and_k_once(store: tlc.SweepStore, tmp_path: Path):
    import pyarrow.parquet as pq

    cell, lost = cell_of(revision="step7", step=7), cell_of((1, 2))
    analysis, facts = measured(cell)
    store.save(cell, analysis, facts)
    store.fail(lost, RuntimeError("lost"))
    path = store.write_table(tmp_path / "out" / "table.parquet")
    schema = pq.read_schema(path)
    assert schema.names == list(COLUMNS)
    assert all(schema.field(name).metadata[b"description"].decode() == text for name, (_, text) in COLUMNS.items())
    table = store.table()
    assert pq.read_table(path).to_pylist() == pq.read_table(path, schema=schema).to_pylist()
    assert table.columns.tolist() == list(COLUMNS)
    assert len(table) == 6 + 1
    row = table.query("sublayer == 'mlp' and k_asked == '0.25'").iloc[0]
    coupling = analysis.coupling
    j, k = 1, coupling.ks[1]
    assert (row["k"], row["step"], row["n_tokens"], row["n_measured"]) == (k, 7, 7, 2)
    assert row["n_params"] == facts.n_params and row["d_model"] == coupling.overlap_null.reciprocal()[0] * 2
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    for column, name in (
        ("coupling", "values"),
        ("null", "null"),
        ("null_std", "null_std"),
        ("overlap_u", "overlap_u"),
    ):
        matrix = getattr(coupling, name)[2, :, j].double()
        expected = sum(matrix[:, a, b].sum() for a, b in pairs) / (2 * len(pairs))
        assert row[column] == pytest.approx(float(expected), rel=1e-6)
    assert row["excess"] == pytest.approx(row["coupling"] - row["null"])
    assert row["lss"] == pytest.approx(float(analysis.linearity.path("mlp")[[0, -1]].mean()))
    failed = table.query("status == 'failed'").iloc[0]
    assert failed["error"] == "RuntimeError: lost" and failed["key"] == lost.key
    assert json.loads(failed["prompt"]) == [1, 2]


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
    with pytest.raises(StoreError, match=cell.key):
        ours.add(theirs)
    assert ours.keys() == {cell.key}


def test_no_store_is_an_error(tmp_path: Path):
    with pytest.raises(StoreError, match="no store of sweep results"):
        tlc.SweepStore(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written to"):
        tlc.SweepStore(tmp_path / "file", create=True)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("new, but not all of it")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_only_what_dead_processes_left_is_removed(tmp_path: Path):
    script = (
        "import sys, os, pathlib\nfrom tlcoupling.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as partial:\n    partial.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")]).returncode == 9
    (left,) = tmp_path.iterdir()
    elsewhere = tmp_path / left.name.replace("@", "@elsewhere.")
    elsewhere.write_text("another host's")
    with replacing(tmp_path / "mine") as partial:
        assert remove_abandoned(tmp_path) == 1
        assert set(tmp_path.iterdir()) == {partial, elsewhere}
    os.utime(elsewhere, (0, 0))
    assert remove_abandoned(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
