"""The autograd engine: exact for any architecture, through the hooked modules themselves.

It runs a block again with the graph kept, so that hooks the user has attached act on the derivative as they act on the
forward pass. It is the oracle of everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlcoupling.errors import HookError
from tlcoupling.forward.hooked import Hook
from tlcoupling.forward.trace import Trace
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.memory import free_memory

Part = Callable[[Tensor], Tensor]  # the coordinates of a leaf that vary

CHUNK, ROWS = 64, 2048  # vectors of a batched backward pass, and rows of its products, at most: more are no faster
CHUNK_SHARE = 0.25  # of what is free, for what they hold on their way


def autograd_flops(block: nn.Module, n_tokens: int) -> float:
    """Floating-point operations of one product: a backward pass over all positions, whichever is asked for."""
    return 4.0 * sum(parameter.numel() for parameter in block.parameters()) * n_tokens


def autograd_column_bytes(block: nn.Module, n_heads: int, n_tokens: int, item: int) -> float:
    """Memory of one vector on its way back through a block, at all positions: twice what its modules give."""
    widths = sum(sum(p.shape[-2:]) for p in block.parameters() if p.ndim > 1) + 3 * n_heads * n_tokens
    return 2.0 * item * n_tokens * widths


def n_heads_of(cfg: Any) -> int:
    """The number of attention heads that a configuration names, 0 where it names none."""
    return max(0, int(getattr(cfg, "n_heads", 0) or 0))


def vectors_at_once(column_bytes: float, n_tokens: int, free: float) -> int:
    """How many vectors go back through a block together."""
    return max(1, min(CHUNK, ROWS // n_tokens, int(CHUNK_SHARE * free / column_bytes)))


def at_once(trace: Trace, layer: int) -> int:
    """Return how many vectors, or moved streams, go through a block together."""
    column = autograd_column_bytes(
        trace.model.blocks[layer], n_heads_of(trace.model.cfg), trace.n_tokens, trace.resid.dtype.itemsize
    )
    return vectors_at_once(column, trace.n_tokens, free_memory(trace.block_input(layer).device))


class GraphJacobian(JacobianOperator):
    """The Jacobian of a vector with respect to a part of a leaf, from a recorded graph, by reverse-mode derivatives.

    J^T y is one backward pass. J x is the derivative of u -> J^T u, dotted with x: a backward pass through the
    backward pass, which needs no forward-mode rule of any module in between.
    """

    def __init__(
        self,
        output: Float[Tensor, " m"],
        leaf: Tensor,
        part: Part,
        flops: float,
        vectors: int = CHUNK,
    ) -> None:
        """Take a graph.

        Args:
            output: the vector, as a function of the leaf.
            leaf: what it depends on.
            part: the coordinates of the leaf that vary, ``[..., *leaf.shape]`` to ``[..., n]``.
            flops: floating-point operations of one product.
            vectors: how many go back through the graph together.
        """
        self._vectors = vectors
        self._output, self._leaf, self._part = output, leaf, part
        self._cotangent = torch.zeros_like(output, requires_grad=True)
        with torch.enable_grad():  # the caller may have it off, and a part without its graph has products of zero
            (pulled,) = torch.autograd.grad(
                output, leaf, self._cotangent, create_graph=True, allow_unused=True, materialize_grads=True
            )
            self._pulled = part(pulled)
        self._describe((len(output), len(self._pulled)), leaf)
        self._cost(flops, len(output) * flops)

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""
        if not self._pulled.requires_grad:
            return x.new_zeros(self.shape[0], x.shape[1])
        return _batched_grad(self._pulled, self._cotangent, x, self._vectors, lambda grads: grads)

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""
        return _batched_grad(self._output, self._leaf, y, self._vectors, self._part)

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself, from m backward passes."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return self.rmm(eye).mT.contiguous()


class BlockGraph(GraphJacobian):
    """A Jacobian from a graph of one block.

    Attributes:
        constant: whether autograd sees no dependence at all of the output on the input.
    """

    def __init__(
        self, trace: Trace, layer: int, where: str, output: Float[Tensor, " m"], leaf: Tensor, part: Part
    ) -> None:
        """Take the graph of a run of the block; ``where`` names it in an error."""
        self.constant = not output.requires_grad
        if self.constant:
            with torch.enable_grad():  # a constant, as where a hook patches it: the Jacobian is zero
                output = output + 0 * leaf.sum()
        flops = autograd_flops(trace.model.blocks[layer], trace.n_tokens)
        try:
            super().__init__(output, leaf, part, flops, at_once(trace, layer))
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise HookError(
                f"layer {layer}, {where}: a hook edits in place an activation that the derivative needs; let it "
                "edit a copy (`activation = activation.clone()`) and give that back"
            ) from error


class AutogradJacobian(BlockGraph):
    """The Jacobian of a sublayer's output at dest with respect to its input at src."""

    def __init__(self, trace: Trace, layer: int, sublayer: str, src: int, dest: int, head: int | None) -> None:
        """Run the block once with its graph kept."""
        output, leaf = _linearize(trace, layer, sublayer, src, dest, head)
        super().__init__(trace, layer, sublayer, output, leaf, at_position(src))


