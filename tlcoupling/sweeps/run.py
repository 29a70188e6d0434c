"""Run a plan: measure missing cells group by group, here or with any executor, and store each at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlcoupling.analysis.analyze import analyze
from tlcoupling.arguments import check_int
from tlcoupling.errors import ArgumentError, ResultFileError, StoreError
from tlcoupling.models.baseline import random_baseline
from tlcoupling.progress import watched
from tlcoupling.sweeps.cells import Cell, ModelFacts
from tlcoupling.sweeps.executors import Requeued, process_pool
from tlcoupling.sweeps.plan import Plan
from tlcoupling.sweeps.source import CellGroup
from tlcoupling.sweeps.store import SweepStore, as_store, describe
from tlcoupling.text import counted, visible

_POLL_SECONDS = 2.0
OnCell = Callable[[Cell, str | None], None]


@dataclass(frozen=True)
class SweepReport:
    """The outcome of a sweep.

    Attributes:
        store: the store with the results.
        n_cells: cells of the plan.
        n_kept: cells measured before this sweep.
        n_measured: cells measured by this sweep.
        failed: cells that could not be measured, each with its error; the store keeps these too.
        unfinished: cells whose process or job ended before an outcome; a re-run measures them.
        reasons: why processes or jobs ended.
        seconds: wall-clock time.
        damaged: cells whose file in the store was damaged before this sweep, each with the reason. The sweep measures
            them again and replaces the file.
    """

    store: SweepStore
    n_cells: int
    n_kept: int
    n_measured: int
    failed: dict[Cell, str]
    unfinished: tuple[Cell, ...]
    reasons: tuple[str, ...]
    seconds: float
    damaged: dict[Cell, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line."""
        return (
            f"SweepReport({counted(self.n_cells, 'cell')}: {self.n_kept} measured before, {self.n_measured} now, "
            f"{len(self.failed)} failed, {len(self.unfinished)} unfinished; {self.seconds:.1f} s, "
            f"{str(self.store.folder)!r})"
        )

    @property
    def complete(self) -> bool:
        """Return whether every cell of the plan is measured."""
        return not self.failed and not self.unfinished


def sweep(
    plan: Plan | str | Path,
    store: SweepStore | str | Path | None = None,
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    cells_per_job: int | None = None,
    progress: bool | None = None,
) -> SweepReport:
    """Measure the cells of a plan that a store lacks.

    Each measured cell is stored at once, atomically, so a re-run after any interruption measures only what is missing.
    A failed cell leaves its error in the store, the others continue, and a re-run tries it again. A cell whose file is
    damaged is measured again. Several sweeps may share a store.

    Args:
        plan: a plan, or its path.
        store: a store, or its folder, created if missing; by default ``plan.store`` beside ``plan.toml``.
        executor: any ``concurrent.futures.Executor`` (``tlcoupling.sweeps.SlurmExecutor``, Dask's
            ``Client.get_executor()``, executorlib, mpi4py). Its workers must reach the store under the same path. None
            for this process.
        workers: number of processes on this machine, instead of an executor; they share torch's threads.
        cells_per_job: the most cells in one unit of work; by default as in the plan. Otherwise a model's cells are
            split if there are more processes than models. Each unit loads its model once.
        progress: show a progress bar with the number of failures; by default on a terminal or in a notebook.

    Returns:
        ``SweepReport``.

    Raises:
        PlanError: the plan is invalid. Raised before any work starts.
        StoreError, ResultFileError: the store cannot be written to (such as a full disk); its results are kept.
        ArgumentError: both an executor and workers, or a number below 1.

    Example:
        >>> report = tlc.sweep("plan.toml", "results", workers=2)  # doctest: +SKIP
        >>> report.store.table()  # doctest: +SKIP
    """
    started = time.perf_counter()
    for name, value in (("workers", workers), ("cells_per_job", cells_per_job)):
        if value is not None:
            check_int(name, value, 1)
    if executor is not None and workers is not None:
        raise ArgumentError("workers", workers, "None if an executor is given")
    plan = plan if isinstance(plan, Plan) else Plan.read(plan)
    store = as_store(plan.default_store if store is None else store, create=True)
    cells = {cell.key: cell for cell in plan.cells}
    measured = {key for key in store.keys() & set(cells) if store.has(cells[key])}
    damaged = store.damaged(set(cells) - measured)
    at_most = cells_per_job or plan.cells_per_job
    if at_most is None and workers is not None:
        at_most = math.ceil((len(cells) - len(measured)) / workers) or None
    groups = plan.pending(measured, at_most)
    with ExitStack() as stack:
        meter = stack.enter_context(_meter(len(cells), len(measured), progress))
        if workers is not None and groups:
            executor = stack.enter_context(process_pool(min(workers, len(groups))))
        reasons = _here(groups, store, meter) if executor is None else _elsewhere(groups, store, executor, meter)
    now = {key for key in cells if key not in measured and store.has(cells[key])}
    wrong = {one.cell.key: one.error for one in store.failures() if one.cell.key in cells}
    left = [cell for key, cell in cells.items() if key not in measured | now]
    return SweepReport(
        store=store,
        n_cells=len(cells),
        n_kept=len(measured),
        n_measured=len(now),
        failed={cell: wrong[cell.key] for cell in left if cell.key in wrong},
        unfinished=tuple(cell for cell in left if cell.key not in wrong),
        reasons=tuple(reasons),
        seconds=time.perf_counter() - started,
        damaged={cells[key]: reason for key, reason in damaged.items()},
    )


