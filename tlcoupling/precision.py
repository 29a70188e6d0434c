"""Full precision for float32 matrix products.

``torch.set_float32_matmul_precision("high")`` allows TF32 (10-bit mantissa) on Ampere and later GPUs. ``"medium"``
allows bfloat16, also on CPUs. Both are too coarse for singular vectors, for a certificate of 1e-4 and for residuals
of 3e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Set float32 matrix products to ``"highest"`` precision, and restore the old setting on exit.

    Works as a decorator too: ``@full_precision()``. The setting is global to the process: other threads see it.
    """
    try:
        before = torch.get_float32_matmul_precision()
        backends = {}
    except RuntimeError:  # the user set each backend's newer fp32_precision, which the older getter refuses to read
        before = "highest"
        backends = {backend: backend.fp32_precision for backend in _matmul_backends()}
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, precision in backends.items():
            backend.fp32_precision = precision


def _matmul_backends() -> tuple[Any, ...]:
    """Return the backends whose precision ``set_float32_matmul_precision`` sets."""
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
