"""Trace: one hooked forward pass, its topology, and the residual identity.

A trace holds the residual stream and what each sublayer wrote to it, and can run any of the model's blocks again
(``Trace.run_block``), which is how both Jacobian engines see the model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tlcoupling.errors import ArgumentError, ResidualIdentityError, StaleTraceError, UnsupportedModelError
from tlcoupling.forward.bare import hooked_model
from tlcoupling.forward.block import Block, norms_are_folded
from tlcoupling.forward.cache import plain
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import (
    BlockCall,
    Done,
    ForwardRecord,
    Hook,
    attached,
    model_name_of,
    record_forward,
    require_supported,
)
from tlcoupling.forward.inputs import read_inputs
from tlcoupling.forward.lifting import lifted, lifted_parts, needs_lift
from tlcoupling.forward.offload import device_of
from tlcoupling.forward.points import hook_points, in_place
from tlcoupling.forward.prompt import to_text
from tlcoupling.forward.quantised import dtype_of, quantisation_of
from tlcoupling.forward.split import Split, block_hook, splits_of_model
from tlcoupling.forward.stacks import Stack, StackName, stack_of
from tlcoupling.forward.stream import IDENTITY_TOLERANCE, Stream, relative_gap
from tlcoupling.forward.user_hooks import FwdHooks, UserHooks, has_user_hooks, hooked_layers, hooked_outside_blocks
from tlcoupling.forward.window import Past, windowed
from tlcoupling.memory import give_back_memory
from tlcoupling.results.base import Provenance

# How far the stream of a cache may lie from that of a pass in float32 or better, relative to its norm: at the median
# over depths and positions; ten times as far at any. Rounding grows on its way: SmolLM2-135M in bfloat16 is 1.2e-2 off
# at the median and up to 0.24 at single positions (in float16 1.5e-3 and 0.018), another token 0.6 to 1.6.
_CACHE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# How far earlier positions may move with the last one, relative to their norm: rounding of products of other shapes.
_CAUSAL = 1e-6
# Rounding belongs to the terms that make up a write: one of less than this share of the layer's median length counts as
# that long.
_SHORT = 1e-2


PATTERN = "attn.hook_pattern"


@dataclass(frozen=True, repr=False, eq=False)
class Trace(Stream):
    """One hooked forward pass of a model.

    Attributes:
        model: the model, as it was given.
        tokens: token ids, ``[pos]``.
        str_tokens: the tokens as text.
        text: the prompt as text, decoded whole; empty if the model has no tokenizer.
        hooked_layers: the blocks in whose Jacobians hooks of the user's acted during the pass, those of ``fwd_hooks``,
            those attached by ``model.hooks(...)`` and those registered on modules.
        refusal: why the blocks are not split into sublayers, though they have some; None otherwise.
        first: the position in the prompt of position 0: 0, but in a window.
    """

    model: Any
    tokens: Int[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    text: str
    hooked_layers: frozenset[int]
    refusal: str | None
    _hooks: UserHooks = field(repr=False)
    _calls: list[BlockCall] = field(repr=False)
    _points: dict[str, Any] = field(repr=False)
    first: int = 0

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Trace({self.model_name}: {self.n_layers} {self.topology} blocks, d_model {self.d_model}, "
            f"{self.n_tokens} tokens)"
        )

    @classmethod
    @measured
    def from_cache(cls, model: Any, cache: Any, tokens: Any, *, fwd_hooks: FwdHooks = ()) -> Trace:
        """A trace from a ``run_with_cache`` that you already have.

        The blocks are run once more to learn how the model calls them, and the result must match the cache.

        Args:
            model: the model that made the cache.
            cache: an ``ActivationCache`` or a dictionary of hook names to activations, with or without batch axis.
            tokens: what the cache was made from: a string, token ids ``[pos]`` or ``[1, pos]``.
            fwd_hooks: the hooks that the cache was made with, as in ``trace``.

        Raises:
            MissingHookError: a hook point is not in the cache; the message says how to cache it.
            ArgumentError: a batch larger than one.
            NonFiniteActivationError: NaN or infinite activations; the message names the first layer.
            ResidualIdentityError: the sublayers' writes do not add up to the stream.
            StaleTraceError: the model, run on the tokens, does not give the cached stream.
        """
        model = hooked_model(model)
        require_supported(model)
        own = trace(model, tokens, fwd_hooks=fwd_hooks)
        given = Stream.from_activations(plain(cache), own.splits)
        if own.resid.shape != given.resid.shape:
            raise ArgumentError("tokens", f"{own.n_tokens} tokens", f"the {given.n_tokens} tokens of the cache")
        gaps = relative_gap(given.resid.to(own.resid), own.resid)
        allowed = _CACHE_TOLERANCE[plain(cache)[block_hook(0, "hook_resid_pre")].dtype]
        if not (gaps.median() <= allowed and gaps.max() <= 10 * allowed):
            depth, pos = divmod(int(gaps.argmax()), own.n_tokens)
            raise StaleTraceError(
                "the model gives another residual stream for these tokens than the cache holds (most at depth "
                f"{depth}, position {pos}: {float(gaps.max()):.1e} off): the cache comes from other weights, other "
                "tokens (a BOS token?), from hooks that are not attached now, or from float32 products of reduced "
                "precision (torch.set_float32_matmul_precision)"
            )
        return own

    @property
    def model_name(self) -> str:
        """The model's own name."""
        return model_name_of(self.model)

    def provenance(
        self, *, settings: Mapping[str, Any], seconds: float, engine: Mapping[str, str] | None = None
    ) -> Provenance:
        """The provenance of a measurement on this trace."""
        return Provenance(
            model_name=self.model_name,
            weight_processing=self.weight_processing,
            tokens=tuple(self.tokens.tolist()),
            str_tokens=self.str_tokens,
            text=self.text,
            settings={**settings, **self._stack_settings, **self._kind_settings, **self.hook_settings},
            engine=engine or {},
            seconds=seconds,
        )

    @property
    def _stack_settings(self) -> dict[str, Any]:
        """What a provenance says of the stack of an encoder-decoder; empty of other models."""
        return self.model.settings() if isinstance(self.model, Stack) else {}

    @property
    def _kind_settings(self) -> dict[str, Any]:
        """What a provenance says of the kinds of layers; empty where all are of one."""
        return {"layer_kinds": list(self.layer_kinds)} if len(set(self.layer_kinds)) > 1 else {}

    @property
    def hook_settings(self) -> dict[str, Any]:
        """What a provenance says of hooks of the user's; empty without any, so that no edited pass looks clean."""
        said = {"fwd_hooks": list(self._hooks.names), "hooked_layers": sorted(self.hooked_layers)}
        return {name: value for name, value in said.items() if value}

    @cached_property
    def weight_processing(self) -> dict[str, Any]:
        """What was done to the weights, as far as the model tells and the activations show."""
        cfg = self.model.cfg
        writes = torch.cat([*self.writes.values()]) if self.writes else self.resid.diff(dim=0)
        share_of_mean = writes.mean(-1).abs().max() / writes.std(-1).max()
        return {
            "normalization_type": getattr(cfg, "normalization_type", None),
            "layer_norm_folded": norms_are_folded(self.model),
            "writes_centered": bool(share_of_mean < 1e-4),
            "dtype": str(dtype_of(self.model.blocks)).removeprefix("torch."),
            **({} if (quantisation := quantisation_of(self.model.blocks)) is None else {"quantisation": quantisation}),
        }

    def layers_hooked_now(self) -> frozenset[int]:
        """The blocks in whose Jacobians hooks act that are attached now, apart from those that the trace keeps."""
        return hooked_layers(self._points_now(self._points), self.model.blocks)

    @contextlib.contextmanager
    def hooks_attached(self) -> Iterator[None]:
        """Attach the hooks that the trace keeps, for a run of the whole model, in which each has to be called.

        Raises:
            ArgumentError: one was not, so that it would be left out without a word.
        """
        with self._hooks.attached():
            yield
        self._hooks.require_fired("")

    def hooked_outside_blocks(self) -> bool:
        """Whether hooks of the user's act outside the blocks now: on embeddings, final norm or logits."""
        return hooked_outside_blocks(self.model, self._points_now(self._points))

    def point(self, layer: int, name: str) -> Any | None:
        """Return the hook point ``blocks.{layer}.{name}``, None where the model has none."""
        full = block_hook(layer, name)
        return self._points_now([full]).get(full)

    def _points_now(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the hook points by name, read again if the model has replaced one of ``names``."""
        points = {id(point): point for name in names if (point := self._points.get(name)) is not None}
        if not all(in_place(self.model, point) for point in points.values()):
            points = hook_points(self.model)
            self._points.clear()
            self._points.update(points)
        return self._points

    def block(self, layer: int) -> Block:
        """What a block is made of now."""
        return Block.read(self.model, layer, self.splits[layer])

    def window(self, first: int, last: int) -> Trace | None:
        """Return this trace at consecutive positions, whose blocks run without the others.

        Positions before the window count through their keys and values alone, as the model cached them. Whether a
        block gives the same then shows in ``check_current``.

        Args:
            first: the first position.
            last: the last position.

        Returns:
            A trace whose position 0 is ``first``. None where the model cached no keys and values of earlier positions.
        """
        rows = slice(first, last + 1)
        calls = [windowed(call, layer, rows, self.n_tokens) for layer, call in enumerate(self._calls)]
        made = [call for call in calls if call is not None]
        if len(made) < len(calls):
            return None
        writes = {name: write[:, rows] for name, write in self.writes.items()}
        tokens, names = self.tokens[rows], self.str_tokens[rows]
        resid = self.resid[:, rows]
        rest = {"tokens": tokens, "str_tokens": names, "first": first, "_calls": made}
        cut = replace(self, resid=resid, writes=writes, edits=None, **rest)
        vars(cut).update(_parameters=self._parameters, _lifts=self._lifts)  # of the same blocks
        return cut

    def past(self, layer: int) -> Past | None:
        """Return the keys and values of the positions before a window; None in a trace of all positions."""
        call = self._calls[layer]
        return next((each for each in (*call.args, *call.kwargs.values()) if isinstance(each, Past)), None)

    @measured
    def run_block(
        self,
        layer: int,
        resid_pre: Float[Tensor, "batch pos d_model"],
        hooks: Mapping[str, Hook],
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run one block again from x^l to x^{l+1}, with hooks of ours (by short name) behind those of the user.

        x^l is what the block reads after the user's hooks on its ``hook_resid_pre``, so what these give back is put
        aside; x^{l+1} is what they make of it on the next ``hook_resid_pre``. Offloaded weights are brought
        into memory meanwhile, and half-precision ones lifted to float32 while their part of the block runs.
        """
        block = self.model.blocks[layer]
        reads, after = self.point(layer, "hook_resid_pre"), self.point(layer + 1, "hook_resid_pre")
        with ExitStack() as stack:
            if self.lifts(layer):
                stack.enter_context(lifted_parts(self.model, block))
            stack.enter_context(self._hooks.attached(layer))
            given = resid_pre
            if has_user_hooks([reads]):
                # copies, for hooks that edit in place what they get: neither may reach x^l itself
                given = resid_pre.clone()
                stack.enter_context(attached([(reads, lambda tensor: resid_pre.clone())]))
            stack.enter_context(attached(self._named(layer, hooks)))
            out = self._calls[layer].run(block, given)
            return out if after is None else after(out)

    @cached_property
    @measured
    def causal(self) -> bool:
        """Whether no position reads a later one, which is tested in each block by moving its input at the last one.

        A model that reads ahead within a prefix, but nowhere as far as the last position, counts as causal.
        """
        if getattr(self.model.cfg, "attention_dir", "causal") == "bidirectional":
            return False
        if self.n_tokens == 1:
            return True
        for layer in range(self.n_layers):
            stream = self.block_input(layer)
            moved = stream.clone()
            moved[:, -1] = -moved[:, -1] + moved[:, 0]
            with torch.no_grad():
                here, there = (self.run_block(layer, each, {})[0, :-1] for each in (stream, moved))
            if (relative_gap(there, here) > _CAUSAL).any():
                return False
        return True

    @measured
    @torch.no_grad()
    def alone(self, first: int, last: int | None = None) -> bool:
        """Whether no other position lies on the way between two of some consecutive ones, through all blocks.

        At a single one, its own Jacobians then multiply to what the blocks do to it. Tested in each block: what moves
        there must not move earlier positions, and it must not move with later ones.

        Args:
            first: the first position.
            last: the last one; None: the same.
        """
        if getattr(self.model.cfg, "attention_dir", "causal") == "bidirectional":
            return False
        stop = (first if last is None else last) + 1
        for layer in range(self.n_layers):
            stream = self.block_input(layer)
            own, later = stream.clone(), stream.clone()
            own[:, first:stop] = -own[:, first:stop].roll(1, -1)
            later[:, stop:] = -later[:, stop:].roll(1, -1)
            still, moved, beside = (self.run_block(layer, each, {})[0] for each in (stream, own, later))
            gap = relative_gap(torch.cat([moved[:first], beside[first:stop]]), still[:stop])
            if (gap > _CAUSAL).any():
                return False
        return True

    def require_alone(self, pos: int) -> None:
        """Check that the Jacobians of a position multiply to what all blocks do to it.

        Raises:
            UnsupportedModelError: a perturbation comes back to the position by way of others.
        """
        if not self.alone(pos):
            raise UnsupportedModelError(
                f"in {self.model_name} a perturbation at position {pos} comes back to it by way of others: the product "
                "of its own Jacobians is not what the blocks do to it. tlc.slice_jacobian follows all positions"
            )

    def block_input(self, layer: int) -> Float[Tensor, "1 pos d_model"]:
        """x^l on the device of its block, with a batch axis."""
        return self.input_of(layer, "block")

    @cached_property
    def _parameters(self) -> list[list[Tensor]]:
        """The parameters of each block, which go where the block goes."""
        return [list(block.parameters()) for block in self.model.blocks]

    @cached_property
    def _lifts(self) -> dict[tuple[int, frozenset[torch.dtype]], bool]:
        """Whether a block has weights to lift, by layer and by its parameters' dtypes, as far as it was asked for."""
        return {}

    def lifted(self, layer: int, module: nn.Module) -> AbstractContextManager[None]:
        """Hold the half-precision weights of a module of a block in float32 for a while."""
        return lifted(self.model, module) if self.lifts(layer) else contextlib.nullcontext()

    def lifts(self, layer: int) -> bool:
        """Return whether a block has half-precision or quantised weights."""
        key = layer, frozenset(each.dtype for each in self._parameters[layer])  # others once a part is converted
        if key not in self._lifts:
            self._lifts[key] = needs_lift(self.model.blocks[layer])
        return self._lifts[key]

    def attention(self, layers: Iterable[int]) -> str:
        """Return what the attention of some layers is called.

        Raises:
            UnsupportedModelError: one of them has none that is split off.
        """
        return {self.block(layer).attn.name for layer in layers}.pop()

    def reads(self, layer: int, sublayer: str) -> str:
        """Return the hook point of the stream that a sublayer, or the block, reads."""
        return "hook_resid_pre" if sublayer == "block" else self.block(layer).sublayers[sublayer].reads

    def input_of(self, layer: int, sublayer: str) -> Float[Tensor, "1 pos d_model"]:
        """``read_by`` on the device of its block, with a batch axis."""
        device = self._parameters[layer][0].device
        device = device_of(self.model.blocks[layer]) if device.type == "meta" else device
        return self.read_by(layer, sublayer).to(device)[None]

    def mlp_input(self, layer: int) -> Float[Tensor, "1 pos d_model"]:
        """Return what the MLP reads; x^l in a block without one."""
        return self.input_of(layer, "mlp" if "mlp" in self.writes else "block")

    @measured
    def run_attn(
        self, layer: int, resid_pre: Float[Tensor, "1 pos d_model"], hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "1 pos d_model"]:
        """Run one block again as far as its attention's write, and give that.

        Some attention modules fire hooks behind their write (GPT-J's pattern), so they are run to their end.
        """
        written: list[Tensor] = []
        left = []

        def leave(module: Any, args: Any, output: Any) -> None:
            left.append(module)
            if written:
                raise Done

        def write(tensor: Tensor) -> None:
            written.append(tensor)
            if left:
                raise Done

        attn = self.block(layer).attn
        handle = attn.module.register_forward_hook(leave)
        try:
            with contextlib.suppress(Done):
                self.run_block(layer, resid_pre, {**hooks, attn.write: write})
        finally:
            handle.remove()
        return written[0]

    def attn_without_heads(self, layer: int) -> Float[Tensor, "pos d_model"]:
        """What a layer's attention gives where its heads give nothing, such as a bias, before a norm behind it."""
        attn, unnormed = self.block(layer).attn, []
        (hook_z,) = attn.points("z")
        with torch.no_grad(), attn.keep_unnormed(unnormed.append):
            written = self.run_attn(layer, self.block_input(layer), {hook_z: torch.zeros_like})
        return unnormed[0][0] if unnormed else written[0]

    def _named(self, layer: int, hooks: Mapping[str, Hook]) -> list[tuple[Any, Hook]]:
        return [(self.point(layer, name), hook) for name, hook in hooks.items()]

    def check_current(
        self, sublayer: str, layer: int, now: Float[Tensor, "pos d_model"], rows: Sequence[int] | None = None
    ) -> None:
        """Check that a sublayer (or the block) run again gives what it gave when the trace was taken, at each position.

        Args:
            sublayer: one of ``sublayers``.
            layer: block index.
            now: what it gives now, at all positions or at ``rows``.
            rows: those positions, or None for all.

        Raises:
            StaleTraceError: it gives something else.
        """
        wrote = (self.resid[1:] if sublayer == "block" else self.writes[sublayer])[layer]
        positions = range(self.n_tokens) if rows is None else rows
        then = wrote[list(positions)]
        gaps = relative_gap(now.detach().to(then), then, shortest=_SHORT * float(wrote.norm(dim=-1).median()))
        worst = int(gaps.argmax())  # a NaN counts as the largest
        if not gaps[worst] <= IDENTITY_TOLERANCE[then.dtype]:
            raise StaleTraceError(
                f"{sublayer} of layer {layer} gives another output now than when the trace was taken "
                f"({float(gaps[worst]):.1e} off at position {positions[worst]}): the weights or the attached hooks "
                "have changed. Take a new trace: with the hooks as fwd_hooks=, or inside the `with model.hooks(...)` "
                "that it is used in"
            )


@measured
def trace(
    model: Any,
    prompt: Any,
    *,
    fwd_hooks: FwdHooks = (),
    prepend_bos: bool | None = None,
    attention_mask: Any | None = None,
    tokenizer: Any | None = None,
    stack: StackName | None = None,
    decoder_input: Any | None = None,
) -> Trace:
    """Run a model once on a prompt and keep its residual stream.

    Hooks act on the forward pass and on every Jacobian that is taken from the trace: those of ``fwd_hooks``, which the
    trace keeps, and those attached by ``with model.hooks(...)`` or registered on modules (``register_forward_hook``),
    which have to stay as long as it is used. The Jacobian of block l is that of x^{l+1} with respect to x^l, each as a
    block reads it: it sees hooks within the block, on its ``hook_resid_post`` and on the next ``hook_resid_pre``, while
    its own ``hook_resid_pre`` makes x^l. An activation that a hook replaces by constants passes no derivative on. A
    module whose ``forward`` was replaced counts as the model's own: ``engine="autograd"`` follows it wherever it goes,
    while a closed form is held against it at each source and destination that is measured.

    What is in force around this call or any later use of the trace does not count: autocast, ``torch.inference_mode``,
    ``torch.no_grad``, a default dtype or device, the precision of float32 products, threads that measure the same model
    (they wait). Hooks run in that state too: one that makes a tensor should give it the activation's dtype and device.

    Args:
        model: a ``HookedTransformer``, a ``TransformerBridge``, or a bare HuggingFace (or PEFT) model, in eval mode. It
            is left as it was. ``trace.model`` of a bare model is a bridge around a copy of its modules that shares its
            weights: hooks that are registered on the bare model later do not act.
        prompt: a string, token ids ``[pos]``, a batch of one ``[1, pos]``, or what the tokenizer or the processor
            returns for one input (``pixel_values``, ``input_values``). Text is never truncated, and pads are removed:
            positions count from its first token.
        fwd_hooks: hooks as in ``model.run_with_hooks``: pairs (hook name or filter of names, function).
        prepend_bos: whether a string gets a BOS token in front; the default is the model's own
            (``cfg.default_prepend_bos``), as everywhere in TransformerLens.
        attention_mask: for token ids: 1 for each token of the prompt and 0 for each pad before or behind it. Without
            it, pads are told by the tokenizer's pad token, where that cannot be text.
        tokenizer: of a bare model, for prompts that are text.
        stack: of an encoder-decoder: whose stream is traced, ``"encoder"`` or ``"decoder"``. Positions are those of
            that stack. ``trace.model`` is then that stack as a model of its own, with the other's input held.
        decoder_input: of an encoder-decoder: what the decoder reads, text or token ids with the start token. An encoder
            does not depend on it.

    Raises:
        UnsupportedModelError: several parallel streams, a looped decoder, quantised weights or such that are not in
            memory and that nothing brings there, or a module in training mode. docs/models.md lists the reasons.
        ArgumentError: an empty prompt, a batch larger than one, token ids out of range or more than the context holds,
            ids that may be pads or text, a mask with zeros between ones, placeholders of images; hooks on points that
            do not exist or are not called.
        HookError: a hook gives back no tensor, or one of another shape.
        NonFiniteActivationError: NaN or infinite activations; the message names the first layer.
        ResidualIdentityError: the sublayers' writes do not add up to the stream where hooks act, as where one edits
            ``hook_resid_mid``.

    Warns:
        UserWarning: the sublayers' writes do not add up to the stream by the model's own code: its blocks are measured
            whole.

    Example:
        >>> trace = tlc.trace(model, "When Mary and John went to the store")  # doctest: +SKIP
    """
    model = hooked_model(model, tokenizer)
    model, prompt, attention_mask = stack_of(model, stack, prompt, decoder_input, prepend_bos, attention_mask)
    require_supported(model)
    inputs = read_inputs(model, prompt, prepend_bos, attention_mask)
    points, splits = hook_points(model), splits_of_model(model)
    user_hooks = UserHooks.of(model, points, fwd_hooks)
    with user_hooks.attached():
        hooked = hooked_layers(points, model.blocks)
        outputs = [block_hook(layer, "hook_resid_post") for layer in range(len(splits))]
        between = [points[block_hook(layer, "hook_resid_pre")] for layer in range(1, len(splits))]
        edited = has_user_hooks([*between, *(points[name] for name in outputs)])
        names = recorded(splits)
        known = [name for name in names if name in points]
        record = record_forward(model, inputs, known, outputs if edited else (), wrap=not (hooked or fwd_hooks))
    user_hooks.require_fired()
    give_back_memory()  # what lay between the recorded activations, half as much as these
    stream, refusal = _split_stream(record, splits, edited, bool(hooked))
    calls = record.calls
    del record
    give_back_memory()
    if inputs.is_text and stream.n_tokens != inputs.tensor.shape[1]:
        allowed = f"a length that the model does not pad: its blocks run on {stream.n_tokens} positions"
        raise ArgumentError("prompt", f"{inputs.tensor.shape[1]} tokens", allowed)
    return Trace(
        **{each.name: getattr(stream, each.name) for each in fields(stream)},
        model=model,
        tokens=inputs.tokens(stream.n_tokens),
        str_tokens=inputs.labels(model, stream.n_tokens),
        text=to_text(model, inputs.tensor[0]) if inputs.is_text else "",
        hooked_layers=hooked,
        refusal=refusal,
        _hooks=user_hooks,
        _calls=calls,
        _points=points,
    )


def _split_stream(
    record: ForwardRecord, splits: Sequence[Split], edited: bool, hooked: bool
) -> tuple[Stream, str | None]:
    """Split the recorded stream into the sublayers' writes where they add up.

    Where they do not, it is the architecture that writes otherwise, unless hooks of the user's act: the blocks are then
    measured whole.

    Returns:
        The stream, and why it is not split; None where it is.

    Raises:
        ResidualIdentityError: the writes do not add up, and hooks act.
    """
    before, whole = record.before if edited else None, [split.opaque for split in splits]
    missing = next((name for name in recorded(splits) if name not in record.activations), None)
    try:
        if missing is None:
            return Stream.from_activations(record.activations, splits, before), None
        refusal = f"the forward pass does not call {missing!r}, so what is written there is not known"
    except ResidualIdentityError as error:
        if hooked:
            raise
        refusal = str(error)
    stream = Stream.from_activations(record.activations, whole, before)
    warnings.warn(f"the blocks are measured whole, and not split into sublayers: {refusal}", stacklevel=5)
    return stream, refusal


def require_trace(value: Any) -> None:
    """Check that an argument is a trace, as where a model was given.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, Trace):
        shown = value if isinstance(value, str) else type(value).__name__
        raise ArgumentError("trace", shown, "a trace, which tlc.trace(model, prompt) returns")


def recorded(splits: Sequence[Split]) -> list[str]:
    """The hook points that a trace records."""
    names = [block_hook(len(splits) - 1, "hook_resid_post")]
    for layer, split in enumerate(splits):
        of_parts = dict.fromkeys(name for part in split.parts for name in (part.reads, part.write))
        names += [block_hook(layer, name) for name in {"hook_resid_pre": None, **of_parts}]
    return names
