"""A plan: models x revisions x prompts x settings, read from a TOML file and checked before any model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlcoupling.errors import PlanError
from tlcoupling.sweeps.cells import Cell
from tlcoupling.sweeps.plan_file import Reader
from tlcoupling.sweeps.source import CellGroup


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep.

    Attributes:
        groups: all cells, by model and revision, in the order of the plan.
        cells_per_job: the most cells in one unit of work; None leaves it to the executor.
        name: the name of its file.
    """

    groups: tuple[CellGroup, ...]
    cells_per_job: int | None = None
    name: str = "plan"

    @property
    def cells(self) -> list[Cell]:
        """Return all cells, each once."""
        return [cell for group in self.groups for cell in group.cells]

    @property
    def default_store(self) -> Path:
        """Return the default folder for results: ``plan.store`` beside ``plan.toml``."""
        return Path(self.name).with_suffix(".store")

    def __repr__(self) -> str:
        """One line."""
        return f"Plan({self.name}: {len(self.cells)} cells of {len(self.groups)} models and revisions)"

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Read a TOML file. Relative paths in it start from its folder.

        Raises:
            PlanError: the plan is invalid; the message names the file, line, key and allowed values.
        """
        path = Path(path)
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        try:
            text = path.read_text(encoding="utf-8")
            content = tomllib.loads(text)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise PlanError(f"the plan {str(path)!r} cannot be read: {error}") from error
        return cls.of(content, base=path.parent, name=str(path), text=text)

    @classmethod
    def of(cls, content: Mapping[str, Any], base: str | Path = ".", name: str = "plan", text: str = "") -> Plan:
        """Build a plan from the contents of a TOML file.

        Args:
            content: ``models``, ``prompts`` and the optional keys.
            base: the folder that relative paths start from.
            name: the plan's name in messages.
            text: the file's text, for line numbers in messages.

        Raises:
            PlanError: as ``read``.

        Example:
            >>> plan = tlc.Plan.of({"models": ["gpt2"], "prompts": {"text": ["Once upon a time"]}})  # doctest: +SKIP
        """
        groups, per_job = Reader(Path(base), name, text).read(content)
        return cls(groups, per_job, name)

    def pending(self, measured: Collection[str], at_most: int | None = None) -> list[CellGroup]:
        """Return groups of the cells not yet measured, split into at most ``at_most`` cells each."""
        groups = []
        for group in self.groups:
            cells = [cell for cell in group.cells if cell.key not in measured]
            size = at_most or len(cells) or 1
            groups += [replace(group, cells=tuple(cells[i : i + size])) for i in range(0, len(cells), size)]
        return groups
