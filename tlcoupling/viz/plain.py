"""What a page or a figure says: numbers (NaN and infinity as None, large arrays packed), tokens, and the metric."""

from __future__ import annotations

import base64
import math
from typing import Any

import torch
from torch import Tensor

from tlcoupling.coupling.result import Coupling

_SHOWN = {"\n": "↵", "\r": "␍", "\t": "⇥", "\xa0": "⍽"}
_JOINERS = "\u200c\u200d"  # invisible, but they shape the letters and emoji around them
_LARGEST, _UNDEFINED = 32767, -32768  # of 16 bits


def rounded(value: Any, digits: int = 4) -> Any:
    """Numbers rounded, with None for NaN and infinity (JSON has neither), in tensors, lists and dictionaries."""
    if isinstance(value, Tensor):
        return rounded(value.tolist(), digits)
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, float):
        return round(value, digits) + 0.0 if math.isfinite(value) else None  # + 0.0: no "-0.0"
    return value


def packed(array: Tensor) -> dict[str, Any]:
    """An array in 16 bits a number: ``scale`` times a signed integer, base64 of little-endian ones.

    The error is at most half of ``scale``, which is 1/32767 of the largest magnitude. What is not finite is the integer
    -32768.
    """
    array = array.detach().double()
    finite = array.isfinite()
    scale = float(array[finite].abs().max()) / _LARGEST if finite.any() else 0.0
    scale = scale or 1.0  # of zeros
    steps = torch.where(finite, array / scale, float(_UNDEFINED)).round().to(torch.int16)
    data = base64.b64encode(steps.contiguous().numpy().astype("<i2").tobytes()).decode()
    return {"shape": list(array.shape), "scale": scale, "data": data}


def visible(text: str) -> str:
    """A token with line breaks and invisible characters as signs, so that no token looks empty or reorders others."""

    def shown(char: str) -> str:
        if char.isprintable() or (char in _JOINERS and len(text) > 1):
            return char
        return _SHOWN.get(char) or f"\\u{{{ord(char):x}}}"

    return "".join(map(shown, text)) or "∅"


def label(text: str, longest: int = 16) -> str:
    """A token short enough for an axis."""
    text = visible(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def formula(result: Coupling) -> str:
    """The coupling as it was measured."""
    projected = "U₂ᵀ J₁ V₂" if result.bases == "uv" else "V₂ᵀ J₁ U₂"
    size = "‖S₁‖" if result.normalizer == "frobenius" else "tr S₁"
    return f"c = 1 − ‖ {f'|{projected}|' if result.absolute else projected} − S₁ ‖ / {size}"
