"""How the library touches a model: checks, temporary hooks, and a float32 lift of half-precision weights.

Everything here leaves the model as it was: mode, gradients, hooks, dtype. It relies only on what both generations of
TransformerLens offer (``cfg``, ``blocks``, ``hook_dict`` and the ``HookPoint`` class), never on a class's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tlcoupling.errors import UnsupportedModelError

Topology = Literal["sequential", "parallel", "attn_only"]

_LEVEL = 0x71C0  # the hook-context level of our hooks; TransformerLens counts its own up from 0
_HALF = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, torch.float64, *_HALF)


def block_hook(layer: int, name: str) -> str:
    """The full name of a hook point in a block, ``blocks.{layer}.{name}``."""
    return f"blocks.{layer}.{name}"


def require_supported(model: Any, in_training: bool = False) -> None:
    """Refuse what has no residual Jacobian here, with the reason.

    Args:
        model: the model.
        in_training: allow training mode.

    Raises:
        UnsupportedModelError: not a hooked model, no decoder blocks, an encoder or a state-space model, quantised
            weights, or training mode.
    """
    missing = [n for n in ("cfg", "blocks", "hook_dict", "run_with_cache") if not hasattr(model, n)]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no TransformerLens model with decoder blocks (it lacks "
            f"{', '.join(missing)}); a HookedTransformer or a TransformerBridge of a decoder is needed. Encoders, "
            "encoder-decoders and models without a `blocks` list are not supported"
        )
    if model.training and not in_training:
        raise UnsupportedModelError(
            "the model is in training mode, where dropout makes every forward pass another function: "
            "call model.eval() first"
        )
    points = model.hook_dict
    for layer in range(len(model.blocks)):
        if block_hook(layer, "hook_attn_out") not in points:
            raise UnsupportedModelError(
                f"block {layer} has no hook_attn_out, so it has no attention sublayer to split off: "
                "state-space, recurrent and hybrid models are not supported"
            )
    for name, parameter in model.blocks.named_parameters():
        if parameter.dtype not in _FLOATING:
            raise UnsupportedModelError(
                f"blocks.{name} is quantised ({parameter.dtype}): its products are approximations, so their Jacobian "
                "would be too. Load the model in bfloat16, float16, float32 or float64"
            )


def model_name_of(model: Any) -> str:
    """A model's own name, that of its class where it has none."""
    return str(getattr(getattr(model, "cfg", None), "model_name", type(model).__name__))


def topology_of(hook_names: Iterable[str], attn_only: bool = False) -> Topology:
    """Read the blocks' topology off the names of their hook points (design, section 2).

    Args:
        hook_names: names of hook points, of a model or in a cache.
        attn_only: what the model's configuration says; a ``HookedTransformer`` without MLPs has their hook points.
    """
    names = set(hook_names)
    if attn_only or block_hook(0, "hook_mlp_out") not in names:
        return "attn_only"
    return "sequential" if block_hook(0, "hook_resid_mid") in names else "parallel"


def topology_of_model(model: Any) -> Topology:
    """The topology of a model's blocks."""
    return topology_of(model.hook_dict, bool(getattr(model.cfg, "attn_only", False)))


def norms_are_folded(model: Any) -> bool:
    """Whether the gains and biases of the blocks' norms were folded into the weights that read from them.

    A ``HookedTransformer`` says so in its configuration. A ``TransformerBridge`` keeps its norms and sets their gains
    to a constant and their biases to zero, and says only that it processed something.
    """
    if str(getattr(model.cfg, "normalization_type", None)).endswith("Pre"):
        return True
    if not getattr(model, "_weights_processed", getattr(model, "compatibility_mode", False)):
        return False
    norms = [getattr(block, name, None) for block in model.blocks for name in ("ln1", "ln2")]
    parameters = [each for norm in norms if norm is not None for each in norm.named_parameters()]
    return bool(parameters) and all(
        (parameter == (0 if name.endswith("bias") else parameter.flatten()[0])).all() for name, parameter in parameters
    )


Hook = Callable[[Tensor], Tensor | None]


@contextmanager
def attached(hooks: Iterable[tuple[Any, Hook]], first: bool = False) -> Iterator[None]:
    """Attach functions to hook points for a while; a function may return a tensor to put in place of the old one.

    They act behind the hooks that are there already, with ``first`` before them.
    """
    touched = []
    try:
        for point, function in hooks:
            touched.append(point)
            point.add_hook(_with_hook_argument(function), dir="fwd", level=_LEVEL, prepend=first)
        yield
    finally:
        for point in touched:
            point.remove_hooks("fwd", level=_LEVEL)


def _with_hook_argument(function: Hook) -> Callable[..., Tensor | None]:
    """TransformerLens calls hooks as ``hook(tensor, hook=point)``."""
    return lambda tensor, hook: function(tensor)


