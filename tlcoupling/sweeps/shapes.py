"""The cost of a sweep's cells, from the shape of each model: stated in the plan, or read from a local configuration.

A stand-in of the same shape is built without numbers, and its work is counted from the schedule that a measurement
would follow. Nothing is downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tlcoupling.analysis.estimate import memory_with_trace, stages_of
from tlcoupling.arguments import check_int, resolve_indices, resolve_sublayers
from tlcoupling.coupling.depth import depth_groups
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.schedule import Comparison, make_schedule
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.split import PARALLEL, SEQUENTIAL, Split, sublayers_of
from tlcoupling.linalg.work import Rates
from tlcoupling.models.smollm2 import NAME as SMOLLM2
from tlcoupling.sweeps.cells import Cell

_CHARACTERS_A_TOKEN = 4.0  # of English text, about; the cost of coupling hardly depends on it
_UNBOUNDED = 2.0**60  # bytes: the machine that will run the sweep is not known
_HEADER = 5500.0  # bytes of a file's JSON, measured; what a token adds to it is little beside its numbers
_TENSORS = 7  # values, null, null_std, two overlaps and their nulls: a number for each pair of layers and each K


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
    def splits(self) -> tuple[Split, ...]:
        """How its blocks are split."""
        return (PARALLEL if self.parallel else SEQUENTIAL,) * self.n_layers

    @property
    def sublayers(self) -> tuple[str, ...]:
        """What can be measured of it."""
        return sublayers_of(self.splits)

    @property
    def weights(self) -> int:
        """Numbers in the weight matrices of all blocks."""
        attn = 2 * self.d_model * self.d_head * (self.n_heads + self.n_key_value_heads)
        return self.n_layers * (attn + (3 if self.gated else 2) * self.d_model * self.d_mlp)


def shape_at_hand(name: str) -> Shape | None:
    """Return a model's shape from a configuration on this machine: in a folder, or in the hub's cache.

    Args:
        name: as ``tlc.load_model`` takes it.

    Returns:
        None without such a configuration, or where its decoder is of another form.
    """
    if name == SMOLLM2:
        return Shape(n_layers=30, d_model=576, n_heads=9, d_mlp=1536, n_key_value_heads=3)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    try:
        return _of_config(folder)
    except Exception:  # a configuration can fail in any way, and the sweep does not need an estimate
        return None


def _of_config(folder: Path) -> Shape | None:
    """Build a configuration's model without numbers, and read the shape off its blocks."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config = config.get_text_config()
    d, heads, n_layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    blocks = next(part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == n_layers)
    block = blocks[-1]  # the first one may lack a norm (ModernBERT)
    matrices = [parameter for parameter in block.parameters() if parameter.ndim == 2]
    groups = getattr(config, "num_key_value_heads", None) or (1 if getattr(config, "multi_query", False) else heads)
    if getattr(config, "new_decoder_architecture", False):  # of Falcon
        groups = config.num_kv_heads
    d_head = getattr(config, "head_dim", None) or d // heads
    d_mlp = matrices[-1].numel() // d  # the MLP's write is the last matrix of a block
    outside_attn = sum(matrix.numel() for matrix in matrices) - 2 * d * d_head * (heads + groups)
    norms = [part for part in block.children() if {parameter.ndim for parameter in part.parameters()} == {1}]
    shape = Shape(
        n_layers=n_layers,
        d_model=d,
        n_heads=heads,
        d_mlp=d_mlp,
        n_key_value_heads=groups,
        d_head=d_head,
        gated=outside_attn > 2.5 * d * d_mlp,
        parallel=len(norms) == 1
        or any(getattr(config, name, False) for name in ("use_parallel_residual", "parallel_attn")),
    )
    expected = sum(parameter.numel() for parameter in blocks.parameters() if parameter.ndim > 1)
    return shape if math.isclose(shape.weights, expected, rel_tol=0.05) else None  # such as experts


@dataclass(frozen=True)
class CellCost:
    """What one cell costs.

    Attributes:
        flops: floating-point operations.
        seconds: estimated time, without loading the model.
        memory_bytes: memory beyond the model, at most.
        file_bytes: size of its result file.
    """

    flops: float
    seconds: float
    memory_bytes: float
    file_bytes: float


def n_tokens_of(prompt: str | tuple[int, ...]) -> int:
    """Return the number of a prompt's token ids, or about that of its text."""
    return len(prompt) if isinstance(prompt, tuple) else 1 + math.ceil(len(prompt) / _CHARACTERS_A_TOKEN)


def cell_costs(shape: Shape, cells: Sequence[Cell], rates: Rates) -> list[CellCost]:
    """Return the cost of each cell; cells that differ in nothing that matters are counted once.

    Raises:
        ArgumentError: settings do not fit the shape.
    """
    known: dict[Any, CellCost] = {}
    for cell in cells:
        kind = (cell.settings, n_tokens_of(cell.prompt))
        if kind not in known:
            known[kind] = cell_cost(shape, cell, rates)
    return [known[cell.settings, n_tokens_of(cell.prompt)] for cell in cells]


def cell_cost(shape: Shape, cell: Cell, rates: Rates) -> CellCost:
    """Return the cost of a cell of a model of that shape.

    Raises:
        ArgumentError: its settings do not fit the shape (K above the width, a token out of range).
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
    comparison = Comparison(model, shape.splits, n_tokens, torch.float32, names, groups, options)
    schedule = make_schedule(comparison, free=_UNBOUNDED)
    stages = stages_of(model, n_tokens, {"": schedule}, rates)
    pairs = len(names) * len(positions) * (_TENSORS * len(options.k) + 1) * shape.n_layers**2  # and the null's width
    per_row = len(names) * len(positions) * shape.n_layers * (max(options.k) + 3)
    trajectories = n_tokens * (3 * shape.n_layers + 12)
    return CellCost(
        flops=sum(stage.flops for stage in stages),
        seconds=sum(stage.seconds for stage in stages),
        memory_bytes=memory_with_trace(model, shape.splits, n_tokens, torch.float32, schedule.peak_bytes),
        file_bytes=4.0 * (pairs + per_row + trajectories) + _HEADER,
    )


class _Stand(nn.Module):
    """The weights of a decoder without their numbers, under TransformerLens's names. Costs are counted from them."""

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
