"""Work on several Jacobians at once.

A matrix of a usual width does not keep several cores busy: its decomposition is a chain of small steps. One Jacobian a
core, each worked on by one thread, takes about half the time on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import torch

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Workers:
    """Threads that share the cores of PyTorch's own, as a context manager.

    Only what touches neither modules nor hooks may run in them: those are the calling thread's.

    Attributes:
        count: how many items are worked on at once.
    """

    def __init__(self, count: int) -> None:
        """With one worker there are no threads beside the calling one, which keeps all of PyTorch's."""
        self.count = count
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        """Start."""
        if self.count > 1:
            # PyTorch's number of threads is that of the calling thread, and the default of those not yet started:
            # the latter is put right again at the end.
            self._stack.callback(torch.set_num_threads, self._threads)
            each = max(1, self._threads // self.count)
            self._pool = self._stack.enter_context(
                ThreadPoolExecutor(self.count, "tlcoupling", initializer=torch.set_num_threads, initargs=(each,))
            )
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._stack.close()

    def map(self, function: Callable[[ItemT], ResultT], items: Iterable[ItemT], at_once: bool) -> list[ResultT]:
        """function(item) of each, in order; in the calling thread alone unless ``at_once``."""
        if self._pool is None or not at_once:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))
