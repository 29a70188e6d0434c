"""The file format of results: one safetensors file of tensors with a JSON header and a checksum, never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tlcoupling.errors import ResultFileError
from tlcoupling.results.atomic import replacing

FORMAT = "tlcoupling-3"
_BLANK = "0" * 32  # in place of the checksum while it is computed
_LEVELS = 50  # most levels of nesting in a header; ours have fewer than ten
# Errors that contents of any kind can cause. RuntimeError is absent: a cluster raises its shutdown signal as one.
_DAMAGE = (
    SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip


def write_file(path: str | Path, tensors: dict[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and a header of JSON's types to one file, whole or not at all; return its path.

    Equal contents give equal bytes: the header is a single entry, because safetensors orders several entries
    differently in each process.

    Raises:
        ResultFileError: the file cannot be written; the message says why.
    """
    path = Path(path)
    try:
        content = save(tensors, {FORMAT: json.dumps({"checksum": _BLANK, **header})})
        # safetensors' save_file writes a temporary file under a name of its own first, which a kill would leave
        replace_file(path, content.replace(_BLANK.encode(), _checksum(content, _BLANK).encode(), 1))
    except (OSError, SafetensorError) as error:
        raise ResultFileError(f"cannot write the result to {str(path)!r}: {error}") from error
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def read_bytes(path: str | Path, follow_links: bool = True) -> bytes:
    """Return the contents of a file. Only regular files are opened: opening a named pipe would block.

    Raises:
        ResultFileError: there is none, it cannot be read, or it is something else, such as a folder. Also a symbolic
            link, unless ``follow_links``.
    """
    path = Path(path)
    with damage_reported(path):
        if path.is_symlink() and not follow_links:
            raise ResultFileError(f"{str(path)!r} is a symbolic link, which is not followed")
        if not path.exists():
            raise ResultFileError(f"no result file at {str(path)!r}")
        if not path.is_file():
            raise ResultFileError(f"{str(path)!r} is not a regular file, but a folder, a pipe, a socket or a device")
        return path.read_bytes()


def parse_file(content: bytes, name: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header of a result file.

    The header has a ``checksum`` if the file has one, which then matches all its bytes. Files written before there were
    checksums have none: their contents are unverified.

    Args:
        content: the file's bytes.
        name: its name in messages.

    Raises:
        ResultFileError: the file is damaged, or not a tlcoupling result.
    """
    with damage_reported(name):
        tensors = load(content)
    with damage_reported(name, "the header of "):
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        if FORMAT not in metadata:
            raise ResultFileError(
                f"{str(name)!r} is a safetensors file, but is damaged or is not a result of this version of tlcoupling "
                f"(its header lacks {FORMAT!r})"
            )
        header = parse_json(metadata[FORMAT])
    if "checksum" in header:
        with damage_reported(name):
            if _checksum(content, header["checksum"]) != header["checksum"]:
                raise ResultFileError(f"{str(name)!r} is damaged: its contents do not match its checksum")
    elif unknown := header.keys() - {"kind", "plain", "nested", "provenance", "note"}:
        raise ResultFileError(f"the header of {str(name)!r} is damaged: unknown entries {sorted(unknown)}")
    return tensors, header


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Return the mapping that a JSON text describes.

    Raises:
        ValueError: it is not JSON, not a mapping, or nested too deeply.
    """
    value = json.loads(text)
    if not isinstance(value, dict) or not _is_shallow(value, _LEVELS):
        raise ValueError(f"not a mapping of at most {_LEVELS} levels")
    return value


@contextmanager
def damage_reported(name: str | Path, part: str = "") -> Iterator[None]:
    """Report errors that a file's contents cause as a ``ResultFileError``.

    Args:
        name: the file's name in the message.
        part: what of the file is read, such as ``"the header of "``.
    """
    try:
        yield
    except OSError as error:
        raise ResultFileError(f"{str(name)!r} cannot be read: {error}") from error
    except _DAMAGE as error:
        said = error if isinstance(error, SafetensorError) else repr(error)
        raise ResultFileError(f"{part}{str(name)!r} is damaged or is not a result: {said}") from error


def _checksum(content: bytes, given: str) -> str:
    """Return 32 hexadecimal digits of the digest of all bytes, the given checksum's own digits taken as zeros."""
    start = content.index(given.encode())
    digest = hashlib.sha256(memoryview(content)[:start])
    digest.update(_BLANK.encode())
    digest.update(memoryview(content)[start + len(given) :])
    return digest.hexdigest()[: len(_BLANK)]


def _is_shallow(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_shallow(item, levels - 1) for item in items)
