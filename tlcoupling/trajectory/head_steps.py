r"""Heads along a token's trajectory: how much of each block's step each head writes.

A head's writes of different layers are made by unrelated heads, so they are no path of their own. What is defined is
each head's part in the step that the block takes, layer by layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.block import Uncovered
from tlcoupling.forward.context import measured
from tlcoupling.forward.lifting import lifted
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.norms import Norm
from tlcoupling.results.base import Result


@dataclass(frozen=True, repr=False, eq=False)
class HeadSteps(Result):
    r"""Each head's part in each block's step, d^l = x^{l+1} - x^l.

    Attributes:
        share: <w, d^l> / ||d^l||^2 with w what the head writes: the part of the step that the head makes, negative
            where it works against it. ``[layer, head, pos]``.
        bias_share: the same of what the attention writes besides its heads (its output bias). ``[layer, pos]``.
        mlp_share: the same of the MLP's write; None in an attention-only model. ``[layer, pos]``. Over heads, bias and
            MLP the shares sum to 1.
        length: ||w|| / ||d^l||, the length of the head's write beside that of the step. ``[layer, head, pos]``.
        tokens: the tokens as text.
    """

    share: Float[Tensor, "layer head pos"]
    bias_share: Float[Tensor, "layer pos"]
    mlp_share: Float[Tensor, "layer pos"] | None
    length: Float[Tensor, "layer head pos"]
    tokens: tuple[str, ...]

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "share": ("layer", "head", "pos"),
        "bias_share": ("layer", "pos"),
        "mlp_share": ("layer", "pos"),
        "length": ("layer", "head", "pos"),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attn_share": ("layer", "pos"),
        "cosine": ("layer", "head", "pos"),
    }

    def __repr__(self) -> str:
        """One line."""
        n_layers, n_heads, n_tokens = self.share.shape
        return (
            f"HeadSteps({n_heads} heads of {n_layers} layers, {n_tokens} tokens: attention's mean share of the step "
            f"{self.attn_share.nanmean():.4f})"
        )

    @property
    def attn_share(self) -> Float[Tensor, "layer pos"]:
        """Attention's share of the step: that of its heads and its bias."""
        return self.share.sum(1) + self.bias_share

    @property
    def cosine(self) -> Float[Tensor, "layer head pos"]:
        """The cosine between a head's write and the step; NaN where a head writes nothing."""
        return self.share / self.length

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "layer": range(self.share.shape[0]),
            "head": range(self.share.shape[1]),
            "pos": range(len(self.tokens)),
        }


@measured
def head_steps(trace: Trace) -> HeadSteps:
    """How much of each token's step each head writes, in every layer.

    Behind a post-norm a head's write is what the norm makes of it with its scale held, as in direct logit attribution,
    so that the shares still sum to the attention's.

    Args:
        trace: a trace of the model.

    Raises:
        UnsupportedModelError: the attention's write is not the sum of its heads' (no hook_z, no W_O, or a write that
            they do not account for).
        StaleTraceError: the model or its hooks have changed since the trace was taken.

    Example:
        >>> tlc.head_steps(trace).share[3, :, -1]  # of the heads of layer 3, last token # doctest: +SKIP
    """
    require_trace(trace)
    started = time.perf_counter()
    fields: dict[str, list[Tensor]] = {name: [] for name in ("share", "bias_share", "mlp_share", "length")}
    for layer in range(trace.n_layers):
        step = trace.resid[layer + 1] - trace.resid[layer]
        size = step.norm(dim=-1)

        def share(write: Float[Tensor, "*head pos d"], step: Tensor = step, size: Tensor = size) -> Tensor:
            return (write * step).sum(-1) / size.square()

        writes = head_writes(trace, layer).to(step)
        fields["share"].append(share(writes))
        written = trace.writes[trace.block(layer).attn.name][layer]
        fields["bias_share"].append(share(written - writes.sum(0)))
        fields["length"].append(writes.norm(dim=-1) / size)
        if trace.mlp_out is not None:
            fields["mlp_share"].append(share(trace.mlp_out[layer]))
    stacked = {name: torch.stack(values).cpu() if values else None for name, values in fields.items()}
    return HeadSteps(
        provenance=trace.provenance(settings={}, seconds=time.perf_counter() - started),
        tokens=trace.str_tokens,
        **stacked,  # pyright: ignore[reportArgumentType]
    )


def head_writes(trace: Trace, layer: int) -> Float[Tensor, "head pos d_model"]:
    """What each head of a layer adds to the stream; the attention's write is their sum and a bias.

    Raises:
        UnsupportedModelError, StaleTraceError: see ``head_steps``.
    """
    block, kept = trace.block(layer), {}
    attn = block.attn

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: kept.__setitem__(name, tensor[0].detach())

    (hook_z,) = attn.points("z")
    hooks = {name: keep(name) for name in (hook_z, attn.gives) if trace.point(layer, name) is not None}
    with torch.no_grad(), attn.keep_unnormed(keep("unnormed")):
        written = trace.run_attn(layer, trace.block_input(layer), hooks)[0]
    trace.check_current(attn.name, layer, written)
    weight = block.output_of_heads(kept.get(hook_z)).to(written)
    before = kept.get("unnormed", written)
    factor = attn.write_factor(kept.get(attn.gives), written)
    writes = factor * einsum(kept[hook_z].to(written), weight, "pos head e, head e d -> head pos d")
    block.require_heads_add_up(writes, before, trace.attn_without_heads(layer).to(before))
    if attn.behind is None:
        return writes
    try:
        with lifted(trace.model, attn.behind):
            norm = Norm.read(attn.behind, before, "the norm behind the attention")
    except Uncovered as error:
        raise UnsupportedModelError(f"the write of layer {layer} cannot be split into heads: {error}") from error
    return norm.parts(writes, before)
