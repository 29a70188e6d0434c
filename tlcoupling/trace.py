"""Trace: one hooked forward pass, its topology, and the residual identity.

A trace holds the residual stream and what each sublayer wrote to it, and can run any of the model's blocks again
(``Trace.run_block``), which is how both Jacobian engines see the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcoupling.errors import (
    ArgumentError,
    MissingHookError,
    NonFiniteActivationError,
    ResidualIdentityError,
    StaleTraceError,
    UnsupportedModelError,
)
from tlcoupling.hooked import (
    BlockCall,
    Done,
    Hook,
    Topology,
    attached,
    block_hook,
    has_user_hooks,
    lifted_parts,
    norms_are_folded,
    record_forward,
    require_supported,
    topology_of,
    topology_of_model,
)
from tlcoupling.results import Provenance

# Rounding of x + a + m against what the model itself added up, relative to the norm of the sum.
IDENTITY_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-2,
}
PATTERN = "attn.hook_pattern"


@dataclass(frozen=True, repr=False, eq=False)
class Stream:
    """A residual stream and the sublayers' writes, checked to add up.

    Attributes:
        resid: x^0 .. x^L, the last one before the final norm, ``[layer + 1, pos, d_model]``.
        attn_out: a^l, what each attention sublayer wrote, ``[layer, pos, d_model]``.
        mlp_out: m^l, what each MLP wrote, ``[layer, pos, d_model]``; None in an attention-only model.
        topology: ``"sequential"``, ``"parallel"`` or ``"attn_only"``.
    """

    resid: Float[Tensor, "layer_plus_1 pos d_model"]
    attn_out: Float[Tensor, "layer pos d_model"]
    mlp_out: Float[Tensor, "layer pos d_model"] | None
    topology: Topology

    @property
    def n_layers(self) -> int:
        """Number of blocks, L."""
        return self.attn_out.shape[0]

    @property
    def n_tokens(self) -> int:
        """Number of positions."""
        return self.resid.shape[1]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.resid.shape[2]

    @property
    def sublayers(self) -> tuple[str, ...]:
        """What can be measured: ``block`` and ``attn``, and ``mlp`` where the model has MLPs."""
        return ("block", "attn") if self.topology == "attn_only" else ("block", "attn", "mlp")

    @cached_property
    def resid_mid(self) -> Float[Tensor, "layer pos d_model"]:
        """x^l + a^l, what the MLP of a sequential block reads."""
        return self.resid[:-1] + self.attn_out

    @classmethod
    def from_activations(cls, activations: Mapping[str, Tensor], n_layers: int, topology: Topology) -> Stream:
        """Build the stream from recorded hook points and check it.

        Half-precision activations are lifted to float32; the tolerance of the check is that of their own dtype.

        Raises:
            MissingHookError, ArgumentError, NonFiniteActivationError, ResidualIdentityError: see ``Trace.from_cache``.
        """
        first = _fetch(activations, block_hook(0, "hook_resid_pre"))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32

        def stack(names: Iterable[str]) -> Tensor:
            # a device map spreads the layers over devices; the stream lives on the first one's
            return torch.stack([_fetch(activations, name).to(first.device, dtype) for name in names])

        layers = range(n_layers)
        resid = stack(
            [block_hook(layer, "hook_resid_pre") for layer in layers] + [block_hook(n_layers - 1, "hook_resid_post")]
        )
        attn_out = stack(block_hook(layer, "hook_attn_out") for layer in layers)
        mlp_out = None
        if topology != "attn_only":
            mlp_out = stack(block_hook(layer, "hook_mlp_out") for layer in layers)
        stream = cls(resid, attn_out, mlp_out, topology)
        stream._check_finite()
        stream._check_identity(IDENTITY_TOLERANCE[first.dtype])
        mids = [block_hook(layer, "hook_resid_mid") for layer in layers]
        if topology == "sequential" and all(name in activations for name in mids):
            stream._check_resid_mid(stack(mids), IDENTITY_TOLERANCE[first.dtype])
        return stream

    def _check_finite(self) -> None:
        finite = self.resid.isfinite().all(-1)
        if finite.all():
            return
        layer, pos = (~finite).nonzero()[0].tolist()
        where = f"enters block {layer}" if layer < self.n_layers else f"leaves the last block, {layer - 1}"
        raise NonFiniteActivationError(
            f"the residual stream that {where} holds NaN or infinite values (first at position {pos}); "
            "no Jacobian, line or rate is defined there. A half-precision model may have overflowed: try float32"
        )

    @property
    def identity_gap(self) -> float:
        """The largest gap in x^l + a^l + m^l = x^{l+1}, relative to the norm of the sum."""
        return float(self._identity_gaps().max())

    def _identity_gaps(self) -> Float[Tensor, " layer"]:
        total = self.resid[:-1] + self.attn_out
        if self.mlp_out is not None:
            total = total + self.mlp_out
        gap = (total - self.resid[1:]).norm(dim=-1) / self.resid[1:].norm(dim=-1)
        return gap.amax(-1)

    def _check_identity(self, tolerance: float) -> None:
        worst = self._identity_gaps()
        if (worst <= tolerance).all():
            return
        layer = int((worst > tolerance).nonzero()[0])
        writes = "hook_attn_out" if self.mlp_out is None else "hook_attn_out and hook_mlp_out"
        raise ResidualIdentityError(
            f"block {layer}: resid_pre plus {writes} misses {block_hook(layer, 'hook_resid_post')} by "
            f"{worst[layer]:.2e} of its norm (allowed: {tolerance:.0e}), so the hooks do not hold what the sublayers "
            "add to the stream and a split by sublayer would be wrong. Hooks that edit the stream between the "
            "sublayers, or an architecture that rescales or reorders its writes, do this"
        )

    def _check_resid_mid(self, hooked: Float[Tensor, "layer pos d_model"], tolerance: float) -> None:
        gap = ((self.resid_mid - hooked).norm(dim=-1) / hooked.norm(dim=-1)).amax(-1)
        if (gap <= tolerance).all():
            return
        layer = int((gap > tolerance).nonzero()[0])
        raise ResidualIdentityError(
            f"block {layer}: resid_pre plus hook_attn_out misses {block_hook(layer, 'hook_resid_mid')} by "
            f"{gap[layer]:.2e} of its norm (allowed: {tolerance:.0e}), so the MLP does not read the stream after "
            "attention, and its Jacobian would be that of another input"
        )


@dataclass(frozen=True, repr=False, eq=False)
class Trace(Stream):
    """One hooked forward pass of a model.

    Attributes:
        model: the model, as it was given.
        tokens: token ids, ``[pos]``.
        str_tokens: the tokens as text.
        hooked: whether hooks of the user's were attached during the pass.
    """

    model: Any
    tokens: Int[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    hooked: bool
    _calls: list[BlockCall] = field(repr=False)
    _points: Mapping[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        """One line."""
        return (
            f"Trace({self.model_name}: {self.n_layers} {self.topology} blocks, d_model {self.d_model}, "
            f"{self.n_tokens} tokens)"
        )

    @classmethod
    def from_cache(cls, model: Any, cache: Any, tokens: Any) -> Trace:
        """A trace from a ``run_with_cache`` that you already have.

        The blocks are run once more to learn how the model calls them, and the result must match the cache.

        Args:
            model: the model that made the cache.
            cache: an ``ActivationCache`` or a dictionary of hook names to activations, with or without batch axis.
            tokens: what the cache was made from: a string, token ids ``[pos]`` or ``[1, pos]``.

        Raises:
            MissingHookError: a hook point is not in the cache; the message says how to cache it.
            ArgumentError: a batch larger than one.
            NonFiniteActivationError: NaN or infinite activations; the message names the first layer.
            ResidualIdentityError: the sublayers' writes do not add up to the stream.
            StaleTraceError: the model, run on the tokens, does not give the cached stream.
        """
        require_supported(model)
        given = Stream.from_activations(_plain(cache), len(model.blocks), topology_of_model(model))
        own = trace(model, tokens)
        if own.resid.shape != given.resid.shape:
            raise ArgumentError("tokens", f"{own.n_tokens} tokens", f"the {given.n_tokens} tokens of the cache")
        gap = (own.resid - given.resid).norm() / own.resid.norm()
        if not gap <= IDENTITY_TOLERANCE[torch.float16 if _is_half(cache) else own.resid.dtype]:
            raise StaleTraceError(
                f"the model gives another residual stream for these tokens than the cache holds ({gap:.1e} off): the "
                "cache comes from other weights, other tokens (a BOS token?) or from hooks that are not attached now"
            )
        return own

    @property
    def model_name(self) -> str:
        """The model's own name."""
        return str(getattr(self.model.cfg, "model_name", type(self.model).__name__))

    def provenance(
        self, *, settings: Mapping[str, Any], seconds: float, engine: Mapping[str, str] | None = None
    ) -> Provenance:
        """The provenance of a measurement on this trace."""
        return Provenance(
            model_name=self.model_name,
            weight_processing=self.weight_processing,
            tokens=tuple(self.tokens.tolist()),
            str_tokens=self.str_tokens,
            settings=settings,
            engine=engine or {},
            seconds=seconds,
        )

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
            "dtype": str(next(self.model.blocks.parameters()).dtype).removeprefix("torch."),
        }

    @property
    def has_user_hooks(self) -> bool:
        """Whether hooks of the user's are attached now."""
        return has_user_hooks(self._points)

    def point(self, layer: int, name: str) -> Any | None:
        """The hook point ``blocks.{layer}.{name}``, None where the model has none."""
        return self._points.get(block_hook(layer, name))

    def run_block(
        self,
        layer: int,
        resid_pre: Float[Tensor, "1 pos d_model"],
        hooks: Mapping[str, Hook],
    ) -> Float[Tensor, "1 pos d_model"]:
        """Run one block again, with hooks of ours (by short name) beside those of the user.

        Half-precision weights are lifted to float32 while their part of the block runs.
        """
        block = self.model.blocks[layer]
        with lifted_parts(self.model, block), attached(self._named(layer, hooks)):
            return self._calls[layer].run(block, resid_pre)

    def block_input(self, layer: int) -> Float[Tensor, "1 pos d_model"]:
        """x^l on the device of its block, with a batch axis."""
        return self.resid[layer].to(next(self.model.blocks[layer].parameters()).device)[None]

    def mlp_input(self, layer: int) -> Float[Tensor, "1 pos d_model"]:
        """What the MLP reads: x_mid in a sequential block, x^l in a parallel one; placed as ``block_input``."""
        stream = self.resid_mid if self.topology == "sequential" else self.resid
        return stream[layer].to(next(self.model.blocks[layer].parameters()).device)[None]

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

        handle = self.model.blocks[layer].attn.register_forward_hook(leave)
        try:
            with contextlib.suppress(Done):
                self.run_block(layer, resid_pre, {**hooks, "hook_attn_out": write})
        finally:
            handle.remove()
        return written[0]

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

    def run_mlp(
        self, layer: int, stream: Float[Tensor, "1 pos d_model"], hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "1 pos d_model"]:
        """Run the MLP sublayer of one block, its norms included, on any rows of what it reads."""
        block = self.model.blocks[layer]
        before = getattr(block, "ln2", None)
        if before is None and self.topology == "parallel":
            before = getattr(block, "ln1", None)  # one norm feeds both sublayers
        after = getattr(block, "ln2_post", None)
        with lifted_parts(self.model, block), attached(self._named(layer, hooks)):
            out = block.mlp(stream if before is None else before(stream))
            return out if after is None else after(out)

    def _named(self, layer: int, hooks: Mapping[str, Hook]) -> list[tuple[Any, Hook]]:
        return [(self._points[block_hook(layer, name)], hook) for name, hook in hooks.items()]

    def check_current(
        self, sublayer: str, layer: int, now: Float[Tensor, "pos d_model"], rows: Sequence[int] | None = None
    ) -> None:
        """Check that a sublayer (or the block) run again gives what it gave when the trace was taken.

        Args:
            sublayer: ``"block"``, ``"attn"`` or ``"mlp"``.
            layer: block index.
            now: what it gives now, at all positions or at ``rows``.
            rows: those positions, or None for all.

        Raises:
            StaleTraceError: it gives something else.
        """
        wrote = {"block": self.resid[1:], "attn": self.attn_out, "mlp": self.mlp_out}[sublayer]
        then = wrote[layer] if rows is None else wrote[layer, list(rows)]
        gap = (now.detach().to(then) - then).norm() / then.norm()
        if not gap <= IDENTITY_TOLERANCE[then.dtype]:
            raise StaleTraceError(
                f"{sublayer} of layer {layer} gives another output now than when the trace was taken ({gap:.1e} off): "
                "the weights or the attached hooks have changed. Take a new trace; analyse a hooked model inside its "
                "`with model.hooks(...)`"
            )


