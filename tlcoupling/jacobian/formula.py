r"""The formula of a block: its Jacobians as compositions of norms, projections, activation and attention core.

- attention: J = N' W_O (A_q W_Q + A_k W_K + A_v W_V) N, with the blocks A of the core, and N and N' the derivatives of
  the norms before and behind; a QK-norm stands between W_Q and A_q, W_K and A_k;
- MLP: J = N' W_out diag(act'(pre)) W_in N; gated: N' W_out (diag(act'(pre) pre_linear) W_gate + diag(act(pre)) W_in) N;
- block: J_attn + J_mlp (delta I + J_attn) where it is sequential, J_attn + J_mlp where it is parallel.

The parts are tensors with numbers (``analytic``), or shapes alone on torch's meta device (``cost``), so that the work
is counted by the composition that does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.split import Topology
from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.parts import BlockMap, HeadMap
from tlcoupling.linalg.maps import Diagonal, Projection
from tlcoupling.linalg.operator import JacobianOperator, Sum


def attention_map(
    core: AttentionCore,
    weights: Mapping[str, Tensor],
    src: int,
    dest: int,
    before: JacobianOperator,
    behind: JacobianOperator,
    factor: float = 1.0,
    head: int | None = None,
) -> JacobianOperator:
    """Compose J_attn from src to dest.

    Args:
        core: the attention core.
        weights: W_Q, W_K, W_V and W_O, as ``Sublayer.weights`` gives them.
        src: input position.
        dest: output position.
        before: the derivative of the norm that the attention reads through, at src.
        behind: that of the norm behind it, at dest.
        factor: the block's factor on what the attention gives.
        head: only this head's share.
    """
    q_blocks, k_blocks, v_blocks = core.blocks(src, dest)
    terms = [(k_blocks, "W_K", core.n_groups, core.k_norm, src), (v_blocks, "W_V", core.n_groups, None, src)]
    if src == dest:
        terms.append((q_blocks, "W_Q", core.n_heads, core.q_norm, dest))
    branches = []
    for blocks, name, n_groups, norm, pos in terms:
        weight = weights[name]
        # HookedTransformer repeats a group's weights for each of its heads
        weight = rearrange(weight[:: weight.shape[0] // n_groups], "group d e -> (group e) d")
        groups = torch.arange(core.n_heads, device=weight.device) // (core.n_heads // n_groups)
        if head is not None:
            blocks, groups = blocks[head : head + 1], groups[head : head + 1]
        heads = HeadMap(blocks, groups, n_groups)
        branches.append((heads if norm is None else heads @ norm.derivative(pos)) @ Projection(weight))
    write = weights["W_O"] if head is None else weights["W_O"][head : head + 1]
    return behind @ (_scaled(factor, rearrange(write, "head e d -> d (head e)")) @ Sum(branches) @ before)


def mlp_map(
    slopes: Sequence[Float[Tensor, " d_mlp"]],
    weights: Mapping[str, Tensor],
    before: JacobianOperator,
    behind: JacobianOperator,
    factor: float = 1.0,
) -> JacobianOperator:
    """Compose J_mlp at one position.

    Args:
        slopes: of ``hook_post`` on ``hook_pre``, and on ``hook_pre_linear`` where the MLP is gated.
        weights: W_in, W_out and W_gate where it is gated, as ``Sublayer.weights`` gives them.
        before: the derivative of the norm that the MLP reads through.
        behind: that of the norm behind it.
        factor: the block's factor on what the MLP gives.
    """
    names = ["W_in"] if len(slopes) == 1 else ["W_gate", "W_in"]
    branches = [Diagonal(slope) @ Projection(weights[name].mT) for slope, name in zip(slopes, names, strict=True)]
    inner = branches[0] if len(branches) == 1 else Sum(branches)
    return behind @ (_scaled(factor, weights["W_out"].mT) @ inner @ before)


def block_map(topology: Topology, attn: JacobianOperator, mlp: JacobianOperator | None, same: bool) -> JacobianOperator:
    """Compose the Jacobian of a block.

    Args:
        topology: how its sublayers are arranged.
        attn: J_attn from src to dest.
        mlp: J_mlp at dest; None where x^l_src does not reach the MLP at dest.
        same: whether src = dest.
    """
    if mlp is None:
        return attn
    return BlockMap(attn, mlp, skip=same) if topology == "sequential" else attn + mlp


def _scaled(factor: float, weight: Float[Tensor, "m n"]) -> Projection:
    """Factor * W, without a copy where the factor is 1."""
    return Projection(weight if factor == 1 else factor * weight)
