"""Quantised weights: which can be read, and why others are refused.

A layer that rounds its weights alone is linear in its input, with dequantised weights: it has a Jacobian. bitsandbytes'
4-bit layers (NF4, FP4) and torchao's weight-only tensors are read so. One that rounds its input too (LLM.int8, dynamic
activations) is a step function, whose derivative is zero almost everywhere.
"""

from __future__ import annotations

import math
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.errors import UnsupportedModelError

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ACTIVATIONS = ("activation_quantization", "act_quant_kwargs")  # how torchao's tensors round activations, if they do
_PACKED = (torch.int8, torch.uint8, torch.int32)  # of buffers with two axes or more; masks are boolean


def state_of(module: nn.Module) -> Any | None:
    """The quantisation state of a 4-bit layer of bitsandbytes; None of any other module."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None) or (None if weight is None else getattr(module, "quant_state", None))
    return state if hasattr(state, "absmax") and getattr(weight, "dtype", None) not in _FLOATING else None


def weight_only(tensor: Any) -> bool:
    """Whether a tensor is one of torchao's that says it rounds no activations."""
    if not type(tensor).__module__.startswith("torchao.") or getattr(tensor, "act_pre_scale", None) is not None:
        return False
    said = [getattr(tensor, name) for name in _ACTIVATIONS if hasattr(tensor, name)]
    return bool(said) and all(each is None for each in said)


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a layer whose quantised weight is read."""
    return state_of(module) is not None or weight_only(module._parameters.get("weight"))


def dequantised(module: nn.Module) -> Tensor | None:
    """The weight of a layer whose quantised weight is read, in float32; None of any other module."""
    weight: Any = module._parameters.get("weight")
    if weight_only(weight):
        return weight.dequantize().detach().float()
    if (state := state_of(module)) is None:
        return None
    from bitsandbytes.functional import dequantize_4bit

    packed = module._parameters["weight"]
    assert packed is not None
    state = copy(state)
    state.dtype = torch.float32  # else the products of codes and scales are rounded to the dtype of the checkpoint
    return dequantize_4bit(packed.data, state)


def dtype_of(blocks: nn.Module) -> torch.dtype:
    """The dtype of the first weight that is not packed."""
    return next(parameter.dtype for parameter in blocks.parameters() if parameter.dtype in _FLOATING)


def numel_of(module: nn.Module) -> int:
    """Number of weights; two for each packed byte of a 4-bit layer."""
    states = [(part._parameters.get("weight"), state_of(part)) for part in module.modules()]
    shapes = {id(weight): state.shape for weight, state in states if state is not None}
    return sum(math.prod(shapes.get(id(each), each.shape)) for each in module.parameters())


def quantisation_of(blocks: nn.Module, within: str = "blocks.") -> str | None:
    """What the weights of a model's blocks are quantised with, such as ``"bitsandbytes nf4"``; None where they are not.

    Args:
        blocks: the blocks, or another module.
        within: what its name in a message begins with.

    Raises:
        UnsupportedModelError: weights that cannot be read, or layers that round their input; the message names one.
    """
    holding = [(name, module) for name, module in blocks.named_modules() if module._parameters or module._buffers]
    kinds: set[str] = set()
    for name, module in holding:
        weight: Any = module._parameters.get("weight")
        if weight_only(weight):
            bits = str(getattr(weight, "target_dtype", weight.qdata.dtype)).removeprefix("torch.")
            kinds.add(f"torchao {bits}")
        if (state := state_of(module)) is None:
            continue
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"quantised weights: {within}{name} was repacked for this CPU by a forward pass not ours: its "
                "weights are rounded again, and their derivative is lost. Load the model again, and trace it before "
                "anything else runs it; or set support_avx512bf16_for_cpu = False on its 4-bit layers first"
            )
        kinds.add(f"bitsandbytes {state.quant_type}")
    tensors = [
        (f"{where}.{name}" if where else name, owner, tensor)
        for where, owner in holding
        for name, tensor in chain(owner._parameters.items(), owner._buffers.items())
        if tensor is not None and not (name == "weight" and is_packed(owner))
    ]
    for name, owner, tensor in tensors:
        parameter = isinstance(tensor, nn.Parameter)
        if any(getattr(tensor, each, None) is not None for each in _ACTIVATIONS):
            reason = f"a {type(tensor).__name__} that rounds activations: its derivative is zero almost everywhere"
        elif hasattr(tensor, "__tensor_flatten__"):
            reason = f"a {type(tensor).__name__}, which holds other tensors"
        elif parameter and tensor.dtype == torch.int8 and hasattr(getattr(owner, "state", None), "SCB"):
            reason = "of LLM.int8, which rounds activations: its derivative is zero almost everywhere"
        elif tensor.dtype.is_floating_point and tensor.dtype not in _FLOATING:
            reason = f"{tensor.dtype}, with activations rounded beside it: its derivative is zero almost everywhere"
        elif (parameter and tensor.dtype not in _FLOATING) or (tensor.dtype in _PACKED and tensor.ndim > 1):
            reason = f"{tensor.dtype}, in a format that is not read"
        else:
            continue
        raise UnsupportedModelError(
            f"quantised weights: {within}{name} is quantised ({reason}). Load the model in bfloat16, float16, float32 "
            "or float64, in 4 bits by bitsandbytes, or with torchao's weight-only configurations"
        )
    return ", ".join(sorted(kinds)) or None
