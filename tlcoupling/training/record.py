"""A training run's measurements, in a store or in memory, separate from those of other runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.errors import ResultFileError, StoreError
from tlcoupling.sweeps.cells import Cell, ModelFacts
from tlcoupling.sweeps.store import SweepStore, as_store, describe
from tlcoupling.sweeps.table import frame, row_of_failure, rows_of_cell

if TYPE_CHECKING:
    import pandas


class TrainingRecord:
    """The cells of one run: those of a store that have its name, or rows in memory.

    Only the name tells the cells of two runs apart. So a new run needs a new name, and never replaces another run's
    results. A resumed run replaces the results of steps after its checkpoint.

    Args:
        name: the run's name.
        store: a store or its folder, created if missing; None for memory.
        resume: whether to continue the run of this name in the store.

    Raises:
        StoreError: the store cannot be written to, or already holds this run, and ``resume=False``.
    """

    def __init__(self, name: str, store: SweepStore | str | Path | None, resume: bool) -> None:
        self.name, self._resume = name, resume
        self._store = None if store is None else as_store(store, create=True)
        self._own: set[str] = set()
        self._rows: list[dict[str, Any]] = []  # without a store
        if self._store is not None and not resume:
            self._refuse_another(self._store)

    def _refuse_another(self, store: SweepStore) -> None:
        steps = sorted({cell.step or 0 for cell in _cells(store) if cell.model == self.name})
        if steps:
            raise StoreError(
                f"the store {str(store.folder)!r} has a run named {self.name!r} already, steps {steps[0]} to "
                f"{steps[-1]}; allowed: another name=, or resume=True to continue that run"
            )

    def keep(self, cell: Cell, outcome: Analysis | Exception, facts: ModelFacts, seconds: float) -> None:
        """Record a measurement, or why there is none.

        Args:
            cell: the cell.
            outcome: the measurement, or the error.
            facts: the model's sizes.
            seconds: duration of the attempt.

        Raises:
            StoreError, ResultFileError: it cannot be written, or another run has written that cell meanwhile.
        """
        if self._store is None:
            if isinstance(outcome, Exception):
                self._rows.append(row_of_failure(cell, describe(outcome), seconds))
            else:
                self._rows += rows_of_cell(cell, outcome, facts)
            return
        if not self._resume and cell.key not in self._own and self._store.has(cell):
            raise StoreError(
                f"another run named {self.name!r} has written it to {str(self._store.folder)!r} meanwhile; its result "
                "is kept; allowed: another name="
            )
        if isinstance(outcome, Exception):
            self._store.fail(cell, outcome, seconds)
        else:
            self._store.save(cell, outcome, facts)
        self._own.add(cell.key)

    def table(self) -> pandas.DataFrame:
        """Return all measurements and failures of the run as a sweep's table."""
        if self._store is None:
            return frame(self._rows)
        table = self._store.table().sort_values(["step", "prompt_id"])
        return table.loc[table["model"] == self.name].reset_index(drop=True)


def _cells(store: SweepStore) -> Iterator[Cell]:
    """Yield measured and failed cells; skip damaged files, whose cell is unknown."""
    for key in sorted(store.keys()):
        try:
            yield store.read(key)[0]
        except ResultFileError:
            continue
    yield from (failure.cell for failure in store.failures())
