"""Seconds, peak memory and the matrix-product rate of one machine, and a row of the benchmark's table."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from rich.table import Table

SAMPLE_EVERY = 0.005
SHORT = 20.0  # seconds


@dataclass(frozen=True)
class Measured:
    """One call: its wall-clock seconds, its peak memory beyond what was there before (bytes), and what it gave."""

    seconds: float
    peak_bytes: float
    result: Any


def measured(function: Callable[[], Any], device: torch.device, fresh: bool = False) -> Measured:
    """Call a function and measure it.

    ``fresh`` gives back to the system what earlier calls left behind, so that the peak does not hide in it; a short
    call is then slower, since it has to ask for its memory anew.
    """
    if fresh:
        _tidy(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        started = time.perf_counter()
        result = function()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        return Measured(seconds, torch.cuda.max_memory_allocated(device) - before, result)
    process, finished = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not finished.wait(SAMPLE_EVERY):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        result = function()
        seconds = time.perf_counter() - started
    finally:
        finished.set()
        watcher.join()
    return Measured(seconds, peak - before, result)


def _tidy(device: torch.device) -> None:
    """Give free memory back, so that a peak does not hide in what an earlier call left behind."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return
    with suppress(OSError):  # another C library: peaks may then be understated, for both procedures
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def alternating(
    functions: Sequence[Callable[[], Any]], rounds: int, device: torch.device
) -> list[tuple[float, float, Any]]:
    """Call functions in turn, several rounds; for each the fastest seconds, the largest peak and the last result.

    A short call has four turns in a round, of which a busy moment does not take all, the first one with fresh memory.
    """
    calls: list[list[Measured]] = [[] for _ in functions]
    for _ in range(rounds):
        for found, function in zip(calls, functions, strict=True):
            found.append(measured(function, device, fresh=True))
            found += [measured(function, device) for _ in range(3) if found[0].seconds < SHORT]
    return [
        (min(one.seconds for one in found), max(one.peak_bytes for one in found), found[-1].result) for found in calls
    ]


@dataclass(frozen=True)
class Row:
    """A line of the table: the same work by the published procedure and by tlcoupling.

    ``flops`` is what tlcoupling's call computes, from which its share of the peak follows; None: not counted.
    """

    work: str
    published_s: float
    published_bytes: float | None
    ours_s: float
    ours_bytes: float
    flops: float | None = None


def table(title: str, rows: Sequence[Row], peak: float) -> Table:
    """Rows as a table; ``peak`` in operations per second."""
    shown = Table(title=title, title_justify="left")
    columns = ("work", "published s", "ours s", "ratio", "share of peak", "published GiB", "ours GiB")
    for index, name in enumerate(columns):
        shown.add_column(name, justify="right" if index else "left")
    for row in rows:
        shown.add_row(
            row.work,
            _number(row.published_s),
            _number(row.ours_s),
            _number(row.published_s / row.ours_s),
            "–" if row.flops is None else f"{row.flops / row.ours_s / peak:.0%}",
            "–" if row.published_bytes is None else f"{row.published_bytes / 2**30:.2f}",
            f"{row.ours_bytes / 2**30:.2f}",
        )
    return shown


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
