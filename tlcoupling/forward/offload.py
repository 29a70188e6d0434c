"""Weights that accelerate keeps on disk or on the host until the forward pass of their module.

``disk_offload``, ``cpu_offload`` and device maps with ``"cpu"`` or ``"disk"`` put a tensor without numbers, of the
device ``meta``, in the place of each weight. A hook on its module, accelerate's ``AlignDevicesHook``, knows a map to
read the weight from, and the device on which the module works. ``in_memory`` (``lifting``) reads these maps.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.errors import UnsupportedModelError


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks with which accelerate moves the weights of a module itself."""
    found = [module.__dict__.get("_hf_hook")]  # a bridge's part would answer for the module that it wraps
    while any(hasattr(each, "hooks") for each in found):  # accelerate chains them, pair by pair
        found = [hook for each in found for hook in getattr(each, "hooks", (each,))]
    return [hook for hook in found if hasattr(hook, "offload")]


def offloading(module: nn.Module, name: str) -> Any | None:
    """Return the hook that reads one of a module's own weights (or buffers) from a map; None where there is none."""
    is_buffer = name in module._buffers
    able = (each for each in hooks_of(module) if each.offload and each.weights_map is not None)
    return next((each for each in able if each.offload_buffers or not is_buffer), None)


def read(hook: Any, name: str, like: Tensor) -> Tensor:
    """Read a weight from a hook's map: a copy, which nothing else can change, on the device of the work.

    Raises:
        UnsupportedModelError: it is not there any more, as where the folder was removed.
    """
    try:
        stored: Tensor = hook.weights_map[name]
    except Exception as error:  # of many types: a missing file, a damaged one, a missing key
        raise UnsupportedModelError(
            f"weights not in memory: accelerate offloads {name!r} of shape {tuple(like.shape)}, and it cannot be read "
            f"from where it was put ({type(error).__name__}: {error})"
        ) from error
    return stored.detach().to(hook.execution_device, like.dtype, copy=True).reshape(like.shape)


def device_of(module: Any) -> torch.device:
    """Return the device on which a module, or one stack of a model, works: where its first weight is, or is brought."""
    first = next(module.parameters()).device
    if first.type != "meta":
        return first
    hooks = (hook for part in module.modules() for hook in hooks_of(part) if hook.execution_device is not None)
    return next((torch.device(hook.execution_device) for hook in hooks), first)


def brought_bytes(model: Any) -> float:
    """Return what the largest of the parts that a pass brings into memory takes there: a block, or embeddings.

    A weight lies there twice while it is copied.
    """
    parts: list[nn.Module] = [*model.blocks]
    parts += [part for name, part in model.named_children() if name not in ("blocks", "original_model")]
    sizes = [[each.nbytes for each in part.parameters() if each.is_meta] for part in parts]
    return float(max((sum(each) + max(each) for each in sizes if each), default=0))


def is_offloaded(module: Any) -> bool:
    """Return whether weights or buffers of a module are not in memory."""
    return any(each.is_meta for each in chain(module.parameters(), module.buffers()))
