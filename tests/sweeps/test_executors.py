"""Jobs of a cluster without a cluster: what is submitted, what comes back, and what becomes of the rest."""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, ModelLoadError, PlanError, StoreError
from tlcoupling.sweeps import executors, run
from tlcoupling.sweeps.executors import JobLostError, Requeued
from tlcoupling.sweeps.source import Source


class Job:
    """As submitit has them: it runs when it is submitted, unless it is kept waiting; an error comes back as text."""

    def __init__(self, call: Callable[[], Any], job_id: str, waits: bool) -> None:
        self.job_id, self.waits, self.cancelled = job_id, waits, False
        self.paths = SimpleNamespace(result_pickle=SimpleNamespace(exists=lambda: not self.waits))
        if not waits:
            try:
                self.outcome = pickle.loads(pickle.dumps(call()))
            except Exception:
                self.outcome = RuntimeError(traceback.format_exc())

    def result(self) -> Any:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self, check: bool) -> None:
        self.cancelled = True

    def stderr(self) -> str:
        return "gone"


class Array:
    """What submits jobs that all ask for the same."""

    def __init__(self, jobs: list[Job], waits: bool) -> None:
        self.jobs, self.waits = jobs, waits

    @contextmanager
    def batch(self) -> Iterator[None]:
        yield

    def submit(self, function: Any, *args: Any, **kwargs: Any) -> Job:
        # the first of an array runs at once
        job = Job(lambda: function(*args, **kwargs), str(len(self.jobs)), self.waits or bool(self.jobs))
        self.jobs.append(job)
        return job


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """A queue that takes everything but the partition "wrong", and keeps what is sent to "slow"."""
    jobs: list[Job] = []

    def array(self: Any, resources: dict[str, Any]) -> Array:
        if resources.get("slurm_partition") == "wrong":
            raise ArgumentError("resources", resources, "what submitit takes")
        return Array(jobs, resources.get("slurm_partition") == "slow")

    monkeypatch.setattr(tlc.SlurmExecutor, "_array", array)
    monkeypatch.setattr(executors, "_queue", lambda: {job.job_id for job in jobs if job.waits and not job.cancelled})
    monkeypatch.setattr(executors, "_GATHER_SECONDS", 0.05)
    return jobs


def ask(value: int, partition: str) -> Any:
    return SimpleNamespace(value=value, resources={"slurm_partition": partition})


def value_of(asked: Any) -> int:
    return asked.value


def test_an_array_that_is_not_taken_fails_alone(cluster: list[Job], tmp_path: Path):
    with tlc.SlurmExecutor(tmp_path, poll_seconds=0.05) as executor:
        good, bad = (executor.submit(value_of, ask(7, partition)) for partition in ("good", "wrong"))
        assert good.result(timeout=60) == 7
        assert isinstance(bad.exception(timeout=60), ArgumentError)
    assert [job.cancelled for job in cluster] == [False]


@pytest.mark.parametrize(("said", "sizes"), [("MaxArraySize            = 2\n", [2, 2, 1]), (None, [5])])
def test_arrays_are_as_long_as_the_cluster_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, sizes: list[int]
):
    if said is not None:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho 'SlurmUser = root\n{said}'\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if said else str(tmp_path))
    arrays: list[list[Job]] = []

    def array(self: Any, resources: dict[str, Any]) -> Array:
        arrays.append([])
        return Array(arrays[-1], True)

    monkeypatch.setattr(tlc.SlurmExecutor, "_array", array)
    monkeypatch.setattr(executors, "_queue", lambda: set())
    monkeypatch.setattr(executors, "_GRACE_SECONDS", 0.0)
    with tlc.SlurmExecutor(tmp_path, poll_seconds=0.05) as executor:
        arrays.clear()  # one is made to check the resources
        for future in [executor.submit(value_of, ask(value, "slow")) for value in range(5)]:
            assert isinstance(future.exception(timeout=60), JobLostError)
    assert [len(jobs) for jobs in arrays] == sizes


