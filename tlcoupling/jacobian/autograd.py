"""The autograd engine: exact for any architecture, through the hooked modules themselves.

It runs a block again with the graph kept, so that hooks the user has attached act on the derivative as they act on the
forward pass. It is the oracle of everything else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlcoupling.errors import TLCouplingError
from tlcoupling.jacobian.norms import write_factor
from tlcoupling.jacobian.operator import JacobianOperator
from tlcoupling.trace import Trace

CHUNK = 64  # vectors per batched backward pass: bounds the memory of a product with many vectors


class GraphJacobian(JacobianOperator):
    """The Jacobian of a vector with respect to a part of a leaf, from a recorded graph, by reverse-mode derivatives.

    J^T y is one backward pass. J x is the derivative of u -> J^T u, dotted with x: a backward pass through the
    backward pass, which needs no forward-mode rule of any module in between.
    """

    def __init__(
        self, output: Float[Tensor, " m"], leaf: Tensor, part: Callable[[Tensor], Tensor], flops: float
    ) -> None:
        """Take a graph.

        Args:
            output: the vector, as a function of the leaf.
            leaf: what it depends on.
            part: the coordinates of the leaf that vary, ``[..., *leaf.shape]`` to ``[..., n]``.
            flops: floating-point operations of one product.
        """
        self._output, self._leaf, self._part = output, leaf, part
        self._cotangent = torch.zeros_like(output, requires_grad=True)
        with torch.enable_grad():  # the caller may have it off, and a part without its graph has products of zero
            (pulled,) = torch.autograd.grad(
                output, leaf, self._cotangent, create_graph=True, allow_unused=True, materialize_grads=True
            )
            self._pulled = part(pulled)
        self.shape, self.dtype, self.device = (len(output), len(self._pulled)), leaf.dtype, leaf.device
        self.product_flops, self.dense_flops = flops, len(output) * flops

    def mm(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """J X."""
        if not self._pulled.requires_grad:
            return x.new_zeros(self.shape[0], x.shape[1])
        return _batched_grad(self._pulled, self._cotangent, x, lambda grads: grads)

    def rmm(self, y: Float[Tensor, "m k"]) -> Float[Tensor, "n k"]:
        """J^T Y."""
        return _batched_grad(self._output, self._leaf, y, self._part)

    def dense(self) -> Float[Tensor, "m n"]:
        """The matrix itself, from m backward passes."""
        eye = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        return self.rmm(eye).mT.contiguous()


class AutogradJacobian(GraphJacobian):
    """The Jacobian of a sublayer's output at dest with respect to its input at src."""

    def __init__(self, trace: Trace, layer: int, sublayer: str, src: int, dest: int, head: int | None) -> None:
        """Run the block once with its graph kept."""
        output, leaf = _linearize(trace, layer, sublayer, src, dest, head)
        if not output.requires_grad:
            raise TLCouplingError(
                f"layer {layer}, {sublayer}: the output does not depend on the input through autograd; a hook that "
                "detaches the graph, or a module that runs without gradients, hides the Jacobian"
            )
        weights = sum(parameter.numel() for parameter in trace.model.blocks[layer].parameters())
        super().__init__(output, leaf, at_position(src), 4.0 * weights * trace.n_tokens)


def at_position(pos: int) -> Callable[[Tensor], Tensor]:
    """The part of a residual stream ``[..., 1, pos, d_model]`` at one position."""
    return lambda stream: stream[..., 0, pos, :]


def _batched_grad(
    output: Tensor, leaf: Tensor, vectors: Float[Tensor, "m k"], select: Callable[[Tensor], Tensor]
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
            materialize_grads=True,
        )
        return grads if batched else grads[None]

    rows = []
    for chunk in vectors.mT.to(output).split(CHUNK):
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
    resid_pre = trace.block_input(layer)
    reads_mid = sublayer == "mlp" and trace.topology == "sequential"
    leaf = (trace.mlp_input(layer) if reads_mid else resid_pre).clone().requires_grad_()
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: kept.__setitem__(name, tensor)

    hooks = {}
    if reads_mid:
        hooks["hook_resid_mid"] = lambda tensor: leaf
    source = "attn.hook_z" if head is not None else f"hook_{sublayer}_out"
    for name in (source, *(("attn.hook_out", "hook_attn_out") if head is not None else ())):
        if trace.point(layer, name) is not None:
            hooks[name] = keep(name)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        resid_post = trace.run_block(layer, resid_pre if reads_mid else leaf, hooks)
        if not reads_mid:
            trace.check_current("block", layer, resid_post[0])
        if head is not None:
            weight = trace.model.blocks[layer].attn.W_O[head].to(resid_pre)
            given = kept.get("attn.hook_out")
            factor = write_factor(None if given is None else given[0].detach(), kept["hook_attn_out"][0].detach())
            output = factor * (kept[source][0, dest, head] @ weight)
        elif sublayer == "block":
            output = resid_post[0, dest] - leaf[0, dest] if src == dest else resid_post[0, dest]
        else:
            output = kept[source][0, dest]
    return output, leaf
