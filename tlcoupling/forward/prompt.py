"""Prompts: text, token ids or a tokenizer's output to the token ids that a model takes, and back to text.

What is measured is what the caller meant, or an error. Text is never truncated. Pads are never measured as text: a
padded row gives the token ids of its prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.forward.offload import device_of

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"
# What else a tokenizer's output may hold: it describes the text and changes nothing about it.
_DESCRIBES = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping"}
# How HuggingFace configurations name the token ids that images, sound and video are put in place of.
_PLACEHOLDERS = [f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index")]
_BATCH = "one prompt: tlc.analyze_many measures several"


def named_prompts(
    prompts: Mapping[str, Any] | Sequence[Any] | Tensor,
    attention_mask: Mapping[str, Any] | Sequence[Any] | Tensor | None = None,
) -> dict[str, Any]:
    """Return several prompts by their names, or by their numbers if they have none.

    Args:
        prompts: a list, a mapping of names to prompts, token ids ``[prompt, pos]``, or what a tokenizer returns for
            several texts.
        attention_mask: a mask for each prompt, in the same form.

    Raises:
        ArgumentError: no prompts, a single string, or another number of masks.
    """
    prompts, attention_mask = _unpack("prompts", prompts, attention_mask)
    named = _by_name("prompts", prompts)
    if attention_mask is None:
        return named
    masks = _by_name(_MASK, attention_mask)
    if masks.keys() != named.keys():
        raise ArgumentError(_MASK, f"masks of {', '.join(masks)}", f"one mask for each prompt: {', '.join(named)}")
    return {name: {_IDS: prompt, _MASK: masks[name]} for name, prompt in named.items()}


def _by_name(argument: str, values: Any) -> dict[str, Any]:
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) == 0:
        raise ArgumentError(argument, values, "one or more: a list, or a mapping of the prompts' names")
    return dict(values) if isinstance(values, Mapping) else {str(index): value for index, value in enumerate(values)}


def _unpack(argument: str, prompt: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Return token ids and mask of what a tokenizer returns; return anything else unchanged.

    Raises:
        ArgumentError: it holds more than text, such as pixels, or a second mask.
    """
    if not isinstance(prompt, Mapping) or _IDS not in prompt:
        return prompt, attention_mask
    if others := sorted(set(prompt) - {_IDS, _MASK} - _DESCRIBES):
        allowed = f"text alone ({_IDS} and {_MASK}): images, sound and own positions are not passed to the model"
        raise ArgumentError(argument, f"a tokenizer's output with {', '.join(others)}", allowed)
    if attention_mask is not None and _MASK in prompt:
        raise ArgumentError(_MASK, attention_mask, f"None: {argument} holds one")
    return prompt[_IDS], prompt.get(_MASK, attention_mask)


def signal_of(model: Any) -> str | None:
    """Return the name of what a model takes in the place of token ids; None if it takes token ids."""
    if getattr(model.cfg, "is_visual_model", False):
        return "pixel_values"
    return "input_values" if getattr(model.cfg, "is_audio_model", False) else None


def to_tokens(
    model: Any, prompt: Any, prepend_bos: bool | None, attention_mask: Any | None = None
) -> Int[Tensor, "1 pos"]:
    """Return the token ids of a prompt; see ``text_tokens``.

    Raises:
        UnsupportedModelError: the model takes pixels or a waveform, and this measurement needs token ids.
    """
    if (signal := signal_of(model)) is not None:
        raise UnsupportedModelError(
            f"this model takes {signal}, and this measurement takes token ids alone. tlc.trace, tlc.analyze and "
            f"tlc.analyze_many take {signal}"
        )
    return text_tokens(model, prompt, prepend_bos, attention_mask)[0]


