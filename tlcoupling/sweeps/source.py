"""Where a model of a plan comes from: a name with a revision, or a folder of files known by their digest."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlcoupling.models.offline import offline
from tlcoupling.sweeps.cells import Cell
from tlcoupling.sweeps.shapes import Shape

# What a model's numbers depend on; a Trainer's folder holds optimiser states beside it
_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "vocab*", "merges.txt", "*.model")
_FILES += ("added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Source:
    """How a model is loaded, and what its cells say of it.

    Attributes:
        name: what ``tlc.load_model`` takes: a name, or the path of a folder.
        model: what its cells call it.
        revision: of a hub's model, or the folder's name in a series.
        step: training step, where it is known.
        weights: digest of a folder's files, or the name of a hub's model.
        load: what it is loaded with, as far as it changes numbers: ``dtype``, ``hooked``.
        arguments: everything else that ``tlc.load_model`` is given, such as ``device`` and ``revision``.
        local_files_only: ask nothing of a hub.
    """

    name: str
    model: str
    revision: str | None = None
    step: int | None = None
    weights: str | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    local_files_only: bool = False

    def open(self) -> Any:
        """Load the model.

        Raises:
            ModelLoadError: as ``tlc.load_model``.
        """
        import torch

        from tlcoupling.models.load import load_model

        arguments = dict(self.arguments)
        if self.load.get("dtype") is not None:
            arguments["dtype"] = getattr(torch, self.load["dtype"])
        with _no_bars(), offline() if self.local_files_only else nullcontext():
            return load_model(self.name, hooked=self.load["hooked"], **arguments)

    def __str__(self) -> str:
        """As progress and messages name it."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


@contextmanager
def _no_bars() -> Iterator[None]:
    """No bar of transformers' for every model that is loaded: the sweep has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Group:
    """Cells of one model, which is loaded once for them: the unit of work that an executor gets.

    Attributes:
        source: the model.
        cells: what is measured of it.
        resources: what a Slurm job of it asks for, as submitit names them.
        shape: of the model, where it is known before it is loaded.
    """

    source: Source
    cells: tuple[Cell, ...]
    resources: Mapping[str, Any] = field(default_factory=dict)
    shape: Shape | None = None


def digest_of_folder(folder: Path) -> str:
    """32 hexadecimal digits of a model's files: their names and all of their contents.

    Raises:
        OSError: one cannot be read.
    """
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in _FILES):
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
            whole.update(f"{path.name}\0{digest.hexdigest()}\0".encode())
    return whole.hexdigest()[:32]
