"""The file format of results: one safetensors file with a JSON header, never pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tlcoupling.errors import ResultFileError
from tlcoupling.results.atomic import replacing
from tlcoupling.results.base import Provenance, Result

FORMAT = "tlcoupling-3"


def write_result(result: Result, path: str | Path, note: Mapping[str, Any] | None = None) -> Path:
    """Write a result as ``Result.save`` does, with a note in the header for ``read_note``.

    Equal results with equal notes give equal bytes. The header is a single entry because safetensors orders several
    entries differently in each process.

    Args:
        result: the result.
        path: the file to write; its folder must exist.
        note: extra JSON-serialisable data about the result.

    Raises:
        ResultFileError: the file cannot be written; the message says why.
    """
    path = Path(path)
    tensors, header = _flatten(result)
    if note is not None:
        header["note"] = note
    try:
        with replacing(path) as temporary:
            # not save_file: it writes a temporary file of its own, which remove_abandoned would not recognise
            temporary.write_bytes(save(tensors, {FORMAT: json.dumps(header)}))
    except (OSError, SafetensorError) as error:
        raise ResultFileError(f"cannot write the result to {str(path)!r}: {error}") from error
    return path


def load(path: str | Path) -> Any:
    """Read a result of any kind that ``save`` wrote.

    Raises:
        ResultFileError: no such file, a damaged file, or not a tlcoupling result.
    """
    return read_result(path)[0]


def read_result(path: str | Path) -> tuple[Any, Mapping[str, Any]]:
    """Read a result and the note that was written with it.

    Raises:
        ResultFileError: as ``load``.
    """
    with _opened(path) as (file, header):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _unflatten(header, tensors, prefix=""), header.get("note", {})


def read_note(path: str | Path) -> Mapping[str, Any]:
    """Read the note of a result file without its tensors. A truncated file is still detected.

    Raises:
        ResultFileError: as ``load``.
    """
    with _opened(path) as (_, header):
        return header.get("note", {})


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a result file and read its header; any failure becomes a ``ResultFileError``."""
    path = Path(path)
    if not path.is_file():
        raise ResultFileError(f"no result file at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise ResultFileError(
                    f"{str(path)!r} is a safetensors file, but not a result of this version of tlcoupling "
                    f"(its header lacks {FORMAT!r})"
                )
            yield file, json.loads(metadata[FORMAT])
    except (SafetensorError, OSError) as error:
        raise ResultFileError(f"{str(path)!r} is damaged or is not a safetensors file: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ResultFileError(f"the header of {str(path)!r} is damaged: {error!r}") from error


def _flatten(result: Result, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split a result into tensors and a JSON header. Nested results are flattened with their field's name as prefix."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"kind": type(result).__name__, "plain": {}, "nested": {}}
    for spec in fields(result):
        value = getattr(result, spec.name)
        if isinstance(value, Tensor):
            tensors[prefix + spec.name] = value.detach().cpu().contiguous()
        elif isinstance(value, Result):
            inner, header["nested"][spec.name] = _flatten(value, f"{prefix}{spec.name}.")
            tensors |= inner
        elif isinstance(value, Provenance):
            header["provenance"] = asdict(value)
        elif spec.metadata.get("saved", True):
            header["plain"][spec.name] = value
    return tensors, header


def _unflatten(header: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> Result:
    """Undo ``_flatten``."""
    kind = Result._kinds[header["kind"]]
    values = {name: _tuples(value) for name, value in header["plain"].items()}
    values["provenance"] = Provenance(**{name: _tuples(value) for name, value in header["provenance"].items()})
    for name, inner in header["nested"].items():
        values[name] = _unflatten(inner, tensors, f"{prefix}{name}.")
    for spec in fields(kind):
        if prefix + spec.name in tensors:
            values[spec.name] = tensors[prefix + spec.name]
    return kind(**values)


def _tuples(value: Any) -> Any:
    """Convert JSON's lists back to the tuples that results hold."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
