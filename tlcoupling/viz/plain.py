"""Encode numbers and tokens for pages and figures, and describe the metric.

NaN and infinity become None, and large arrays are packed in bytes.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor

from tlcoupling.coupling.result import Coupling
from tlcoupling.text import visible

_LARGEST, _UNDEFINED = 32767, -32768  # of 16 bits


def plain(value: Any) -> Any:
    """Return tensors, lists and dictionaries with None for NaN and infinity, since JSON has neither.

    Nothing is rounded: the page rounds what it shows, once.
    """
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def roots(array: Tensor) -> dict[str, Any]:
    """Pack numbers from 0 to 1 as their square roots in 8 bits: small ones keep more digits than with even steps."""
    steps = (array.detach().double().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return {"shape": list(array.shape), "data": steps.contiguous().numpy().tobytes()}


def packed(array: Tensor, budget: int | None = None) -> dict[str, Any]:
    """Pack an array as 16-bit integers: a number is ``scale`` times its integer.

    The error is at most half of ``scale``. ``data`` has the low bytes of all integers, then their high bytes, which
    compresses better. The integer -32768 stands for a number that is not finite.

    Args:
        array: the numbers.
        budget: bytes that the compressed data may take. ``scale`` is 1/32767 of the largest magnitude, doubled until
            they are enough.
    """
    array = array.detach().double()
    finite = array.isfinite()
    largest = float(array[finite].abs().max()) if finite.any() else 0.0
    scale = largest / _LARGEST or 1.0  # all zeros
    while True:
        steps = torch.where(finite, array / scale, float(_UNDEFINED)).round().to(torch.int16).contiguous()
        data = steps.numpy().astype("<i2").reshape(-1, 1).view("u1").T.tobytes()
        if budget is None or scale > largest or len(zlib.compress(data)) <= budget:
            return {"shape": list(array.shape), "scale": scale, "data": data}
        scale *= 2


def label(text: str, longest: int = 16) -> str:
    """Shorten a token for an axis."""
    text = visible(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def formula(result: Coupling) -> str:
    """Return the formula of the coupling with the options that were used."""
    projected = "U₂ᵀ J₁ V₂" if result.bases == "uv" else "V₂ᵀ J₁ U₂"
    size = "‖S₁‖" if result.normalizer == "frobenius" else "tr S₁"
    return f"c = 1 − ‖ {f'|{projected}|' if result.absolute else projected} − S₁ ‖ / {size}"
