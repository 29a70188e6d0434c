"""How the library touches a model: checks, temporary hooks, and a record of one forward pass.

Everything here, and the float32 lift of half-precision weights (``lifting``), leaves the model as it was: mode,
gradients, hooks, dtype. It relies only on what both generations of TransformerLens offer (``cfg``, ``blocks``,
``hook_dict`` and the ``HookPoint`` class), never on a class's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tlcoupling.errors import ArgumentError, TLCouplingError, UnsupportedModelError
from tlcoupling.forward.bare import is_bare
from tlcoupling.forward.context import require_own_state
from tlcoupling.forward.inputs import Inputs
from tlcoupling.forward.lifting import lifted_model
from tlcoupling.forward.points import hook_points
from tlcoupling.forward.quantised import quantisation_of
from tlcoupling.forward.split import block_hook

_LEVEL = 0x71C0  # the hook-context level of our hooks; TransformerLens counts its own up from 0
_BETWEEN = 1e-6  # how far a block may read from what the last one gave, relative to its norm


def require_supported(model: Any, in_training: bool = False) -> None:
    """Refuse what has no residual Jacobian here, with the reason.

    Args:
        model: the model.
        in_training: allow training mode.

    Raises:
        ArgumentError: the name of a model, or a trace.
        UnsupportedModelError: not a hooked model, an encoder-decoder, several parallel streams, quantised weights, a
            module in training mode, or weights that cannot be differentiated through (see ``require_own_state``). The
            message begins with one of the reasons that docs/models.md lists.
    """
    if isinstance(model, str):
        raise ArgumentError("model", model, f"a model; tlc.load_model({model!r}) loads one by name")
    if hasattr(model, "run_block"):
        raise ArgumentError("model", model, "a model: this is a trace, whose model is trace.model")
    if not all(hasattr(model, name) for name in ("cfg", "hook_dict", "run_with_cache")):
        hint = (
            "; tlc.trace takes it, and trace.model is a bridge around it, which is taken here" if is_bare(model) else ""
        )
        raise UnsupportedModelError(
            f"not a hooked model: {type(model).__name__} is neither a HookedTransformer nor a TransformerBridge{hint}"
        )
    if not hasattr(model, "blocks"):
        lists = [name for name, _ in model.named_children() if name.endswith("blocks")]
        reason = "encoder-decoder" if "decoder_blocks" in lists else "looped depth" if lists else "no blocks"
        hint = ". tlc.trace(..., stack='encoder' or 'decoder') measures one; its trace.model is taken here"
        hint = hint if reason == "encoder-decoder" else ""
        raise UnsupportedModelError(
            f"{reason}: {model_name_of(model)} has no one list of blocks that a residual stream passes once, in order"
            + (f"; its lists are {', '.join(lists)}{hint}" if lists else "")
        )
    quantisation_of(model.blocks)
    points = hook_points(model)
    for layer, block in enumerate(model.blocks):
        for name in ("hook_resid_pre", "hook_resid_post"):
            if block_hook(layer, name) not in points:
                raise UnsupportedModelError(
                    f"several streams: block {layer} ({type(block).__name__}) has no {name}, so it does not take one "
                    "residual stream to one (hyper-connections)"
                )
    require_own_state(model, in_training)


def model_name_of(model: Any) -> str:
    """A model's own name, that of its class where it has none."""
    return str(getattr(getattr(model, "cfg", None), "model_name", type(model).__name__))


