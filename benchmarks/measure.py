"""Measure seconds and peak memory of calls, and format rows of the benchmark table."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import psutil
import torch
from rich.table import Table

SAMPLE_EVERY = 0.002
SHORT = 5.0  # seconds


@dataclass(frozen=True)
class Measured:
    """One call: wall-clock seconds, peak memory above the level before the call (bytes), and its result."""

    seconds: float
    peak_bytes: float
    result: Any


def measured(function: Callable[[], Any], device: torch.device, fresh: bool = False) -> Measured:
    """Call a function and measure it.

    ``fresh`` first returns free memory to the system. Otherwise memory left by earlier calls can hide the peak. A short
    call is then slower, because it has to allocate its memory again.
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


def peak_alone(load: Callable[[], Any], call: Callable[[Any], Any]) -> float:
    """Return the peak resident memory of a call in a process of its own, in which it is the first; bytes.

    It counts from what is resident when the model is loaded, as ``tlc.estimate`` does. In a process that has measured
    before, libraries are loaded already, and memory that was left free hides a part of the peak.

    Args:
        load: makes what the call is given, such as the model.
        call: what is measured. Both are functions of modules, or partials of such.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, load, call, torch.get_num_threads()).result()


def _peak(load: Callable[[], Any], call: Callable[[Any], Any], threads: int) -> float:
    torch.set_num_threads(threads)
    given = load()
    return measured(partial(call, given), torch.device("cpu"), fresh=True).peak_bytes


def _tidy(device: torch.device) -> None:
    """Return free memory to the system, so memory left by an earlier call does not hide a peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return
    with suppress(OSError):  # another C library: peaks may be understated, for both procedures
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def alternating(
    functions: Sequence[Callable[[], Any]], rounds: int, device: torch.device, again: int = 3
) -> list[tuple[float, float, Any]]:
    """Call functions in turn for several rounds; return each one's fastest seconds, largest peak and last result.

    A short call runs ``again`` several times per round, so that a busy moment does not slow all of them. The first has
    fresh memory.
    """
    calls: list[list[Measured]] = [[] for _ in functions]
    for _ in range(rounds):
        for runs, function in zip(calls, functions, strict=True):
            runs.append(measured(function, device, fresh=True))
            runs += [measured(function, device) for _ in range(again) if runs[0].seconds < SHORT]
    return [(min(one.seconds for one in runs), max(one.peak_bytes for one in runs), runs[-1].result) for runs in calls]


@dataclass(frozen=True)
class Row:
    """One row of the table: the same work by the published procedure and by tlcoupling.

    ``flops`` counts the operations of tlcoupling's call and gives its share of the peak; None if not counted.
    ``goal_s`` is what tlcoupling's call should take on two CPU cores; None without a goal.
    """

    work: str
    published_s: float
    published_bytes: float | None
    ours_s: float
    ours_bytes: float
    flops: float | None = None
    goal_s: float | None = None


def cells(row: Row, peak: float) -> dict[str, str]:
    """Format a row, by the names of its columns; ``peak`` is in operations per second."""
    return {
        "work": row.work,
        "published s": _number(row.published_s),
        "ours s": _number(row.ours_s),
        "goal s": "–" if row.goal_s is None else _number(row.goal_s),
        "ratio": _number(row.published_s / row.ours_s),
        "share of peak": "–" if row.flops is None else f"{row.flops / row.ours_s / peak:.0%}",
        "published GiB": "–" if row.published_bytes is None else f"{row.published_bytes / 2**30:.2f}",
        "ours GiB": f"{row.ours_bytes / 2**30:.2f}",
    }


def table(title: str, rows: Sequence[Row], peak: float) -> Table:
    """Format rows as a table; ``peak`` is in operations per second."""
    shown = Table(title=title, title_justify="left")
    for index, row in enumerate(cells(row, peak) for row in rows):
        for name in () if index else row:
            shown.add_column(name, justify="left" if name == "work" else "right")
        shown.add_row(*row.values())
    return shown


def print_table(title: str, rows: Iterable[Mapping[str, str | float]]) -> None:
    """Print rows as they come, the names of their columns above the first."""
    print(f"\n{title}", flush=True)
    for index, row in enumerate(rows):
        if index == 0:
            print("  ".join(f"{name:>14}" for name in row))
        shown = (value if isinstance(value, str) else _number(value) for value in row.values())
        print("  ".join(f"{value:>14}" for value in shown), flush=True)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"
