"""Work counted by the kind of step, and the rate at which this machine does each kind: together they give seconds.

A decomposition of a small matrix reaches a fraction of the rate of a matrix product, and a small model spends its time
between the products.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import nn

from tlcoupling.precision import full_precision


@dataclass(frozen=True)
class Work:
    """Work of one or more steps.

    Attributes:
        matmul: floating-point operations of products of two large matrices.
        thin: floating-point operations of products of a matrix with few columns.
        weights: the same of a block's weights, which come from memory each time.
        svd: floating-point operations of decompositions of small matrices.
        calls: small module calls. They stand for the time that Python and PyTorch add to each step.
        softmax: numbers put through a softmax, which stand for all steps that take numbers one by one.
    """

    matmul: float = 0.0
    thin: float = 0.0
    weights: float = 0.0
    svd: float = 0.0
    calls: float = 0.0
    softmax: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both."""
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int | float) -> Work:
        """The same work several times."""
        return Work(*(times * each for each in astuple(self)))

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return self.matmul + self.thin + self.weights + self.svd


@dataclass(frozen=True)
class Rates:
    """How much of each kind of ``Work`` a machine does per second.

    Attributes:
        matmul: on all threads.
        thin: on all threads.
        weights: on all threads.
        svd: on one thread.
        calls: on one thread.
        softmax: on all threads.
        threads: worker threads that can share ``svd`` and ``calls``; 1 for a machine of which this is unknown.
    """

    matmul: float
    thin: float
    weights: float
    svd: float
    calls: float
    softmax: float
    threads: int = 1

    def seconds(self, work: Work, workers: int = 1) -> float:
        """Return the seconds that some work takes with ``workers`` threads."""
        alone = work.svd / self.svd + work.calls / self.calls
        together = work.matmul / self.matmul + work.thin / self.thin + work.weights / self.weights
        together += work.softmax / self.softmax
        return together + alone / min(workers, self.threads)

    @classmethod
    def typical(cls, matmul: float) -> Rates:
        """Return the rates of a machine of which only one is known, with shares as measured on a CPU."""
        return cls(matmul, thin=0.8 * matmul, weights=0.4 * matmul, svd=0.2 * matmul, calls=2e5, softmax=0.02 * matmul)


@functools.cache
@full_precision()
def measured_rates(device: torch.device, dtype: torch.dtype = torch.float32) -> Rates:
    """Measure a device's rates once per process, in a fraction of a second: the fastest of several steps.

    Steps are short, so that other processes do not interrupt all of them.
    """

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def fastest(step: Callable[[], object]) -> float:
        seconds = []
        for _ in range(12):
            _finish(device)
            started = time.perf_counter()
            step()
            _finish(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    size = 4096 if device.type == "cuda" else 512
    square, columns, stack = random(size, size), random(size, 16), random(2, 128, 128)
    weight, few = random(8192, 2048), random(2048, 16)  # 64 MiB: beyond the caches
    module, x = nn.Linear(4, 4, device=device, dtype=dtype), random(4, 4)
    module.register_forward_hook(lambda module, args, output: None)
    with torch.no_grad():
        return Rates(
            matmul=2.0 * size**3 / fastest(lambda: square @ square),
            thin=2.0 * size**2 * 16 / fastest(lambda: square @ columns),
            weights=4.0 * weight.numel() * 16 / fastest(lambda: weight.mT @ (weight @ few)),
            svd=2 * 20.0 * 128**3 / fastest(lambda: torch.linalg.svd(stack)),
            calls=100 / fastest(lambda: [module(x) for _ in range(100)]),
            softmax=square.numel() / fastest(lambda: square.softmax(-1)),
            threads=torch.get_num_threads(),
        )


def _finish(device: torch.device) -> None:
    """Wait for a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