def text_tokens(
    model: Any, prompt: Any, prepend_bos: bool | None, attention_mask: Any | None = None
) -> tuple[Int[Tensor, "1 pos"], Int[Tensor, "1 pos"] | None]:
    """Return the token ids of a prompt, without pads, on the model's first device, and their types.

    The types tell the two texts of a pair apart. They are None where all tokens are of the first, or have none.

    Args:
        model: the model.
        prompt: a string, token ids ``[pos]`` or ``[1, pos]``, or what a tokenizer returns for one text.
        prepend_bos: whether a string gets a BOS token; None for the model's default.
        attention_mask: 1 for each token of the prompt and 0 for each pad, in the shape of the token ids.

    Raises:
        ArgumentError: an empty prompt; a batch; token ids out of range, or more than the context holds; a mask with
            zeros between ones; token ids that may be pads or text; placeholders of images.

    Warns:
        UserWarning: pads were removed without a mask, or the prompt begins with the BOS token twice.
    """
    types = prompt.get(_TYPES) if isinstance(prompt, Mapping) else None
    prompt, attention_mask = _unpack("prompt", prompt, attention_mask)
    if isinstance(prompt, str):
        tokens = _encode(model, prompt, prepend_bos)[None]
        if attention_mask is not None:
            raise ArgumentError(_MASK, attention_mask, "None: a string has no pads")
    else:
        tokens = _one_row(prompt)
        real = _pads_excluded(model, tokens[0]) if attention_mask is None else _unmasked(attention_mask, tokens)
        tokens = tokens[:, real]
        types = None if types is None else _one_row(types)[:, real]
    if tokens.shape[1] == 0:
        raise ArgumentError("prompt", prompt, "at least one token; it is empty")
    vocabulary = getattr(model.cfg, "d_vocab", None)
    if vocabulary and vocabulary > 0 and not ((tokens >= 0) & (tokens < vocabulary)).all():
        raise ArgumentError("prompt", prompt, f"token ids from 0 to {vocabulary - 1}")
    context = getattr(model.cfg, "n_ctx", None)
    if context and tokens.shape[1] > context:
        raise ArgumentError("prompt", f"{tokens.shape[1]} tokens", f"at most {context}, the model's context length")
    _require_text(model, tokens)
    _warn_of_two_bos(model, tokens[0])
    # a copy: ids made under torch.inference_mode cannot be looked up where gradients are on
    device = device_of(model)
    if types is not None and types.any() and hasattr(model, "token_type_embed"):
        return tokens.long().to(device, copy=True), types.long().to(device, copy=True)
    return tokens.long().to(device, copy=True), None


def _encode(model: Any, text: str, prepend_bos: bool | None) -> Int[Tensor, " pos"]:
    """Return the token ids of a text of any length: TransformerLens would cut it off at the context's."""
    if not text:
        raise ArgumentError("prompt", text, "at least one token; it is empty")
    if getattr(model, "tokenizer", None) is None:
        raise ArgumentError("prompt", text, "token ids: this model has no tokenizer")
    bos = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    return model.to_tokens(text, truncate=False, **bos)[0]


def _one_row(prompt: Any) -> Int[Tensor, "1 pos"]:
    """Return token ids as a batch of one.

    Raises:
        ArgumentError: something else, or a batch of several.
    """
    if isinstance(prompt, Mapping):
        raise ArgumentError(
            "prompt", f"a mapping with {', '.join(map(str, prompt))}", f"a mapping with {_IDS}, or text"
        )
    if isinstance(prompt, Sequence) and any(isinstance(item, str) for item in prompt):
        raise ArgumentError("prompt", prompt, f"a string or token ids of {_BATCH}")
    try:
        tokens = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError("prompt", prompt, f"a string or token ids of {_BATCH}") from error
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ArgumentError("prompt", prompt, "a string or integer token ids")
    if tokens.ndim == 1:
        tokens = tokens[None]
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise ArgumentError("prompt", f"token ids of shape {tuple(tokens.shape)}", f"[pos] or [1, pos], {_BATCH}")
    return tokens


def _unmasked(attention_mask: Any, tokens: Int[Tensor, "1 pos"]) -> slice:
    """Return where the tokens lie that a mask keeps.

    Raises:
        ArgumentError: another shape, other numbers than 0 and 1, no one, or zeros between ones.
    """
    try:
        mask = torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(_MASK, attention_mask, "a tensor or list of zeros and ones") from error
    if tuple(mask.shape) not in (tuple(tokens.shape), tuple(tokens.shape[1:])):
        raise ArgumentError(_MASK, f"a mask of shape {tuple(mask.shape)}", f"{tuple(tokens.shape)}, as the token ids")
    mask = mask.reshape(-1)
    if not ((mask == 0) | (mask == 1)).all():
        raise ArgumentError(_MASK, attention_mask, "zeros and ones")
    kept = mask.nonzero().flatten().tolist()
    if not kept:
        raise ArgumentError(_MASK, attention_mask, "at least one token that is not masked")
    if kept[-1] - kept[0] + 1 != len(kept):
        raise ArgumentError(_MASK, attention_mask, "zeros at the ends alone: tokens within a prompt cannot be masked")
    return slice(kept[0], kept[-1] + 1)


