"""Prompts of a plan, from the plan itself, a text file, a JSONL file or a HuggingFace dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from tlcoupling.errors import PlanError
from tlcoupling.forward.offline import offline

# The keys allowed with each source of prompts.
_BESIDE = {"text": ("limit",), "file": ("field", "limit"), "dataset": ("config", "split", "field", "limit")}
KEYS = (*_BESIDE, "config", "split", "field", "limit")


def read_prompts(spec: Mapping[str, Any], base: Path, where: str, local_files_only: bool) -> list[str]:
    """Return the prompts of one table of a plan, without blank ones.

    Args:
        spec: the table: one of ``text``, ``file``, ``dataset``, and its options.
        base: the folder that relative paths start from.
        where: the table's name in messages.
        local_files_only: whether to load datasets from this machine only.

    Raises:
        PlanError: an option that does not apply to the source; a missing, empty or invalid file; a missing dataset or
            field.
    """
    kinds = [kind for kind in _BESIDE if kind in spec]
    if len(kinds) != 1:
        raise PlanError(f"{where}: it has {' and '.join(kinds) or 'no source'}; allowed: one of text, file, dataset")
    if unused := [key for key in spec if key not in (kinds[0], *_BESIDE[kinds[0]])]:
        allowed = ", ".join(_BESIDE[kinds[0]])
        raise PlanError(f"{where}: {unused[0]} = {spec[unused[0]]!r} does not apply to {kinds[0]}; allowed: {allowed}")
    limit = spec.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise PlanError(f"{where}: limit = {limit!r} is not allowed; allowed: an int from 1 on")
    source, name = spec[kinds[0]], f"{where}: {kinds[0]} = {spec[kinds[0]]!r}"
    if kinds[0] == "text":
        texts = [source] if isinstance(source, str) else source
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise PlanError(f"{name} is not allowed; allowed: a string or a list of strings")
    elif not isinstance(source, str) or not source:
        raise PlanError(f"{name} is not allowed; allowed: a path" + (" or a name" if kinds[0] == "dataset" else ""))
    elif kinds[0] == "file":
        texts = _of_file((base / source).expanduser(), spec.get("field"), name)
    else:
        texts = _of_dataset(source, spec, base, name, local_files_only)
    prompts = list(islice((text for text in texts if text.strip()), limit))
    if not prompts:
        raise PlanError(f"{name} holds no prompt: it is empty or blank")
    return prompts


def _of_file(path: Path, field: str | None, name: str) -> Iterable[str]:
    try:
        # split as editors do: separators such as U+2028 belong to a prompt, a byte order mark to none
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{name} cannot be read: {error}") from error
    if path.suffix not in (".jsonl", ".ndjson"):
        if field is not None:
            raise PlanError(f"{name} has one prompt per line, so no field {field!r}; allowed: a file named .jsonl")
        return lines
    return _of_jsonl(lines, field or "text", name)


def _of_jsonl(lines: Iterable[str], field: str, name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PlanError(f"{name}, line {number} is not JSON: {error}") from error
        yield _field(row, field, f"{name}, line {number}")


def _of_dataset(source: str, spec: Mapping[str, Any], base: Path, name: str, local_files_only: bool) -> Iterable[str]:
    """Yield one field of a dataset, row by row. A folder beside the plan takes precedence over a hub's name."""
    try:
        import datasets
    except ImportError as error:
        raise PlanError(f"{name} needs the package datasets: pip install datasets") from error
    folder, split = (base / source).expanduser(), spec.get("split", "train")
    try:
        with offline() if local_files_only else nullcontext():
            rows = datasets.load_dataset(str(folder) if folder.is_dir() else source, spec.get("config"), split=split)
    except Exception as error:  # of any type: datasets raises errors of a dozen libraries
        reason = " ".join(str(error).split())[:300]
        raise PlanError(f"{name}, split {split!r} cannot be loaded: {type(error).__name__}: {reason}") from error
    field = spec.get("field", "text")
    return (_field(row, field, f"{name}, row {number}") for number, row in enumerate(rows))


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, Mapping) or field not in row:
        has = ", ".join(map(str, row)) if isinstance(row, Mapping) else "none"
        raise PlanError(f"{where} has no field {field!r}; it has: {has}")
    if not isinstance(row[field], str):
        raise PlanError(f"{where}: the field {field!r} holds a {type(row[field]).__name__}; allowed: text")
    return row[field]
