"""Stacks: the encoder or the decoder of an encoder-decoder, seen as a model with one list of blocks.

The other stack becomes part of the input. So whatever takes a model takes a ``Stack``: its blocks are ``blocks``, and
their hook points ``blocks.{layer}.hook_...``. A decoder's prompt is what the decoder reads; the encoder's is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.forward.prompt import to_tokens

StackName = Literal["encoder", "decoder"]


class Stack:
    """One stack of an encoder-decoder; everything that is not said here is the whole model's.

    Attributes:
        model: the encoder-decoder.
        name: ``"encoder"`` or ``"decoder"``.
        blocks: its blocks.
        other: token ids that the other stack reads, ``[1, pos]``.
        start_token: the id that a decoder begins with, which may be that of the pads; None of an encoder.
    """

    def __init__(self, model: Any, name: StackName, other: Int[Tensor, "1 pos"]) -> None:
        """Take a stack; nothing is run."""
        self.model, self.other = model, other
        self.name: StackName = name
        self.blocks: nn.ModuleList = getattr(model, f"{name}_blocks")
        self.start_token = _start_token(model) if name == "decoder" else None

    def __getattr__(self, name: str) -> Any:
        """What the whole model says; copying asks for special methods before there is one."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model, name)

    @property
    def W_E(self) -> Tensor:
        """The embedding of this stack, which the other may share."""
        embed = getattr(self.model, f"{self.name}_embed", None) or self.model.embed
        return embed.weight

    @property
    def hook_dict(self) -> dict[str, Any]:
        """The hook points of the whole model by name, those of this stack as ``blocks.{layer}...``."""
        return {self._ours(name): point for name, point in self.model.hook_dict.items()}

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Go through the parts of the model: ``blocks``, each block of the other stack, and the rest."""
        for name, part in self.model.named_children():
            if part is self.blocks:
                yield "blocks", part
            elif name.endswith("_blocks"):
                yield from ((f"{name}.{layer}", block) for layer, block in enumerate(part.children()))
            else:
                yield name, part

    def hooks(self, fwd_hooks: Iterable[tuple[Any, Callable[..., Any]]] = (), **options: Any) -> Any:
        """Attach hooks for a while, as the whole model's method does."""
        return self.model.hooks(fwd_hooks=[(self._theirs(name), hook) for name, hook in fwd_hooks], **options)

    def run_with_hooks(
        self, tokens: Any, *, return_type: str | None = "logits", fwd_hooks: Iterable[Any] = (), **options: Any
    ) -> Any:
        """Run the model with hooks."""
        with self.hooks(fwd_hooks):
            return self(tokens, return_type=return_type, **options)

    def run_with_cache(self, *args: Any, **options: Any) -> Any:
        """Refuse: a cache of the whole model names its hook points otherwise."""
        raise UnsupportedModelError("a stack of an encoder-decoder has no run_with_cache: tlc.trace keeps its stream")

    def __call__(self, tokens: Int[Tensor, "1 pos"], *, return_type: str | None = "logits", **options: Any) -> Any:
        """Run the whole model, this stack on ``tokens`` and the other one on ``other``.

        Raises:
            UnsupportedModelError: logits of an encoder.
        """
        if self.name == "encoder" and return_type is not None:
            raise UnsupportedModelError("an encoder has no logits: trace the decoder")
        other = self.other.to(tokens.device)
        read, written = (tokens, other) if self.name == "encoder" else (other, tokens)
        return self.model(read, decoder_input=written, return_type=return_type, **options)

    def to_tokens(self, text: str, **options: Any) -> Int[Tensor, "1 pos"]:
        """Return the ids of a text: as the whole model's for an encoder, after the start token for a decoder."""
        if self.name == "encoder":
            return self.model.to_tokens(text, **options)
        ids = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([[self.start_token, *ids]])

    def settings(self) -> dict[str, Any]:
        """What a provenance says of the stack."""
        other = "decoder_input" if self.name == "encoder" else "encoder_input"
        return {"stack": self.name, other: self.other[0].tolist()}

    def _ours(self, name: str) -> str:
        prefix = f"{self.name}_blocks."
        return "blocks." + name.removeprefix(prefix) if name.startswith(prefix) else name

    def _theirs(self, name: str | Callable[[str], bool]) -> str | Callable[[str], bool]:
        if isinstance(name, str):
            return f"{self.name}_{name}" if name.startswith("blocks.") else name
        return lambda theirs: name(self._ours(theirs))


def stack_of(
    model: Any, stack: str | None, prompt: Any, decoder_input: Any, prepend_bos: bool | None, attention_mask: Any
) -> tuple[Any, Any, Any]:
    """Return a stack of an encoder-decoder, what it is run on, and the mask of that; else what was given.

    Raises:
        ArgumentError: ``stack`` or ``decoder_input`` of a model without two stacks; an unknown stack; a decoder without
            its input.
    """
    has_two = not isinstance(model, Stack) and hasattr(model, "encoder_blocks") and hasattr(model, "decoder_blocks")
    if stack is None and decoder_input is None:
        return model, prompt, attention_mask
    if not has_two:
        for name, value in (("stack", stack), ("decoder_input", decoder_input)):
            if value is not None:
                raise ArgumentError(name, value, "None: this model is not an encoder-decoder")
        return model, prompt, attention_mask
    if stack not in get_args(StackName):
        raise ArgumentError("stack", stack, "'encoder' or 'decoder': this model has both")
    nothing = torch.empty(1, 0, dtype=torch.long)
    if stack == "encoder":
        start = [_start_token(model)] if decoder_input is None else decoder_input
        decoder = Stack(model, "decoder", nothing)
        return Stack(model, "encoder", to_tokens(decoder, start, None)), prompt, attention_mask
    if decoder_input is None:
        raise ArgumentError("decoder_input", None, "what the decoder reads: text, or token ids with the start token")
    read = to_tokens(Stack(model, "encoder", nothing), prompt, prepend_bos, attention_mask)
    return Stack(model, "decoder", read), decoder_input, None


def _start_token(model: Any) -> int:
    """The id that a decoder begins with.

    Raises:
        UnsupportedModelError: the configuration names none.
    """
    config = model.original_model.config
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):  # T5 begins with a pad
        for part in (config, getattr(config, "text_config", None)):
            if isinstance(token := getattr(part, name, None), int):
                return token
    raise UnsupportedModelError("encoder-decoder: the configuration names no decoder_start_token_id")
