"""Sweeps through executors of other packages, each with a worker that is killed in mid-cell, and the re-run.

Each is skipped where its package is absent: ``scripts/beside.py --run distributed executorlib mpi4py`` installs them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from small_sweeps import contents_apart_from_times, needs_folders, plan_of, save_model

import tlcoupling as tlc

HERE = Path(__file__).parents[1]
CELLS = 25  # of each model: several seconds, so that a signal comes in the middle of them
DEADLINE = 500.0  # seconds; the machine may be busy

pytestmark = pytest.mark.slow


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tlc.Plan:
    needs_folders()
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))  # of the workers
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for seed, name in enumerate(("one", "two")):
        save_model(tmp_path / name, seed)
    return plan_of(tmp_path, ["one", "two"], CELLS, settings={"k": [2, 4], "tokens": "all"})


Victims = Callable[[], list[psutil.Process]]


def kill_in_mid_cell(store: tlc.SweepStore, victims: Victims, more: int = 2) -> None:
    """Kill processes once this many more cells are stored."""
    known, until = len(store.keys()), time.monotonic() + DEADLINE
    while len(store.keys()) < known + more:
        assert time.monotonic() < until, "no cell is measured"
        time.sleep(0.01)
    for process in victims():
        process.kill()


def require_whole(store: tlc.SweepStore, plan: tlc.Plan, folder: Path) -> None:
    """All cells are there, none half-written, and some of both models are what this process measures."""
    assert store.keys() == {cell.key for cell in plan.cells} and not store.failed_keys()
    few = plan_of(folder, ["one", "two"], 2, settings={"k": [2, 4], "tokens": "all"})
    here = tlc.sweep(few, folder / "here").store
    for key in here.keys():  # noqa: SIM118 (a store is no mapping)
        assert contents_apart_from_times(store.path(key)) == contents_apart_from_times(here.path(key))


def swept(plan: tlc.Plan, store: tlc.SweepStore, executor: Executor, victims: Victims) -> tlc.SweepReport:
    """Sweep while processes are killed."""
    with ThreadPoolExecutor(1) as thread:
        report = thread.submit(tlc.sweep, plan, store, executor=executor)
        kill_in_mid_cell(store, victims)
        return report.result(timeout=DEADLINE)


def times_of(store: tlc.SweepStore) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (store.folder / "cells").iterdir() if path.name[0] != "."}


def test_dask_gives_a_killed_workers_cells_to_another(plan: tlc.Plan, tmp_path: Path):
    """Or gives them up, where it is told to: then they are reported, and a re-run measures them."""
    distributed = pytest.importorskip("distributed")
    store = tlc.SweepStore(tmp_path / "store", create=True)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
        client.get_executor() as executor,
    ):

        def busy() -> list[psutil.Process]:
            processes = client.run(os.getpid)
            return [psutil.Process(processes[worker]) for worker, keys in client.processing().items() if keys][:1]

        cluster.scheduler.allowed_failures = 0
        first = swept(plan, store, executor, busy)
        (reason,) = first.reasons
        assert "KilledWorker" in reason and not first.failed
        assert 0 < len(first.unfinished) < CELLS
        kept = times_of(store)
        cluster.scheduler.allowed_failures = 3  # Dask's own choice
        client.wait_for_workers(2)
        again = swept(plan, store, executor, busy)
        assert again.complete and not again.reasons
        assert again.n_kept == len(kept) == 2 * CELLS - len(first.unfinished)
    assert times_of(store).items() >= kept.items()
    require_whole(store, plan, tmp_path)


def test_executorlib_gives_a_killed_workers_cells_to_another(plan: tlc.Plan, tmp_path: Path):
    """Where none is left, they are reported, and a re-run measures them."""
    executorlib = pytest.importorskip("executorlib")
    store = tlc.SweepStore(tmp_path / "store", create=True)

    def workers() -> list[psutil.Process]:
        children = psutil.Process().children(recursive=True)
        return [one for one in children if any("executorlib" in word for word in one.cmdline())]

    def through_executorlib(victims: Victims) -> tlc.SweepReport:
        with executorlib.SingleNodeExecutor(max_workers=2, block_allocation=True, hostname_localhost=True) as executor:
            return swept(plan, store, executor, victims)

    first = through_executorlib(workers)
    assert all("ExecutorlibSocketError" in reason for reason in first.reasons) and first.reasons and not first.failed
    assert 0 < len(first.unfinished) < 2 * CELLS
    kept = times_of(store)
    again = through_executorlib(lambda: workers()[:1])
    assert again.complete and not again.reasons and again.n_kept == len(kept)
    assert times_of(store).items() >= kept.items()
    require_whole(store, plan, tmp_path)


_SWEEP_BY_MPI = """
import sys
import tlcoupling as tlc
from mpi4py.futures import MPIPoolExecutor

if __name__ == "__main__":
    with MPIPoolExecutor() as executor:
        print(tlc.sweep(sys.argv[1], sys.argv[2], executor=executor, cells_per_job=5))
"""


def test_mpi_ends_the_job_of_a_killed_rank_and_a_rerun_goes_on(plan: tlc.Plan, tmp_path: Path):
    """MPI's own way: mpirun ends all ranks. What was stored is whole, and the next job measures the rest."""
    pytest.importorskip("mpi4py")
    if not shutil.which("mpirun"):
        pytest.skip("needs Debian's package openmpi-bin")
    script, toml, store = (
        tmp_path / "script.py",
        tmp_path / "plan.toml",
        tlc.SweepStore(tmp_path / "store", create=True),
    )
    script.write_text(_SWEEP_BY_MPI)
    prompts = [cell.prompt for cell in plan.groups[0].cells]
    toml.write_text(
        f'models = ["one", "two"]\nlocal_files_only = true\nprompts.text = {prompts}\n'
        "[settings]\nk = [2, 4]\ntokens = 'all'\n"
    )
    plan = tlc.Plan.read(toml)
    # on this machine alone, whatever its cores: one rank submits, two measure
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--host", "localhost:3", "-n", "3", sys.executable]
    command += ["-m", "mpi4py.futures", str(script), str(toml), str(store.folder)]

    def ranks(job: subprocess.Popen[str]) -> list[psutil.Process]:
        return [one for one in psutil.Process(job.pid).children() if "mpi4py.futures" in one.cmdline()]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        timer = threading.Timer(DEADLINE, job.kill)
        timer.start()
        kill_in_mid_cell(store, lambda: ranks(job)[-1:])
        out, _ = job.communicate()
        timer.cancel()
    assert job.returncode not in (0, None) and f"signal {signal.SIGKILL.value}" in out, out
    kept = times_of(store)
    assert 2 <= len(kept) < 2 * CELLS
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    assert f"50 cells: {len(kept)} measured before, {2 * CELLS - len(kept)} now, 0 failed, 0 unfinished" in done.stdout
    assert times_of(store).items() >= kept.items()
    require_whole(store, plan, tmp_path)
