"""A store: a folder with one file per measured cell, from any process, machine or training run.

``cells/KEY.safetensors`` is a whole ``Analysis`` with its cell in the header. ``failed/KEY.json`` says why a cell could
not be measured. Files are written atomically, and two writers of one cell write the same contents, so any number of
processes can share a store without a lock.

Anything may lie in these folders: damaged files, files of strangers, folders, pipes, links. Each costs one row of the
table, of status "damaged", and nothing else. Links are not followed.
"""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.arguments import check_int
from tlcoupling.errors import ResultFileError, StoreError
from tlcoupling.results.atomic import remove_abandoned, replacing
from tlcoupling.results.base import write_result
from tlcoupling.slices.lens import JacobianLens
from tlcoupling.sweeps.agreement import differences
from tlcoupling.sweeps.cells import Cell, ModelFacts, digest_of
from tlcoupling.sweeps.entries import Failure, Measured, clear, read_cell, read_failure, read_lens, replace_entry
from tlcoupling.sweeps.table import (
    frame,
    row_of_damage,
    row_of_failure,
    row_of_outdated,
    rows_of_cell,
    write_parquet,
)
from tlcoupling.text import counted

if TYPE_CHECKING:
    import pandas

_SUFFIX = ".safetensors"
OnDamage = Callable[[str, str], None]


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
        self.folder: Path = Path(folder)
        self._cells, self._failed, self._lenses = (self.folder / name for name in ("cells", "failed", "lenses"))
        if create:
            self._prepare()
        elif not self._cells.is_dir():
            raise StoreError(f"{str(folder)!r} is not a store of sweep results: it has no folder 'cells'")

    def _prepare(self) -> None:
        for folder in (self._cells, self._failed, self._lenses):
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
        return (
            f"SweepStore({str(self.folder)!r}: {counted(len(self.keys()), 'cell')}, {len(self.failed_keys())} failed)"
        )

    def path(self, key: str) -> Path:
        """Return the path of a cell's result file, existing or not."""
        return self._cells / f"{key}{_SUFFIX}"

    def _failure_path(self, key: str) -> Path:
        return self._failed / f"{key}.json"

    def keys(self) -> set[str]:
        """Return the keys of cells with a result file, damaged or not."""
        return self._names(self._cells, _SUFFIX)

    def failed_keys(self) -> set[str]:
        """Return the keys of cells with a failure record, damaged or not, and no undamaged result since."""
        failed = self._names(self._failed, ".json")
        return failed - {key for key in failed & self.keys() if self._measured(key)}

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

    def lens_keys(self) -> set[str]:
        """Return the keys of prompts with a Jacobian lens (``lens_sweep``), damaged or not."""
        return self._names(self._lenses, _SUFFIX)

    def lens_path(self, key: str) -> Path:
        """Return the path of the file of a prompt's lens, existing or not."""
        return self._lenses / f"{key}{_SUFFIX}"

    def save_lens(self, lens: JacobianLens, record: Mapping[str, Any]) -> Path:
        """Write the Jacobian lens of one prompt atomically.

        Args:
            lens: the lens.
            record: what it is of, of JSON's types; its digest is the key.

        Raises:
            ResultFileError: it cannot be written.
        """
        path = self.lens_path(digest_of(record))
        self._lenses.mkdir(exist_ok=True)
        clear(path)
        return write_result(lens, path, {"lens": record})

    def has(self, cell: Cell) -> bool:
        """Return whether the store holds an undamaged result of a cell."""
        measured = self._measured(cell.key)
        return measured is not None and measured.cell.key == cell.key

    def _measured(self, key: str) -> Measured | None:
        """Return a cell with its result; None if there is none, or its file is damaged."""
        try:
            return read_cell(self.path(key))
        except ResultFileError:
            return None

    def damaged(self, keys: Collection[str] | None = None) -> dict[str, str]:
        """Return the keys of cells with a damaged file, each with the reason.

        The file is a result, or the failure record of a cell without an undamaged result.

        Args:
            keys: the cells to check; None for all.
        """
        failed, reasons = self.failed_keys(), {}
        for key in sorted(self.keys() | failed):
            if keys is None or key in keys:
                try:
                    self._failure(key) if key in failed else read_cell(self.path(key))
                except ResultFileError as error:
                    reasons[key] = str(error)
        return reasons

    def save(self, cell: Cell, analysis: Analysis, facts: ModelFacts) -> Path:
        """Write a cell's result atomically, and delete the record of an earlier failure.

        Raises:
            ResultFileError: it cannot be written (a full disk, a read-only folder).
        """
        path = self.path(cell.key)
        clear(path)
        write_result(analysis, path, {"cell": cell.to_json(), "model": asdict(facts)})
        self._forget_failure(cell.key)
        return path

    def _forget_failure(self, key: str) -> None:
        path = self._failure_path(key)
        clear(path)
        path.unlink(missing_ok=True)

    def fail(self, cell: Cell, error: BaseException, seconds: float = 0.0) -> Path:
        """Record why a cell could not be measured.

        Raises:
            StoreError: the record cannot be written either.
        """
        path = self._failure_path(cell.key)
        content = {
            "cell": cell.to_json(),
            "error": describe(error),
            "trace": "".join(traceback.format_exception(error)),
            "seconds": seconds,
        }
        try:
            replace_entry(path, json.dumps(content, indent=1).encode())
        except ResultFileError as refused:
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
        measured = read_cell(self.path(key))
        return measured.cell, measured.analysis, measured.facts

    def cells(self) -> Iterator[Cell]:
        """Yield the cells that have a result, in the order of their keys.

        Raises:
            ResultFileError: a result file is damaged.
        """
        for key in sorted(self.keys()):
            yield self.read(key)[0]

    def failures(self) -> list[Failure]:
        """Return the failed cells of this version of the measurement, in the order of their keys.

        Damaged records are left out; ``damaged`` names them.
        """
        failed = self.failed_keys()
        failures = map(self._failure, sorted(failed - self.damaged(failed).keys()))
        return [failure for failure in failures if failure is not None]

    def _failure(self, key: str) -> Failure | None:
        """Return the failure of a cell; None if another process has measured it by now, or its record is outdated.

        Raises:
            ResultFileError: the record is damaged.
        """
        path = self._failure_path(key)
        failure = read_failure(path) if os.path.lexists(path) else None
        return failure if failure is not None and failure.cell.key == key else None

    def rows(self, draws: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the rows of the table: cells with a result in the order of their keys, then those that failed.

        Warns once, at the end, of results without a checksum.

        Args:
            draws: as in ``table``.
        """
        check_int("draws", draws, 39 if draws else 0, note="fewer cannot show p <= 0.05")
        failed, unverified = self.failed_keys(), 0
        for key in (*sorted(self.keys() - failed), *sorted(failed)):
            try:
                if key not in failed:
                    cell, analysis, facts = self.read(key)
                    unverified += not analysis.provenance.verified
                    yield from (
                        rows_of_cell(cell, analysis, facts, draws) if cell.key == key else [row_of_outdated(cell, key)]
                    )
                elif (failure := self._failure(key)) is not None:
                    yield row_of_failure(failure.cell, failure.error, failure.seconds)
            except ResultFileError as error:
                yield row_of_damage(key, str(error))
        if unverified:
            warnings.warn(
                f"{unverified} results of the store {str(self.folder)!r} have no checksum: they were written by an "
                "early version of tlcoupling, and damage to their numbers would not be noticed (column 'verified')",
                stacklevel=2,
            )

    def table(self, draws: int = 0) -> pandas.DataFrame:
        """Return one row per cell, sublayer and K; ``tlcoupling.sweeps.table.COLUMNS`` describes each column.

        Args:
            draws: draws of the rotation test behind the p-values, 39 or more. 199 take about a second a cell of 30
                layers. 0 leaves p-values out.

        Raises:
            ArgumentError: fewer draws.
        """
        return frame(self.rows(draws))

    def write_table(self, path: str | Path, draws: int = 0) -> Path:
        """Write ``table`` to one parquet file.

        Args:
            path: the file.
            draws: as in ``table``.

        Raises:
            ResultFileError: the file cannot be written.
        """
        return write_parquet(self.rows(draws), Path(path))

    def add(self, other: SweepStore, on_damage: OnDamage | None = None) -> int:
        """Copy the cells of another store that this one lacks, or whose file is damaged here; return their number.

        Failures of cells without a result in either store are copied too, and Jacobian lenses of prompts. Each file is
        read and checked before it is copied; damaged files of the other store are skipped.

        Args:
            other: the other store.
            on_damage: called with the key of each skipped file and the reason; by default, one warning has all reasons.

        Raises:
            StoreError: the two results of a cell differ in more than times, versions and rounding
                (``tlcoupling.sweeps.agreement``). Raised before anything is copied.
            ResultFileError: a file cannot be written.
        """
        skipped, lacking = other.damaged(), []
        for key in sorted(other.keys() - other.failed_keys() - skipped.keys()):
            ours = self._measured(key)
            if ours is None:
                lacking.append(key)
            else:
                self._require_agreement(key, ours, read_cell(other.path(key)), other)
        for key in lacking:
            replace_entry(self.path(key), read_cell(other.path(key)).content)
            self._forget_failure(key)
        known = {failure.cell.key for failure in self.failures()}
        for failure in other.failures():
            key = failure.cell.key
            if key not in known and self._measured(key) is None:
                replace_entry(self._failure_path(key), other._failure_path(key).read_bytes())
        skipped |= self._add_lenses(other)
        if on_damage is not None:
            for key, reason in skipped.items():
                on_damage(key, reason)
        elif skipped:
            warnings.warn(f"damaged files were not copied: {'; '.join(skipped.values())}", stacklevel=2)
        return len(lacking)

    def _add_lenses(self, other: SweepStore) -> dict[str, str]:
        """Copy the lenses that this store lacks; return the keys of damaged ones, each with the reason."""
        skipped = {}
        for key in sorted(other.lens_keys()):
            try:
                read_lens(self.lens_path(key))
            except ResultFileError:
                try:
                    content = read_lens(other.lens_path(key))[1]
                except ResultFileError as error:
                    skipped[key] = str(error)
                    continue
                self._lenses.mkdir(exist_ok=True)
                replace_entry(self.lens_path(key), content)
        return skipped

    def _require_agreement(self, key: str, ours: Measured, theirs: Measured, other: SweepStore) -> None:
        one, two = ((one.analysis, {"cell": one.cell, "model": one.facts}) for one in (ours, theirs))
        if names := differences(one, two):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise StoreError(
                f"two stores disagree on the cell {theirs.cell}: {', '.join(names[:3])}{more} differ by more than "
                f"rounding; remove the wrong one: {str(self.path(key))!r} or {str(other.path(key))!r}"
            )


def describe(error: BaseException) -> str:
    """Return an error's type and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def as_store(store: Any, create: bool = False) -> SweepStore:
    """Return a store, opened if its folder is given."""
    return store if isinstance(store, SweepStore) else SweepStore(store, create=create)
