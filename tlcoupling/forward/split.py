"""Split: how each block's sublayers write to the residual stream, read off the hook points and the wrapped modules.

A model's blocks may differ: a hybrid has attention in some and a recurrent mixer in others. What a sublayer is (its
``kind``) is told by the module that it wraps, not by the name of its slot: Nemotron-H calls everything ``mixer``. What
a sublayer is called (its ``name``) is the same in all blocks, so that layers can be compared.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from tlcoupling.forward.points import hook_points

Topology = Literal["sequential", "parallel", "cross", "single", "opaque"]
Kind = Literal["attn", "mixer", "cross_attn", "mlp"]

# How TransformerLens names the modules that read other positions, and those that do not.
_MIXERS = ("attn", "self_attn", "linear_attn", "mamba", "mixer", "ssm", "conv", "time_mix")
_MLPS = ("mlp", "channel_mix")
# Sublayers that read no other position of their stream: cross-attention reads those of the encoder.
POSITIONWISE = ("cross_attn", "mlp")
# What a recurrence keeps that attention does not: decays, and convolutions along the positions.
_DECAYS = ("A_log", "time_decay", "recurrent_param")
# How HuggingFace names the projection of an attention to its queries.
_QUERIES = (
    "q_proj", "qkv_proj", "query", "query_key_value", "c_attn", "q_attn", "qkv", "Wqkv", "q_a_proj", "q_b_proj", "q",
)  # fmt: skip

# The slots of the sublayers in the order in which they run, and the hook points of their writes.
_GROUPS = ((_MIXERS, "hook_attn_out"), (("cross_attn",), "hook_cross_attn_out"), (_MLPS, "hook_mlp_out"))


def block_hook(layer: int, name: str) -> str:
    """The full name of a hook point in a block, ``blocks.{layer}.{name}``."""
    return f"blocks.{layer}.{name}"


@dataclass(frozen=True)
class Part:
    """One sublayer of a block.

    Attributes:
        name: ``"attn"``, ``"mixer"``, ``"cross_attn"`` or ``"mlp"``. A model has ``mixer`` where not all of its blocks
            begin with attention; it is then the name of the attention in the others too.
        kind: what it is in this block.
        slot: the name of its module in the block, with which the names of its hook points begin.
        write: the hook point of what it adds to the stream.
        reads: the hook point of the stream that it reads.
    """

    name: str
    kind: Kind
    slot: str
    write: str
    reads: str = "hook_resid_pre"


@dataclass(frozen=True)
class Split:
    """How one block is split into sublayers.

    Attributes:
        topology: ``"sequential"`` (the second sublayer reads what the first one wrote), ``"parallel"`` (both read the
            block's input), ``"cross"`` (attention, cross-attention and MLP in sequence), ``"single"`` (one sublayer),
            or ``"opaque"`` (not split).
        parts: the sublayers, in the order in which they run; none of an opaque block.
        kind: what the block is made of, such as ``"attn+mlp"``; known of an opaque block too.
    """

    topology: Topology
    parts: tuple[Part, ...]
    kind: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sublayers."""
        return tuple(part.name for part in self.parts)

    @property
    def opaque(self) -> Split:
        """The same block, not split."""
        return Split("opaque", (), self.kind)


# The blocks of plain decoders, as their hook points tell.
_ATTN, _MLP = Part("attn", "attn", "attn", "hook_attn_out"), Part("mlp", "mlp", "mlp", "hook_mlp_out")
SEQUENTIAL = Split("sequential", (_ATTN, replace(_MLP, reads="hook_resid_mid")), "attn+mlp")
ATTENTION = Split("single", (_ATTN,), "attn")
PARALLEL = Split("parallel", (_ATTN, _MLP), "attn+mlp")


def splits_of(
    hook_names: Container[str], n_layers: int, attn_only: bool = False, blocks: Any = None
) -> tuple[Split, ...]:
    """Read the split of each block off the names of its hook points (design, section 2).

    Blocks that are not arranged alike share no sublayers: then none is split.

    Args:
        hook_names: names of hook points, of a model or in a cache.
        n_layers: number of blocks.
        attn_only: what the model's configuration says; a ``HookedTransformer`` without MLPs has their hook points.
        blocks: the blocks, which tell what their slots hold; without them, ``attn`` holds attention.
    """
    splits = [_split(hook_names, layer, attn_only, blocks[layer] if blocks else None) for layer in range(n_layers)]
    first = {part.kind for split in splits for part in split.parts[:1]}
    if len({split.topology for split in splits}) > 1 or not first or "mlp" in first:
        return tuple(split.opaque for split in splits)
    name = "attn" if first == {"attn"} else "mixer"
    return tuple(_named(split, name) for split in splits)


def splits_of_model(model: Any) -> tuple[Split, ...]:
    """The split of each of a model's blocks."""
    attn_only = bool(getattr(model.cfg, "attn_only", False))
    return splits_of(hook_points(model), len(model.blocks), attn_only, model.blocks)


def topology_of(splits: Iterable[Split]) -> Topology:
    """How the sublayers of a model are arranged; it is the same in all of its blocks."""
    return next(iter(splits)).topology


def sublayers_of(splits: Iterable[Split]) -> tuple[str, ...]:
    """What can be measured on all blocks of a model."""
    return ("block", *next(iter(splits)).names)


def _named(split: Split, name: str) -> Split:
    mixer, *rest = split.parts
    return replace(split, parts=(replace(mixer, name=name), *rest))


def _split(hook_names: Container[str], layer: int, attn_only: bool, block: nn.Module | None) -> Split:
    def slots(candidates: Iterable[str], alias: str) -> list[str]:
        found = [slot for slot in candidates if block_hook(layer, f"{slot}.hook_out") in hook_names]
        plain = alias.removeprefix("hook_").removesuffix("_out")
        return found or ([plain] if block_hook(layer, alias) in hook_names else [])

    def first(*names: str) -> str:
        return next((name for name in names if block_hook(layer, name) in hook_names), names[-1])

    groups = {alias: slots(candidates, alias) for candidates, alias in _GROUPS}
    if attn_only:
        groups["hook_mlp_out"] = []
    parts: list[Part] = []
    kinds: list[Kind] = []
    for alias, found in groups.items():
        norm = f"ln{len(parts) + 1}_post.hook_out"
        held: list[Kind] = [_kind_of(slot, block) for slot in found]
        kinds += held
        if found:
            parts.append(Part(held[0], held[0], found[0], first(alias, norm, f"{found[0]}.hook_out")))
    if not parts:
        return Split("opaque", (), "block" if block is None else _kind_within(block))
    topology: Topology = "single" if len(kinds) == 1 else "parallel"
    if topology == "parallel" and block_hook(layer, "hook_resid_mid") in hook_names:
        topology = "cross" if groups["hook_cross_attn_out"] else "sequential"
        reads = ("hook_resid_pre", "hook_resid_mid", first("hook_resid_mid2", "ln3.hook_in"))
        parts = [replace(part, reads=name) for part, name in zip(parts, reads, strict=False)]
    return Split(topology, tuple(parts), "+".join(kinds))


def _kind_of(slot: str, block: nn.Module | None) -> Kind:
    """What a slot of a block holds."""
    module = getattr(block, slot, None)
    if slot in _MLPS:
        return "mlp"
    if slot == "cross_attn":
        return "cross_attn"
    if module is None:
        return "attn" if slot == "attn" else "mixer"
    if _recurs(module):
        return "mixer"
    return "attn" if slot == "attn" or _attends(module) else "mlp"


def _kind_within(block: nn.Module) -> str:
    """What a block is made of whose sublayers TransformerLens does not name."""
    recurs = _recurs(block)
    attends = any(_attends_itself(module) and not _recurs(module) for module in block.modules())
    return "+".join(name for name, there in (("attn", attends), ("mixer", recurs)) if there) or "block"


def _recurs(module: nn.Module) -> bool:
    return any(
        isinstance(part, nn.Conv1d) or any(name in part._parameters for name in _DECAYS) for part in module.modules()
    )


def _attends(module: nn.Module) -> bool:
    return any(_attends_itself(part) for part in module.modules())


def _attends_itself(module: nn.Module) -> bool:
    return any(name in module._modules for name in _QUERIES)
