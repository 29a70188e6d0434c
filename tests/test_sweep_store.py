"""The store of a sweep: what is kept of a cell, how stores are joined, and what the table says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, TOKENS
from sweeps import contents_apart_from_times

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, ResultFileError, StoreError
from tlcoupling.results.atomic import remove_abandoned, replacing
from tlcoupling.sweeps import cells
from tlcoupling.sweeps.cells import Cell, ModelFacts, Settings
from tlcoupling.sweeps.table import COLUMNS, rows, to_arrow

SETTINGS = Settings(k=(2, 0.25), tokens=(0, -1))  # of an even number of tokens, a median is the mean of the middle two


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
    assert pq.read_table(path).to_pylist() == to_arrow(rows(store)).to_pylist()
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
    distances = analysis.growth.expodistance[[0, -1]].double().numpy()
    assert row["ed"] == pytest.approx(np.median(distances)) and row["cv"] == pytest.approx(np.median(distances**0.5))
    assert distances.min() < 0.99 * row["ed"]
    failed = table.query("status == 'failed'").iloc[0]
    assert failed["error"] == "RuntimeError: lost" and failed["key"] == lost.key
    assert json.loads(failed["prompt"]) == [1, 2]


def test_the_table_tells_weights_loads_and_measurements_apart(store: tlc.SweepStore, monkeypatch: pytest.MonkeyPatch):
    """Cells that differ in these alone are rows that differ, and no mean is taken over them."""
    analysis, facts = measured(cell_of())
    for weights, dtype in (("a", None), ("b", None), ("b", "bfloat16")):
        store.save(cell_of(weights=weights, load={"dtype": dtype}), analysis, facts)
    table = store.table()
    assert set(zip(table["weights"], table["load"], strict=True)) == {
        ("a", '{"dtype": null}'), ("b", '{"dtype": null}'), ("b", '{"dtype": "bfloat16"}')
    }  # fmt: skip
    with pytest.raises(ArgumentError, match="table='2 different weights of tiny'"):
        tlc.correlate(table, {"tiny": 1.0})
    with pytest.raises(ArgumentError, match="table='2 different load of tiny'"):
        tlc.correlate(table[table["weights"] == "b"], {"tiny": 1.0})
    import pandas as pd

    once = table[table["weights"] == "a"]
    with pytest.raises(ArgumentError, match="table='6 rows twice, such as tiny'"):
        tlc.correlate(pd.concat([once, once]), {"tiny": 1.0})

    monkeypatch.setattr(cells, "MEASUREMENT", 0)
    outdated = store.table()
    assert set(outdated["status"]) == {"outdated"} and set(outdated["key"]) == store.keys()
    assert outdated["coupling"].isna().all() and set(outdated["weights"]) == {"a", "b"}


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
        "import sys, os, pathlib\nfrom tlcoupling.results.atomic import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as partial:\n    partial.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")]).returncode == 9
    (left,) = tmp_path.iterdir()
    elsewhere = tmp_path / left.name.replace("@", "@elsewhere.")
    elsewhere.write_text("another host's")
    hour = time.time() - 3700
    with replacing(tmp_path / "mine") as partial:
        for path in (partial, elsewhere):
            os.utime(path, (hour, hour))
        assert remove_abandoned(tmp_path) == 0, "a container of this host's name may still write what is new"
        os.utime(left, (hour, hour))
        assert remove_abandoned(tmp_path) == 1
        assert set(tmp_path.iterdir()) == {partial, elsewhere}
    os.utime(elsewhere, (hour - 24 * 3600, hour - 24 * 3600))
    assert remove_abandoned(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
