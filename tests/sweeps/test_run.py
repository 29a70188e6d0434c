"""Running sweeps: what is missing is done, what fails is kept and tried again, and nothing is lost."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from small_sweeps import contents_apart_from_times, needs_folders, plan_of, save_model, words
from typer.testing import CliRunner

import tlcoupling as tlc
from tlcoupling.cli import app
from tlcoupling.errors import ArgumentError, ModelLoadError, ResultFileError, StoreError
from tlcoupling.sweeps.run import measure_group
from tlcoupling.sweeps.source import Source

HERE = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_folders()
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        save_model(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def loaded(models: Path) -> dict[str, Any]:
    """Both models, loaded once."""
    return {str((models / name).resolve()): tlc.load_model(models / name) for name in ("one", "two")}


@pytest.fixture
def opened(loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that a sweep opens; each is at hand."""
    names: list[str] = []

    def open_source(source: Source) -> Any:
        names.append(source.model)
        if source.name not in loaded:
            raise ModelLoadError(f"no {source.name} here")
        return loaded[source.name]

    monkeypatch.setattr(Source, "open", open_source)
    return names


def contents(store: tlc.SweepStore) -> dict[str, Any]:
    """What a store holds apart from times."""
    return {path.name: contents_apart_from_times(path) for path in (store.folder / "cells").iterdir()}


def test_a_rerun_does_only_what_is_missing(models: Path, opened: list[str], tmp_path: Path):
    plan = plan_of(models, ["one", "two"])
    report = tlc.sweep(plan, tmp_path / "store")
    assert (report.n_cells, report.n_kept, report.n_measured, report.complete) == (6, 0, 6, True)
    assert opened == ["one", "two"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "cells").iterdir()}
    assert len(before) == 6
    report.store.path(plan.groups[1].cells[0].key).unlink()
    again = tlc.sweep(plan, tmp_path / "store")
    assert (again.n_kept, again.n_measured) == (5, 1)
    assert opened == ["one", "two", "two"]
    kept = {path: path.stat().st_mtime_ns for path in before}
    assert sum(before[path] != kept[path] for path in before) == 1
    assert tlc.sweep(plan_of(models, ["one", "two"], 4), tmp_path / "store").n_measured == 2


def test_a_cell_holds_what_analyze_measures(models: Path, loaded: dict[str, Any], opened: list[str], tmp_path: Path):
    plan = plan_of(models, ["two"], 1, settings={"k": [2, 0.25], "tokens": [0, -1], "normalizer": "trace"})
    store = tlc.sweep(plan, tmp_path / "store").store
    (cell,) = plan.cells
    found = store.load(cell.key)
    model = loaded[str((models / "two").resolve())]
    traced = tlc.trace(model, cell.prompt)
    truth = tlc.depth_coupling(traced, [2, 0.25], tokens=[0, -1], normalizer="trace")
    assert torch.equal(found.coupling.values, truth.values) and found.coupling.normalizer == "trace"
    assert torch.equal(found.growth.norms, tlc.growth(traced).norms)
    assert found.attention is None and found.tokens == traced.str_tokens


def test_fresh_weights_are_measured_beside_the_last_revision(models: Path, loaded, opened: list[str], tmp_path: Path):
    plan = plan_of(models, ["one"], 2, random_baseline=[0, 3])
    store = tlc.sweep(plan, tmp_path / "store").store
    assert opened == ["one"]
    table = store.table()
    assert sorted(table["random_seed"].dropna().tolist()) == [0, 0, 3, 3]
    (cell,) = (one for one in plan.cells if one.random_seed == 3 and one.prompt == words(2)[1])
    fresh = tlc.random_baseline(loaded[str((models / "one").resolve())], 3)
    truth = tlc.depth_coupling(tlc.trace(fresh, cell.prompt), 2, sublayers="block")
    assert torch.equal(store.load(cell.key).coupling.values, truth.values)


def test_what_fails_is_kept_and_tried_again(models: Path, loaded, opened: list[str], tmp_path: Path):
    text = ["w1 w2 w3 w4 w5 w6", "w1", "w6 w5 w4 w3 w2 w1"]  # the second has no token 4
    settings = {"k": 2, "tokens": 4}
    plan = plan_of(models, ["one", "EleutherAI/nowhere"], prompts={"text": text}, settings=settings)
    report = tlc.sweep(plan, tmp_path / "store")
    assert (report.n_measured, len(report.failed), report.unfinished, report.complete) == (2, 4, (), False)
    errors = {(cell.model, cell.prompt): error for cell, error in report.failed.items()}
    assert "ArgumentError: tokens=4 is not allowed" in errors["one", text[1]]
    assert all("ModelLoadError: no EleutherAI/nowhere" in errors["EleutherAI/nowhere", prompt] for prompt in text)
    assert report.store.table()["status"].value_counts().to_dict() == {"failed": 4, "measured": 2 * 3}
    assert all("Traceback" in one.trace for one in report.store.failures())
    loaded["EleutherAI/nowhere"] = loaded[str((models / "one").resolve())]
    try:
        again = tlc.sweep(plan, tmp_path / "store")
    finally:
        del loaded["EleutherAI/nowhere"]
    assert (again.n_kept, again.n_measured, len(again.failed)) == (2, 2, 2)
    assert {cell.prompt for cell in again.failed} == {text[1]}