Hook = Callable[[Any], Any]  # takes a tensor; may return one to put in its place


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

    Key-value caches are put aside: a block that is run again would append to them.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    stream: str | None  # the keyword of the residual stream, None where it is the first positional argument
    caches: Mapping[int | str, Any]  # key-value caches, by where they are in ``args`` or ``kwargs``

    @classmethod
    def capture(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BlockCall:
        """Keep a call's arguments."""
        places = [*enumerate(args, start=-1), *kwargs.items()]  # the stream is taken off the positional ones
        caches = {place: value for place, value in places if _is_kv_cache(value)}
        args = tuple(None if _is_kv_cache(value) else value for value in args)
        kept = {name: None if _is_kv_cache(value) else value for name, value in kwargs.items()}
        if "use_cache" in kept:
            kept["use_cache"] = False
        stream = None if args else next(name for name in ("hidden_states", "resid_pre") if name in kept)
        if stream is not None:
            del kept[stream]
        return cls(args[1:], kept, stream, caches)

    def run(self, block: nn.Module, resid_pre: Tensor) -> Tensor:
        """Run the block on other residual streams, ``[batch, pos, d_model]`` to ``[batch, pos, d_model]``."""

        def repeated(value: Any) -> Any:
            """What cross-attention reads, for each stream: T5 would cut one up among several."""
            is_stream = isinstance(value, Tensor) and value.ndim == 3 and len(value) == 1
            return value.expand(len(resid_pre), -1, -1) if is_stream else value

        args = [repeated(value) for value in self.args]
        kwargs = {name: repeated(value) for name, value in self.kwargs.items()}
        try:
            if self.stream is None:
                return stream_in(block(resid_pre, *args, **kwargs))
            return stream_in(block(*args, **{self.stream: resid_pre}, **kwargs))
        finally:
            _forget_pattern(block)


def stream_in(output: Any) -> Tensor:
    """The residual stream in what a block gives: itself, or the first of several tensors."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _forget_pattern(block: nn.Module) -> None:
    """Free the pattern of the last run, with its graph.

    Some attention modules of TransformerLens keep it as an attribute (of GPT-2 and Pythia, among others). A pass would
    hold those of all layers, which grow with the square of the length.
    """
    for module in block.children():
        if isinstance(vars(module).get("_pattern"), Tensor):
            vars(module)["_pattern"] = None


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
    model: Any, inputs: Inputs, hook_names: Iterable[str], names_before: Iterable[str] = (), wrap: bool = True
) -> ForwardRecord:
    """Run the model through all its blocks and record hook points and block calls.

    Half-precision models run in float32, one module lifted at a time. The run ends at the unembedding, not at the last
    block: a looped decoder runs its blocks again in between.

    Args:
        model: the model.
        inputs: what it is run on.
        hook_names: hook points to record behind the hooks that are attached to them.
        names_before: hook points to record before these.
        wrap: name the block where the model's own code fails; not where hooks of the user's may have failed.

    Raises:
        UnsupportedModelError: the pass does not run each block once, in order, or changes the stream between them; it
            fails.
    """
    points, calls, last = hook_points(model), [], len(model.blocks) - 1
    activations: dict[str, Tensor] = {}
    before: dict[str, Tensor] = {}

    def record(name: str, kept: dict[str, Tensor]) -> tuple[Any, Hook]:
        return points[name], lambda tensor: kept.__setitem__(name, tensor.detach().clone())

    left: dict[int, Tensor] = {}  # what the last block gave

    def leave(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        _forget_pattern(module)
        left.clear()
        left[layer] = stream_in(output).detach()
        if layer == last:  # GPT-1's blocks give a list, in which TransformerLens does not find the stream
            activations.setdefault(block_hook(layer, "hook_resid_post"), left[layer].clone())

    def enter(layer: int, tensor: Tensor) -> None:
        given = left.get(layer - 1)
        if given is None or not given.isfinite().all():
            return
        if tensor.ndim != 3 or given.shape != tensor.shape:
            raise UnsupportedModelError(
                f"several streams: block {layer} reads a tensor of shape {tuple(tensor.shape)}, which is no residual "
                "stream [batch, pos, d_model]"
            )
        gap = (given.to(tensor) - tensor).norm() / tensor.norm()
        if not gap <= _BETWEEN:
            raise UnsupportedModelError(
                f"changed between blocks: block {layer} reads another stream than block {layer - 1} gives "
                f"({float(gap):.2e} of its norm off), which would count as growth. RWKV halves it there in eval mode: "
                "set rescale_every=0 in its configuration"
            )

    def capture(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer != len(calls):
            raise UnsupportedModelError(
                f"looped depth: the forward pass calls block {layer} as number {len(calls) + 1} of its block calls; "
                f"each of the {len(model.blocks)} blocks has to be called once, in order"
            )
        calls.append(BlockCall.capture(args, kwargs))

    def stop(module: nn.Module, args: Any) -> None:
        raise Done

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(attached([record(name, activations) for name in hook_names]))
        stack.enter_context(attached([record(name, before) for name in names_before], first=True))
        reads = [points[block_hook(layer, "hook_resid_pre")] for layer in range(last + 1)]
        stack.enter_context(attached([(reads[layer], partial(enter, layer)) for layer in range(last + 1)], True))
        stack.enter_context(lifted_model(model))
        for layer, block in enumerate(model.blocks):
            stack.callback(block.register_forward_pre_hook(partial(capture, layer), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(leave, layer)).remove)
        if isinstance(unembed := getattr(model, "unembed", None), nn.Module):
            stack.callback(unembed.register_forward_pre_hook(stop, prepend=True).remove)
        try:
            model(inputs.tensor, return_type=None, **inputs.options)
        except Done:
            pass
        except Exception as error:
            if isinstance(error, (TLCouplingError, torch.OutOfMemoryError)) or not wrap or "Inference" in str(error):
                raise
            where = f"in block {len(calls) - 1}" if calls else "before the first block"
            raise UnsupportedModelError(
                f"forward pass fails: the model's own code fails {where} ({type(error).__name__}: {error})"
            ) from error
    if len(calls) < len(model.blocks):
        raise UnsupportedModelError(f"looped depth: the forward pass runs {len(calls)} of {len(model.blocks)} blocks")
    return ForwardRecord(activations, before, calls)
