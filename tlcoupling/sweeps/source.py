"""The source of a plan's model: a name with a revision, or a folder identified by the digest of its files."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlcoupling.errors import ModelLoadError
from tlcoupling.forward.offline import offline
from tlcoupling.sweeps.cells import Cell
from tlcoupling.sweeps.shapes import Shape

# Files that determine a model's numbers; a Trainer's folder also holds optimiser states
_FILES = ("config.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*", "vocab*", "merges.txt", "*.model")
_FILES += ("added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Source:
    """How to load a model, and how its cells describe it.

    Attributes:
        name: the argument of ``tlc.load_model``: a name, or the path of a folder.
        model: the model's name in its cells.
        revision: revision of a hub's model, or the folder's name in a series.
        step: training step, if known.
        weights: digest of a folder's files, or the name of a hub's model.
        load: loader arguments that change numbers: ``dtype``, ``hooked``.
        arguments: other arguments of ``tlc.load_model``, such as ``device`` and ``revision``.
        local_files_only: make no hub request.
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
        """Load the model, whose weights are those that ``weights`` names.

        Raises:
            ModelLoadError: as ``tlc.load_model``; also if a folder's files have changed since the plan was read.
        """
        import torch

        from tlcoupling.models.load import load_model

        arguments = dict(self.arguments)
        if self.load.get("dtype") is not None:
            arguments["dtype"] = getattr(torch, self.load["dtype"])
        with _no_bars(), offline() if self.local_files_only else nullcontext():
            model = load_model(self.name, hooked=self.load["hooked"], **arguments)
        if self.weights not in (None, self.name):
            _leave_files(model)
            self._require_unchanged()
        return model

    def _require_unchanged(self) -> None:
        try:
            digest = digest_of_folder(Path(self.name))
        except OSError as error:
            raise ModelLoadError(f"the files of the model {self.name!r} cannot be read again: {error}") from error
        if digest != self.weights:
            raise ModelLoadError(
                f"the weights changed while they were loaded: the files of {self.name!r} have the digest {digest}, but "
                f"had {self.weights} when the plan was read; run the sweep again to measure them as they are now"
            )

    def __str__(self) -> str:
        """Return the model's name in progress bars and messages."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


def _leave_files(model: Any) -> None:
    """Copy weights in main memory: transformers maps files into memory, so a later write to one would change them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide transformers' loading bars: the sweep has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class CellGroup:
    """Cells of one model, loaded once for all of them: an executor's unit of work.

    Attributes:
        source: the model.
        cells: the cells to measure.
        resources: resources of its Slurm job, as submitit names them.
        shape: the model's shape, if known before loading.
    """

    source: Source
    cells: tuple[Cell, ...]
    resources: Mapping[str, Any] = field(default_factory=dict)
    shape: Shape | None = None


def digest_of_folder(folder: Path) -> str:
    """Return 32 hexadecimal digits that identify the names and contents of a model's files.

    Raises:
        OSError: a file cannot be read.
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
