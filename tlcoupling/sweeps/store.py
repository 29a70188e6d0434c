"""A store: a folder with one file per measured cell, from any process, machine or training run.

``cells/KEY.safetensors`` is a whole ``Analysis`` with its cell in the header. ``failed/KEY.json`` says why a cell could
not be measured. Files are written atomically, and two writers of one cell write the same contents, so any number of
processes can share a store without a lock.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.errors import ResultFileError, StoreError, TLCouplingError
from tlcoupling.results.atomic import remove_abandoned, replacing
from tlcoupling.results.base import read_result, write_result
from tlcoupling.results.files import read_note
from tlcoupling.sweeps.agreement import differences
from tlcoupling.sweeps.cells import Cell, ModelFacts
from tlcoupling.sweeps.table import (
    frame,
    row_of_damage,
    row_of_failure,
    row_of_outdated,
    rows_of_cell,
    write_parquet,
)

if TYPE_CHECKING:
    import pandas

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Failure:
    """Why a cell could not be measured.

    Attributes:
        cell: the cell.
        error: the error's type and message.
        trace: its traceback.
        seconds: duration of the attempt.
    """

    cell: Cell
    error: str
    trace: str = ""
    seconds: float = 0.0


class SweepStore:
    """A folder of measured cells.

    Args:
        folder: its path.
        create: create the folder if missing, and check that it is writable.

    Raises:
        StoreError: there is no store, or it is not writable; the message says why.

    Example:
        >>> store = tlc.SweepStore("results")  # doctest: +SKIP
        >>> store.table().groupby("model")["excess"].mean()  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path, create: bool = False) -> None:
        self.folder = Path(folder)
        self._cells, self._failed = self.folder / "cells", self.folder / "failed"
        if create:
            self._prepare()
        elif not self._cells.is_dir():
            raise StoreError(f"{str(folder)!r} is not a store of sweep results: it has no folder 'cells'")

    def _prepare(self) -> None:
        for folder in (self._cells, self._failed):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(folder / ".writable"):
                    pass
                (folder / ".writable").unlink(missing_ok=True)
                remove_abandoned(folder)
            except OSError as error:
                raise StoreError(f"the store {str(self.folder)!r} cannot be written to: {error}") from error

    def __repr__(self) -> str:
        """One line."""
        return f"SweepStore({str(self.folder)!r}: {len(self.keys())} cells, {len(self.failed_keys())} failed)"

    def path(self, key: str) -> Path:
        """Return the path of a cell's result file, existing or not."""
        return self._cells / f"{key}{_SUFFIX}"

    def keys(self) -> set[str]:
        """Return the keys of cells with a result file, damaged or not."""
        return self._names(self._cells, _SUFFIX)

    def failed_keys(self) -> set[str]:
        """Return the keys of cells that failed and have no undamaged result since."""
        failed = self._names(self._failed, ".json")
        return failed - {key for key in failed & self.keys() if self._is_whole(key)}

    def _names(self, folder: Path, suffix: str) -> set[str]:
        try:
            return {
                path.name.removesuffix(suffix)
                for path in folder.iterdir()
                if path.name.endswith(suffix) and not path.name.startswith(".")
            }
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StoreError(f"the store {str(self.folder)!r} cannot be read: {error}") from error

    def has(self, cell: Cell) -> bool:
        """Return whether the store holds an undamaged result of a cell."""
        try:
            return read_note(self.path(cell.key)).get("cell") == cell.to_json()
        except ResultFileError:
            return False

    def _is_whole(self, key: str) -> bool:
        try:
            read_note(self.path(key))
        except ResultFileError:
            return False
        return True

    def save(self, cell: Cell, analysis: Analysis, facts: ModelFacts) -> Path:
        """Write a cell's result atomically, and delete the record of an earlier failure.

        Raises:
            ResultFileError: it cannot be written (a full disk, a read-only folder).
        """
        path = write_result(analysis, self.path(cell.key), {"cell": cell.to_json(), "model": asdict(facts)})
        (self._failed / f"{cell.key}.json").unlink(missing_ok=True)
        return path

    def fail(self, cell: Cell, error: BaseException, seconds: float = 0.0) -> Path:
        """Record why a cell could not be measured.

        Raises:
            StoreError: the record cannot be written either.
        """
        path = self._failed / f"{cell.key}.json"
        content = {
            "cell": cell.to_json(),
            "error": describe(error),
            "trace": "".join(traceback.format_exception(error)),
            "seconds": seconds,
        }
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as refused:
            raise StoreError(
                f"cannot write to the store {str(self.folder)!r}: {refused}; the unrecorded failure: {cell}: "
                f"{describe(error)}"
            ) from error
        return path

    def load(self, key: str) -> Analysis:
        """Return a cell's measurement.

        Raises:
            ResultFileError: there is none, or its file is damaged.
        """
        return self.read(key)[1]

    def read(self, key: str) -> tuple[Cell, Analysis, ModelFacts]:
        """Return a cell, its measurement, and its model's sizes.

        Raises:
            ResultFileError: there is none, or its file is damaged or not a cell's.
        """
        analysis, note = read_result(self.path(key))
        try:
            return Cell.from_json(note["cell"]), analysis, ModelFacts(**note["model"])
        except (KeyError, TypeError, TLCouplingError) as error:
            raise ResultFileError(f"{str(self.path(key))!r} is not a cell of a sweep: {error!r}") from error

    def cells(self) -> Iterator[Cell]:
        """Yield the cells that have a result, in the order of their keys.

        Raises:
            ResultFileError: a result file is damaged.
        """
        for key in sorted(self.keys()):
            yield Cell.from_json(read_note(self.path(key))["cell"])

    def failures(self) -> list[Failure]:
        """Return the failed cells of this version of the measurement, in the order of their keys."""
        failures = []
        for key in sorted(self.failed_keys()):
            try:
                content = json.loads((self._failed / f"{key}.json").read_text(encoding="utf-8"))
                cell = Cell.from_json(content["cell"])
                if cell.key == key:
                    failures.append(Failure(**{**content, "cell": cell}))
            except FileNotFoundError:
                continue  # another process has measured it by now
            except (OSError, KeyError, TypeError, ValueError) as error:
                raise StoreError(f"{str(self._failed / key)!r}.json is not a failure record: {error!r}") from error
        return failures

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of the table: cells with a result in the order of their keys, then those that failed."""
        for key in sorted(self.keys() - self.failed_keys()):
            try:
                cell, analysis, facts = self.read(key)
            except ResultFileError as error:
                yield row_of_damage(key, str(error))
                continue
            yield from rows_of_cell(cell, analysis, facts) if cell.key == key else [row_of_outdated(cell, key)]
        for failure in self.failures():
            yield row_of_failure(failure.cell, failure.error, failure.seconds)

    def table(self) -> pandas.DataFrame:
        """Return one row per cell, sublayer and K; ``tlcoupling.sweeps.table.COLUMNS`` describes each column."""
        return frame(self.rows())

    def write_table(self, path: str | Path) -> Path:
        """Write ``table`` to one parquet file.

        Raises:
            ResultFileError: the file cannot be written.
        """
        return write_parquet(self.rows(), Path(path))

    def add(self, other: SweepStore) -> int:
        """Copy the cells of another store that this one lacks, and return their number.

        Failures of cells without a result in either store are copied too.

        Raises:
            StoreError: the two results of a cell differ in more than times, versions and rounding
                (``tlcoupling.sweeps.agreement``). Raised before anything is copied.
            ResultFileError: a result file is damaged, or cannot be written.
        """
        ours, theirs = self.keys(), other.keys()
        for key in sorted(ours & theirs):
            if names := differences(self.path(key), other.path(key)):
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise StoreError(
                    f"two stores disagree on the cell {other.read(key)[0]}: {', '.join(names[:3])}{more} differ by "
                    f"more than rounding; remove the wrong one: {str(self.path(key))!r} or "
                    f"{str(other.path(key))!r}"
                )
        for key in sorted(theirs - ours):
            read_note(other.path(key))
            self._copy(other.path(key), self.path(key))
            (self._failed / f"{key}.json").unlink(missing_ok=True)
        for key in sorted(other.failed_keys() - self.keys() - self.failed_keys()):
            self._copy(other._failed / f"{key}.json", self._failed / f"{key}.json")
        return len(theirs - ours)

    def _copy(self, source: Path, target: Path) -> None:
        try:
            with replacing(target) as temporary:
                temporary.write_bytes(source.read_bytes())
        except OSError as error:
            raise ResultFileError(f"cannot copy {str(source)!r} to {str(target)!r}: {error}") from error


def describe(error: BaseException) -> str:
    """Return an error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def as_store(store: Any, create: bool = False) -> SweepStore:
    """Return a store, opened if its folder is given."""
    return store if isinstance(store, SweepStore) else SweepStore(store, create=create)