def measure_group(group: CellGroup, folder: str, on_cell: OnCell | None = None) -> list[tuple[str, str | None]]:
    """Measure the cells of a group that a store lacks. Executors run this function, in any process.

    Args:
        group: the cells; their model is loaded once.
        folder: the store's folder.
        on_cell: called after each cell, with its error or None.

    Returns:
        The keys of all cells of the group, each with its error or None.

    Raises:
        StoreError, ResultFileError: the store cannot be written to.
    """
    store, outcomes = SweepStore(folder), []

    def note(cell: Cell, error: str | None) -> None:
        outcomes.append((cell.key, error))
        if on_cell is not None:
            on_cell(cell, error)

    def refuse(cells: Sequence[Cell], error: Exception, began: float) -> None:
        if Requeued.job_ends:
            raise error  # a shutdown signal, not a cell's error
        for cell in cells:
            store.fail(cell, error, time.perf_counter() - began)
            note(cell, describe(error))

    wanted = [cell for cell in group.cells if not store.has(cell)]
    for cell in group.cells:
        if cell not in wanted:
            note(cell, None)  # another process was faster
    model: Any = None
    for seed, cells in _by_seed(wanted):
        began = time.perf_counter()
        try:
            if model is None:
                model = group.source.open()
            subject = model if seed is None else random_baseline(model, seed)
            facts = ModelFacts.of(subject)
        except Exception as error:  # of any type: other groups can still be measured
            refuse(cells, error, began)
            continue
        for cell in cells:
            if store.has(cell):
                note(cell, None)
                continue
            began = time.perf_counter()
            prompt = list(cell.prompt) if isinstance(cell.prompt, tuple) else cell.prompt
            try:
                analysis = analyze(subject, prompt, attention=False, **cell.settings.arguments())
            except Exception as error:  # of any type: other cells can still be measured
                refuse([cell], error, began)
                continue
            store.save(cell, analysis, facts)
            note(cell, None)
    return outcomes


def _by_seed(cells: Sequence[Cell]) -> Iterator[tuple[int | None, list[Cell]]]:
    """Yield the cells of the model itself, then those of each set of random weights."""
    for seed in dict.fromkeys(cell.random_seed for cell in cells):
        yield seed, [cell for cell in cells if cell.random_seed == seed]


def _here(groups: Sequence[CellGroup], store: SweepStore, meter: _Meter) -> list[str]:
    for group in groups:
        meter.show(str(group.source))
        measure_group(group, str(store.folder), lambda cell, error: meter.add(1, error is not None))
    return []


def _elsewhere(groups: Sequence[CellGroup], store: SweepStore, executor: Executor, meter: _Meter) -> list[str]:
    """Submit groups to an executor and wait. A process or job that ends without a result does not stop the others."""
    futures: dict[Future[list[tuple[str, str | None]]], CellGroup] = {}
    reasons: dict[str, None] = {}
    try:
        for group in groups:
            futures[executor.submit(measure_group, group, str(store.folder.resolve()))] = group
    except RuntimeError as error:  # the pool broke or was shut down
        reasons[describe(error)] = None
    waiting = set(futures)
    failures = finished = 0
    meter.show(f"{len(waiting)} jobs")
    try:
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_SECONDS)
            for future in done:
                try:
                    outcomes = future.result()
                except (StoreError, ResultFileError):
                    raise
                except (Exception, CancelledError) as error:
                    reasons[f"{futures[future].source}: {describe(error)}"] = None
                    continue
                finished += len(outcomes)
                failures += sum(error is not None for _, error in outcomes)
            keys = store.keys()
            meter.set(sum(cell.key in keys for group in groups for cell in group.cells), failures)
    except BaseException:
        for future in waiting:
            future.cancel()
        raise
    return list(reasons)


@contextmanager
def _meter(total: int, kept: int, progress: bool | None) -> Iterator[_Meter]:
    """Yield a meter, shown as a progress bar if wanted."""
    if not (watched() if progress is None else progress):
        yield _Meter(None, None, kept)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        MofNCompleteColumn(),
        TextColumn("cells"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Meter(bar, bar.add_task("", total=total, completed=kept, failed="", what=""), kept)


class _Meter:
    """A progress bar, or a stand-in that shows nothing."""

    def __init__(self, bar: Any, task: Any, kept: int) -> None:
        self._bar, self._task, self._kept = bar, task, kept
        self._done = self._failed = 0

    def show(self, what: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, what=visible(what))

    def add(self, cells: int, failed: bool) -> None:
        self.set(self._done + cells - failed, self._failed + failed)

    def set(self, done: int, failed: int) -> None:
        self._done, self._failed = done, failed
        if self._bar is not None:
            shown = f"[red]{failed} failed[/]" if failed else ""
            self._bar.update(self._task, completed=self._kept + done + failed, failed=shown)