def trace(model: Any, prompt: Any, *, prepend_bos: bool | None = None) -> Trace:
    """Run a model once on a prompt and keep its residual stream.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge`` of a decoder, in eval mode. It is left as it was.
        prompt: a string, token ids ``[pos]``, or a batch of one ``[1, pos]``.
        prepend_bos: whether a string gets a BOS token in front; the default is the model's own
            (``cfg.default_prepend_bos``), as everywhere in TransformerLens.

    Raises:
        UnsupportedModelError: an encoder, a state-space model, quantised weights, or training mode.
        ArgumentError: an empty prompt, a batch larger than one, or token ids out of range.
        NonFiniteActivationError: NaN or infinite activations; the message names the first layer.
        ResidualIdentityError: the sublayers' writes do not add up to the stream.

    Example:
        >>> trace = tlc.trace(model, "When Mary and John went to the store")  # doctest: +SKIP
    """
    require_supported(model)
    tokens = _to_tokens(model, prompt, prepend_bos)
    points, n_layers = model.hook_dict, len(model.blocks)
    topology = topology_of_model(model)
    names = [block_hook(layer, "hook_resid_pre") for layer in range(n_layers)]
    names += [block_hook(layer, "hook_attn_out") for layer in range(n_layers)]
    names += [block_hook(n_layers - 1, "hook_resid_post")]
    if topology != "attn_only":
        names += [block_hook(layer, "hook_mlp_out") for layer in range(n_layers)]
    if topology == "sequential":
        names += [block_hook(layer, "hook_resid_mid") for layer in range(n_layers)]
    first_pattern = block_hook(0, PATTERN)
    record = record_forward(model, tokens, [*names, *([first_pattern] if first_pattern in points else [])])
    pattern = record.activations.pop(first_pattern, None)
    declared = getattr(model.cfg, "attention_dir", "causal")
    if declared == "bidirectional" or (pattern is not None and (pattern.triu(1) != 0).any()):
        raise UnsupportedModelError(
            "attention in block 0 looks ahead, so this is an encoder or another bidirectional model; "
            "only causal decoders are supported"
        )
    stream = Stream.from_activations(record.activations, n_layers, topology)
    return Trace(
        resid=stream.resid,
        attn_out=stream.attn_out,
        mlp_out=stream.mlp_out,
        topology=stream.topology,
        model=model,
        tokens=tokens[0].cpu(),
        str_tokens=_to_str_tokens(model, tokens[0]),
        hooked=has_user_hooks(points),
        _calls=record.calls,
        _points=points,
    )


