"""One process that has loaded torch and a model and forks sweeps from there: 50 of them cost no 50 imports.

Run by sweeps/test_run.py: ``kills MODELS FOLDER COUNT``, ``two MODELS FOLDER``, ``memory MODELS FOLDER CELLS``. Prints
one number a line.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import torch
from small_sweeps import plan_of

import tlcoupling as tlc
from tlcoupling.results import atomic
from tlcoupling.sweeps.run import measure_group
from tlcoupling.sweeps.source import Source

SLOWEST_KILL = 0.8  # seconds, of a few cells


def forked(work: Callable[[], object]) -> int:
    """Start a process that does it; the caller goes on."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def finished(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(f"a sweep ended with status {status}")


def kills(models: Path, folder: Path, count: int) -> None:
    # enough cells, so that the rounds do not finish them
    plan, rounds = plan_of(models, ["one"], 3 * count), random.Random(0)
    finished(forked(lambda: tlc.sweep(plan, folder / "undisturbed")))
    slow_disk()
    known: set[str] = set()
    half: set[Path] = set()
    in_mid_sweep = in_mid_write = 0
    store = tlc.SweepStore(folder / "killed", create=True)
    for _ in range(count):
        child = forked(lambda: tlc.sweep(plan, folder / "killed"))
        time.sleep(rounds.uniform(0, SLOWEST_KILL))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        in_mid_sweep += os.WIFSIGNALED(status)
        in_mid_write += not half.issuperset((store.folder / "cells").glob(".*"))
        half |= set((store.folder / "cells").glob(".*"))
        for key in store.keys() - known:
            store.load(key)  # raises where it is not whole
            known.add(key)
    for path in store.folder.rglob(".*"):
        os.utime(path, (0, 0))  # long ago, so that what killed processes left is known to be that
    finished(forked(lambda: tlc.sweep(plan, folder / "killed")))
    show(kills=count, in_mid_sweep=in_mid_sweep, in_mid_write=in_mid_write, measured_before_the_last=len(known))


def slow_disk() -> None:
    """Make writing slow, so that many kills come while a file is written."""
    real = atomic._to_disk

    def slow(path: Path, flags: int) -> None:
        time.sleep(0.03)
        real(path, flags)

    atomic._to_disk = slow


def two(models: Path, folder: Path) -> None:
    plan = plan_of(models, ["one"], 30)
    finished(forked(lambda: tlc.sweep(plan, folder / "undisturbed")))
    for child in [forked(lambda: tlc.sweep(plan, folder / "both")) for _ in range(2)]:
        finished(child)
    show(failed=len(tlc.SweepStore(folder / "both").failed_keys()))


def memory(models: Path, folder: Path, cells: int) -> None:
    plan, process, seen = plan_of(models, ["one"], cells), psutil.Process(), []
    tlc.SweepStore(folder / "memory", create=True)
    measure_group(plan.groups[0], str(folder / "memory"), lambda *_: seen.append(process.memory_info().rss))
    settled = torch.tensor(seen[150:], dtype=torch.float64)
    at = torch.arange(len(settled), dtype=torch.float64)
    slope = ((at - at.mean()) * (settled - settled.mean())).sum() / (at - at.mean()).square().sum()
    show(cells=len(seen), bytes_a_cell=slope.item())


def show(**numbers: float) -> None:
    for name, number in numbers.items():
        print(name, number)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, models, folder, *more = sys.argv[1:]
    model = plan_of(Path(models), ["one"]).groups[0].source.open()
    Source.open = lambda source: model  # is there in every fork
    {"kills": kills, "two": two, "memory": memory}[kind](Path(models), Path(folder), *map(int, more))
