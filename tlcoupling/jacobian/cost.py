"""What a block's Jacobians cost in work and memory, from the shapes of its weights alone: nothing is run.

The formula of the closed forms (``formula``) is composed of shapes on torch's meta device. The composition that counts
the work is therefore the one that does it. Which engine a sublayer will get is a guess from the names of its weights:
only the certificate decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.forward.block import Block, Sublayer, Uncovered
from tlcoupling.forward.lifting import lifted
from tlcoupling.forward.offload import is_offloaded
from tlcoupling.forward.quantised import dtype_of, numel_of, quantisation_of
from tlcoupling.forward.split import Split
from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.autograd import autograd_column_bytes, autograd_flops, n_heads_of
from tlcoupling.jacobian.formula import READS, Mixing, attention_map, block_map, mlp_map
from tlcoupling.jacobian.mixture import Experts
from tlcoupling.jacobian.norms import Norm
from tlcoupling.jacobian.readings import HeadNorm, Latent, head_readings
from tlcoupling.jacobian.scores import Scores
from tlcoupling.linalg.maps import Identity
from tlcoupling.linalg.operator import JacobianOperator

_CHOSEN = ("experts_per_token", "num_experts_per_tok")  # names of the number of chosen experts in a configuration


@dataclass(frozen=True)
class Cost:
    """The cost of one Jacobian.

    Attributes:
        engine: ``"analytic"`` or ``"autograd"``, guessed from the weights.
        product_flops: floating-point operations of one product with one vector.
        dense_flops: of forming the matrix.
        forward_flops: of one forward pass of the block.
        run_bytes: memory held while the layer is measured: weights that are read or lifted, and autograd's graph of its
            own.
        backward_bytes: of one vector on its way back through the block at all positions, twice that of a run's graph.
        column_bytes: working memory of a product, for each of its vectors.
        dense_bytes: working memory of forming the matrix; by autograd, in addition to that of its products.
    """

    engine: str
    product_flops: float
    dense_flops: float
    forward_flops: float
    run_bytes: float
    backward_bytes: float
    column_bytes: float
    dense_bytes: float


def block_costs(model: Any, layer: int, split: Split, n_tokens: int, engine: str = "auto") -> dict[str, Cost]:
    """Return the cost of one position's Jacobians of a layer, by sublayer; ``"head"`` is that of one attention head.

    Args:
        model: the model.
        layer: block index.
        split: how the block is split.
        n_tokens: length of the prompt.
        engine: ``"auto"``, ``"analytic"`` or ``"autograd"``.
    """
    block, cfg = Block.read(model, layer, split), model.cfg
    weights = _numel(block.module)
    dtype = dtype_of(block.module)
    size = torch.float64.itemsize if dtype == torch.float64 else torch.float32.itemsize
    lifted_bytes = lifted_numbers(block.module) * size
    # read for each layer: pages of files beside their copies, or holes between the matrices that are kept
    lifted_bytes += 2 * weights * dtype.itemsize if is_offloaded(block.module) else 0
    maps = {name: _map(block, sublayer) for name, sublayer in block.sublayers.items()}
    heads = n_heads_of(cfg)
    column_bytes = autograd_column_bytes(block.module, heads, n_tokens, size)
    by_autograd = Cost(
        engine="autograd",
        product_flops=autograd_flops(block.module, n_tokens),
        dense_flops=cfg.d_model * autograd_flops(block.module, n_tokens),
        forward_flops=2.0 * weights * n_tokens,
        run_bytes=lifted_bytes + 1.5 * column_bytes,
        backward_bytes=column_bytes,
        column_bytes=column_bytes,
        dense_bytes=float(size * cfg.d_model**2),
    )

    modules = {name: sublayer.module for name, sublayer in block.sublayers.items()}
    widest = {name: 3 * _widest(module) for name, module in modules.items()}
    width = {
        name: 4 * heads * int(cfg.d_head) if block.sublayers[name].kind == "attn" else wide
        for name, wide in widest.items()
    }

    def closed(made: JacobianOperator | None, widest: int) -> Cost:
        if made is None or engine == "autograd":
            return by_autograd
        return Cost(
            engine="analytic",
            product_flops=made.product_flops,
            dense_flops=made.dense_flops,
            forward_flops=by_autograd.forward_flops,
            run_bytes=float(lifted_bytes),
            backward_bytes=column_bytes,
            column_bytes=size * (4.0 * cfg.d_model + widest),
            dense_bytes=size * cfg.d_model * (3.0 * cfg.d_model + widest),
        )

    costs = {name: closed(maps[name], width[name]) for name in modules}
    if block.sublayers and block.mixer.kind == "attn":
        costs["head"] = closed(_map(block, block.mixer, head=0), width[block.mixer.name])
    parts = [each for each in maps.values() if each is not None]
    whole = None
    if parts and len(parts) == len(maps):
        whole = block_map(split.topology, parts, same=True)
    return {"block": closed(whole, max(width.values(), default=0)), **costs}


def layer_costs(
    model: Any, layers: Iterable[int], splits: Sequence[Split], n_tokens: int, engine: str = "auto"
) -> dict[int, dict[str, Cost]]:
    """Return ``block_costs`` of several layers; layers whose weights have the same shapes are counted once."""
    known: dict[Any, dict[str, Cost]] = {}
    costs = {}
    for layer in layers:
        block = model.blocks[layer]
        key = tuple((name, tuple(p.shape), p.dtype, str(p.device)) for name, p in block.named_parameters())
        if key not in known:
            known[key] = block_costs(model, layer, splits[layer], n_tokens, engine)
        costs[layer] = known[key]
    return costs


def lifted_numbers(module: nn.Module) -> int:
    """Return how many weights of a module are held in fewer bits than they are measured in."""
    lift = dtype_of(module).itemsize < torch.float32.itemsize or quantisation_of(module)
    return numel_of(module) if lift else 0


def _numel(module: nn.Module | None) -> int:
    return numel_of(module) if module is not None else 0


def _widest(module: nn.Module | None) -> int:
    """The largest side of a module's matrices."""
    shapes = [p.shape[-2:] for p in module.parameters() if p.ndim > 1] if module is not None else []
    return max((max(shape) for shape in shapes), default=0)