def stream_of(source: Any) -> Stream:
    """The stream of a trace, or of an ``ActivationCache`` alone.

    Raises:
        MissingHookError, ArgumentError, NonFiniteActivationError, ResidualIdentityError: see ``Trace.from_cache``.
    """
    if isinstance(source, Stream):
        return source
    activations = _plain(source)
    layers = {int(name.split(".")[1]) for name in activations if name.startswith("blocks.")}
    if not layers:
        raise MissingHookError(
            f"the cache holds no hook point of any block. {_how_to_cache('blocks.0.hook_resid_pre')}"
        )
    model = getattr(source, "model", None)
    topology = topology_of(activations) if model is None else topology_of_model(model)
    return Stream.from_activations(activations, max(layers) + 1, topology)


def _plain(cache: Any) -> Mapping[str, Tensor]:
    """The dictionary inside an ``ActivationCache``, whose own look-up accepts shorthands and rejects ``in``."""
    return getattr(cache, "cache_dict", cache)


def _is_half(cache: Any) -> bool:
    return _fetch(_plain(cache), block_hook(0, "hook_resid_pre"), batched=None).dtype in (
        torch.float16,
        torch.bfloat16,
    )


def _fetch(activations: Mapping[str, Tensor], name: str, batched: bool | None = True) -> Float[Tensor, "pos d_model"]:
    """One recorded activation without its batch axis."""
    if name not in activations:
        raise MissingHookError(f"the cache lacks {name!r}. {_how_to_cache(name)}")
    tensor = activations[name]
    if tensor.ndim == 3:
        if tensor.shape[0] != 1:
            raise ArgumentError("batch", tensor.shape[0], "a batch of one: trace each prompt by itself")
        tensor = tensor[0]
    if tensor.ndim != 2:
        raise ArgumentError(name, tuple(tensor.shape), "a shape of [pos, d_model] or [1, pos, d_model]")
    return tensor


