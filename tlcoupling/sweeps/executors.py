"""Executors for groups of cells: processes of this machine, or jobs of a Slurm cluster.

Both implement ``concurrent.futures.Executor``, the only interface that ``tlc.sweep`` needs.
"""

from __future__ import annotations

import getpass
import multiprocessing
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from tlcoupling.errors import ArgumentError, StoreError, TLCouplingError

_GATHER_SECONDS = 0.2  # calls submitted within this time become one job array
_GRACE_SECONDS = 10.0  # after a job leaves the queue, time for its result to reach this machine
_MAX_ARRAY_SIZE = 1001  # of a cluster that does not set it
_SHOWN = 300  # characters of a job's stderr in an error
_Call = tuple[Future, Callable[[Any], Any], dict[str, Any]]  # its future, its submission to an array, its resources


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes that share this machine's threads. They are spawned, since a fork breaks CUDA."""
    threads = max(1, torch.get_num_threads() // workers)
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
    )


def check_resources(resources: Mapping[str, Any]) -> None:
    """Check before submission that submitit knows the requested resources, if submitit is installed.

    Raises:
        ArgumentError: it does not; ``name`` is the unknown resource.
    """
    try:
        import submitit
    except ImportError:
        return  # without submitit there is no executor to request resources from
    # the debug cluster checks parameter names of every kind of cluster
    executor = submitit.AutoExecutor(folder=".", cluster="debug")
    for name, value in resources.items():
        try:
            executor.update_parameters(**{name: value})
        except (AssertionError, NameError, TypeError, ValueError) as error:
            raise ArgumentError(
                name, value, f"a resource that submitit accepts ({str(error).splitlines()[0]})"
            ) from error


class JobLostError(TLCouplingError):
    """A job of a cluster ended without a result: it was killed, or ran out of memory or time."""


class Requeued:
    """A function whose cluster job is requeued at its time limit or on preemption.

    The function runs again from its start and must skip finished work itself; a group of cells does.

    Attributes:
        job_ends: whether this process's job was told to end. Exceptions raised after this point are the shutdown
            signal, not task errors: submitit raises it in whatever code is running.
    """

    job_ends: ClassVar[bool] = False

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function. Our errors are returned, since submitit would pass on only the text of their traceback."""
        try:
            return self.function(*args, **kwargs)
        except TLCouplingError as error:
            return _Raised(error)
        except Exception as error:
            if not Requeued.job_ends:
                raise
            return _Raised(JobLostError(f"the job ended before its work: {error}"))

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Return the call for submitit to requeue, unless the limit of requeues is reached."""
        from submitit.helpers import DelayedSubmission

        Requeued.job_ends = True
        return DelayedSubmission(self, *args, **kwargs)


@dataclass(frozen=True)
class _Raised:
    """An error passed from one process to another."""

    error: TLCouplingError


