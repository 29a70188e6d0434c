"""A sweep through a real Slurm: a job that is killed in mid-cell, one that is preempted, and the re-run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from small_sweeps import contents_apart_from_times, needs_folders, plan_of, save_model

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError

HERE = Path(__file__).parents[1]
CLUSTER = HERE / "slurm_cluster.sh"
CELLS = 25  # of each model: several seconds, so that a signal comes in the middle of them


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One node on loopback."""
    pytest.importorskip("submitit", reason="sweeping through Slurm needs submitit")
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("a Slurm of our own needs root, and Debian's packages slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("PYTHONPATH", str(HERE.parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            subprocess.run([CLUSTER, "start", folder], check=True)
            yield
        finally:
            subprocess.run([CLUSTER, "stop", folder], check=True)


def worker(task: int, deadline: float) -> psutil.Process:
    """The process that does a task of the array, as soon as there is one."""
    while time.monotonic() < deadline:
        for process in psutil.process_iter():
            try:
                if "submitit.core._submit" in process.cmdline() and process.name().startswith("python"):
                    variables = process.environ()
                    if variables.get("SLURM_ARRAY_TASK_ID") == str(task) and "SLURM_PROCID" in variables:
                        return process
            except psutil.Error:
                continue
        time.sleep(0.05)
    raise AssertionError(f"task {task} never ran")


def cells_of(store: tlc.SweepStore, plan: tlc.Plan, index: int) -> int:
    return len(store.keys() & {cell.key for cell in plan.groups[index].cells})


@pytest.mark.slow
def test_a_killed_job_and_a_preempted_one(cluster: None, tmp_path: Path):
    needs_folders()
    for seed, name in enumerate(("one", "two")):
        save_model(tmp_path / name, seed)
    settings = {"k": [2, 4], "tokens": "all"}
    plan = plan_of(tmp_path, ["one", "two"], CELLS, settings=settings, resources={"timeout_min": 5})
    store = tlc.SweepStore(tmp_path / "store", create=True)
    deadline = time.monotonic() + 500  # the machine may be busy

    def through_slurm() -> tlc.SweepReport:
        with tlc.SlurmExecutor(tmp_path / "logs", poll_seconds=0.5, cpus_per_task=1) as executor:
            return tlc.sweep(plan, store, executor=executor)

    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(through_slurm)
        for task, sent in ((0, signal.SIGKILL), (1, signal.SIGUSR2)):
            process = worker(task, deadline)
            while cells_of(store, plan, task) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(sent)
        report = first.result()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "cells").iterdir()}
    for path in kept:
        tlc.load(path)  # raises where it is not whole
    # the preempted job went back into the queue and did the rest; the killed one is told of, and its cells are missing
    assert cells_of(store, plan, 1) == CELLS
    assert 2 <= cells_of(store, plan, 0) < CELLS
    assert {cell.model for cell in report.unfinished} == {"one"} and not report.failed
    (reason,) = report.reasons
    assert reason.startswith("one: JobLostError: Slurm job") and "Killed" in reason
    arrays = {path.name.split("_")[0] for path in (tmp_path / "logs").glob("*_0_log.out")}
    assert len(arrays) == 1, "both jobs are one array"

    again = through_slurm()
    assert again.complete and again.n_kept == len(kept) and again.n_measured == 2 * CELLS - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert store.keys() == {cell.key for cell in plan.cells}
    assert not list((tmp_path / "store" / "cells").glob(".*"))
    few = plan_of(tmp_path, ["one"], 4, settings=settings, resources={"timeout_min": 5})
    here = tlc.sweep(few, tmp_path / "here").store
    assert len(here.keys() & store.keys()) == 4
    for key in here.keys():  # noqa: SIM118 (a store is no mapping)
        assert contents_apart_from_times(store.path(key)) == contents_apart_from_times(here.path(key))


def test_resources_that_submitit_does_not_know(cluster: None, tmp_path: Path):
    with pytest.raises(ArgumentError, match=r"resources=\{'memory': 4\}.*submitit"):
        tlc.SlurmExecutor(tmp_path, memory=4)


@pytest.mark.slow
def test_more_jobs_than_one_array_takes(cluster: None, tmp_path: Path):
    """The cluster takes two in one array, and refuses three."""
    with tlc.SlurmExecutor(tmp_path, poll_seconds=0.5, cpus_per_task=1, timeout_min=5) as executor:
        futures = [executor.submit(abs, -value) for value in range(3)]
        assert [future.result(timeout=300) for future in futures] == [0, 1, 2]
    jobs = sorted(path.name.split("_")[:2] for path in tmp_path.glob("*_0_log.out"))
    assert [index for _, index in jobs] == ["0", "1", "0"]
    assert len({array for array, _ in jobs}) == 2
