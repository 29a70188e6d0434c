r"""A differentiable coupling, for use as a training regulariser.

It is the coupling of ``metric``, on Jacobians that keep their graph and with differentiable singular triplets.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlcoupling.arguments import Indices, check_index, check_name, check_sublayer, resolve_indices, resolve_one_k
from tlcoupling.coupling.metric import Normalizer, coupling, off_diagonal_mean
from tlcoupling.coupling.null import null_coupling
from tlcoupling.errors import ArgumentError, DegenerateSpectrumError, UnsupportedModelError
from tlcoupling.forward.block import Block
from tlcoupling.forward.context import in_training_mode, measured
from tlcoupling.forward.hooked import Done, Hook, attached, record_forward, require_supported
from tlcoupling.forward.inputs import Inputs
from tlcoupling.forward.offload import is_offloaded
from tlcoupling.forward.points import hook_points
from tlcoupling.forward.prompt import to_tokens
from tlcoupling.forward.split import Split, block_hook, splits_of_model, sublayers_of
from tlcoupling.forward.stream import IDENTITY_TOLERANCE, Stream, relative_gap
from tlcoupling.forward.trace import recorded
from tlcoupling.forward.user_hooks import hooked_layers
from tlcoupling.jacobian.differences import Function, leaning

Quantity = Literal["values", "excess"]
Sublayer = Literal["block", "attn", "mlp"]

_MIN_GAP = 100  # least gap of squared singular values, in rounding errors; below it the derivative is noise


@measured
def coupling_loss(
    model: Any,
    tokens: Any,
    k: int | float = 10,
    *,
    layers: Indices | None = None,
    sublayer: Sublayer = "block",
    token: int = -1,
    quantity: Quantity = "values",
    normalizer: Normalizer = "frobenius",
    absolute: bool = True,
    attention_mask: Any | None = None,
) -> Float[Tensor, ""]:
    r"""Return 1 - coupling of the layers' Jacobians, differentiable with respect to the model's parameters.

    c is the mean coupling over ordered pairs of different layers (``depth_coupling(...).mean()``). With
    ``quantity="excess"`` the loss is c_null - c, about 0 for random weights at every width and K. This c_null is of
    the whole width; ``depth_coupling(...).excess`` takes the effective width. Minimising the loss couples the layers; a
    negative weight uncouples them. Add it to the task loss:

        (task_loss + 0.1 * tlc.coupling_loss(model, tokens, layers=[4, 5, 6])).backward()

    The derivative passes through the Jacobians (second derivatives of the model), the residual stream and the singular
    vectors. With P = U^T J V, du_i = sum_j u_j (s_i dP_ji + s_j dP_ij) / (s_i^2 - s_j^2), and likewise dv_i. The loss
    does not depend on the signs of pairs (u, v), so no other term is needed. If one of the top k singular values
    coincides with another value, the derivative does not exist: an error is raised. Only first derivatives are correct:
    do not differentiate the gradient.

    The Jacobians are held against central differences of what is run, as all are: parts without a graph are an error.

    Cost: d_model backward passes per layer, with their graph kept, and two forward passes for the differences. Use a
    few layers and a short prompt. The forward pass runs at the highest float32 precision, the backward pass at the
    precision set when it runs.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge`` in float32 or float64, in eval mode, or in training mode
            without dropout. Attached hooks act.
        tokens: a prompt, as in ``trace``.
        k: number of singular vectors to compare, or a fraction of d_model.
        layers: at least two block indices; by default all.
        sublayer: ``"block"``, or a sublayer that all blocks have, such as ``"attn"`` or ``"mlp"``. Of a sublayer, one
            more forward pass checks that the writes add up to the stream.
        token: the position.
        quantity: ``"values"`` or ``"excess"``.
        normalizer: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        attention_mask: as in ``trace``.

    Raises:
        ArgumentError: an argument out of range.
        UnsupportedModelError: as in ``trace``; dropout; weights in half precision or 4 bits; a block whose
            hook points the model does not call; a model of images or sound.
        ResidualIdentityError: the sublayers' writes do not add up to the stream; ``"block"`` needs no such split.
        DegenerateSpectrumError: singular values that coincide.
        HookError, DerivativeError: a hook, or the model itself, hides from autograd what it does.
    """
    require_supported(model, in_training=True)
    dtypes = [parameter.dtype for parameter in model.blocks.parameters()]  # norms may be finer than what they feed
    if coarse := [dtype for dtype in dtypes if dtype not in (torch.float32, torch.float64)]:
        raise UnsupportedModelError(
            f"the weights are {coarse[0]}, too coarse for derivatives of singular vectors; allowed: float32, float64"
        )
    if is_offloaded(model):
        raise UnsupportedModelError(
            "weights not in memory: accelerate offloads them, so no gradient of the loss would reach them. Load the "
            "whole model onto devices"
        )
    ids = to_tokens(model, tokens, None, attention_mask)
    splits = splits_of_model(model)
    check_sublayer("sublayer", sublayer, sublayers_of(splits))
    if sublayer != "block":
        _require_split(model, ids, splits)
    check_name("quantity", quantity, get_args(Quantity))
    check_name("normalizer", normalizer, get_args(Normalizer))
    chosen = resolve_indices("layers", layers, len(model.blocks))
    if len(chosen) < 2:
        raise ArgumentError("layers", layers, "at least two layers to compare")
    pos = check_index("token", token, ids.shape[1])
    size = resolve_one_k("k", k, model.cfg.d_model)
    if in_training_mode(model):
        _require_repeatable(model, ids)
    ends = {layer: _ends(Block.read(model, layer, splits[layer]), sublayer) for layer in chosen}
    jacobians = _jacobians(model, ids, ends, pos)
    parts = [differentiable_triplets(jacobian, size) for jacobian in jacobians]
    home = jacobians[0].device  # device of the loss; a device map may have put other layers elsewhere
    u, s, v = (torch.stack([part.to(home) for part in each]) for each in zip(*parts, strict=True))
    projected = torch.stack(  # [layer, basis_layer, K, K]
        [(u.mT.to(jacobian.device) @ jacobian @ v.to(jacobian.device)).to(home) for jacobian in jacobians]
    )
    values = coupling(projected, s[:, None], normalizer, absolute)
    if quantity == "values":
        return 1 - off_diagonal_mean(values)
    frobenius = torch.stack([jacobian.norm().to(home) for jacobian in jacobians])
    null = null_coupling(s, frobenius, model.cfg.d_model, normalizer, absolute)  # of the whole width, which is constant
    return off_diagonal_mean(null[:, None] - values)


def _require_split(model: Any, ids: Tensor, splits: Sequence[Split]) -> None:
    """Check that the sublayers' writes add up to the stream, as a trace does, by one more forward pass.

    Raises:
        ResidualIdentityError: they do not.
        UnsupportedModelError: the pass does not call their hook points.
    """
    names = [name for name in recorded(splits) if name in hook_points(model)]
    outputs = [block_hook(layer, "hook_resid_post") for layer in range(len(splits))]
    record = record_forward(model, Inputs(ids), names, outputs, wrap=False)
    if silent := [name for name in names if name not in record.activations] + [
        name for name in outputs if name not in record.before
    ]:
        raise _not_called(silent[0])
    Stream.from_activations(record.activations, splits, record.before)


def differentiable_triplets(
    jacobian: Float[Tensor, "d d"], k: int
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"], Float[Tensor, "d k"]]:
    r"""Return the top k singular triplets, differentiable; only the gaps of the top k values matter.

    The derivative of ``torch.linalg.svd`` divides by all gaps. Those among the discarded values are exactly zero for a
    Jacobian of low rank.

    Raises:
        DegenerateSpectrumError: one of the top k values coincides with the next one, or is zero.
    """
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(jacobian)
        square = s.square()
        following = torch.cat([square[1:], square.new_zeros(1)])[:k]
        close = square[:k] - following <= _MIN_GAP * torch.finfo(s.dtype).eps * square[0]
        if close.any():
            index = int(close.nonzero()[0])
            raise DegenerateSpectrumError(
                f"singular value {index + 1} of a Jacobian, {float(s[index]):.6g}, coincides with the next one or with "
                "zero, so its vectors have no derivative: take a smaller k"
            )
        gaps = square[:k] - square[:, None]
        weights = torch.where(torch.eye(len(s), k, dtype=torch.bool, device=s.device), 0.0, 1 / gaps)
        eye = torch.eye(len(s), k, dtype=s.dtype, device=s.device)
    products = u.mT @ jacobian @ vh.mT  # P; its value is diag(s), and below only its derivative matters
    moved = products - products.detach()
    down, across = moved[:, :k], moved[:k].mT
    left = (s[:k] * down + s[:, None] * across) * weights
    right = (s[:, None] * down + s[:k] * across) * weights
    return u @ (eye + left), products.diagonal()[:k], vh.mT @ (eye + right)


def _ends(block: Block, sublayer: str) -> tuple[str, str]:
    """The hook points of a block between which a Jacobian lies."""
    if sublayer == "block":
        return "hook_resid_pre", "hook_resid_post"
    return block.sublayers[sublayer].reads, block.sublayers[sublayer].write


def _jacobians(model: Any, ids: Tensor, ends: Mapping[int, tuple[str, str]], pos: int) -> list[Float[Tensor, "d d"]]:
    """Return the Jacobians at one position with their graph, all from one forward pass.

    Args:
        model: the model.
        ids: token ids.
        ends: by layer, the hook points that it reads and writes at.
        pos: the position.

    Raises:
        HookError, DerivativeError: one is not the derivative of what is run, by central differences.

    Warns:
        UserWarning: a hook is not smooth, so that this could not be checked.
    """
    layers = list(ends)
    inputs: dict[int, Tensor] = {}

    def begin(layer: int, tensor: Tensor) -> Tensor:
        inputs[layer] = tensor.clone() if tensor.requires_grad else tensor.detach().clone().requires_grad_()
        return inputs[layer]

    def written(outputs: Mapping[int, Tensor], layer: int, read: Tensor) -> Float[Tensor, " d"]:
        return outputs[layer][0, pos] - (read[0, pos] if ends[layer][1] == "hook_resid_post" else 0.0)

    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        outputs = _written(model, ids, ends, begin)
        out = {layer: written(outputs, layer, inputs[layer]) for layer in layers}
        jacobians = [_dense(out[layer], inputs[layer], pos) for layer in layers]
    home = jacobians[0].device

    @torch.no_grad()
    def moved(moves: Float[Tensor, "move layer d"]) -> Float[Tensor, "move layer d"]:
        changes = []
        for move in moves:
            streams = {layer: inputs[layer].detach().clone() for layer in layers}
            for layer, step in zip(layers, move, strict=True):
                streams[layer][0, pos] += step.to(streams[layer])
            ran = _written(model, ids, ends, lambda layer, tensor, streams=streams: streams[layer])
            changes.append([(written(ran, layer, streams[layer]) - out[layer]).to(home) for layer in layers])
        return torch.stack([torch.stack(change) for change in changes])

    stream = torch.stack([inputs[layer][0, pos].detach().to(home) for layer in layers])
    hooked = hooked_layers(hook_points(model), model.blocks)
    reason = Function(
        where=f"coupling_loss, entry {{row}} of layers={list(layers)}",
        moved=moved,
        product=lambda direction: torch.stack(
            [(one.detach() @ q.to(one)).to(home) for one, q in zip(jacobians, direction, strict=True)]
        ),
        size=1.0,
        lengths=torch.stack([out[layer].detach().norm().to(home) for layer in layers]),
        hooked=not hooked.isdisjoint(layers),
    ).require(leaning(stream) * stream.norm(dim=-1, keepdim=True))
    if reason is not None:
        warnings.warn(reason, stacklevel=5)
    return jacobians


def _written(
    model: Any, ids: Tensor, ends: Mapping[int, tuple[str, str]], read: Callable[[int, Tensor], Tensor]
) -> dict[int, Tensor]:
    """Run the model as far as the last of some layers, and return what each wrote when it read ``read(layer, x)``."""
    points, last = hook_points(model), block_hook(max(ends), "hook_resid_post")
    outputs: dict[int, Tensor] = {}

    def end(layer: int, tensor: Tensor) -> None:
        outputs[layer] = tensor

    def stop(tensor: Tensor) -> None:
        raise Done

    hooks: list[tuple[Any, Hook]] = []
    for layer, (reads, _) in ends.items():
        hooks.append((points[block_hook(layer, reads)], partial(read, layer)))
    for layer, (_, writes) in ends.items():
        hooks.append((points[block_hook(layer, writes)], partial(end, layer)))
    with suppress(Done), attached([*hooks, (points[last], stop)]):
        model(ids, return_type=None)
    if silent := [block_hook(layer, writes) for layer, (_, writes) in ends.items() if layer not in outputs]:
        raise _not_called(silent[0])
    return outputs


def _not_called(name: str) -> UnsupportedModelError:
    """Return the error of a hook point that the forward pass does not call."""
    return UnsupportedModelError(
        f"the forward pass does not call {name}, so its blocks have no differentiable Jacobian here. "
        "tlc.depth_coupling measures this model, without a derivative"
    )


def _require_repeatable(model: Any, ids: Tensor) -> None:
    """Raise an error if two passes in training mode give different residual streams."""
    last = hook_points(model)[block_hook(len(model.blocks) - 1, "hook_resid_post")]
    streams: list[Tensor] = []
    with torch.no_grad(), attached([(last, lambda tensor: streams.append(tensor.clone()))]):
        for _ in range(2):
            model(ids, return_type=None)
    if relative_gap(*streams).max() > IDENTITY_TOLERANCE[streams[0].dtype]:
        raise UnsupportedModelError(
            "the model is in training mode and two runs give different streams, as dropout does: each pass is another "
            "function with another Jacobian. Set its dropout to 0, or call model.eval() around this loss"
        )


def _dense(output: Float[Tensor, " d"], leaf: Float[Tensor, "1 pos d"], pos: int) -> Float[Tensor, "d d"]:
    """Return d output / d leaf at one position, with its graph; zero where autograd sees no dependence."""
    if not output.requires_grad:
        output = output + 0 * leaf.sum()
    eye = torch.eye(len(output), dtype=output.dtype, device=output.device)
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    try:
        (rows,) = torch.autograd.grad(output, leaf, eye, is_grads_batched=True, **options)
        return rows[:, 0, pos]
    except RuntimeError:  # a module's backward has no batching rule
        return torch.stack([torch.autograd.grad(output, leaf, row, **options)[0][0, pos] for row in eye])
