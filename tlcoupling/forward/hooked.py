"""How the library touches a model: checks, temporary hooks, and a record of one forward pass.

Everything here, and the float32 lift of half-precision weights (``lifting``), leaves the model as it was: mode,
gradients, hooks, dtype. It relies only on what both generations of TransformerLens offer (``cfg``, ``blocks``,
``hook_dict`` and the ``HookPoint`` class), never on a class's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.forward.context import require_own_state
from tlcoupling.forward.lifting import HALF, lifted_model
from tlcoupling.forward.points import hook_points
from tlcoupling.forward.split import block_hook

_LEVEL = 0x71C0  # the hook-context level of our hooks; TransformerLens counts its own up from 0
_BETWEEN = 1e-6  # how far a block may read from what the last one gave, relative to its norm
_FLOATING = (torch.float32, torch.float64, *HALF)


def require_supported(model: Any, in_training: bool = False) -> None:
    """Refuse what has no residual Jacobian here, with the reason.

    Args:
        model: the model.
        in_training: allow training mode.

    Raises:
        ArgumentError: the name of a model, or a trace.
        UnsupportedModelError: not a hooked model, no decoder blocks, an encoder or a state-space model, quantised
            weights, a module in training mode, or weights that cannot be differentiated through (see
            ``require_own_state``).
    """
    if isinstance(model, str):
        raise ArgumentError("model", model, "a model, such as tlc.load_model returns by name")
    if hasattr(model, "run_block"):
        raise ArgumentError("model", model, "a model: this is a trace, whose model is trace.model")
    missing = [n for n in ("cfg", "blocks", "hook_dict", "run_with_cache") if not hasattr(model, n)]
    if missing:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no TransformerLens model with decoder blocks (it lacks "
            f"{', '.join(missing)}); a HookedTransformer or a TransformerBridge of a decoder is needed. Encoders, "
            "encoder-decoders and models without a `blocks` list are not supported"
        )
    points = hook_points(model)
    for layer, block in enumerate(model.blocks):
        for name in ("hook_resid_pre", "hook_resid_post"):
            if block_hook(layer, name) not in points:
                raise UnsupportedModelError(
                    f"block {layer} ({type(block).__name__}) has no {name}: it does not take one residual stream to "
                    "one. Models with several parallel streams (hyper-connections, AltUp) are not supported"
                )
    for name, parameter in model.blocks.named_parameters():
        if parameter.dtype not in _FLOATING:
            raise UnsupportedModelError(
                f"blocks.{name} is quantised ({parameter.dtype}): its products are approximations, so their Jacobian "
                "would be too. Load the model in bfloat16, float16, float32 or float64"
            )
    require_own_state(model, in_training)


def model_name_of(model: Any) -> str:
    """A model's own name, that of its class where it has none."""
    return str(getattr(getattr(model, "cfg", None), "model_name", type(model).__name__))


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
    """Run the model through all its blocks and record hook points and block calls.

    Half-precision models run in float32, one module lifted at a time. The run ends at the unembedding, not at the last
    block: a looped decoder runs its blocks again in between.

    Args:
        model: the model.
        tokens: token ids.
        hook_names: hook points to record behind the hooks that are attached to them.
        names_before: hook points to record before these.

    Raises:
        UnsupportedModelError: the pass does not run each block once, in order.
    """
    points, calls = hook_points(model), []
    activations: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}

    def record(name: str, kept: dict[str, Tensor]) -> tuple[Any, Hook]:
        return points[name], lambda tensor: kept.__setitem__(name, tensor.detach().clone())

    left: dict[int, Tensor] = {}  # what the last block gave

    def leave(layer: int, tensor: Tensor) -> None:
        left.clear()
        left[layer] = tensor.detach()

    def enter(layer: int, tensor: Tensor) -> None:
        given = left.get(layer - 1)
        if given is None or given.shape != tensor.shape:
            return
        gap = (given.to(tensor) - tensor).norm() / tensor.norm()
        if not gap <= _BETWEEN:
            raise UnsupportedModelError(
                f"block {layer} reads another stream than block {layer - 1} gives ({float(gap):.2e} of its norm off): "
                "the model changes the stream between its blocks, which would count as growth. RWKV halves it "
                "there in eval mode: set rescale_every=0 in its configuration"
            )

    def capture(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer != len(calls):
            raise UnsupportedModelError(
                f"the forward pass calls block {layer} as number {len(calls) + 1} of its block calls; each of the "
                f"{len(model.blocks)} blocks has to be called once, in order. Looped decoders, which run their blocks "
                "several times, and models that skip or share blocks are not supported"
            )
        calls.append(BlockCall.capture(args, kwargs))

    def stop(module: nn.Module, args: Any) -> None:
        raise Done

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(attached([record(name, activations) for name in hook_names]))
        stack.enter_context(attached([record(name, before) for name in names_before], first=True))
        layers = range(len(model.blocks))
        stack.enter_context(
            attached([(points[block_hook(layer, "hook_resid_post")], partial(leave, layer)) for layer in layers])
        )
        stack.enter_context(
            attached([(points[block_hook(layer, "hook_resid_pre")], partial(enter, layer)) for layer in layers], True)
        )
        stack.enter_context(lifted_model(model))
        for layer, block in enumerate(model.blocks):
            handle = block.register_forward_pre_hook(partial(capture, layer), with_kwargs=True)
            stack.callback(handle.remove)
        if isinstance(unembed := getattr(model, "unembed", None), nn.Module):
            stack.callback(unembed.register_forward_pre_hook(stop, prepend=True).remove)
        with suppress(Done):
            model(tokens, return_type=None)
    if len(calls) < len(model.blocks):
        raise UnsupportedModelError(f"the forward pass runs {len(calls)} of {len(model.blocks)} blocks")
    return ForwardRecord(activations, before, calls)
