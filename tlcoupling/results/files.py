"""The file format of results: one safetensors file of tensors with a JSON header, never pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tlcoupling.errors import ResultFileError
from tlcoupling.results.atomic import replacing

FORMAT = "tlcoupling-3"


def write_file(path: str | Path, tensors: dict[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and a header of JSON's types to one file, whole or not at all; return its path.

    Equal contents give equal bytes: the header is a single entry, because safetensors orders several entries
    differently in each process.

    Raises:
        ResultFileError: the file cannot be written; the message says why.
    """
    path = Path(path)
    try:
        with replacing(path) as unfinished:
            # safetensors' save_file writes a temporary file under a name of its own first, which a kill would leave
            unfinished.write_bytes(save(tensors, {FORMAT: json.dumps(header)}))
    except (OSError, SafetensorError) as error:
        raise ResultFileError(f"cannot write the result to {str(path)!r}: {error}") from error
    return path


def read_note(path: str | Path) -> Mapping[str, Any]:
    """Return the note of a result file without reading its tensors; a truncated file is an error all the same.

    Raises:
        ResultFileError: the file is missing, damaged, or not a tlcoupling result.
    """
    with opened(path) as (_, header):
        return header.get("note", {})


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a result file and yield it with its header; errors while it is open are reported as damage.

    Raises:
        ResultFileError: the file is missing, damaged, or not a tlcoupling result.
    """
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
