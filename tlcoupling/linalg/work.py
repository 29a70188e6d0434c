"""Work counted by the kind of step, and the rate at which this machine does each kind.

A decomposition of a small matrix reaches a fraction of the rate of a matrix product, and a small model spends its time
between the products. Four measured rates turn work into seconds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tlcoupling.precision import full_precision

_THIN, _SVD = 16, 192  # columns of the thin product that is timed, and the size of the matrix that is decomposed
_THIN_SHARE, _SVD_SHARE, _CALLS = 0.6, 0.2, 1e5  # shares of the matrix-product rate, where only that rate is known


@dataclass(frozen=True)
class Work:
    """Work of one or more steps.

    Attributes:
        matmul: floating-point operations of products of two large matrices.
        thin: floating-point operations of products with few columns.
        svd: floating-point operations of matrix decompositions.
        calls: small module calls. They stand for the time that Python and PyTorch add to each step.
    """

    matmul: float = 0.0
    thin: float = 0.0
    svd: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(self.matmul + other.matmul, self.thin + other.thin, self.svd + other.svd, self.calls + other.calls)

    def __mul__(self, times: int | float) -> Work:
        """The same work several times."""
        return Work(times * self.matmul, times * self.thin, times * self.svd, times * self.calls)

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.matmul + self.thin + self.svd


@dataclass(frozen=True)
class Rates:
    """How fast a machine works.

    Attributes:
        matmul: floating-point operations per second of products of two large matrices, on all threads.
        thin: floating-point operations per second of products with 16 columns, on all threads.
        svd: floating-point operations per second of a singular value decomposition, on one thread.
        calls: small module calls per second, on one thread.
        shared: whether worker threads share what the last two count; not known of a machine that is not at hand.
    """

    matmul: float
    thin: float
    svd: float
    calls: float
    shared: bool = True

    def seconds(self, work: Work, workers: int = 1) -> float:
        """Return the seconds that some work takes when ``workers`` threads share the decompositions."""
        alone = work.svd / self.svd + work.calls / self.calls
        return work.matmul / self.matmul + work.thin / self.thin + alone / (workers if self.shared else 1)

    @classmethod
    def typical(cls, matmul: float) -> Rates:
        """Return the rates of a machine of which only the matrix-product rate is known."""
        return cls(matmul, _THIN_SHARE * matmul, _SVD_SHARE * matmul, _CALLS, shared=False)


@functools.cache
@full_precision()
def measured_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Measure a device's rates once per process, in a fraction of a second."""
    size = 4096 if device.type == "cuda" else 1024
    square, thin, small = (
        torch.randn(*shape, device=device, dtype=dtype) for shape in ((size, size), (size, _THIN), (_SVD, _SVD))
    )
    module = nn.Linear(4, 4, device=device, dtype=dtype)
    module.register_forward_hook(lambda module, args, output: None)
    x = torch.ones(4, 4, device=device, dtype=dtype)
    repeated = 100
    with torch.no_grad():
        return Rates(
            matmul=matmul_rate(device, dtype),
            thin=2.0 * size**2 * _THIN / _fastest(lambda: square @ thin, device),
            svd=20.0 * _SVD**3 / _fastest(lambda: torch.linalg.svd(small), device),
            calls=repeated / _fastest(lambda: [module(x) for _ in range(repeated)], device),
        )


@full_precision()
def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Return a device's matrix-product rate in floating-point operations per second: the fastest of several."""
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _fastest(lambda: matrix @ matrix, device)


def _fastest(function: Callable[[], object], device: torch.device, rounds: int = 6) -> float:
    """Return the seconds of the fastest of several calls."""
    seconds = []
    for _ in range(rounds):
        _finish(device)
        started = time.perf_counter()
        function()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _finish(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
