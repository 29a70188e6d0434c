"""Stream: a residual stream and what each sublayer wrote to it, checked to add up.

It comes from the activations of a trace or of a cache; nothing here runs a model.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import (
    ArgumentError,
    MissingHookError,
    NonFiniteActivationError,
    ResidualIdentityError,
    UnsupportedModelError,
)
from tlcoupling.forward.cache import fetch, how_to_cache, plain
from tlcoupling.forward.split import (
    Part,
    Split,
    Topology,
    block_hook,
    splits_of,
    splits_of_model,
    sublayers_of,
    topology_of,
)

# Rounding of x + a + m against what the model itself added up, relative to the norm of the sum.
IDENTITY_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-2,
}


@dataclass(frozen=True, repr=False, eq=False)
class Stream:
    """A residual stream and the sublayers' writes, checked to add up: x^l + a^l + m^l + edits = x^{l+1}.

    Attributes:
        resid: x^0 .. x^L, the last one before the final norm, ``[layer + 1, pos, d_model]``. Each is what a block
            reads, after all hooks on ``hook_resid_pre``; x^L after those on the last ``hook_resid_post``.
        writes: by the sublayer's name, what it wrote in each layer, ``[layer, pos, d_model]``, in the order in which
            they run; empty where the blocks are not split.
        splits: how each block is split into sublayers.
        edits: what hooks of the user's added to the stream behind a block's writes, at ``hook_resid_post`` and the
            next ``hook_resid_pre``; None where no hook is there. ``[layer, pos, d_model]``.
    """

    resid: Float[Tensor, "layer_plus_1 pos d_model"]
    writes: Mapping[str, Float[Tensor, "layer pos d_model"]]
    splits: tuple[Split, ...]
    edits: Float[Tensor, "layer pos d_model"] | None

    @property
    def n_layers(self) -> int:
        """Number of blocks, L."""
        return self.resid.shape[0] - 1

    @property
    def topology(self) -> Topology:
        """How the sublayers are arranged: ``"sequential"``, ``"parallel"``, ``"cross"``, ``"single"``, ``"opaque"``."""
        return topology_of(self.splits)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """What each block is made of, such as ``"attn+mlp"`` or ``"mixer+mlp"``."""
        return tuple(split.kind for split in self.splits)

    @property
    def attn_out(self) -> Float[Tensor, "layer pos d_model"]:
        """a^l, what each attention wrote.

        Raises:
            UnsupportedModelError: not every block has attention that is split off.
        """
        if "attn" not in self.writes:
            allowed = ", ".join(self.sublayers)
            raise UnsupportedModelError(f"not every block has an attention that is split off; there is: {allowed}")
        return self.writes["attn"]

    @property
    def mlp_out(self) -> Float[Tensor, "layer pos d_model"] | None:
        """m^l, what each MLP wrote; None in a model without MLPs that are split off."""
        return self.writes.get("mlp")

    @property
    def n_tokens(self) -> int:
        """Number of positions."""
        return self.resid.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.resid.shape[2]

    @property
    def sublayers(self) -> tuple[str, ...]:
        """What can be measured: ``block``, and the sublayers whose writes add up in every block."""
        return sublayers_of(self.splits)

    @cached_property
    def resid_mid(self) -> Float[Tensor, "layer pos d_model"]:
        """x^l + a^l, what the second sublayer of a sequential block reads."""
        return self.resid[:-1] + next(iter(self.writes.values()))

    def read_by(self, layer: int, sublayer: str) -> Float[Tensor, "pos d_model"]:
        """What a sublayer, or the block, reads: x^l, with the writes of those before it where they run in sequence."""
        if sublayer == "block" or self.topology not in ("sequential", "cross"):
            return self.resid[layer]
        before = itertools.takewhile(lambda name: name != sublayer, self.writes)
        return sum((self.writes[name][layer] for name in before), self.resid[layer])

    @property
    def after_writes(self) -> Float[Tensor, "layer pos d_model"]:
        """x^l + a^l + m^l as the model added it up: x^{l+1}, before hooks that edit it."""
        return self.resid[1:] if self.edits is None else self.resid[1:] - self.edits

    @classmethod
    def from_activations(
        cls,
        activations: Mapping[str, Tensor],
        splits: Sequence[Split],
        before: Mapping[str, Tensor] | None = None,
    ) -> Stream:
        """Build the stream from recorded hook points and check it.

        Half-precision activations are lifted to float32; the tolerance of the check is that of their own dtype.

        Args:
            activations: by full hook name, as the model went on with them.
            splits: how each block is split.
            before: ``hook_resid_post`` of each block as it was before hooks of the user's; None where no hook edits
                the stream between blocks, or where it is not known (in a cache).

        Raises:
            MissingHookError, ArgumentError, NonFiniteActivationError, ResidualIdentityError: see ``Trace.from_cache``.
        """
        first = fetch(activations, block_hook(0, "hook_resid_pre"))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32

        def rows(names: Iterable[str], source: Mapping[str, Tensor] = activations) -> Iterator[Tensor]:
            for name in names:
                row = fetch(source, name)
                if row.shape != first.shape:
                    allowed = f"{tuple(first.shape)}, the shape of the stream: a hook there must keep the shape"
                    raise ArgumentError(name, f"activations of shape {tuple(row.shape)}", allowed)
                # a device map spreads the layers over devices; the stream lives on the first one's
                yield row.to(first.device, dtype)

        def stack(*given: Any) -> Tensor:
            return torch.stack(list(rows(*given)))

        n_layers = len(splits)
        layers = range(n_layers)
        resid = stack(
            [block_hook(layer, "hook_resid_pre") for layer in layers] + [block_hook(n_layers - 1, "hook_resid_post")]
        )
        writes = {
            name: stack(block_hook(layer, split.parts[index].write) for layer, split in enumerate(splits))
            for index, name in enumerate(splits[0].names)
        }
        edits = None
        if before is not None:
            edits = resid[1:] - stack((block_hook(layer, "hook_resid_post") for layer in layers), before)
        stream = cls(resid, writes, tuple(splits), edits)
        stream._check_finite()
        stream._check_identity(IDENTITY_TOLERANCE[first.dtype])
        for part in splits[0].parts[1:]:
            reads = [block_hook(layer, part.reads) for layer in layers]
            if stream.topology in ("sequential", "cross") and all(name in activations for name in reads):
                stream._check_reads(part, rows(reads), IDENTITY_TOLERANCE[first.dtype])
        return stream

    def _check_finite(self) -> None:
        # a layer at a time, here and below: of all at once, each step would hold another copy of the stream
        finite = torch.stack([each.isfinite().all(-1) for each in self.resid])
        if finite.all():
            return
        layer, pos = (~finite).nonzero()[0].tolist()
        raise not_finite(layer, self.n_layers, pos)

    @property
    def identity_gap(self) -> float:
        """The largest gap in x^l + a^l + m^l + edits = x^{l+1}, relative to the norm before the edits.

        NaN where the blocks are not split.
        """
        return float(self._identity_gaps().max()) if self.writes else math.nan

    def _identity_gaps(self) -> Float[Tensor, " layer"]:
        steps = zip(self.resid[:-1], self.after_writes, *self.writes.values(), strict=True)
        return torch.stack([relative_gap(before + sum(wrote), after) for before, after, *wrote in steps]).amax(-1)

    def _check_identity(self, tolerance: float) -> None:
        if not self.writes:
            return
        worst = self._identity_gaps()
        if (worst <= tolerance).all():
            return
        layer = int((~(worst <= tolerance)).nonzero()[0])
        raise writes_do_not_add_up(layer, float(worst[layer]), tolerance, self.splits[layer])

    def _check_reads(self, part: Part, hooked: Iterable[Float[Tensor, "pos d_model"]], tolerance: float) -> None:
        """Check that a sublayer reads the stream behind those before it; ``hooked`` is what it read in each layer."""
        gaps = [relative_gap(self.read_by(layer, part.name), each) for layer, each in enumerate(hooked)]
        gap = torch.stack(gaps).amax(-1)
        if (gap <= tolerance).all():
            return
        layer = int((~(gap <= tolerance)).nonzero()[0])
        raise mid_is_another(layer, float(gap[layer]), tolerance, self.splits[layer], part)


def relative_gap(
    found: Float[Tensor, "*rest d"], truth: Float[Tensor, "*rest d"], *, shortest: float = 0.0
) -> Float[Tensor, "*rest"]:
    """||found - truth|| / ||truth|| along the last axis; 0 where the two are equal, zeros included.

    A truth shorter than ``shortest`` counts as that long.
    """
    gap = (found - truth).norm(dim=-1)
    return torch.where(gap > 0, gap / truth.norm(dim=-1).clamp_min(shortest), gap)


def not_finite(layer: int, n_layers: int, pos: int) -> NonFiniteActivationError:
    """The error of a stream x^layer with NaN or infinite values."""
    where = f"enters block {layer}" if layer < n_layers else f"leaves the last block, {layer - 1}"
    return NonFiniteActivationError(
        f"the residual stream that {where} holds NaN or infinite values (first at position {pos}); "
        "no Jacobian, line or rate is defined there. A half-precision model may have overflowed: try float32"
    )


def writes_do_not_add_up(layer: int, gap: float, tolerance: float, split: Split) -> ResidualIdentityError:
    """The error of a block whose writes do not add up to the stream."""
    writes = " and ".join(part.write for part in split.parts)
    return ResidualIdentityError(
        f"block {layer}: resid_pre plus {writes} misses {block_hook(layer, 'hook_resid_post')} by "
        f"{gap:.2e} of its norm (allowed: {tolerance:.0e}), so the hooks do not hold what the sublayers "
        "add to the stream and a split by sublayer would be wrong. An architecture that rescales or reorders its "
        "writes does this (tlc.trace measures its blocks whole), and so do hooks that edit hook_resid_mid and "
        "autoencoders in its place (edit hook_attn_out instead), hooks registered on "
        "a module behind its hook point, or, in a cache, hooks that edit hook_resid_post or hook_resid_pre (a trace "
        "with fwd_hooks= tells their share apart)"
    )


def mid_is_another(layer: int, gap: float, tolerance: float, split: Split, part: Part) -> ResidualIdentityError:
    """The error of a block with a sublayer that does not read x^l plus the writes before it."""
    writes = " and ".join(one.write for one in split.parts[: split.names.index(part.name)])
    reader, after = ("the MLP", "attention") if part.name == "mlp" else (part.name, "the sublayers before it")
    return ResidualIdentityError(
        f"block {layer}: resid_pre plus {writes} misses {block_hook(layer, part.reads)} by "
        f"{gap:.2e} of its norm (allowed: {tolerance:.0e}), so {reader} does not read the stream after "
        f"{after}, and its Jacobian would be that of another input. Hooks that edit {part.reads} do this, and so do "
        "autoencoders in its place: edit hook_attn_out instead"
    )


def stream_of(source: Any) -> Stream:
    """Return the stream of a trace, or of an ``ActivationCache`` alone.

    An ``ActivationCache`` has to hold all blocks of its model. A dictionary names no model: its last block counts as
    the model's last.

    Raises:
        MissingHookError, ArgumentError, NonFiniteActivationError, ResidualIdentityError: see ``Trace.from_cache``.

    Warns:
        UserWarning: a dictionary that names no model lacks ``hook_resid_mid``: parallel blocks have none, but it may
            have been left out.
    """
    if isinstance(source, Stream):
        return source
    activations = plain(source)
    if not isinstance(activations, Mapping):
        shown = source if isinstance(source, str) else type(source).__name__
        allowed = "a trace, which tlc.trace(model, prompt) returns, or the cache of model.run_with_cache"
        raise ArgumentError("source", shown, allowed)
    layers = {int(name.split(".")[1]) for name in activations if name.startswith("blocks.")}
    if not layers:
        raise MissingHookError(f"the cache holds no hook point of any block. {how_to_cache('blocks.0.hook_resid_pre')}")
    model = getattr(source, "model", None)
    if model is not None and max(layers) + 1 < len(model.blocks):
        raise MissingHookError(
            f"the cache ends with block {max(layers)}, and its model has {len(model.blocks)} blocks: run_with_cache "
            "with stop_at_layer= or a names_filter leaves out the others. "
            + how_to_cache(block_hook(max(layers) + 1, "hook_resid_pre"))
        )
    splits = splits_of(activations, 1) * (max(layers) + 1) if model is None else splits_of_model(model)
    if model is None and topology_of(splits) == "opaque":
        fetch(activations, block_hook(0, "hook_attn_out"))  # a cache without any write was cut short
    if model is None and topology_of(splits) == "parallel":
        warnings.warn(
            "the activations hold no hook_resid_mid and name no model, so that their blocks are taken as parallel: no "
            "sublayer path, no shares of growth. Where the blocks are sequential, cache hook_resid_mid too; an "
            "ActivationCache settles it by its model",
            stacklevel=4,
        )
    return Stream.from_activations(activations, splits)
