"""Matrix products of float32 in float32.

``torch.set_float32_matmul_precision("high")`` lets them be taken in TF32 (a mantissa of 10 bits) on GPUs from Ampere
on, and ``"medium"`` in bfloat16, also on CPUs: faster in training, and too coarse for singular vectors, for a
certificate of 1e-4 and for residuals of 3e-5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Hold the precision of float32 matrix products at ``"highest"`` for a while, then put back what was set.

    Also for functions, as ``@full_precision()``. The setting is the process's own: other threads see it meanwhile.
    """
    try:
        before = torch.get_float32_matmul_precision()
        backends = {}
    except RuntimeError:  # set by the newer names, fp32_precision of each backend: the older getter refuses these
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
    """Those that ``set_float32_matmul_precision`` sets."""
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
