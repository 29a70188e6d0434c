"""A cell: one measurement of one model on one prompt, named by a digest of its contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from tlcoupling.arguments import as_list, as_plain, check_name
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.results.typed import build

# Increased when a change of the library changes a cell's numbers or model facts. Older results are then outdated and
# measured again.
MEASUREMENT = 3
_SUBLAYERS = ("block", "attn", "mixer", "mlp")  # of any model


@dataclass(frozen=True)
class Settings:
    """How to measure a cell: the arguments of ``tlc.analyze`` that change its numbers.

    Attributes:
        k: numbers of singular vectors, or fractions of d_model.
        tokens: positions for coupling, or ``"all"``.
        sublayers: ``"block"``, ``"attn"``, ``"mixer"``, ``"mlp"``; None for all that the model has.
        normalizer: ``"frobenius"`` or ``"trace"``.
        bases: ``"uv"`` or ``"vu"``.
        absolute: True as in the authors' code, False as in the paper's formula.
        prepend_bos: as in ``trace``.
        engine: ``"auto"``, ``"analytic"`` or ``"autograd"``.
        solver: ``"auto"``, ``"dense"`` or ``"krylov"``.

    Raises:
        ArgumentError: a value invalid for every model. Model-dependent values are checked when the cell is run.
    """

    k: tuple[int | float, ...] = (10,)
    tokens: tuple[int, ...] | Literal["all"] = (-1,)
    sublayers: tuple[str, ...] | None = None
    normalizer: Normalizer = "frobenius"
    bases: Bases = "uv"
    absolute: bool = True
    prepend_bos: bool | None = None
    engine: EngineName = "auto"
    solver: SolverName = "auto"

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.k or not all(_is_k(item) for item in self.k):
            raise ArgumentError("k", list(self.k), "ints from 1 on, or fractions of d_model between 0 and 1")
        if self.tokens != "all" and (not self.tokens or not all(type(item) is int for item in self.tokens)):
            raise ArgumentError("tokens", self.tokens, "a position, several, or 'all'")
        if self.sublayers is not None and not (self.sublayers and set(self.sublayers) <= set(_SUBLAYERS)):
            raise ArgumentError("sublayers", list(self.sublayers), f"one or more of {', '.join(_SUBLAYERS)}")
        for name, kind in (
            ("normalizer", Normalizer),
            ("bases", Bases),
            ("engine", EngineName),
            ("solver", SolverName),
        ):
            check_name(name, getattr(self, name), get_args(kind))
        if not isinstance(self.absolute, bool):
            raise ArgumentError("absolute", self.absolute, "true or false")
        if self.prepend_bos is not None and not isinstance(self.prepend_bos, bool):
            raise ArgumentError("prepend_bos", self.prepend_bos, "true or false")

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Build settings from ``tlc.analyze``'s arguments: also lists, and a single ``k``, token or sublayer.

        Raises:
            ArgumentError: as for the class.
            TypeError: an unknown name.
        """
        for name in ("k", "tokens", "sublayers"):
            value = values.get(name)
            if value is not None and not (name == "tokens" and isinstance(value, str) and value == "all"):
                values[name] = tuple(as_list(as_plain(value)))
        return cls(**values)

    def arguments(self) -> dict[str, Any]:
        """Return the settings as arguments of ``tlc.analyze``."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def _is_k(item: Any) -> bool:
    return (type(item) is int and item >= 1) or (isinstance(item, float) and 0 < item < 1)


@dataclass(frozen=True)
class Cell:
    """One measurement of a sweep. Its key is a digest of all fields.

    Attributes:
        model: the model's name.
        prompt: its text, or token ids.
        settings: how it is measured.
        revision: the model's revision, such as ``"step1000"``; None for the default one.
        step: the training step, if known.
        weights: identity of the weights, independent of the model's name in the plan: the digest of a local model's
            files, or its name on a hub. None for live training weights, which cannot be reloaded.
        load: loader arguments that change numbers (``dtype``, ``hooked``).
        random_seed: seed of the fresh weights of ``tlc.random_baseline``; None for the model itself.
    """

    model: str
    prompt: str | tuple[int, ...]
    settings: Settings = field(default_factory=Settings)
    revision: str | None = None
    step: int | None = None
    weights: str | None = None
    load: Mapping[str, Any] = field(default_factory=dict, hash=False)
    random_seed: int | None = None

    @cached_property
    def key(self) -> str:
        """Return 32 hexadecimal digits; equal cells have equal keys on every machine."""
        return digest_of({"measurement": MEASUREMENT, **self.to_json()})

    @cached_property
    def prompt_id(self) -> str:
        """Return 12 hexadecimal digits of the prompt's digest."""
        return digest_of(self.to_json()["prompt"])[:12]

    def __str__(self) -> str:
        """Return the cell's name in messages."""
        revision = f"@{self.revision}" if self.revision else ""
        seed = "" if self.random_seed is None else f" (random, seed {self.random_seed})"
        return f"{self.key}: {self.model}{revision}{seed} on prompt {self.prompt_id}"

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return json.loads(json.dumps({**asdict(self), "load": dict(self.load)}))

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Cell:
        """Undo ``to_json``.

        Raises:
            KeyError, TypeError, ArgumentError: the record does not describe a cell.
        """
        prompt = record["prompt"]
        changes = {
            "prompt": tuple(prompt) if isinstance(prompt, list) else prompt,
            "settings": Settings.of(**record["settings"]),
        }
        return build(cls, {**record, **changes})


@dataclass(frozen=True)
class ModelFacts:
    """A model's sizes, for tables.

    Attributes:
        d_model: its width.
        n_layers: its depth.
        n_heads: heads per layer.
        n_params: number of parameters; shared ones count once.
        commit: commit of the hub's repository, if known.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_params: int
    commit: str | None = None

    @classmethod
    def of(cls, model: Any) -> ModelFacts:
        """Read the sizes from a ``HookedTransformer`` or ``TransformerBridge``."""
        whole = getattr(model, "original_model", None)
        whole = model if whole is None else whole
        commit = getattr(getattr(whole, "config", None), "_commit_hash", None)
        return cls(
            d_model=int(model.cfg.d_model),
            n_layers=len(model.blocks),
            n_heads=int(model.cfg.n_heads),
            n_params=sum(parameter.numel() for parameter in whole.parameters()),
            commit=commit if isinstance(commit, str) else None,
        )


def digest_of(value: Any) -> str:
    """Return 32 hexadecimal digits that identify a value of JSON's types."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