@dataclass(frozen=True)
class BlockCall:
    """The arguments that the model passes to one of its blocks, without the residual stream.

    Key-value caches are left out: a block that is run again would append to them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    stream: str | None  # the keyword of the residual stream, None where it is the first positional argument

    @classmethod
    def capture(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockCall:
        """Keep a call's arguments."""
        args = tuple(None if _is_kv_cache(value) else value for value in args)
        kept = {name: None if _is_kv_cache(value) else value for name, value in kwargs.items()}
        if "use_cache" in kept:
            kept["use_cache"] = False
        stream = None if args else next(name for name in ("hidden_states", "resid_pre") if name in kept)
        if stream is not None:
            del kept[stream]
        return cls(args[1:], kept, stream)

    def run(self, block: nn.Module, resid_pre: Tensor) -> Tensor:
        """Run the block on another residual stream, ``[1, pos, d_model]`` to ``[1, pos, d_model]``."""
        if self.stream is None:
            out = block(resid_pre, *self.args, **self.kwargs)
        else:
            out = block(*self.args, **{self.stream: resid_pre}, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


def _is_kv_cache(value: Any) -> bool:
    return "Cache" in type(value).__name__


@contextmanager
def _float32_activations(model: Any) -> Iterator[None]:
    """``HookedTransformer`` casts activations to ``cfg.dtype``: hold it at float32 where it is half precision."""
    dtype = getattr(model.cfg, "dtype", None)
    if dtype not in _HALF:
        yield
        return
    model.cfg.dtype = torch.float32
    try:
        yield
    finally:
        model.cfg.dtype = dtype


@contextmanager
def lifted(model: Any, module: nn.Module) -> Iterator[None]:
    """Hold one module's half-precision weights and buffers in float32 for a while.

    Works on a module at a time, so that a large model is never held in float32 whole. The model's own tensors are put
    aside, not converted, so that a graph recorded meanwhile keeps the float32 ones.
    """
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    lifts: dict[int, Tensor] = {}  # a tensor may be reached by several names
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.dtype in _HALF:
                    kept.append((table, name, tensor))
    try:
        for table, name, tensor in kept:
            if id(tensor) not in lifts:
                lift = tensor.detach().float()
                lifts[id(tensor)] = nn.Parameter(lift) if isinstance(tensor, nn.Parameter) else lift
            table[name] = lifts[id(tensor)]
        with _float32_activations(model):
            yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor


@contextmanager
def lifted_parts(model: Any, block: nn.Module) -> Iterator[None]:
    """Hold each part of a block (norm, attention, MLP) in float32 while it is called, one at a time."""
    if not _has_half(block):
        yield
        return
    # a bridge's wrapped block is made of the same parts
    parts = [part for name, part in block.named_children() if name != "_original_component"]
    # modules with weights that are called although their part is not (OPT's MLP); a second lift finds nothing to do
    leaves = [module for module in block.modules() if module._parameters]
    with ExitStack() as stack:
        stack.enter_context(_float32_activations(model))
        for part in (*parts, *leaves):
            _lift_around_call(stack, model, part)
        yield


@contextmanager
def lifted_model(model: Any) -> Iterator[None]:
    """Hold each part of a model in float32 while it is called, one at a time."""
    with ExitStack() as stack:
        for name, part in model.named_children():
            if name not in ("blocks", "original_model"):
                _lift_around_call(stack, model, part)
        for block in model.blocks:
            stack.enter_context(lifted_parts(model, block))
        yield


class Done(Exception):
    """All that is needed of a run is there: the rest of it is left out."""


@dataclass
class ForwardRecord:
    """What one forward pass left behind.

    Attributes:
        activations: recorded tensors by full hook name, ``[1, pos, ...]``.
        before: some of them as they were before the hooks that are attached to the model.
        calls: each block's call.
    """

    activations: dict[str, Tensor]
    before: dict[str, Tensor]
    calls: list[BlockCall]


def record_forward(
    model: Any, tokens: Tensor, hook_names: Iterable[str], names_before: Iterable[str] = ()
) -> ForwardRecord:
    """Run the model up to the end of its last block and record hook points and block calls.

    Half-precision models run in float32, one module lifted at a time.

    Args:
        model: the model.
        tokens: token ids.
        hook_names: hook points to record behind the hooks that are attached to them.
        names_before: hook points to record before these.
    """
    points, calls = model.hook_dict, []
    activations: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}

    def record(name: str, kept: dict[str, Tensor]) -> tuple[Any, Hook]:
        return points[name], lambda tensor: kept.__setitem__(name, tensor.detach().clone())

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(BlockCall.capture(args, kwargs))

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        raise Done

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(attached([record(name, activations) for name in hook_names]))
        stack.enter_context(attached([record(name, before) for name in names_before], first=True))
        stack.enter_context(lifted_model(model))
        for block in model.blocks:
            handle = block.register_forward_pre_hook(capture, with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(model.blocks[-1].register_forward_hook(stop).remove)
        with suppress(Done):
            model(tokens, return_type=None)
    return ForwardRecord(activations, before, calls)


def _has_half(module: nn.Module) -> bool:
    return any(tensor.dtype in _HALF for tensor in chain(module.parameters(), module.buffers()))


def _lift_around_call(stack: ExitStack, model: Any, module: nn.Module) -> None:
    """Lift a module whenever it is called, while the stack is open."""
    if not _has_half(module):
        return
    lift: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        lift.append(lifted(model, module))
        lift[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        lift.pop().__exit__(None, None, None)

    def leave_if_left_open() -> None:
        while lift:
            lift.pop().__exit__(None, None, None)

    stack.callback(leave_if_left_open)
    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)
