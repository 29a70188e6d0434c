"""Trace: one hooked forward pass, its topology, and the residual identity.

A trace holds the residual stream and what each sublayer wrote to it, and can run any of the model's blocks again
(``Trace.run_block``), which is how both Jacobian engines see the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcoupling.errors import ArgumentError, StaleTraceError, UnsupportedModelError
from tlcoupling.forward.block import Block, block_hook, norms_are_folded, topology_of_model
from tlcoupling.forward.cache import plain
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import BlockCall, Done, Hook, attached, model_name_of, record_forward, require_supported
from tlcoupling.forward.lifting import lifted_parts
from tlcoupling.forward.points import hook_points, in_place
from tlcoupling.forward.prompt import to_str_tokens, to_text, to_tokens
from tlcoupling.forward.quantised import dtype_of, quantisation_of
from tlcoupling.forward.stream import IDENTITY_TOLERANCE, Stream, relative_gap
from tlcoupling.forward.user_hooks import FwdHooks, UserHooks, has_user_hooks, hooked_layers, hooked_outside_blocks
from tlcoupling.forward.window import Past, windowed
from tlcoupling.results.base import Provenance

PATTERN = "attn.hook_pattern"
# How far the stream of a cache may lie from that of a pass in float32 or better, relative to its norm: at the median
# over depths and positions; ten times as far at any. Rounding grows on its way: SmolLM2-135M in bfloat16 is 1.2e-2 off
# at the median and up to 0.24 at single positions (in float16 1.5e-3 and 0.018), another token 0.6 to 1.6.
_CACHE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Rounding belongs to the terms that make up a write: one of less than this share of the layer's median length counts as
# that long.
_SHORT = 1e-2


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
    """

    model: Any
    tokens: Int[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    text: str
    hooked_layers: frozenset[int]
    _hooks: UserHooks = field(repr=False)
    _calls: list[BlockCall] = field(repr=False)
    _points: dict[str, Any] = field(repr=False)

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
        require_supported(model)
        given = Stream.from_activations(plain(cache), len(model.blocks), topology_of_model(model))
        own = trace(model, tokens, fwd_hooks=fwd_hooks)
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
            settings={**settings, **self.hook_settings},
            engine=engine or {},
            seconds=seconds,
        )

    @property
    def hook_settings(self) -> dict[str, Any]:
        """What a provenance says of hooks of the user's; empty without any, so that no edited pass looks clean."""
        said = {"fwd_hooks": list(self._hooks.names), "hooked_layers": sorted(self.hooked_layers)}
        return {name: value for name, value in said.items() if value}

    @cached_property
    def weight_processing(self) -> dict[str, Any]:
        """What was done to the weights, as far as the model tells and the activations show."""
        cfg = self.model.cfg
        writes = self.attn_out if self.mlp_out is None else torch.cat([self.attn_out, self.mlp_out])
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
        if not all(in_place(self.model, self._points[name]) for name in names if name in self._points):
            points = hook_points(self.model)
            self._points.clear()
            self._points.update(points)
        return self._points

    def block(self, layer: int) -> Block:
        """What a block is made of now."""
        return Block.read(self.model, layer, self.topology)

    def window(self, first: int, last: int) -> Trace | None:
        """Return this trace at consecutive positions, whose blocks run without the others.

        Positions before the window count through their keys and values alone, as the model cached them. Whether a
        block gives the same then shows in ``check_current``.

        Args:
            first: the first position.
            last: the last position.

        Returns:
            A trace whose position 0 is ``first``. None where the model cached no keys and values.
        """
        rows = slice(first, last + 1)
        calls = [windowed(call, layer, rows, self.n_tokens) for layer, call in enumerate(self._calls)]
        made = [call for call in calls if call is not None]
        if len(made) < len(calls):
            return None
        streams = {name: getattr(self, name)[:, rows] for name in ("resid", "attn_out")}
        mlp_out = None if self.mlp_out is None else self.mlp_out[:, rows]
        tokens, names = self.tokens[rows], self.str_tokens[rows]
        return replace(self, **streams, mlp_out=mlp_out, edits=None, tokens=tokens, str_tokens=names, _calls=made)

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
        aside; x^{l+1} is what they make of it on the next ``hook_resid_pre``. Half-precision weights are lifted to
        float32 while their part of the block runs.
        """
        block = self.model.blocks[layer]
        reads, after = self.point(layer, "hook_resid_pre"), self.point(layer + 1, "hook_resid_pre")
        with ExitStack() as stack:
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

    def block_input(self, layer: int) -> Float[Tensor, "1 pos d_model"]:
        """x^l on the device of its block, with a batch axis."""
        return self.resid[layer].to(next(self.model.blocks[layer].parameters()).device)[None]

    def mlp_input(self, layer: int) -> Float[Tensor, "1 pos d_model"]:
        """What the MLP reads: x_mid in a sequential block, x^l in a parallel one; placed as ``block_input``."""
        stream = self.resid_mid if self.topology == "sequential" else self.resid
        return stream[layer].to(next(self.model.blocks[layer].parameters()).device)[None]

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

        handle = self.block(layer).attn.module.register_forward_hook(leave)
        try:
            with contextlib.suppress(Done):
                self.run_block(layer, resid_pre, {**hooks, "hook_attn_out": write})
        finally:
            handle.remove()
        return written[0]

    @measured
    def run_mlp_in_block(
        self, layer: int, stream: Float[Tensor, "1 pos d_model"], hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "1 pos d_model"]:
        """Run one block again as far as its MLP's write, with the MLP reading ``stream`` at all positions."""
        written: list[Tensor] = []

        def stop(tensor: Tensor) -> None:
            written.append(tensor)
            raise Done

        resid_pre = stream
        hooks = {**hooks, "hook_mlp_out": stop}
        if self.topology == "sequential":
            resid_pre = self.block_input(layer)
            hooks["hook_resid_mid"] = lambda tensor: stream
        with contextlib.suppress(Done):
            self.run_block(layer, resid_pre, hooks)
        return written[0]

    @measured
    def run_mlp(
        self, layer: int, stream: Float[Tensor, "1 pos d_model"], hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "1 pos d_model"]:
        """Run the MLP sublayer of one block, its norms included, on any rows of what it reads."""
        block = self.block(layer)
        before, behind = block.mlp.before, block.mlp.behind
        with lifted_parts(self.model, block.module), attached(self._named(layer, hooks)):
            out = block.mlp.module(stream if before is None else before(stream))
            return out if behind is None else behind(out)

    def _named(self, layer: int, hooks: Mapping[str, Hook]) -> list[tuple[Any, Hook]]:
        return [(self.point(layer, name), hook) for name, hook in hooks.items()]

    def check_current(
        self, sublayer: str, layer: int, now: Float[Tensor, "pos d_model"], rows: Sequence[int] | None = None
    ) -> None:
        """Check that a sublayer (or the block) run again gives what it gave when the trace was taken, at each position.

        Args:
            sublayer: ``"block"``, ``"attn"`` or ``"mlp"``.
            layer: block index.
            now: what it gives now, at all positions or at ``rows``.
            rows: those positions, or None for all.

        Raises:
            StaleTraceError: it gives something else.
        """
        wrote = {"block": self.resid[1:], "attn": self.attn_out, "mlp": self.mlp_out}[sublayer][layer]
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
) -> Trace:
    """Run a model once on a prompt and keep its residual stream.

    Hooks act on the forward pass and on every Jacobian that is taken from the trace: those of ``fwd_hooks``, which the
    trace keeps, and those attached by ``with model.hooks(...)`` or registered on modules (``register_forward_hook``),
    which have to stay as long as it is used. The Jacobian of block l is that of x^{l+1} with respect to x^l, each as a
    block reads it: it sees hooks within the block, on its ``hook_resid_post`` and on the next ``hook_resid_pre``, while
    its own ``hook_resid_pre`` makes x^l. An activation that a hook replaces by constants passes no derivative on. A
    module whose ``forward`` was replaced counts as the model's own: ``engine="autograd"`` follows it wherever it goes,
    while a closed form is held against it at the first position that is asked for.

    What is in force around this call or any later use of the trace does not count: autocast, ``torch.inference_mode``,
    ``torch.no_grad``, a default dtype or device, the precision of float32 products, threads that measure the same model
    (they wait). Hooks run in that state too: one that makes a tensor should give it the activation's dtype and device.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge`` of a decoder, in eval mode. It is left as it was.
        prompt: a string, token ids ``[pos]``, a batch of one ``[1, pos]``, or what a tokenizer returns for one text. It
            is never truncated, and pads are removed: positions count from its first token.
        fwd_hooks: hooks as in ``model.run_with_hooks``: pairs (hook name or filter of names, function).
        prepend_bos: whether a string gets a BOS token in front; the default is the model's own
            (``cfg.default_prepend_bos``), as everywhere in TransformerLens.
        attention_mask: for token ids: 1 for each token of the prompt and 0 for each pad before or behind it. Without
            it, pads are told by the tokenizer's pad token, where that cannot be text.

    Raises:
        UnsupportedModelError: an encoder, a state-space model, a looped decoder, quantised or offloaded weights, or a
            module in training mode.
        ArgumentError: an empty prompt, a batch larger than one, token ids out of range or more than the context holds,
            ids that may be pads or text, a mask with zeros between ones, placeholders of images; hooks on points that
            do not exist or are not called.
        HookError: a hook gives back no tensor, or one of another shape.
        NonFiniteActivationError: NaN or infinite activations; the message names the first layer.
        ResidualIdentityError: the sublayers' writes do not add up to the stream, as where a hook edits
            ``hook_resid_mid``.

    Example:
        >>> trace = tlc.trace(model, "When Mary and John went to the store")  # doctest: +SKIP
    """
    require_supported(model)
    tokens = to_tokens(model, prompt, prepend_bos, attention_mask)
    points, n_layers = hook_points(model), len(model.blocks)
    topology = topology_of_model(model)
    user_hooks = UserHooks.of(model, points, fwd_hooks)
    with user_hooks.attached():
        hooked = hooked_layers(points, model.blocks)
        outputs = [block_hook(layer, "hook_resid_post") for layer in range(n_layers)]
        names = _recorded(points, n_layers, topology)
        _require_called([*names, *outputs], points)
        between = [points[block_hook(layer, "hook_resid_pre")] for layer in range(1, n_layers)]
        edited = has_user_hooks([*between, *(points[name] for name in outputs)])
        record = record_forward(model, tokens, names, outputs if edited else ())
    user_hooks.require_fired()
    _require_called((name for name in names if not name.endswith(PATTERN)), record.activations)
    pattern = record.activations.pop(block_hook(0, PATTERN), None)
    declared = getattr(model.cfg, "attention_dir", "causal")
    if declared == "bidirectional" or (pattern is not None and 0 not in hooked and (pattern.triu(1) != 0).any()):
        raise UnsupportedModelError(
            "attention in block 0 looks ahead, so this is an encoder or another bidirectional model; "
            "only causal decoders are supported"
        )
    stream = Stream.from_activations(record.activations, n_layers, topology, record.before if edited else None)
    return Trace(
        **{each.name: getattr(stream, each.name) for each in fields(stream)},
        model=model,
        tokens=tokens[0].cpu(),
        str_tokens=to_str_tokens(model, tokens[0]),
        text=to_text(model, tokens[0]),
        hooked_layers=hooked,
        _hooks=user_hooks,
        _calls=record.calls,
        _points=points,
    )


def require_trace(value: Any) -> None:
    """Check that an argument is a trace, as where a model was given.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, Trace):
        shown = value if isinstance(value, str) else type(value).__name__
        raise ArgumentError("trace", shown, "a trace, which tlc.trace(model, prompt) returns")


def _require_called(names: Iterable[str], called: Container[str]) -> None:
    """Check that a model has, or has called, the hook points that a trace records.

    Raises:
        UnsupportedModelError: one is missing.
    """
    for name in names:
        if name not in called:
            raise UnsupportedModelError(
                f"the model's forward pass does not call {name!r}, so the stream cannot be read there: TransformerLens "
                "does not hook this architecture completely"
            )


def _recorded(points: Mapping[str, Any], n_layers: int, topology: str) -> list[str]:
    """The hook points that a trace records."""
    short = ["hook_resid_pre", "hook_attn_out"]
    if topology != "attn_only":
        short.append("hook_mlp_out")
    if topology == "sequential":
        short.append("hook_resid_mid")
    names = [block_hook(layer, name) for name in short for layer in range(n_layers)]
    names.append(block_hook(n_layers - 1, "hook_resid_post"))
    return [*names, *([block_hook(0, PATTERN)] if block_hook(0, PATTERN) in points else [])]