def _how_to_cache(name: str) -> str:
    return (
        f"Cache it with model.run_with_cache(tokens), or name it in names_filter: {name!r}; a measurement needs "
        "hook_resid_pre, hook_attn_out and hook_mlp_out of every block and hook_resid_post of the last one"
    )


def _to_tokens(model: Any, prompt: Any, prepend_bos: bool | None) -> Int[Tensor, "1 pos"]:
    """Token ids of a prompt, on the model's first device."""
    if isinstance(prompt, str):
        if not prompt:
            raise ArgumentError("prompt", prompt, "at least one token; it is empty")
        if getattr(model, "tokenizer", None) is None:
            raise ArgumentError("prompt", prompt, "token ids: this model has no tokenizer")
        tokens = model.to_tokens(prompt) if prepend_bos is None else model.to_tokens(prompt, prepend_bos=prepend_bos)
    else:
        try:
            tokens = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError("prompt", prompt, "a string or token ids") from error
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ArgumentError("prompt", prompt, "a string or integer token ids")
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise ArgumentError("prompt", f"token ids of shape {tuple(tokens.shape)}", "one prompt: [pos] or [1, pos]")
    if tokens.shape[1] == 0:
        raise ArgumentError("prompt", prompt, "at least one token; it is empty")
    vocabulary = getattr(model.cfg, "d_vocab", None)
    if vocabulary and vocabulary > 0 and not ((tokens >= 0) & (tokens < vocabulary)).all():
        raise ArgumentError("prompt", prompt, f"token ids from 0 to {vocabulary - 1}")
    context = getattr(model.cfg, "n_ctx", None)
    if context and tokens.shape[1] > context:
        raise ArgumentError("prompt", f"{tokens.shape[1]} tokens", f"at most {context}, the model's context length")
    return tokens.long().to(next(model.parameters()).device)


def _to_str_tokens(model: Any, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Tokens as text; ids as text where there is no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return tuple(str(token) for token in tokens.tolist())
    return tuple(model.to_str_tokens(tokens))
