"""What a sweep would cost: from the shape of each model, known from the plan or from a configuration at hand.

A model of the same shape is put together without numbers, and its work counted by the same plan that a measurement
makes; nothing is downloaded for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tlcoupling.arguments import check_int, resolve_indices, resolve_sublayers
from tlcoupling.coupling.depth import depth_groups
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.plan import Job, make_plan
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.block import Topology
from tlcoupling.forward.stream import sublayers_of
from tlcoupling.models.smollm2 import NAME as SMOLLM2
from tlcoupling.sweeps.cells import Cell

_PARALLEL = ("gpt_neox", "gptj", "phi", "falcon", "cohere")
_NOT_GATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "phi", "falcon", "opt", "bloom", "mpt", "starcoder2")
_CHARACTERS_A_TOKEN = 4.0  # of English text, about; what a coupling costs hardly depends on it
_UNBOUNDED = 2.0**60  # bytes: the machine that will run it is not known here
_HEADER = 5500.0  # bytes of a file's JSON, measured; what a token adds to it is little beside its numbers
_TENSORS = 5  # values, null, null_std, overlap_u, overlap_v: a number for each pair of layers


@dataclass(frozen=True)
class Shape:
    """A decoder's shape, as far as its cost depends on it.

    Attributes:
        n_layers: depth.
        d_model: width.
        n_heads: attention heads.
        d_mlp: width of the MLP; 4 d_model where it is left out.
        n_key_value_heads: as many as n_heads where it is left out.
        d_head: d_model / n_heads where it is left out.
        gated: whether the MLP has a gate.
        parallel: whether both sublayers read the block's input.

    Raises:
        ArgumentError: a number below 1.
    """

    n_layers: int
    d_model: int
    n_heads: int
    d_mlp: int = 0
    n_key_value_heads: int = 0
    d_head: int = 0
    gated: bool = True
    parallel: bool = False

    def __post_init__(self) -> None:
        """Fill in what was left out."""
        for name in ("n_layers", "d_model", "n_heads"):
            check_int(name, getattr(self, name), 1)
        usual = {
            "d_mlp": 4 * self.d_model,
            "n_key_value_heads": self.n_heads,
            "d_head": self.d_model // self.n_heads,
        }
        for name, value in usual.items():
            object.__setattr__(self, name, getattr(self, name) or value)

    @property
    def topology(self) -> Topology:
        """Of its blocks."""
        return "parallel" if self.parallel else "sequential"

    @property
    def sublayers(self) -> tuple[str, ...]:
        """What can be measured of it."""
        return sublayers_of(self.topology)

    @property
    def weights(self) -> int:
        """Numbers in the weight matrices of all blocks."""
        attn = 2 * self.d_model * self.d_head * (self.n_heads + self.n_key_value_heads)
        return self.n_layers * (attn + (3 if self.gated else 2) * self.d_model * self.d_mlp)


def shape_at_hand(name: str) -> Shape | None:
    """A model's shape from a configuration on this machine: a folder's, or one that the hub's cache holds.

    Args:
        name: as ``tlc.load_model`` takes it.

    Returns:
        None where there is no such configuration, or it is of another form.
    """
    if name == SMOLLM2:
        return Shape(n_layers=30, d_model=576, n_heads=9, d_mlp=1536, n_key_value_heads=3)
    path = Path(name) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        path = Path(cached)
    try:
        return _of_config(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # without an estimate the sweep is none the worse


def _of_config(config: Mapping[str, Any]) -> Shape:
    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name)), 0)

    kind = str(config.get("model_type", "")).lower()
    return Shape(
        n_layers=first("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        d_model=first("hidden_size", "n_embd", "d_model"),
        n_heads=first("num_attention_heads", "n_head", "n_heads", "num_heads"),
        d_mlp=first("intermediate_size", "n_inner", "ffn_dim"),
        n_key_value_heads=first("num_key_value_heads"),
        d_head=first("head_dim"),
        gated=kind not in _NOT_GATED,
        parallel=kind in _PARALLEL,
    )


@dataclass(frozen=True)
class CellCost:
    """What one cell costs.

    Attributes:
        flops: floating-point operations.
        memory_bytes: beyond the model, at most.
        file_bytes: of its result file.
    """

    flops: float
    memory_bytes: float
    file_bytes: float


def n_tokens_of(prompt: str | tuple[int, ...]) -> int:
    """Length of a prompt: of its token ids, or about that of its text."""
    return len(prompt) if isinstance(prompt, tuple) else 1 + math.ceil(len(prompt) / _CHARACTERS_A_TOKEN)


def cell_costs(shape: Shape, cells: Sequence[Cell]) -> list[CellCost]:
    """The cost of each of several cells; cells that differ in nothing that matters are counted once.

    Raises:
        ArgumentError: settings do not fit the shape.
    """
    known: dict[Any, CellCost] = {}
    for cell in cells:
        kind = (cell.settings, n_tokens_of(cell.prompt))
        if kind not in known:
            known[kind] = cell_cost(shape, cell)
    return [known[cell.settings, n_tokens_of(cell.prompt)] for cell in cells]


def cell_cost(shape: Shape, cell: Cell) -> CellCost:
    """The cost of a cell of a model of that shape, of which nothing else is known.

    Raises:
        ArgumentError: its settings do not fit the shape (K above the width, a token that is not there).
    """
    settings, n_tokens = cell.settings, n_tokens_of(cell.prompt)
    model = _Stand(shape)
    names = resolve_sublayers(settings.sublayers, shape.sublayers)
    options = Options.resolve(
        shape.d_model, list(settings.k), settings.normalizer, settings.bases, settings.absolute, settings.engine,
        settings.solver,
    )  # fmt: skip
    wanted = settings.tokens if settings.tokens == "all" else list(settings.tokens)
    try:
        positions = resolve_indices("tokens", wanted, n_tokens)
    except ArgumentError:
        positions = tuple(range(len(settings.tokens)))  # the length is a guess: the run will tell
    groups = depth_groups(range(shape.n_layers), positions)
    job = Job(model, shape.topology, n_tokens, torch.float32, names, groups, options)
    plan = make_plan(job, free=_UNBOUNDED)
    flops = 2.0 * shape.weights * n_tokens + plan.run_flops
    flops += sum(count * (way.formed + way.thin + way.compared) for way, count in plan.ways.values())
    pairs = len(names) * len(positions) * len(options.k) * shape.n_layers**2
    per_row = len(names) * len(positions) * shape.n_layers * (max(options.k) + 3)
    trajectories = n_tokens * (3 * shape.n_layers + 12)
    return CellCost(flops, plan.peak_bytes, 4.0 * (_TENSORS * pairs + per_row + trajectories) + _HEADER)


class _Stand(nn.Module):
    """The weights of a decoder without their numbers, under TransformerLens's names: what costs are counted from."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(
            d_model=shape.d_model,
            n_heads=shape.n_heads,
            d_head=shape.d_head,
            n_key_value_heads=shape.n_key_value_heads,
        )
        d, heads, groups, size = shape.d_model, shape.n_heads, shape.n_key_value_heads, shape.d_head
        attn = {"W_Q": (heads, d, size), "W_K": (groups, d, size), "W_V": (groups, d, size), "W_O": (heads, size, d)}
        mlp = {"W_in": (d, shape.d_mlp), "W_out": (shape.d_mlp, d)}
        if shape.gated:
            mlp["W_gate"] = (d, shape.d_mlp)
        norms = {"ln1": {"w": (d,)}, **({} if shape.parallel else {"ln2": {"w": (d,)}})}
        parts = {"attn": attn, "mlp": mlp, **norms}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: _weights(shapes) for name, shapes in parts.items()}) for _ in range(shape.n_layers)
        )


def _weights(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    module = nn.Module()
    for name, shape in shapes.items():
        setattr(module, name, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False))
    return module