class SlurmExecutor(Executor):
    """Runs calls as jobs of a Slurm cluster, through submitit. Calls submitted together become one job array.

    More calls than the cluster's ``MaxArraySize`` allows become several arrays.

    If a call's first argument has ``resources`` (a group of cells has the plan's), they are added to the executor's.
    Each set of resources gets its own array. A job that reaches its time limit or is preempted is requeued and
    continues with the missing cells.

    Args:
        folder: folder for submitit's scripts and logs, on a file system shared by the nodes.
        requeues: how often a job may reach its time limit before it fails.
        poll_seconds: time between two checks of the queue.
        **resources: as ``submitit.AutoExecutor.update_parameters`` takes them: ``timeout_min``, ``mem_gb``,
            ``cpus_per_task``, ``gpus_per_node``, ``slurm_partition``, ``slurm_array_parallelism``, ...

    Raises:
        StoreError: submitit is not installed, or Slurm jobs cannot be submitted from this machine.

    Example:
        >>> with SlurmExecutor("logs", timeout_min=60, gpus_per_node=1) as executor:  # doctest: +SKIP
        ...     tlc.sweep("plan.toml", "results", executor=executor)
    """

    def __init__(self, folder: str | Path, *, requeues: int = 3, poll_seconds: float = 5.0, **resources: Any) -> None:
        self._folder, self._requeues, self._resources = folder, requeues, resources
        self._poll_seconds = poll_seconds
        self._array(resources)
        self._lock = threading.Condition()
        self._waiting: list[_Call] = []
        self._jobs: dict[Future, _Job] = {}
        self._thread: threading.Thread | None = None
        self._closed = False

    def _array(self, resources: Mapping[str, Any]) -> Any:
        """Return a submitit executor for jobs with these resources."""
        try:
            import submitit
        except ImportError as error:
            raise StoreError("sweeping through Slurm needs submitit: pip install submitit") from error
        try:
            executor = submitit.AutoExecutor(folder=self._folder, cluster="slurm", slurm_max_num_timeout=self._requeues)
        except (RuntimeError, OSError) as error:
            raise StoreError(f"sweeping through Slurm is not possible here: {error}") from error
        try:
            executor.update_parameters(**resources)
        except (AssertionError, NameError, TypeError, ValueError) as error:
            raise ArgumentError("resources", dict(resources), f"resources that submitit accepts ({error})") from error
        return executor

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Queue a call. It is submitted together with calls that follow within a moment."""
        future: Future[Any] = Future()
        resources = {**self._resources, **(getattr(args[0], "resources", {}) if args else {})}
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._waiting.append((future, lambda array: array.submit(Requeued(fn), *args, **kwargs), resources))
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="slurm-jobs", daemon=True)
                self._thread.start()
            self._lock.notify()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuse further calls; wait for the jobs, or cancel them."""
        with self._lock:
            self._closed = True
            if cancel_futures:
                for future in (*self._jobs, *(future for future, _, _ in self._waiting)):
                    future.cancel()
            self._lock.notify()
        if wait and self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        """Submit queued calls and settle finished jobs, until none are left and the executor is closed."""
        while True:
            with self._lock:
                if not self._waiting:
                    if self._closed and not self._jobs:
                        return
                    self._lock.wait(self._poll_seconds if self._jobs else None)
            time.sleep(_GATHER_SECONDS)
            with self._lock:
                waiting, self._waiting = self._waiting, []
            self._send(waiting)
            try:
                self._check_jobs()
            except Exception as error:  # of any type: nobody reads this thread's errors, only its futures'
                for future, job in self._jobs.items():
                    with suppress(OSError):
                        job.job.cancel(check=False)  # an unwatched job must not run beside a later sweep
                    _settle(future, error=error)
                self._jobs = {}

    def _send(self, waiting: list[_Call]) -> None:
        """Submit calls, those with equal resources as arrays. If an array is refused, only its calls fail."""
        alike: dict[str, list[_Call]] = {}
        for one in waiting:
            alike.setdefault(repr(sorted(one[2].items())), []).append(one)
        size = _max_array_size()
        arrays = [calls[start : start + size] for calls in alike.values() for start in range(0, len(calls), size)]
        for calls in arrays:
            try:
                array = self._array(calls[0][2])
                with array.batch():
                    jobs = [call(array) for _, call, _ in calls]
            except Exception as error:  # of any type: the other arrays can still run
                for future, _, _ in calls:
                    _settle(future, error=error)
            else:
                self._jobs |= {future: _Job(job) for (future, _, _), job in zip(calls, jobs, strict=True)}

    def _check_jobs(self) -> None:
        """Settle the futures of finished jobs, and cancel the jobs of cancelled futures."""
        queue, now = _queue(), time.monotonic()
        for future, job in list(self._jobs.items()):
            if future.cancelled():
                job.job.cancel(check=False)
                future.set_running_or_notify_cancel()
            elif job.job.paths.result_pickle.exists():
                _settle_by(future, job.job)
            elif queue is None or job.job.job_id in queue:
                job.last_seen = now
                continue
            elif now - job.last_seen < _GRACE_SECONDS:
                continue
            else:
                end = " ".join((job.job.stderr() or "nothing on its stderr").split())[-_SHOWN:]
                _settle(future, error=JobLostError(f"Slurm job {job.job.job_id} ended without a result: {end}"))
            del self._jobs[future]


@dataclass
class _Job:
    """A job and when it was last seen in the queue."""

    job: Any
    last_seen: float = field(default_factory=time.monotonic)


def _settle_by(future: Future, job: Any) -> None:
    """Set a future to its job's result or error."""
    try:
        result = job.result()
    except Exception as error:  # any error of the call
        _settle(future, error=error)
    else:
        _settle(future, error=result.error) if isinstance(result, _Raised) else _settle(future, result=result)


def _settle(future: Future, result: Any = None, error: Exception | None = None) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _max_array_size() -> int:
    """Return how many jobs the cluster takes in one array; Slurm's own default, 1001, if it does not answer."""
    try:
        said = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return _MAX_ARRAY_SIZE
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said.stdout, re.MULTILINE)
    return max(1, int(found[1])) if found else _MAX_ARRAY_SIZE


def _queue() -> set[str] | None:
    """Return ids of this user's waiting and running jobs, such as ``12_0`` in an array; None if Slurm does not answer.

    Uses ``squeue`` because submitit's ``sacct`` needs accounting, which many clusters lack.
    """
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={getpass.getuser()}"]
    try:
        queue = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return set(queue.stdout.split())