def _pads_excluded(model: Any, tokens: Int[Tensor, " pos"]) -> slice:
    """Return where the tokens of a prompt without a mask lie: all of them, but for pads at the ends.

    A token id that only pads is removed. Where it also stands for the end or the start of a text (GPT-2: all three are
    one), nobody can tell what a row of them means. A single one at the start is then the BOS token.

    Raises:
        ArgumentError: pads within the prompt, nothing but pads, or token ids that may be pads or text.

    Warns:
        UserWarning: pads were removed.
    """
    tokenizer = getattr(model, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    text = [] if pad is None else (tokens != pad).nonzero().flatten().tolist()
    roles = [name for name in ("bos", "eos", "unk") if pad == getattr(tokenizer, f"{name}_token_id", None)]
    if pad is not None and pad == getattr(model, "start_token", None):  # T5's decoder begins with a pad
        roles.insert(0, "bos")
    if pad is None or len(tokens) == 0 or ("bos" in roles and len(tokens) == 1):
        return slice(None)
    shown = f"{pad} ({getattr(tokenizer, 'pad_token', None)!r})"
    how = f"pass the text itself, token ids without pads, or {_MASK}= (1 for each token of the prompt, 0 for each pad)"
    if not text:
        raise ArgumentError("prompt", f"{len(tokens)} times the pad token {shown}", f"at least one token: {how}")
    start, stop = text[0], text[-1] + 1
    if "bos" in roles and start == 1:
        start = 0
    if roles and (start > 0 or stop < len(tokens)):
        where = "start" if start else "end"
        allowed = f"ids whose pads cannot be text: this pad token is the {roles[0].upper()} token too; {how}"
        raise ArgumentError("prompt", f"token ids with {shown} at the {where}", allowed)
    if not roles and len(text) < stop - start:
        raise ArgumentError("prompt", f"token ids with the pad token {shown} between tokens of text", how)
    if start > 0 or stop < len(tokens):
        warnings.warn(
            f"pads (token {shown}) were removed from a prompt: positions count from the first token of its text. To "
            f"say which tokens are pads, pass {_MASK}=",
            stacklevel=6,
        )
    return slice(start, stop)


def _require_text(model: Any, tokens: Int[Tensor, "1 pos"]) -> None:
    """Refuse placeholders: a model that is not given the image reads them as words.

    Raises:
        ArgumentError: the prompt holds a placeholder.
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    for name in _PLACEHOLDERS:
        token = getattr(config, name, None)
        if isinstance(token, int) and bool((tokens == token).any()):
            kind = name.partition("_")[0]
            allowed = f"text alone: no {kind} is passed to the model, so it would read the placeholder as a word"
            raise ArgumentError("prompt", f"token ids with {token}, the placeholder of {kind} input", allowed)


def _warn_of_two_bos(model: Any, tokens: Int[Tensor, " pos"]) -> None:
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and tokens[:2].tolist() == [bos, bos]:
        warnings.warn(
            f"the prompt begins with the BOS token {getattr(tokenizer, 'bos_token', None)!r} twice. A text that holds "
            "one already, such as a chat template's, gets another: pass prepend_bos=False with the text, or token ids "
            "with one BOS token",
            stacklevel=5,
        )


def to_str_tokens(model: Any, tokens: Int[Tensor, " pos"]) -> tuple[str, ...]:
    """Return tokens as text; ids as text where there is no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return tuple(str(token) for token in tokens.tolist())
    # one token at a time: transformers 5 joins a list of ids, as transformer-lens 2 passes them, into one text
    ids = [[token] for token in tokens.tolist()]
    return tuple(model.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False))


def to_text(model: Any, tokens: Int[Tensor, " pos"]) -> str:
    """Return a prompt as text, decoded whole: several tokens may share one character. Empty without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return "" if tokenizer is None else tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
