"""Central differences of what is run, hooks included, against what autograd says of it.

Where hooks of the user's act, autograd is the only engine, and a hook can hide from it what it does: a graph that is
detached gives a smaller Jacobian, and no error. Two central differences along one direction tell. A hook may treat each
position in its own way, so that what holds for one says nothing of another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import HookError
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.autograd import AutogradJacobian, input_of, output_at

# Steps relative to the stream's norm. Differences are good to the square of the step and to float32 rounding over the
# step (HuggingFace's modules cast to float32 inside); what a hook detaches is a share of the Jacobian.
STEPS = (4e-3, 1e-3)
TOLERANCE = 0.05


def require_followed(
    oracle: AutogradJacobian, trace: Trace, layer: int, sublayer: str, src: int, dest: int
) -> str | None:
    """Check that autograd follows what is run, along one random direction: four runs of the block.

    Returns:
        Why nothing can be said, None where autograd is right.

    Raises:
        HookError: differences settle elsewhere than at autograd's derivative.
    """
    generator = torch.Generator().manual_seed(layer)
    probe = torch.randn(trace.d_model, generator=generator, dtype=oracle.dtype).to(oracle.device)
    probe = probe / probe.norm()

    def run(step: float) -> Float[Tensor, "1 d"]:
        moved = input_of(trace, layer, sublayer).clone()
        moved[0, src] += step * probe
        return output_at(trace, layer, sublayer, src, dest, None, moved, check=False)[None]

    size = float(trace.resid[layer, src].norm())
    where = f"layer {layer}, {sublayer} from position {src} to {dest}"
    return require_same_product(where, oracle.mv(probe)[None], run, size, trace.resid[layer + 1, dest][None])


def require_step_followed(
    trace: Trace, layer: int, found: Float[Tensor, "pos d_model"], move: Float[Tensor, "pos d_model"]
) -> str | None:
    """Check what autograd makes of a perturbation of a whole stream by one block, at each position.

    Args:
        trace: a trace of the model.
        layer: block index.
        found: the perturbation behind the block, by autograd.
        move: the perturbation before it.

    Returns:
        Why nothing can be said, None where autograd is right.

    Raises:
        HookError: see ``require_followed``.
    """
    lengths = move.norm(dim=-1)
    moving = lengths > 0
    if not moving.any():
        return None
    start = trace.block_input(layer)

    def run(step: float) -> Float[Tensor, "pos d_model"]:
        return trace.run_block(layer, start + step * move.to(start), {})[0]

    # no position moves by more than a step's share of its own stream
    size = float((trace.resid[layer].norm(dim=-1)[moving] / lengths[moving]).min())
    return require_same_product(f"layer {layer}, block at position {{pos}}", found, run, size, trace.resid[layer + 1])


def require_same_product(
    where: str,
    found: Float[Tensor, "row d"],
    run: Callable[[float], Float[Tensor, "row d"]],
    size: float,
    output: Float[Tensor, "row d"],
) -> str | None:
    """Hold a product with a Jacobian against central differences along the same direction, row by row.

    Args:
        where: what it is, as a message names it; ``{pos}`` in it stands for the row.
        found: the product, by autograd.
        run: from the distance moved along the direction to the function's value there.
        size: the distance that a step of 1 is.
        output: the function's value, whose rounding the differences have.

    Returns:
        Why nothing can be said, None where the two agree: the function is not smooth there (a hard threshold, a top-k).

    Raises:
        HookError: differences settle elsewhere than at the product.
    """
    size = size or 1.0
    with torch.no_grad():
        wide, narrow = ((run(size * h) - run(-size * h)).to(found) / (2 * size * h) for h in STEPS)
    rounding = torch.finfo(torch.float32).eps * output.to(found).norm(dim=-1) / size / STEPS[1]
    allowed = TOLERANCE * torch.maximum(found.norm(dim=-1), narrow.norm(dim=-1)) + 10 * rounding
    gap = (found - narrow).norm(dim=-1)
    missed = ~(gap <= allowed)
    if not missed.any():
        return None
    settled = missed & ((wide - narrow).norm(dim=-1) <= allowed)
    row = int((settled if settled.any() else missed).nonzero()[0])
    where = where.replace("{pos}", str(row))
    lengths = f"autograd's product with a direction has length {float(found[row].norm()):.3g}"
    if settled.any():
        raise HookError(
            f"{where}: autograd does not see all that is run: {lengths}, and lies {float(gap[row]):.3g} from "
            "central differences. A hook that detaches the graph does this (detach(), no_grad, numpy, an "
            "autoencoder's detached error term)"
        )
    return (
        f"{where}: the Jacobian could not be checked by differences, which do not settle ({lengths}, "
        f"{float(gap[row]):.3g} from them): a hook is not smooth there, or the stream is too large for its rounding"
    )
