"""Quantised weights: which can be read, and why others are refused.

A layer that rounds its weights alone is linear in its input, with dequantised weights: it has a Jacobian. bitsandbytes'
4-bit layers (NF4, FP4) are read so. One that rounds its input too (LLM.int8, fp8) is a step function, whose derivative
is zero almost everywhere.
"""

from __future__ import annotations

import math
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.errors import UnsupportedModelError

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PACKED = (torch.int8, torch.uint8, torch.int32)  # of buffers with two axes or more; masks are boolean


def state_of(module: nn.Module) -> Any | None:
    """The quantisation state of a 4-bit layer of bitsandbytes; None of any other module."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None) or (None if weight is None else getattr(module, "quant_state", None))
    return state if hasattr(state, "absmax") and getattr(weight, "dtype", None) not in _FLOATING else None


def dequantised(module: nn.Module) -> Tensor | None:
    """The weight of a 4-bit layer in float32; None of any other module."""
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


def quantisation_of(blocks: nn.Module) -> str | None:
    """What the weights of a model's blocks are quantised with, such as ``"bitsandbytes nf4"``; None where they are not.

    Raises:
        UnsupportedModelError: weights that cannot be read, or layers that round their input; the message names one.
    """
    kinds: set[str] = set()
    read: set[str] = set()
    for name, module in blocks.named_modules():
        if (state := state_of(module)) is None:
            continue
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"quantised weights: blocks.{name} was repacked for this CPU by a forward pass not ours: its "
                "weights are rounded again, and their derivative is lost. Load the model again, and trace it before "
                "anything else runs it; or set support_avx512bf16_for_cpu = False on its 4-bit layers first"
            )
        kinds.add(f"bitsandbytes {state.quant_type}")
        read.add(f"{name}.weight")
    for name, tensor in (*blocks.named_parameters(), *blocks.named_buffers()):
        if name in read:
            continue
        parameter = isinstance(tensor, nn.Parameter)
        if hasattr(tensor, "__tensor_flatten__"):
            reason = f"a {type(tensor).__name__}, which holds other tensors"
        elif parameter and tensor.dtype == torch.int8 and hasattr(tensor, "SCB"):
            reason = "of LLM.int8, which rounds activations: its derivative is zero almost everywhere"
        elif tensor.dtype.is_floating_point and tensor.dtype not in _FLOATING:
            reason = f"{tensor.dtype}, with activations rounded beside it: its derivative is zero almost everywhere"
        elif (parameter and tensor.dtype not in _FLOATING) or (tensor.dtype in _PACKED and tensor.ndim > 1):
            reason = f"{tensor.dtype}, in a format that is not read"
        else:
            continue
        raise UnsupportedModelError(
            f"quantised weights: blocks.{name} is quantised ({reason}). Load the model in bfloat16, float16, float32 "
            "or float64, or in 4 bits by bitsandbytes"
        )
    return ", ".join(sorted(kinds)) or None
