"""Block: what one block is made of, read once from its modules.

A sublayer adds ``c * behind(module(before(x)))`` to the residual stream: a norm before its module and one behind it,
where it has them, and a constant factor (Granite). ``Block`` says which modules these are, how the sublayers are
arranged (``split``), and which weights they hold. The forward pass, both Jacobian engines, their costs and the split
into heads read it, and nothing else looks into a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.lifting import in_memory, lifted
from tlcoupling.forward.split import Kind, Part, Split, Topology, splits_of_model

# TransformerLens's names of the weights that a sublayer needs (it writes with the last), and their number of axes.
_WEIGHTS = {"attn": (("W_Q", "W_K", "W_V", "W_O"), 3), "mlp": (("W_in", "W_out"), 2)}
_GATE = "W_gate"  # of a gated MLP, beside the others
_GATE_OF_HEADS = "W_GATE"  # of an attention whose heads are gated
# How far a block's float32 activations may lie from a formula that describes them, relative to the largest entry.
_FIT = 1e-4


class Uncovered(Exception):
    """The closed form does not describe this sublayer; the message says what does not fit."""


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors agree to a part in 10^4 of the larger's largest entry."""
    scale = torch.maximum(ours.abs().max(), theirs.abs().max())
    return bool((ours - theirs.to(ours)).abs().max() <= _FIT * scale)