class StreamJacobian(BlockGraph):
    """The Jacobian of a block from its whole input to its whole output, all positions in one vector."""

    def __init__(self, trace: Trace, layer: int) -> None:
        """Run the block once with its graph kept.

        Raises:
            StaleTraceError: it gives another output than when the trace was taken.
        """
        leaf = trace.block_input(layer).clone().requires_grad_()
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            out = trace.run_block(layer, leaf, {})
            output = out.flatten()
        trace.check_current("block", layer, out[0])
        super().__init__(trace, layer, "block", output, leaf, lambda grads: grads.flatten(-3))


def at_position(pos: int) -> Part:
    """The part of a residual stream ``[..., 1, pos, d_model]`` at one position."""
    return lambda stream: stream[..., 0, pos, :]


def _batched_grad(
    output: Tensor,
    leaf: Tensor,
    vectors: Float[Tensor, "m k"],
    chunk_size: int,
    select: Callable[[Tensor], Tensor],
) -> Float[Tensor, "n k"]:
    """Products of the columns of ``vectors`` with d output / d leaf, a chunk at a time, in columns."""

    def pull(cotangent: Tensor, batched: bool) -> Tensor:
        (grads,) = torch.autograd.grad(
            output,
            leaf,
            cotangent,
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
        )
        if grads is None:  # unused: torch would make zeros without the batch axis
            return leaf.new_zeros(len(cotangent) if batched else 1, *leaf.shape)
        return grads if batched else grads[None]

    rows = []
    for chunk in vectors.mT.to(output).split(chunk_size):
        try:
            grads = pull(chunk, batched=True)
        except RuntimeError:  # a module whose backward has no batching rule
            grads = torch.cat([pull(row, batched=False) for row in chunk])
        rows.append(select(grads))
    return torch.cat(rows).mT if rows else vectors.new_zeros(leaf.shape[-1], 0)


def _linearize(
    trace: Trace, layer: int, sublayer: str, src: int, dest: int, head: int | None
) -> tuple[Float[Tensor, " d"], Float[Tensor, "1 pos d"]]:
    """The output at dest as a function of a leaf: the residual stream that the sublayer reads."""
    leaf = trace.input_of(layer, sublayer).clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return output_at(trace, layer, sublayer, src, dest, head, leaf, check=True), leaf


def output_at(
    trace: Trace,
    layer: int,
    sublayer: str,
    src: int,
    dest: int,
    head: int | None,
    stream: Float[Tensor, "1 pos d"],
    check: bool,
) -> Float[Tensor, " d"]:
    """What a sublayer puts out at dest when it reads ``stream``; a block's own x^l is taken off it for src = dest."""
    resid_pre, block = trace.block_input(layer), trace.block(layer)
    reads = trace.reads(layer, sublayer)
    whole = reads == "hook_resid_pre"
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: kept.__setitem__(name, tensor)

    hooks: dict[str, Hook] = {} if whole else {reads: lambda tensor: stream}
    source = "" if sublayer == "block" else block.sublayers[sublayer].write  # "" is no point
    if head is not None:
        (source,) = block.attn.points("z")
    for name in (source, *((block.attn.gives, block.attn.write) if head is not None else ())):
        if trace.point(layer, name) is not None:
            hooks[name] = keep(name)
    with block.attn.keep_unnormed(keep("unnormed")) if head is not None else nullcontext():
        resid_post = trace.run_block(layer, stream if whole else resid_pre, hooks)
    if check:
        trace.check_current("block", layer, resid_post[0])
    if head is not None:
        z = kept.get(source)
        weight = block.output_of_heads(z).to(resid_pre)
        given, written = kept.get(block.attn.gives), kept[block.attn.write][0].detach()
        given = None if given is None else given[0].detach()
        factor = block.attn.write_factor(given, written)
        if check:
            shares = factor * einsum(kept[source][0].detach(), weight, "pos head e, head e d -> head pos d")
            gives = kept["unnormed"][0].detach() if "unnormed" in kept else written
            block.require_heads_add_up(shares, gives, trace.attn_without_heads(layer))
        return factor * (kept[source][0, dest, head] @ weight[head])
    if sublayer == "block":
        return resid_post[0, dest] - stream[0, dest] if src == dest else resid_post[0, dest]
    return kept[source][0, dest]
