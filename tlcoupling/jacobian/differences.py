"""Central differences of what is run, hooks included, against what autograd says of it.

Where hooks of the user's act, autograd is the only engine, and a hook can hide from it what it does: a graph that is
detached gives a smaller Jacobian, and no error. Two central differences along one random direction tell.
"""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import HookError
from tlcoupling.jacobian.autograd import AutogradJacobian, input_of, output_at
from tlcoupling.trace import Trace

# Steps relative to the stream's norm. Differences are good to the square of the step and to float32 rounding over the
# step (HuggingFace's modules cast to float32 inside); what a hook detaches is a share of the Jacobian.
STEPS = (4e-3, 1e-3)
TOLERANCE = 0.05


def difference(
    trace: Trace, layer: int, sublayer: str, src: int, dest: int, move: Float[Tensor, " d"]
) -> Float[Tensor, " d"]:
    """Half of what a sublayer puts out at dest with its input at src moved forth, less the same moved back."""
    ends = []
    for sign in (1, -1):
        moved = input_of(trace, layer, sublayer).clone()
        moved[0, src] += sign * move
        with torch.no_grad():
            ends.append(output_at(trace, layer, sublayer, src, dest, None, moved, check=False))
    return (ends[0] - ends[1]) / 2


def require_followed(trace: Trace, layer: int, sublayer: str, src: int, dest: int) -> None:
    """Check that autograd follows what is run.

    Raises:
        HookError: differences settle elsewhere than at autograd's derivative.

    Warns:
        UserWarning: the differences do not settle, so nothing can be said: a hook is not smooth there (a hard
            threshold, a top-k).
    """
    oracle = AutogradJacobian(trace, layer, sublayer, src, dest, None)
    generator = torch.Generator().manual_seed(layer)
    probe = torch.randn(trace.d_model, generator=generator, dtype=oracle.dtype).to(oracle.device)
    probe = probe / probe.norm()
    found = oracle.mv(probe)
    size = float(trace.resid[layer, src].norm()) or 1.0
    wide, narrow = (difference(trace, layer, sublayer, src, dest, size * h * probe) / (size * h) for h in STEPS)
    rounding = torch.finfo(torch.float32).eps * float(trace.resid[layer + 1, dest].norm()) / size / STEPS[1]
    allowed = TOLERANCE * max(float(found.norm()), float(narrow.norm())) + 10 * rounding
    gap = float((found - narrow).norm())
    if gap <= allowed:
        return
    lengths = f"autograd's product with a random direction has length {float(found.norm()):.3g}"
    if float((wide - narrow).norm()) <= allowed:
        raise HookError(
            f"layer {layer}, {sublayer}: autograd does not see all that is run: {lengths}, and lies {gap:.3g} from "
            "central differences. A hook that detaches the graph does this (detach(), no_grad, numpy, an "
            "autoencoder's detached error term)"
        )
    warnings.warn(
        f"layer {layer}, {sublayer}: the Jacobian could not be checked by differences, which do not settle ({lengths}, "
        f"{gap:.3g} from them): a hook is not smooth there, or the stream is too large for its rounding",
        stacklevel=4,
    )
