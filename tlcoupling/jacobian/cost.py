"""What a block's Jacobians cost in work and memory, from the shapes of its weights alone: nothing is run.

The closed forms are put together from maps without numbers (on torch's meta device), so that their work is counted by
the same composition that later does it. Which engine a sublayer will get is a guess here, from the names of its
weights: only the certificate knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.forward.hooked import Topology
from tlcoupling.forward.weights import weight_of
from tlcoupling.jacobian.autograd import autograd_column_bytes, autograd_flops
from tlcoupling.jacobian.parts import BlockMap, HeadMap, NormMap
from tlcoupling.linalg.maps import Diagonal, Identity, Projection
from tlcoupling.linalg.operator import JacobianOperator, Sum

_ATTN_WEIGHTS, _MLP_WEIGHTS = ("W_Q", "W_K", "W_V", "W_O"), ("W_in", "W_out")


@dataclass(frozen=True)
class Cost:
    """The cost of one Jacobian.

    Attributes:
        engine: ``"analytic"`` or ``"autograd"``, as far as shapes tell.
        product_flops: floating-point operations of one product with one vector.
        dense_flops: of forming the matrix.
        run_flops: of running the block's own modules again before the first product; once for a layer.
        run_bytes: memory held while the layer is at work: lifted weights, recorded values, autograd's graph.
        column_bytes: memory on the way of a product, for each of its vectors.
        dense_bytes: memory on the way to the matrix; by autograd, beside that of the products which it is made of.
    """

    engine: str
    product_flops: float
    dense_flops: float
    run_flops: float
    run_bytes: float
    column_bytes: float
    dense_bytes: float


def block_costs(model: Any, layer: int, topology: Topology, n_tokens: int, engine: str = "auto") -> dict[str, Cost]:
    """The cost of one position's Jacobians of a layer, by sublayer.

    Args:
        model: the model.
        layer: block index.
        topology: of its blocks.
        n_tokens: length of the prompt.
        engine: ``"auto"``, ``"analytic"`` or ``"autograd"``.
    """
    block, cfg = model.blocks[layer], model.cfg
    weights = _numel(block)
    dtype = next(block.parameters()).dtype
    size = torch.float64.itemsize if dtype == torch.float64 else torch.float32.itemsize
    lifted = weights * size if dtype.itemsize < size else 0
    attn, mlp = _attn_map(block, cfg), None if topology == "attn_only" else _mlp_map(block)
    heads = int(cfg.n_heads)
    column_bytes = autograd_column_bytes(block, heads, n_tokens, size)
    by_autograd = Cost(
        engine="autograd",
        product_flops=autograd_flops(block, n_tokens),
        dense_flops=cfg.d_model * autograd_flops(block, n_tokens),
        run_flops=6.0 * weights * n_tokens,  # forward, backward, and the backward pass's own graph
        run_bytes=lifted + 1.5 * column_bytes,
        column_bytes=column_bytes,
        dense_bytes=float(size * cfg.d_model**2),
    )

    def closed(made: JacobianOperator | None, widths: Iterable[int]) -> Cost:
        if made is None or engine == "autograd":
            return by_autograd
        widths = list(widths)
        return Cost(
            engine="analytic",
            product_flops=made.product_flops,
            dense_flops=made.dense_flops,
            run_flops=4.0 * (weights if topology == "attn_only" else _numel(block.attn)) * n_tokens
            + (0.0 if topology == "attn_only" else 4.0 * _numel(block.mlp)),  # values and one cotangent
            run_bytes=lifted + column_bytes,
            column_bytes=size * (4.0 * cfg.d_model + max(widths)),
            dense_bytes=size * cfg.d_model * (3.0 * cfg.d_model + max(widths)),
        )

    attn_width = 4 * heads * int(cfg.d_head)
    mlp_width = 3 * max((max(shape) for shape in _matrix_shapes(getattr(block, "mlp", None))), default=0)
    costs = {"attn": closed(attn, [attn_width])}
    if topology == "attn_only":
        return {"block": costs["attn"], **costs}
    costs["mlp"] = closed(mlp, [mlp_width])
    whole = None
    if attn is not None and mlp is not None:
        whole = BlockMap(attn, mlp, skip=True) if topology == "sequential" else Sum([attn, mlp])
    return {"block": closed(whole, [attn_width, mlp_width]), **costs}


def layer_costs(
    model: Any, layers: Iterable[int], topology: Topology, n_tokens: int, engine: str = "auto"
) -> dict[int, dict[str, Cost]]:
    """``block_costs`` of several layers; those whose weights have the same shapes are counted once."""
    known: dict[Any, dict[str, Cost]] = {}
    found = {}
    for layer in layers:
        block = model.blocks[layer]
        key = tuple((name, tuple(p.shape), p.dtype, str(p.device)) for name, p in block.named_parameters())
        if key not in known:
            known[key] = block_costs(model, layer, topology, n_tokens, engine)
        found[layer] = known[key]
    return found


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matrix_shapes(module: nn.Module | None) -> list[tuple[int, ...]]:
    return [] if module is None else [tuple(p.shape[-2:]) for p in module.parameters() if p.ndim > 1]


def _shapes(module: Any, names: Sequence[str]) -> Mapping[str, torch.Size] | None:
    """Shapes of a module's weights in TransformerLens's orientation; None where one is missing."""
    found = {name: weight.shape for name in names if (weight := weight_of(module, name)) is not None}
    return found if set(found) == set(names) else None


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _norm_map(block: nn.Module, name: str, size: int) -> JacobianOperator:
    """The derivative of a norm of the block; the identity where it has none."""
    module = getattr(block, name, None)
    if module is None or isinstance(module, nn.Identity):
        return Identity(size, _empty())
    return _norm_of(size)


def _norm_of(size: int) -> NormMap:
    return NormMap(_empty(size), _empty(), _empty(size), centered=False)


def _head_map(heads: int, size: int, n_groups: int) -> HeadMap:
    return HeadMap(_empty(heads, size, size), torch.empty(heads, dtype=torch.long, device="meta"), n_groups)


def _attn_map(block: Any, cfg: Any) -> JacobianOperator | None:
    shapes = _shapes(block.attn, _ATTN_WEIGHTS)
    if shapes is None or any(len(shape) != 3 for shape in shapes.values()):
        return None
    d, heads, size = shapes["W_Q"][1], shapes["W_Q"][0], shapes["W_Q"][2]
    groups = getattr(cfg, "n_key_value_heads", None) or shapes["W_K"][0]
    branches = []
    for n_groups, norm in ((groups, "k_norm"), (groups, None), (heads, "q_norm")):
        branch: JacobianOperator = _head_map(heads, size, n_groups)
        module = None if norm is None else getattr(block.attn, norm, None)
        if module is not None:
            together = n_groups > 1 and max((p.numel() for p in module.parameters()), default=0) == n_groups * size
            branch = branch @ (_norm_of(n_groups * size) if together else _head_map(n_groups, size, n_groups))
        branches.append(branch @ Projection(_empty(n_groups * size, d)))
    whole = Projection(_empty(d, heads * size)) @ Sum(branches) @ _norm_map(block, "ln1", d)
    return _norm_map(block, "ln1_post", d) @ whole


def _mlp_map(block: Any) -> JacobianOperator | None:
    shapes = _shapes(block.mlp, _MLP_WEIGHTS)
    if shapes is None or any(len(shape) != 2 for shape in shapes.values()):
        return None
    d, width = shapes["W_in"]
    branches = 2 if weight_of(block.mlp, "W_gate") is not None else 1
    inner = Sum([Diagonal(_empty(width)) @ Projection(_empty(width, d)) for _ in range(branches)])
    reads = "ln1" if getattr(block, "ln2", None) is None else "ln2"
    whole = Projection(_empty(d, width)) @ inner @ _norm_map(block, reads, d)
    return _norm_map(block, "ln2_post", d) @ whole
