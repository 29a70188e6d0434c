r"""The formula of a block: its Jacobians as compositions of norms, projections, activation and attention core.

- attention: J = N' W_O (A_q W_Q + A_k W_K + A_v W_V) N, with the blocks A of the core, and N and N' the derivatives of
  the norms before and behind; a QK-norm stands between W_Q and A_q, W_K and A_k, a latent's norm between two weights
  (``readings``); a gate adds A_g W_g;
- MLP: J = N' W_out diag(act'(pre)) W_in N; gated: N' W_out (diag(act'(pre) pre_linear) W_gate + diag(act(pre)) W_in) N;
  a mixture of experts has the units of the chosen ones side by side, and + N' sum_e E_e dw_e^T N for its router;
- block: J_attn + J_mlp (delta I + J_attn) where it is sequential, J_attn + J_mlp where it is parallel.

The parts are tensors with numbers (``analytic``), or shapes alone on torch's meta device (``cost``), so that the work
is counted by the composition that does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.split import Topology
from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.parts import BlockMap, HeadMap
from tlcoupling.linalg.maps import Diagonal, Projection
from tlcoupling.linalg.operator import JacobianOperator, Sum

# The weights that an MLP reads with, by their number.
READS = {1: ("W_in",), 2: ("W_gate", "W_in")}


@dataclass(frozen=True)
class Mixing:
    """The router's term of a mixture of experts, sum_e E_e dw_e^T.

    Attributes:
        columns: the derivative of what the mixture gives by the weight of each expert: E_e.
        rows: the derivative of the weights by what the mixture reads: dw_e.
    """

    columns: Float[Tensor, "d_model expert"]
    rows: Float[Tensor, "expert d_model"]


def attention_map(
    core: AttentionCore,
    write: Float[Tensor, "head e d_model"],
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
        write: W_O.
        src: input position.
        dest: output position.
        before: the derivative of the norm that the attention reads through, at src.
        behind: that of the norm behind it, at dest.
        factor: the block's factor on what the attention gives.
        head: only this head's share.
    """
    heads = slice(None) if head is None else slice(head, head + 1)
    branches = []
    for name, blocks in core.blocks(src, dest).items():
        reading = core.readings[name].derivative(src)
        n_groups = reading.shape[0] // blocks.shape[2]
        groups = torch.arange(core.n_heads, device=blocks.device) // (core.n_heads // n_groups)
        branches.append(HeadMap(blocks[heads], groups[heads], n_groups) @ reading)
    weight = rearrange(write[heads], "head e d -> d (head e)")
    return behind @ (_scaled(factor, weight) @ Sum(branches) @ before)


def mlp_map(
    slopes: Sequence[Float[Tensor, " d_mlp"]],
    weights: Mapping[str, Tensor],
    before: JacobianOperator,
    behind: JacobianOperator,
    factor: float = 1.0,
    mixing: Mixing | None = None,
) -> JacobianOperator:
    """Compose J_mlp at one position.

    Args:
        slopes: of ``hook_post`` on ``hook_pre``, and on ``hook_pre_linear`` where the MLP is gated.
        weights: W_in, W_out and W_gate where it is gated, as ``Sublayer.weights`` gives them.
        before: the derivative of the norm that the MLP reads through.
        behind: that of the norm behind it.
        factor: the block's factor on what the MLP gives.
        mixing: the router's term of a mixture of experts.
    """
    names = READS[len(slopes)]
    branches = [Diagonal(slope) @ Projection(weights[name].mT) for slope, name in zip(slopes, names, strict=True)]
    inner = branches[0] if len(branches) == 1 else Sum(branches)
    given = _scaled(factor, weights["W_out"].mT) @ inner
    if mixing is not None:
        given = given + _scaled(factor, mixing.columns) @ Projection(mixing.rows)
    return behind @ (given @ before)


def block_map(topology: Topology, parts: Sequence[JacobianOperator], same: bool) -> JacobianOperator:
    """Compose the Jacobian of a block.

    Args:
        topology: how its sublayers are arranged.
        parts: J_attn from src to dest, and J_mlp at dest where x^l_src reaches it.
        same: whether src = dest.
    """
    attn, *mlp = parts
    if not mlp:
        return attn
    return BlockMap(attn, *mlp, skip=same) if topology == "sequential" else attn + mlp[0]


def _scaled(factor: float, weight: Float[Tensor, "m n"]) -> Projection:
    """Factor * W, without a copy where the factor is 1."""
    return Projection(weight if factor == 1 else factor * weight)
