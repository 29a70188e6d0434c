"""The kinds of files of a store: a cell's result, the record of its failure, and a prompt's Jacobian lens.

Any of them may be anybody's.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.errors import ResultFileError
from tlcoupling.results.base import parse_result
from tlcoupling.results.files import damage_reported, parse_json, read_bytes, replace_file
from tlcoupling.results.typed import build
from tlcoupling.slices.lens import JacobianLens
from tlcoupling.sweeps.cells import Cell, ModelFacts, digest_of


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


@dataclass(frozen=True)
class Measured:
    """A cell with its result.

    Attributes:
        cell: the cell.
        analysis: its measurement.
        facts: its model's sizes.
        content: the bytes of its file.
    """

    cell: Cell
    analysis: Analysis
    facts: ModelFacts
    content: bytes


def read_cell(path: Path) -> Measured:
    """Read a cell's result.

    Raises:
        ResultFileError: there is none, or its file is damaged, not a regular file, or not a cell's.
    """
    content = read_bytes(path, follow_links=False)
    analysis, note = parse_result(content, path)
    with damage_reported(path, "the note of "):
        cell, facts = Cell.from_json(note["cell"]), build(ModelFacts, note["model"])
        coupling, paths = analysis.coupling, analysis.linearity.paths
        fits = len(coupling.ks) == len(cell.settings.k) and set(coupling.sublayers) <= set(paths)
        if not fits or not set(coupling.positions) <= set(range(len(analysis.tokens))):
            raise ValueError("the measurement is not of its cell")
        return Measured(cell, analysis, facts, content)


def read_failure(path: Path) -> Failure:
    """Read the record of a failure.

    Raises:
        ResultFileError: there is none, or it is damaged or not a regular file.
    """
    content = read_bytes(path, follow_links=False)
    with damage_reported(path, "the failure record "):
        record = parse_json(content)
        return build(Failure, {**record, "cell": Cell.from_json(record["cell"])})


def read_lens(path: Path) -> tuple[JacobianLens, bytes]:
    """Read the Jacobian lens of one prompt; return it with the bytes of its file.

    Raises:
        ResultFileError: there is none, or it is damaged, not a regular file, or not the lens that its name says.
    """
    content = read_bytes(path, follow_links=False)
    lens, note = parse_result(content, path)
    with damage_reported(path, "the note of "):
        if not isinstance(lens, JacobianLens) or digest_of(note["lens"]) != path.stem:
            raise ValueError("it is not the lens that the file's name says")
    return lens, content


def replace_entry(path: Path, content: bytes) -> None:
    """Write a file of a store, whole or not at all.

    Raises:
        ResultFileError: it cannot be written.
    """
    clear(path)
    try:
        replace_file(path, content)
    except OSError as error:
        raise ResultFileError(f"cannot write {str(path)!r}: {error}") from error


def clear(path: Path) -> None:
    """Rename a folder that lies where a file is to be written. A write replaces everything else by itself.

    Raises:
        ResultFileError: it cannot be renamed.
    """
    if path.is_dir() and not path.is_symlink():
        try:
            path.rename(path.with_name(f"{path.name}.aside-{uuid.uuid4().hex[:8]}"))
        except OSError as error:
            raise ResultFileError(f"cannot move the folder {str(path)!r} out of the way: {error}") from error
