"""Read and validate a plan. Error messages name the file, the line, the key and the allowed values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tlcoupling.errors import ArgumentError, PlanError
from tlcoupling.models.load import loads_hooked
from tlcoupling.sweeps import prompts as prompt_tables
from tlcoupling.sweeps.cells import Cell, Settings
from tlcoupling.sweeps.checkpoints import pick_steps, published_steps, steps_in_folder
from tlcoupling.sweeps.executors import check_resources
from tlcoupling.sweeps.shapes import Shape, shape_at_hand
from tlcoupling.sweeps.source import CellGroup, Source, digest_of_folder

_TOP = ("models", "prompts", "settings", "random_baseline", "local_files_only", "resources", "cells_per_job")
_OF_MODEL = (
    "name", "label", "revisions", "checkpoints", "dtype", "device", "hooked", "random_baseline", "resources", "shape",
)  # fmt: skip
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_RESOURCES = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")


@dataclass
class Reader:
    """Turns the contents of a plan into groups of cells.

    Attributes:
        base: the folder that relative paths start from.
        name: the plan's name in messages.
        text: the file's text, for line numbers in messages.
    """

    base: Path
    name: str
    text: str
    _loaded: dict[str, str] = field(default_factory=dict, init=False, repr=False)  # by label

    def read(self, content: Mapping[str, Any]) -> tuple[tuple[CellGroup, ...], int | None]:
        """Return all groups (each cell is in one of them) and the most cells per unit of work.

        Raises:
            PlanError: an unknown key, a value that is not allowed, or a missing model, file or field.
        """
        self._known(content, _TOP, "")
        models = self._entries(content, "models")
        local = self._bool(content, "local_files_only", False)
        prompts = self._prompts(content, local)
        settings = self._settings(content)
        groups: list[CellGroup] = []
        seen: set[str] = set()
        for index, entry in enumerate(models):
            spec = {"name": entry} if isinstance(entry, str) else self._table(entry, f"models[{index}]")
            for group in self._groups(spec, f"models[{index}]", content, local, prompts, settings):
                cells = {cell.key: cell for cell in group.cells if cell.key not in seen}
                seen |= set(cells)
                if cells:
                    groups.append(replace(group, cells=tuple(cells.values())))
        per_job = content.get("cells_per_job")
        if per_job is not None and (type(per_job) is not int or per_job < 1):
            raise self._wrong("cells_per_job", per_job, "an int from 1 on")
        return tuple(groups), per_job

    def _groups(
        self,
        spec: Mapping[str, Any],
        where: str,
        content: Mapping[str, Any],
        local: bool,
        prompts: Sequence[str],
        settings: Sequence[Settings],
    ) -> Iterable[CellGroup]:
        """Yield a model's groups, one per revision. Random weights are measured in the last revision's group."""
        self._known(spec, _OF_MODEL, where)
        seeds = self._seeds(spec.get("random_baseline", content.get("random_baseline", False)))
        resources = {**self._resources(content), **self._resources(spec)}
        shape = self._shape(spec, where)
        sources = self._sources(spec, where, local)
        for source in sources:
            cells = [
                Cell(
                    model=source.model,
                    prompt=prompt,
                    settings=one,
                    revision=source.revision,
                    step=source.step,
                    weights=source.weights,
                    load=dict(source.load),
                    random_seed=seed,
                )
                for seed in (None, *(seeds if source is sources[-1] else ()))
                for one in settings
                for prompt in prompts
            ]
            yield CellGroup(source, tuple(cells), resources, shape or shape_at_hand(source.name))

    def _sources(self, spec: Mapping[str, Any], where: str, local: bool) -> list[Source]:
        name = spec.get("name")
        if not isinstance(name, str) or not name:
            raise PlanError(f"{self._at('models')}: {where} has no name; allowed: a model's name or a folder")
        dtype = spec.get("dtype")
        if dtype is not None and dtype not in _DTYPES:
            raise self._wrong("dtype", dtype, f"one of {', '.join(_DTYPES)}")
        hooked = spec.get("hooked")
        if hooked is not None and not isinstance(hooked, bool):
            raise self._wrong("hooked", hooked, "true or false")
        label = spec.get("label", name)
        if not isinstance(label, str) or not label:
            raise self._wrong("label", label, "a name")
        if "revisions" in spec and "checkpoints" in spec:
            raise PlanError(f"{self._at('checkpoints')}: {name!r} has both revisions and checkpoints; allowed: one")
        folder = (self.base / name).expanduser()
        is_folder = folder.is_dir()
        if not is_folder and (name.startswith((".", "~", "/")) or folder.exists()):
            raise PlanError(f"{self._at(name)}: the model {name!r} is not a folder that exists ({str(folder)!r})")
        plain = Source(
            name=str(folder.resolve()) if is_folder else name,
            model=label,
            load={"dtype": dtype, "hooked": loads_hooked(is_folder, hooked)},
            arguments={"device": spec["device"]} if "device" in spec else {},
            local_files_only=local,
        )
        if (other := self._loaded.setdefault(label, plain.name)) != plain.name:
            raise PlanError(
                f"{self._at(label)}: {other!r} and {plain.name!r} are both called {label!r}; allowed: a different "
                "label for each model, to tell their results apart"
            )
        if is_folder:
            return self._in_folder(plain, folder, spec, name)
        return self._on_hub(replace(plain, weights=name), spec, name)

    def _in_folder(self, plain: Source, folder: Path, spec: Mapping[str, Any], name: str) -> list[Source]:
        """Return the sources in a folder that holds a model, or a training run with one folder per step."""
        if "revisions" in spec:
            raise PlanError(f"{self._at('revisions')}: {name!r} is a folder, which has no revisions")
        steps = steps_in_folder(folder)
        if "checkpoints" in spec:
            if not steps:
                raise PlanError(f"{self._at('checkpoints')}: {name!r} holds no folders named step100 or checkpoint-100")
            chosen = self._pick(spec["checkpoints"], list(steps), name)
            return [
                replace(
                    plain,
                    name=str(steps[step].resolve()),
                    revision=steps[step].name,
                    step=step,
                    weights=self._digest(steps[step]),
                )
                for step in chosen
            ]
        if not (folder / "config.json").is_file():
            hint = f"; with checkpoints = 'all' it is a series of {len(steps)}" if steps else ""
            raise PlanError(f"{self._at(name)}: the folder {name!r} has no config.json in it{hint}")
        return [replace(plain, weights=self._digest(folder))]

    def _on_hub(self, plain: Source, spec: Mapping[str, Any], name: str) -> list[Source]:
        if "checkpoints" in spec:
            series = published_steps(name)
            if series is None:
                raise PlanError(
                    f"{self._at('checkpoints')}: no training steps of {name!r} are known; allowed: "
                    "EleutherAI/pythia-*, stanford-crfm/*, a folder with one subfolder per step, or revisions"
                )
            steps, pattern = series
            return [
                replace(
                    plain,
                    revision=pattern.format(step),
                    step=step,
                    arguments={
                        **plain.arguments,
                        **({"checkpoint_value": step} if plain.load["hooked"] else {"revision": pattern.format(step)}),
                    },
                )
                for step in self._pick(spec["checkpoints"], steps, name)
            ]
        revisions = spec.get("revisions")
        if revisions is None:
            return [plain]
        if not isinstance(revisions, list) or not revisions or not all(isinstance(one, str) for one in revisions):
            raise self._wrong("revisions", revisions, "a list of branches, tags or commits")
        return [replace(plain, revision=one, arguments={**plain.arguments, "revision": one}) for one in revisions]

    def _pick(self, wanted: Any, steps: Sequence[int], name: str) -> list[int]:
        try:
            return pick_steps(wanted, steps)
        except ArgumentError as error:
            raise PlanError(f"{self._at('checkpoints')}: {name!r}: {error}") from error

    def _digest(self, folder: Path) -> str:
        try:
            return digest_of_folder(folder)
        except OSError as error:
            raise PlanError(f"{self.name}: the model in {str(folder)!r} cannot be read: {error}") from error

    def _prompts(self, content: Mapping[str, Any], local: bool) -> list[str]:
        prompts: dict[str, None] = {}
        for index, entry in enumerate(self._entries(content, "prompts")):
            if isinstance(entry, str):
                raise self._wrong("prompts", entry, "a table with one of text, file, dataset")
            where = f"prompts[{index}]"
            self._known(self._table(entry, where), prompt_tables.KEYS, where)
            prompts |= dict.fromkeys(
                prompt_tables.read_prompts(entry, self.base, f"{self._at('prompts')}: {where}", local)
            )
        return list(prompts)

    def _settings(self, content: Mapping[str, Any]) -> list[Settings]:
        tables = self._entries(content, "settings") if "settings" in content else [{}]
        settings = []
        for index, entry in enumerate(tables):
            table = self._table(entry, f"settings[{index}]")
            self._known(table, [spec.name for spec in fields(Settings)], f"settings[{index}]")
            try:
                settings.append(Settings.of(**table))
            except ArgumentError as error:
                raise PlanError(f"{self._at(error.name)}: settings[{index}]: {error}") from error
        return settings

    def _seeds(self, value: Any) -> tuple[int, ...]:
        if isinstance(value, bool):
            return (0,) if value else ()
        if isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value):
            return tuple(dict.fromkeys(value))
        raise self._wrong("random_baseline", value, "true, false, or a list of seeds from 0 on")

    def _resources(self, content: Mapping[str, Any]) -> dict[str, Any]:
        table = self._table(content.get("resources", {}), "resources")
        self._known({key: 0 for key in table if not key.startswith("slurm_")}, (*_RESOURCES, "slurm_*"), "resources")
        try:
            check_resources(table)
        except ArgumentError as error:
            raise PlanError(f"{self._at(error.name)}: resources: {error}") from error
        return dict(table)

    def _shape(self, spec: Mapping[str, Any], where: str) -> Shape | None:
        if "shape" not in spec:
            return None
        table = self._table(spec["shape"], f"{where}.shape")
        self._known(table, [one.name for one in fields(Shape)], f"{where}.shape")
        try:
            return Shape(**table)
        except (TypeError, ArgumentError) as error:
            raise PlanError(f"{self._at('shape')}: {where}.shape: {error}") from error

    def _entries(self, content: Mapping[str, Any], key: str) -> list[Any]:
        """Return a required table, or list of entries, as a list."""
        value = content.get(key)
        value = [value] if isinstance(value, Mapping) else value
        if not isinstance(value, list) or not value:
            state = "none" if value is None or value == [] else f"{key} = {value!r}"
            raise PlanError(f"{self._at(key)}: the plan needs {key}, but has {state}; allowed: one or more")
        return value

    def _table(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise PlanError(f"{self.name}: {where} = {value!r} is not allowed; allowed: a table")
        return value

    def _bool(self, content: Mapping[str, Any], key: str, default: bool) -> bool:
        value = content.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def _known(self, table: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
        for key in table:
            if key not in allowed:
                near = difflib.get_close_matches(key, allowed, 1)
                raise PlanError(
                    f"{self._at(key)}: the key {key!r}{f' of {where}' if where else ''} is not known"
                    f"{f', {near[0]!r} is' if near else ''}; allowed: {', '.join(allowed)}"
                )

    def _wrong(self, key: str, value: Any, allowed: str) -> PlanError:
        return PlanError(f"{self._at(key)}: {key} = {value!r} is not allowed; allowed: {allowed}")

    def _at(self, word: str) -> str:
        """Return the plan's name, with the line in which a word first occurs."""
        for number, line in enumerate(self.text.split("\n"), 1):
            if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", line.partition("#")[0]):
                return f"{self.name}, line {number}"
        return self.name