def test_jobs_that_nobody_can_look_after_are_cancelled(cluster: list[Job], tmp_path: Path, monkeypatch):
    def unknown() -> set[str]:
        raise KeyError("nobody is this process's user")

    monkeypatch.setattr(executors, "_queue", unknown)
    with tlc.SlurmExecutor(tmp_path, poll_seconds=0.05) as executor:
        futures = [executor.submit(value_of, ask(value, "slow")) for value in range(2)]
        assert all(isinstance(future.exception(timeout=60), KeyError) for future in futures)
    assert [job.cancelled for job in cluster] == [True, True]


def test_a_store_that_cannot_be_written_ends_the_sweep_through_a_cluster_too(
    cluster: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first job finds the disk full; the second, in the queue, is taken out of it."""

    def full(*args: Any) -> None:
        raise StoreError("No space left on device")

    monkeypatch.setattr(Source, "open", lambda source: (_ for _ in ()).throw(ModelLoadError("no model here")))
    monkeypatch.setattr(tlc.SweepStore, "fail", full)
    plan = tlc.Plan.of({"models": ["nowhere/one", "nowhere/two"], "prompts": {"text": ["a", "b"]}})
    with (
        pytest.raises(StoreError, match="No space left on device"),
        tlc.SlurmExecutor(tmp_path / "logs", poll_seconds=0.05) as executor,
    ):
        tlc.sweep(plan, tmp_path / "store", executor=executor)
    assert [job.cancelled for job in cluster] == [False, True]


@pytest.mark.parametrize("moment", ["open", "analyze"])
def test_the_end_of_a_jobs_time_is_no_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str):
    """submitit's own handler, of a job that was put into the queue too often, raises in whatever runs."""
    job_environment = pytest.importorskip("submitit.core.job_environment")
    utils = pytest.importorskip("submitit.core.utils")

    def is_killed(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)

    class Model:
        cfg = SimpleNamespace(d_model=2, n_heads=1)
        blocks = ()

        def parameters(self) -> list[Any]:
            return []

    monkeypatch.setattr(Source, "open", is_killed if moment == "open" else lambda source: Model())
    monkeypatch.setattr(run, "analyze", is_killed)
    monkeypatch.setattr(Requeued, "job_ends", False)
    plan = tlc.Plan.of({"models": ["nowhere/one"], "prompts": {"text": ["a", "b"]}})
    store = tlc.SweepStore(tmp_path / "store", create=True)
    delayed = utils.DelayedSubmission(Requeued(run.measure_group), plan.groups[0], str(store.folder))
    delayed.set_timeout(1, 0)
    paths = SimpleNamespace(submitted_pickle=tmp_path / "job.pkl")
    handler = job_environment.SignalHandler(SimpleNamespace(global_rank=0), paths, delayed)
    handler._start_time = 0.0
    before = signal.signal(signal.SIGUSR2, handler.checkpoint_and_try_requeue)
    try:
        found = delayed.result()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert not store.failed_keys() and not store.keys()
    assert isinstance(found.error, JobLostError) and "timed-out too many times" in str(found.error)


def test_resources_are_checked_when_the_plan_is_read():
    pytest.importorskip("submitit")
    content = {"models": ["gpt2"], "prompts": {"text": "a"}}
    text = "[resources]\nslurm_partition = 'test'\nslurm_partion = 'test'"
    with pytest.raises(PlanError, match="plan, line 3: resources: slurm_partion='test'.* Valid arguments: .*partition"):
        tlc.Plan.of({**content, "resources": {"slurm_partition": "test", "slurm_partion": "test"}}, text=text)
    with pytest.raises(PlanError, match="resources: timeout_min='an hour'"):
        tlc.Plan.of({**content, "resources": {"timeout_min": "an hour"}})
    assert tlc.Plan.of({**content, "resources": {"slurm_array_parallelism": 2, "mem_gb": 0.5}}).groups