@dataclass(frozen=True, eq=False)
class Sublayer:
    """One sublayer of a block, which adds ``c * behind(module(before(x)))`` to the residual stream.

    Attributes:
        part_of: its name, its kind, and where its module and its write are found.
        module: the attention, the mixer or the MLP; None where the block has no module of the slot's name.
        before: the norm that the module reads through; None where it reads the stream itself.
        behind: the norm between the module and the stream; None where there is none. Where it is, c is 1.
    """

    part_of: Part
    module: Any
    before: nn.Module | None
    behind: nn.Module | None

    @property
    def name(self) -> str:
        """``"attn"``, ``"mixer"``, ``"cross_attn"`` or ``"mlp"``, as the whole model calls it."""
        return self.part_of.name

    @property
    def kind(self) -> Kind:
        """What it is in this block."""
        return self.part_of.kind

    @property
    def write(self) -> str:
        """The hook point of what it adds to the stream."""
        return self.part_of.write

    @property
    def reads(self) -> str:
        """The hook point of x, the stream that it reads."""
        return self.part_of.reads

    @property
    def gives(self) -> str:
        """The hook point of what its module gives."""
        return f"{self.part_of.slot}.hook_out"

    @property
    def has_experts(self) -> bool:
        """Whether its module is a mixture of experts; layers of one model may differ in this."""
        return weight_of(self.module, "W_in") is None and hasattr(
            getattr(self.module, "original_component", self.module), "experts"
        )

    def points(self, *names: str) -> tuple[str, ...]:
        """Short names of hook points of its module: ``attn.hook_q`` for ``q``."""
        return tuple(f"{self.part_of.slot}.hook_{name}" for name in names)

    def part(self, name: str) -> nn.Module | None:
        """A module inside, such as the ``q_norm`` of an attention; None where there is none."""
        return getattr(self.module, name, None)

    def weights(self) -> dict[str, Tensor]:
        """The weights of its closed form, by TransformerLens's names and in its orientation.

        Returns:
            W_Q, W_K, W_V ``[head, d_model, e]`` and W_O ``[head, e, d_model]`` of an attention, where
            ``HookedTransformer`` repeats the keys and values of a group for each of its heads, and W_GATE
            ``[head, d_model, e]`` where its heads are gated. W_in (and W_gate) ``[d_model, d_mlp]`` and W_out
            ``[d_mlp, d_model]`` of an MLP.

        Raises:
            Uncovered: it is a recurrent mixer or a cross-attention; a weight is missing, or has another number of axes,
                as those of experts have.
        """
        if self.kind not in _WEIGHTS:
            raise Uncovered(f"{type(self.module).__name__} is neither a self-attention nor an MLP")
        names, axes = _WEIGHTS[self.kind]
        weights: dict[str, Tensor] = {}
        for name in names:
            if (weight := weight_of(self.module, name)) is None:
                raise Uncovered(f"{type(self.module).__name__} has no {name}")
            if weight.ndim != axes:
                raise Uncovered(f"{name} of {type(self.module).__name__} has {weight.ndim} axes, not {axes}")
            weights[name] = weight
        if self.kind == "mlp":
            units, gate = weights["W_out"].shape[0], weight_of(self.module, _GATE)
            if weights["W_in"].shape[1] == 2 * units:  # ModernBERT reads its gate and what it gates with one weight
                gate, weights["W_in"] = weights["W_in"].split(units, dim=1)
            weights |= {} if gate is None else {_GATE: gate}
        else:
            heads, size, _ = weights["W_O"].shape
            query, gate = (weight_of(self.part(name), "weight") for name in ("q", "gate"))
            if (
                query is not None and query.shape[0] == 2 * heads * size
            ):  # in each head, a query and a gate (Qwen3-Next)
                parts = query.view(heads, 2, size, -1).mT
                weights["W_Q"], weights[_GATE_OF_HEADS] = parts[:, 0], parts[:, 1]
            elif gate is not None and gate.shape[0] == heads * size:  # Afmoe
                weights[_GATE_OF_HEADS] = gate.view(heads, size, -1).mT
        return {name: weight.detach() for name, weight in weights.items()}

    def write_weight(self) -> Tensor | None:
        """The weight that it writes with, ``[..., d_model]``; None where it has none of TransformerLens's name."""
        return weight_of(self.module, _WEIGHTS[self.kind][0][-1]) if self.kind in _WEIGHTS else None

    def write_factor(self, given: Float[Tensor, "pos d"] | None, written: Float[Tensor, "pos d"]) -> float:
        """Return c, the number by which the block multiplies what the module gives.

        1 where it is not known what the module gives, where the write is not a multiple of it, and where a norm stands
        behind the module (a norm with equal gains also rescales, but each row by its own factor).

        Args:
            given: what the module gives, at ``gives``; None where it was not recorded.
            written: what is added to the stream.
        """
        if given is None or self.behind is not None or close(given, written):
            return 1.0
        factor = (given * written).sum() / given.square().sum()
        return float(factor) if close(factor * given, written) else 1.0

    def keep_unnormed(self, keep: Callable[[Tensor], None]) -> AbstractContextManager[Any]:
        """Pass the input of the norm behind the module, ``[1, pos, d_model]``, to ``keep`` whenever the block runs."""
        if self.behind is None:
            return nullcontext()
        return self.behind.register_forward_pre_hook(lambda module, args: keep(args[0]))


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a model.

    Attributes:
        model: the model.
        layer: block index.
        split: how its sublayers are arranged.
        sublayers: by name, in the order in which they run; empty where the block is not split.
    """

    model: Any
    layer: int
    split: Split
    sublayers: Mapping[str, Sublayer]

    @classmethod
    def read(cls, model: Any, layer: int, split: Split | None = None) -> Block:
        """Describe a block as it is now.

        Args:
            model: the model.
            layer: block index.
            split: where it is known; read off the names of the model's hook points otherwise.
        """
        split = split or splits_of_model(model)[layer]
        module = model.blocks[layer]
        one_norm = split.topology == "parallel" and getattr(module, "ln2", None) is None  # it feeds both sublayers
        sublayers = {}
        for number, part in enumerate(split.parts, start=1):
            sublayers[part.name] = Sublayer(
                part,
                getattr(module, part.slot, None),
                _norm(module, "ln1" if one_norm else f"ln{number}"),
                _norm(module, f"ln{number}_post"),
            )
        return cls(model, layer, split, sublayers)

    @property
    def module(self) -> nn.Module:
        """The block itself."""
        return self.model.blocks[self.layer]

    @property
    def topology(self) -> Topology:
        """How its sublayers are arranged."""
        return self.split.topology

    @property
    def mixer(self) -> Sublayer:
        """The sublayer that reads other positions: attention, or what stands in its place.

        Raises:
            UnsupportedModelError: the block is not split.
        """
        if not self.sublayers:
            raise UnsupportedModelError(f"block {self.layer} is not split into sublayers")
        return next(iter(self.sublayers.values()))

    @property
    def attn(self) -> Sublayer:
        """The attention.

        Raises:
            UnsupportedModelError: the block has none that is split off.
        """
        if self.mixer.kind != "attn":
            raise UnsupportedModelError(
                f"block {self.layer} has no attention: {type(self.mixer.module).__name__} stands in its place"
            )
        return self.mixer

    @property
    def mlp(self) -> Sublayer:
        """The MLP; a KeyError in a block without one."""
        return self.sublayers["mlp"]

    @property
    def n_groups(self) -> int | None:
        """Number of key and value heads that the configuration names; None where it is that of all heads."""
        return getattr(self.model.cfg, "n_key_value_heads", None)

    def output_of_heads(self, z: Tensor | None) -> Float[Tensor, "head e d_model"]:
        """W_O, with which each head writes its share.

        Args:
            z: what the attention's ``hook_z`` showed; None where it showed nothing.

        Raises:
            UnsupportedModelError: the attention's write cannot be split into heads.
        """
        projection = self.attn.part("o")
        with in_memory(self.attn.module) if projection is None else lifted(self.model, projection):
            weight = self.attn.write_weight()
        of_layer = f"the attention of layer {self.layer} ({type(self.attn.module).__name__})"
        if z is None or weight is None:
            missing = " and ".join(name for name, value in (("hook_z", z), ("W_O", weight)) if value is None)
            raise UnsupportedModelError(f"{of_layer} has no {missing} to split it into heads")
        if weight.ndim != 3 or z.shape[-2:] != weight.shape[:2]:
            raise UnsupportedModelError(
                f"{of_layer} cannot be split into heads: hook_z of shape {tuple(z.shape)} does not fit W_O of shape "
                f"{tuple(weight.shape)}"
            )
        return weight.detach()

    def require_heads_add_up(
        self,
        shares: Float[Tensor, "head pos d_model"],
        written: Float[Tensor, "pos d_model"],
        without: Float[Tensor, "pos d_model"],
    ) -> None:
        """Check that the heads' shares add up to what the attention gives, but for a bias that all positions share.

        Args:
            shares: of the heads.
            written: what the attention gives.
            without: what it gives where its heads give nothing: the bias.

        Raises:
            UnsupportedModelError: they do not.
        """
        if not close(without.mean(0) + shares.sum(0), written):
            raise UnsupportedModelError(
                f"the heads of layer {self.layer} do not add up to what its attention writes: an output projection "
                "that does more than apply W_O (an adapter), hooks that edit the write, or an architecture that mixes "
                "its heads, do this"
            )


def norms_are_folded(model: Any) -> bool:
    """Whether the gains and biases of the blocks' norms were folded into the weights that read from them.

    A ``HookedTransformer`` says so in its configuration. A ``TransformerBridge`` keeps its norms, sets their gains to a
    constant and their biases to zero, and says only that it processed something.
    """
    if str(getattr(model.cfg, "normalization_type", None)).endswith("Pre"):
        return True
    if not getattr(model, "_weights_processed", getattr(model, "compatibility_mode", False)):
        return False
    blocks = [Block.read(model, layer, split) for layer, split in enumerate(splits_of_model(model))]
    norms = [sublayer.before for block in blocks for sublayer in block.sublayers.values()]
    parameters: list[tuple[str, Tensor]] = []
    for norm in norms:
        with nullcontext() if norm is None else lifted(model, norm):
            parameters += [] if norm is None else norm.named_parameters()
    return bool(parameters) and all(
        (parameter == (0 if name.endswith("bias") else parameter.flatten()[0])).all() for name, parameter in parameters
    )


def weight_of(module: Any, name: str) -> Tensor | None:
    """A weight of a module by TransformerLens's name, None where it has none of that name.

    Attention with compressed queries and keys (DeepSeek) answers with ``NotImplementedError``, and one whose head size
    differs from the model's with ``ValueError``: ``getattr`` with a default lets both through.
    """
    try:
        weight = getattr(module, name)
    except (AttributeError, NotImplementedError, ValueError):
        return None
    return weight if isinstance(weight, Tensor) else None


def _norm(block: nn.Module, name: str) -> nn.Module | None:
    """A norm of a block; None for the identity, which stands for a norm in models without any."""
    module = getattr(block, name, None)
    return None if isinstance(getattr(module, "original_component", module), nn.Identity) else module
