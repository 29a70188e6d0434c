"""PyTorch's own state, in which the library computes every number.

A user may have set autocast, ``torch.inference_mode``, a default dtype or device, or a lower precision for float32
products. ``torch.set_float32_matmul_precision("high")`` allows TF32 (10-bit mantissa) on Ampere and later GPUs.
``"medium"`` allows bfloat16, also on CPUs. These are too coarse for singular vectors and for a certificate of 1e-4;
inference mode has no derivatives.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_AUTOCAST = tuple(each for each in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(each))


class _ProcessSetting:
    """A setting of the whole process, held at one value while any thread needs it.

    The first thread to enter keeps what was set, the last one to leave puts it back. A value that somebody else sets
    meanwhile is kept.
    """

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], held: Any) -> None:
        self._read, self._write, self._held = read, write, held
        self._lock, self._count, self._before = threading.Lock(), 0, held

    def enter(self) -> None:
        with self._lock:
            now = self._read()
            if self._count == 0 or now != self._held:
                self._before = now
            if now != self._held:
                self._write(self._held)
            self._count += 1

    def leave(self) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._before != self._held and self._read() == self._held:
                self._write(self._before)


def _matmul_precision() -> Any:
    """Return the setting, or that of each backend: the older getter refuses what the newer ``fp32_precision`` set."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return tuple(backend.fp32_precision for backend in _matmul_backends())


def _set_matmul_precision(precision: Any) -> None:
    torch.set_float32_matmul_precision(precision if isinstance(precision, str) else "highest")
    if not isinstance(precision, str):
        for backend, one in zip(_matmul_backends(), precision, strict=True):
            backend.fp32_precision = one


def _matmul_backends() -> tuple[Any, ...]:
    """Return the backends whose precision ``set_float32_matmul_precision`` sets."""
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


_PROCESS = (
    _ProcessSetting(_matmul_precision, _set_matmul_precision, "highest"),
    _ProcessSetting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
)


class _Thread(threading.local):
    inside = False


_thread = _Thread()


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute in PyTorch's own state for a while, then put back what was set.

    Within: no autocast, no inference mode (gradients stay off, as under ``torch.no_grad``), float32 products in full
    float32, float32 as default dtype and the CPU as default device. Whether gradients are on is the caller's choice
    otherwise. Also for functions, as ``@full_precision()``. Entering it again within costs next to nothing.

    The precision of products and the default dtype belong to the whole process: other threads see them meanwhile.
    """
    if _thread.inside:
        yield
        return
    with ExitStack() as stack:
        _thread.inside = True
        stack.callback(setattr, _thread, "inside", False)
        for setting in _PROCESS:
            setting.enter()
            stack.callback(setting.leave)
        for device_type in _AUTOCAST:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))  # switches gradients on
            stack.enter_context(torch.no_grad())
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def in_full_precision(function: FunctionT) -> FunctionT:
    """Run a function within ``full_precision``; within another such call it costs nothing."""

    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        if _thread.inside:
            return function(*args, **kwargs)
        with full_precision():
            return function(*args, **kwargs)

    return cast(FunctionT, within)