def test_a_model_that_is_not_on_this_machine_is_told_of_and_the_sweep_goes_on(models: Path, tmp_path: Path):
    """With local_files_only, the loader's own error: nothing is patched here."""
    report = tlc.sweep(plan_of(models, ["nowhere/missing", "one"], 2), tmp_path / "store")
    assert (report.n_measured, len(report.failed), report.unfinished) == (2, 2, ())
    for cell, error in report.failed.items():
        assert cell.model == "nowhere/missing"
        assert error.startswith("ModelLoadError: TransformerLens could not load name='nowhere/missing'"), error


def test_a_file_that_lost_its_end_is_measured_again(models: Path, opened: list[str], tmp_path: Path):
    plan = plan_of(models, ["one"])
    store = tlc.sweep(plan, tmp_path / "store").store
    whole = contents(store)
    path = store.path(plan.cells[1].key)
    path.write_bytes(path.read_bytes()[:-10])
    assert store.table()["status"].value_counts().to_dict() == {"measured": 2, "damaged": 1}
    report = tlc.sweep(plan, tmp_path / "store")
    assert (report.n_kept, report.n_measured) == (2, 1)
    assert contents(store) == whole


def test_any_executor_gives_the_same(models: Path, opened: list[str], tmp_path: Path):
    plan = plan_of(models, ["one", "two"])
    here = tlc.sweep(plan, tmp_path / "here")
    with ThreadPoolExecutor(1) as executor:
        there = tlc.sweep(plan, tmp_path / "there", executor=executor, cells_per_job=2)
    assert there.complete and opened == ["one", "two", "one", "one", "two", "two"]
    assert contents(there.store) == contents(here.store)


class Breaking(Executor):
    """Runs the first call and then breaks, as a pool does whose process was killed."""

    def __init__(self) -> None:
        self.calls = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        call = pickle.loads(pickle.dumps((fn, args)))  # what another process would get
        self.calls += 1
        if self.calls == 1:
            future.set_result(call[0](*call[1]))
        else:
            future.set_exception(BrokenProcessPool("killed"))
        return future


def test_what_a_lost_process_had_is_taken_up_by_a_rerun(models: Path, opened: list[str], tmp_path: Path):
    plan = plan_of(models, ["one", "two"])
    report = tlc.sweep(plan, tmp_path / "store", executor=Breaking())
    assert (report.n_measured, len(report.unfinished), report.failed) == (3, 3, {})
    assert report.reasons == ("two: BrokenProcessPool: killed",)
    assert tlc.sweep(plan, tmp_path / "store").n_measured == 3


@pytest.mark.slow
def test_processes_give_what_one_gives(models: Path, opened: list[str], tmp_path: Path):
    plan = plan_of(models, ["one"], 4)
    report = tlc.sweep(plan, tmp_path / "two", workers=2)
    assert report.complete, report.reasons
    assert contents(report.store) == contents(tlc.sweep(plan, tmp_path / "one").store)


@pytest.mark.parametrize("more", [{"workers": 0}, {"cells_per_job": 0}, {"workers": 2, "executor": Breaking()}])
def test_arguments_of_a_sweep(models: Path, tmp_path: Path, more: dict[str, Any]):
    with pytest.raises(ArgumentError, match=f"^{next(iter(more))}="):
        tlc.sweep(plan_of(models, ["one"]), tmp_path / "store", **more)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]).returncode:
        pytest.skip("mounting a small file system needs root, and a sandbox that lets it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_the_sweep_and_keeps_the_rest(models: Path, opened: list[str], small_disk: Path):
    plan = plan_of(models, ["one"], 30)
    with pytest.raises(ResultFileError, match=f"os error {errno.ENOSPC}|No space left"):
        tlc.sweep(plan, small_disk / "store")
    store = tlc.SweepStore(small_disk / "store")
    done = contents(store)  # raises where one is not whole
    assert 5 < len(done) < 30
    assert not list(store.folder.rglob(".*"))
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    report = tlc.sweep(plan, store)
    assert report.complete and report.n_kept == len(done)
    assert {name: content for name, content in contents(store).items() if name in done} == done


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(models, opened, small_disk: Path):
    plan = plan_of(models, ["one"], 2)
    store = tlc.sweep(plan, small_disk / "store").store
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="cannot be written to: .*Read-only file system"):
        tlc.sweep(plan_of(models, ["one"], 3), store.folder)
    assert len(tlc.SweepStore(store.folder).table()) == 2


