"""Weights as they are computed with, a module at a time: in memory, and in float32 where they are stored in fewer bits.

No model is held in float32 whole, and none that accelerate keeps on disk is held in memory whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlcoupling.errors import UnsupportedModelError
from tlcoupling.forward.offload import hooks_of, is_offloaded, offloading, read
from tlcoupling.forward.quantised import dequantised, is_packed

HALF = (torch.float16, torch.bfloat16)
# Weights of the layer that is measured, and the same in memory or in float32, by the identity of the former.
Lifts = dict[int, tuple[Tensor, Tensor]]
_LIFTS: ContextVar[Lifts | None] = ContextVar("_LIFTS", default=None)


@contextmanager
def lifted_once(lifts: Lifts) -> Iterator[None]:
    """Lift each weight at most once meanwhile: those in ``lifts`` are taken from there, and others are added."""
    token = _LIFTS.set(lifts)
    try:
        yield
    finally:
        _LIFTS.reset(token)


def _once(tensor: Tensor, lift: Callable[[], Tensor]) -> Tensor:
    """Return what is computed with in a tensor's place, as it was made before where lifts are kept."""
    lifts = _LIFTS.get()
    if lifts is None:
        return lift()
    if id(tensor) not in lifts:
        lifts[id(tensor)] = tensor, lift()
    return lifts[id(tensor)][1]


@contextmanager
def _float32_activations(model: Any) -> Iterator[None]:
    """``HookedTransformer`` casts activations to ``cfg.dtype``: hold it at float32 where it is half precision."""
    dtype = getattr(model.cfg, "dtype", None)
    if dtype not in HALF:
        yield
        return
    model.cfg.dtype = torch.float32
    try:
        yield
    finally:
        model.cfg.dtype = dtype


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a module that accelerate offloads in memory for a while, on the device of their work.

    The model's own tensors, which have no numbers, are put aside. accelerate's hooks leave the weights alone meanwhile.
    """
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    hooks: list[Any] = []
    try:
        for part in module.modules() if is_offloaded(module) else ():
            tables: list[dict[str, Any]] = [part._parameters, part._buffers]
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_meta and (hook := offloading(part, name)) is not None:
                        kept.append((table, name, tensor))
                        made = _once(tensor, partial(read, hook, name, tensor))
                        trained = isinstance(tensor, nn.Parameter)
                        table[name] = nn.Parameter(made, tensor.requires_grad) if trained else made
            hooks += [hook for hook in hooks_of(part) if hook.offload]
        for hook in hooks:
            hook.offload = False
        yield
    finally:
        for hook in hooks:
            hook.offload = True
        for table, name, tensor in kept:
            table[name] = tensor


@contextmanager
def lifted(model: Any, module: nn.Module) -> Iterator[None]:
    """Hold one module's weights and buffers in memory for a while, those of half precision or quantised in float32.

    Works on a module at a time, so that a large model is never held in float32 whole. The model's own tensors are put
    aside, not converted, so that a graph recorded meanwhile keeps the float32 ones.
    """
    with in_memory(module), _in_float32(model, module):
        yield


@contextmanager
def _in_float32(model: Any, module: nn.Module) -> Iterator[None]:
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    lifts: dict[int, Tensor] = {}  # a tensor may be reached by several names
    packed = [part for part in module.modules() if is_packed(part)]
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.dtype in HALF and not (name == "weight" and is_packed(part)):
                    kept.append((table, name, tensor))
    forwards = [part.__dict__.get("forward") for part in packed]
    for part, forward in zip(packed, forwards, strict=True):
        if forward is not None and not hasattr(part, "_hf_hook"):  # accelerate's moves tensors between devices
            raise UnsupportedModelError(
                f"quantised weights: a 4-bit layer ({type(part).__name__}) has a forward of its own, which is not run: "
                "the layer is measured with its weights in float32. Put what it does into a module around the layer"
            )
    weights = [part._parameters["weight"] for part in packed]
    try:
        for part in packed:
            stored: Any = part._parameters["weight"]
            part._parameters["weight"] = nn.Parameter(_once(stored, partial(_dense, part)), requires_grad=False)
            # bitsandbytes' own forward repacks what it holds on some CPUs, and has no second derivative
            part.__dict__["forward"] = partial(_linear, part)
        for table, name, tensor in kept:
            if id(tensor) not in lifts:
                lift = _once(tensor, tensor.detach().float)
                lifts[id(tensor)] = nn.Parameter(lift) if isinstance(tensor, nn.Parameter) else lift
            table[name] = lifts[id(tensor)]
        with _float32_activations(model):
            yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor
        for part, forward, weight in zip(packed, forwards, weights, strict=True):
            part._parameters["weight"] = weight
            part.__dict__.pop("forward", None)
            part.__dict__.update({} if forward is None else {"forward": forward})


def _dense(part: nn.Module) -> Tensor:
    weight = dequantised(part)
    assert weight is not None
    return weight


def _linear(part: Any, x: Tensor) -> Tensor:
    """What a linear layer gives, with the weight that it holds now."""
    return functional.linear(x, part.weight, part.bias)


@contextmanager
def lifted_parts(model: Any, block: nn.Module) -> Iterator[None]:
    """Hold a block in memory, and each part (norm, attention, MLP) in float32 while it is called, one at a time."""
    if not needs_lift(block):
        yield
        return
    # a bridge's wrapped block is made of the same parts
    parts = [part for name, part in block.named_children() if name != "_original_component"]
    # modules with weights that are called although their part is not (OPT's MLP); a second lift finds nothing to do
    leaves = [module for module in block.modules() if module._parameters]
    with ExitStack() as stack:
        stack.enter_context(in_memory(block))
        stack.enter_context(_float32_activations(model))
        for part in (*parts, *leaves):
            _around_call(stack, part, partial(lifted, model, part))
        yield


@contextmanager
def lifted_model(model: Any) -> Iterator[None]:
    """Hold each part of a model in memory and in float32 while it is called, one at a time."""
    with ExitStack() as stack:
        for name, part in model.named_children():
            if name not in ("blocks", "original_model"):
                _around_call(stack, part, partial(lifted, model, part))
        for block in model.blocks:
            _around_call(stack, block, partial(lifted_parts, model, block))
        yield


def needs_lift(module: nn.Module) -> bool:
    """Return whether a module has offloaded, half-precision or quantised weights or buffers."""
    holding = [part for part in module.modules() if part._parameters or part._buffers]
    tensors = chain.from_iterable((*part._parameters.values(), *part._buffers.values()) for part in holding)
    lift = any(each is not None and (each.is_meta or each.dtype in HALF) for each in tensors)
    return lift or any(map(is_packed, holding))


def _around_call(stack: ExitStack, module: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> None:
    """Enter a context whenever a module that needs it is called, while the stack is open."""
    if not needs_lift(module):
        return
    lift: list[AbstractContextManager[None]] = []

    def enter(module: nn.Module, args: Any) -> None:
        lift.append(context())
        lift[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        lift.pop().__exit__(None, None, None)

    def leave_if_left_open() -> None:
        while lift:
            lift.pop().__exit__(None, None, None)

    stack.callback(leave_if_left_open)
    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)
