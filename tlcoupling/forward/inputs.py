"""Inputs: what a model is run on, token ids or the pixels or waveform of its processor, and labels of positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tlcoupling.errors import ArgumentError
from tlcoupling.forward.offload import device_of
from tlcoupling.forward.prompt import signal_of, text_tokens, to_str_tokens

# How processors name what stands in the place of token ids.
_SIGNALS = ("pixel_values", "input_values", "input_features")
_MASKS = ("attention_mask", "padding_mask")
# The names of positions before the patches of an image or a spectrogram, by their number.
_PREFIXES = {0: (), 1: ("[CLS]",), 2: ("[CLS]", "[DIST]")}
# Rows and columns of a picture, at most.
_PICTURE = 256


@dataclass(frozen=True)
class Inputs:
    """What a model is run on.

    Attributes:
        tensor: token ids ``[1, pos]``, or a batch of one image, spectrogram or waveform.
        options: further arguments of the forward pass.
        is_text: whether the tensor holds token ids.
    """

    tensor: Tensor
    options: Mapping[str, Tensor] = field(default_factory=dict)
    is_text: bool = True

    def tokens(self, n_positions: int) -> Int[Tensor, " pos"]:
        """Token ids of the positions; -1 where a position is no token."""
        return self.tensor[0].cpu() if self.is_text else torch.full((n_positions,), -1)

    def labels(self, model: Any, n_positions: int) -> tuple[str, ...]:
        """Text of the positions: tokens, ``[CLS]`` and ``patch row,column``, or ``frame i``."""
        if self.is_text:
            return to_str_tokens(model, self.tensor[0])
        config = model.original_model.config
        rows, columns = _grid(config, self.tensor)
        prefix = _PREFIXES.get(n_positions - rows * columns) if rows else None
        if prefix is None:
            return tuple(f"frame {index}" for index in range(n_positions))
        return (*prefix, *(f"patch {row},{column}" for row in range(rows) for column in range(columns)))


def read_inputs(model: Any, prompt: Any, prepend_bos: bool | None, attention_mask: Any | None = None) -> Inputs:
    """Return what a model is run on for a prompt.

    Args:
        model: the model.
        prompt: a string, token ids, or what the model's tokenizer or processor returns for one input.
        prepend_bos: as in ``to_tokens``.
        attention_mask: as in ``to_tokens``.

    Raises:
        ArgumentError: as in ``to_tokens``; something else than the model takes; a batch; masked frames.
    """
    wanted = signal_of(model)
    if wanted is None:
        tokens, types = text_tokens(model, prompt, prepend_bos, attention_mask)
        return Inputs(tokens, {} if types is None else {"token_type_ids": types})
    given = dict(prompt) if isinstance(prompt, Mapping) else {wanted: prompt}
    masks = [given.pop(name) for name in _MASKS if name in given] + [attention_mask]
    signal = given.pop(next((name for name in _SIGNALS if name in given), wanted), None)
    if given or not isinstance(signal, Tensor) or not signal.is_floating_point() or signal.ndim < 2:
        shown = f"a mapping with {', '.join(prompt)}" if isinstance(prompt, Mapping) else type(prompt).__name__
        raise ArgumentError("prompt", shown, f"{wanted}, a batch of one, as the model's processor returns it")
    if len(signal) != 1:
        raise ArgumentError("prompt", f"{len(signal)} inputs", "one input: tlc.analyze_many measures several")
    if not all(mask is None or bool(torch.as_tensor(mask).all()) for mask in masks):
        raise ArgumentError("attention_mask", "a mask with zeros", "an input without padding")
    return Inputs(signal.to(device_of(model), next(model.parameters()).dtype, copy=True), is_text=False)


def picture_of(model: Any, prompt: Any) -> UInt8[Tensor, "row column channel"] | None:
    """Return the image that the patches of a prompt cover, for people; None of text and sound.

    It is grey, or red, green and blue, each from its lowest to its highest value, with at most 256 rows and columns.

    Args:
        model: the model.
        prompt: a prompt that ``read_inputs`` takes.
    """
    if signal_of(model) != "pixel_values":
        return None
    config, image = model.original_model.config, read_inputs(model, prompt, None).tensor
    rows, columns = (side * getattr(config, "patch_size", 0) for side in _grid(config, image))
    if not rows or not columns:
        return None
    pixels = image[0, :, :rows, :columns].float().cpu()
    if len(pixels) not in (1, 3):
        pixels = pixels.mean(0, keepdim=True)
    pixels = adaptive_avg_pool2d(pixels, (min(rows, _PICTURE), min(columns, _PICTURE)))
    low, high = pixels.amin((1, 2), keepdim=True), pixels.amax((1, 2), keepdim=True)
    shares = (pixels - low) / (high - low).clamp_min(torch.finfo(pixels.dtype).tiny)
    return (255 * shares).round().to(torch.uint8).permute(1, 2, 0).contiguous()


def _grid(config: Any, signal: Tensor) -> tuple[int, int]:
    """Rows and columns of patches; zeros where the positions are no patches."""
    size = getattr(config, "patch_size", None)
    if not isinstance(size, int):
        return 0, 0
    if signal.ndim == 4:  # an image, [1, channel, height, width]
        return signal.shape[2] // size, signal.shape[3] // size
    if signal.ndim != 3 or not hasattr(config, "frequency_stride"):
        return 0, 0
    _, time, frequency = signal.shape  # of a spectrogram
    return (frequency - size) // config.frequency_stride + 1, (time - size) // config.time_stride + 1