def test_a_write_that_fails_is_no_failed_cell(models: Path, opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever file system: an error of writing ends the sweep, by an executor too."""
    plan, calls = plan_of(models, ["one"]), []

    def full(*args: Any, **kwargs: Any) -> bytes:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    import tlcoupling.results.files

    real = tlcoupling.results.files.save
    monkeypatch.setattr(tlcoupling.results.files, "save", full)
    with pytest.raises(ResultFileError, match="No space left"), ThreadPoolExecutor(1) as executor:
        tlc.sweep(plan, tmp_path / "store", executor=executor)
    store = tlc.SweepStore(tmp_path / "store")
    assert len(store.keys()) == 1 and not store.failed_keys()


def script(*arguments: object) -> str:
    """Runs ``sweep_forks.py``: one process that has loaded torch and a model, and forks from there."""
    command = [sys.executable, str(HERE / "sweep_forks.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_whole_files(models: Path, tmp_path: Path):
    """50 times; the script checks every file after each, and prints how often a kill came while a file was written."""
    out = script("kills", models, tmp_path, 50)
    numbers = dict(line.split() for line in out.splitlines())
    assert int(numbers["kills"]) == 50
    assert int(numbers["in_mid_sweep"]) >= 30 and int(numbers["in_mid_write"]) >= 3, out
    killed, undisturbed = (contents(tlc.SweepStore(tmp_path / name)) for name in ("killed", "undisturbed"))
    assert killed == undisturbed
    assert not list((tmp_path / "killed").rglob(".*"))


@pytest.mark.slow
def test_two_processes_on_one_store_do_no_harm(models: Path, tmp_path: Path):
    numbers = dict(line.split() for line in script("two", models, tmp_path).splitlines())
    both, undisturbed = (contents(tlc.SweepStore(tmp_path / name)) for name in ("both", "undisturbed"))
    assert both == undisturbed
    assert int(numbers["failed"]) == 0 and not list((tmp_path / "both").rglob(".*"))


@pytest.mark.slow
def test_memory_is_flat_over_500_cells(models: Path, tmp_path: Path):
    """From the 150th cell to the 500th, resident memory grows by less than 10 kB a cell.

    A cell that was kept whole (its trace, Jacobians and result) would be more than 100 kB even here; 10 kB a cell is
    what the allocator's arenas were seen to move by.
    """
    numbers = dict(line.split() for line in script("memory", models, tmp_path, 500).splitlines())
    assert int(numbers["cells"]) == 500
    assert float(numbers["bytes_a_cell"]) < 10_000, numbers


def test_the_command_sweeps_goes_on_and_merges(models: Path, loaded, opened: list[str], tmp_path: Path):
    import pandas as pd

    for name in ("one", "two"):
        shutil.copytree(models / name, tmp_path / name)
        loaded[str((tmp_path / name).resolve())] = loaded[str((models / name).resolve())]
        (tmp_path / f"{name}.toml").write_text(
            f'models = ["{name}"]\nprompts.text = ["w1 w2 w3 w4 w5", "w1"]\nsettings = {{ k = 2, tokens = 4 }}\n'
        )
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "one.toml")], env={"COLUMNS": "80"})
    assert result.exit_code == 1
    assert "2 cells: 1 measured in" in result.stdout and "1 failed" in result.stdout
    assert "1 x ArgumentError: tokens=4 is not allowed" in result.stdout
    CliRunner().invoke(app, ["sweep", str(tmp_path / "two.toml"), "--store", str(tmp_path / "other")])
    arguments = [str(tmp_path / "one.store"), str(tmp_path / "other"), "--into", str(tmp_path / "all")]
    result = CliRunner().invoke(app, ["merge", *arguments, "--table", str(tmp_path / "all.parquet")])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'other'}: 1 of 1 cells are new" in result.stdout
    table = pd.read_parquet(tmp_path / "all.parquet")
    assert table["model"].value_counts().to_dict() == {"one": 4, "two": 4}
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "none"), "--into", str(tmp_path / "all")])
    assert result.exit_code == 1 and "not a store of sweep results" in result.stderr


def test_an_interrupt_stops_the_sweep(models: Path, opened: list[str], tmp_path: Path):
    plan = plan_of(models, ["one"])

    def interrupt(cell: Any, error: str | None) -> None:
        raise KeyboardInterrupt

    tlc.SweepStore(tmp_path / "store", create=True)
    with pytest.raises(KeyboardInterrupt):
        measure_group(plan.groups[0], str(tmp_path / "store"), interrupt)
    assert tlc.sweep(plan, tmp_path / "store").n_kept == 1