def _map(block: Block, sublayer: Sublayer, head: int | None = None) -> JacobianOperator | None:
    """The Jacobian of a sublayer, of shapes alone; None where it has no closed form."""
    d_model = block.model.cfg.d_model
    behind = sublayer.behind if head is None else None  # a head is measured before it
    before, behind = (_derivative(norm, d_model) for norm in (sublayer.before, behind))
    try:
        if sublayer.kind == "mlp" and sublayer.has_experts:
            slopes, weights, mixing = _mixture(sublayer, block.model.cfg)
            return mlp_map(slopes, weights, before, behind, mixing=mixing)
        with lifted(block.model, sublayer.module):
            latent = Latent.of(sublayer.module) if sublayer.kind == "attn" else None
            weights = {} if latent is not None else {name: w.to("meta") for name, w in sublayer.weights().items()}
    except Uncovered:
        return None
    if sublayer.kind == "mlp":
        if weights["W_in"].shape[0] != d_model:  # a bridge of transformer-lens 3.0 to 3.6 gives them transposed
            return None
        return mlp_map([_empty(weights["W_in"].shape[1])] * (len(weights) - 1), weights, before, behind)
    if latent is not None:
        latent = latent.to(_empty())
        readings = latent.readings(lambda name, down: _head_norm(_empty(1, 1, len(down.weight)), together=True))
        write, size = latent.write(), latent.rope + latent.nope
    else:
        n_groups = block.n_groups or weights["W_K"].shape[0]
        readings = head_readings(weights, {"W_K": n_groups, "W_V": n_groups})
        write, size = weights["W_O"], weights["W_Q"].shape[2]
        for name, module in (("q", sublayer.part("q_norm")), ("k", sublayer.part("k_norm"))):
            if module is not None:
                inputs = _empty(1, len(readings[name].weight) // size, size)
                together = any(p.shape == (inputs[0].numel(),) for p in module.parameters()) and inputs.shape[1] > 1
                readings[name] = replace(readings[name], norm=_head_norm(inputs, together))
    heads = len(write)
    core = AttentionCore(
        pattern=_empty(heads, 1, 1),
        values=_empty(1, heads, write.shape[1]),
        queries=_empty(1, heads, size),
        keys=_empty(1, heads, size),
        scores=Scores(1.0),
        rotary=None,
        gates=_empty(1, heads, write.shape[1]) if "gate" in readings else None,
        readings=readings,
    )
    return attention_map(core, write, 0, 0, before, behind, head=head)


def _mixture(sublayer: Sublayer, cfg: Any) -> tuple[list[Tensor], dict[str, Tensor], Mixing]:
    """The slopes and weights of the chosen experts side by side, and the router's term.

    Raises:
        Uncovered: the experts are held in an unknown form.
    """
    experts, shared = Experts.stacked(sublayer.module), Experts.of_shared(sublayer.module)
    chosen = next((k for name in _CHOSEN if isinstance(k := getattr(cfg, name, None), int)), 1)
    units, reads = chosen * experts.write.shape[1], READS[experts.read.shape[2] // experts.write.shape[1]]
    if shared is not None:
        chosen, units = chosen + 1, units + shared.write.shape[1]
    weights = {**{name: _empty(cfg.d_model, units) for name in reads}, "W_out": _empty(units, cfg.d_model)}
    return [_empty(units)] * len(reads), weights, Mixing(_empty(cfg.d_model, chosen), _empty(chosen, cfg.d_model))


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _norm(size: int) -> Norm:
    return Norm(_empty(size), _empty(size), _empty(), centered=False)


def _derivative(norm: nn.Module | None, size: int) -> JacobianOperator:
    """The derivative of a norm of the stream; the identity where there is none."""
    return Identity(size, _empty()) if norm is None else _norm(size).derivative(_empty(size))


def _head_norm(inputs: Tensor, together: bool) -> HeadNorm:
    """A norm of each head, or of all heads together."""
    count, size = inputs.shape[1:]
    return HeadNorm((_norm(count * size),) if together else (_norm(size),) * count, inputs, together)
