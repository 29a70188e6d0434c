"""What a training run's monitor has measured: kept in a store, or in memory, apart from other runs' measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.errors import ResultFileError, StoreError
from tlcoupling.results.files import read_note
from tlcoupling.sweeps.cells import Cell, ModelFacts
from tlcoupling.sweeps.store import SweepStore, as_store, describe
from tlcoupling.sweeps.table import frame, row_of_failure, rows_of_cell

if TYPE_CHECKING:
    import pandas


class TrainingRecord:
    """The cells of one run: those of a store that have its name, or rows in memory.

    Cells of two runs are told apart by the run's name alone. So a run begins only where no other of its name is, and
    replaces no result that is not its own; one that goes on after a checkpoint says so, and then replaces what the
    steps after that checkpoint left.

    Args:
        name: of the run.
        store: a store or its folder, made where it is missing; None for memory.
        resume: whether the run goes on from what the store has of it.

    Raises:
        StoreError: the store cannot be written to, or has a run of that name that is not to be gone on with.
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
                f"{steps[-1]}; allowed: another name=, or resume=True where this run goes on with that one"
            )

    def keep(self, cell: Cell, outcome: Analysis | Exception, facts: ModelFacts, seconds: float) -> None:
        """Keep a measurement, or why there is none.

        Args:
            cell: what was to be measured.
            outcome: the measurement, or the error.
            facts: what is known of the model.
            seconds: that the attempt took.

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
        """All that is kept of the run, as the table of a sweep."""
        if self._store is None:
            return frame(self._rows)
        table = self._store.table().sort_values(["step", "prompt_id"])
        return table.loc[table["model"] == self.name].reset_index(drop=True)


def _cells(store: SweepStore) -> Iterator[Cell]:
    """What was measured and what failed; what a damaged file was of, nobody knows."""
    for key in sorted(store.keys()):
        try:
            yield Cell.from_json(read_note(store.path(key))["cell"])
        except ResultFileError:
            continue
    yield from (failure.cell for failure in store.failures())
