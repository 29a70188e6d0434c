"""Measure a plan of many cells: cells per second, memory of each process, and the seconds of the table.

    python benchmarks/many_cells.py                                   # 1000 cells, two processes
    python benchmarks/many_cells.py --cells 10000 --executor dask     # needs distributed

The model is a tiny random Llama: most of the time is what a sweep costs beside the measurement, files and bookkeeping.
Memory is flat if that of each process grows by less than 10 kB a cell, from a third of the cells on. A process settles
over its first few hundred cells: plans of fewer than some thousands show that instead. The last line says whether it
was flat, and so does the exit code (0 or 1).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Dask's workers keep a profile of all that they ran: 33 kB for each cell of the plan
os.environ.setdefault("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED", "False")

import numpy as np
import psutil
import torch
from llamas import llama, save, word_tokenizer

import tlcoupling as tlc
from tlcoupling.sweeps.executors import process_pool

FLAT = 10_000  # bytes a cell: one that was kept whole (trace, Jacobians, result) would be more than 100 kB
WORDS = 100


@contextmanager
def executor_of(name: str, workers: int) -> Iterator[Executor]:
    if name == "processes":
        with process_pool(workers) as pool:
            yield pool
        return
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster,
        Client(cluster) as client,
        client.get_executor() as pool,
    ):
        yield pool


class Watch(threading.Thread):
    """Samples the stored cells and the resident memory of this process and of those it started."""

    def __init__(self, store: tlc.SweepStore) -> None:
        super().__init__(daemon=True)
        self.store, self.ended, self.samples = store, threading.Event(), {}

    def run(self) -> None:
        own = psutil.Process()
        while not self.ended.wait(1.0):
            cells = len(self.store.keys())
            for process in (own, *own.children(recursive=True)):
                try:
                    self.samples.setdefault(process.pid, []).append((cells, process.memory_info().rss))
                except psutil.Error:
                    continue  # it has ended

    def growth(self, start: int) -> dict[int, tuple[float, float]]:
        """By process: the largest memory in MB, and the growth in bytes for each cell of the sweep from one on."""
        found = {}
        for pid, samples in self.samples.items():
            cells, memory = np.array([one for one in samples if one[0] >= start] or [(0, 0)], dtype=float).T
            if len(set(cells)) > 2 and memory.max() > 1e8:  # those that measure, and the one that submits
                found[pid] = memory.max() / 1e6, np.polyfit(cells, memory, 1)[0]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--executor", choices=["processes", "dask"], default="processes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cells-per-job", type=int, default=500)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        save(llama(16, 2, 2, WORDS + 1), word_tokenizer(WORDS), folder / "model")
        prompts = [f"w{i % WORDS} w{i // WORDS % WORDS} w{i // WORDS**2 % WORDS} w7" for i in range(options.cells)]
        settings = {"k": 2, "sublayers": "block"}
        content = {"models": ["model"], "prompts": {"text": prompts}, "settings": settings, "local_files_only": True}
        plan = tlc.Plan.of(content, base=folder)
        store = tlc.SweepStore(folder / "store", create=True)
        watch = Watch(store)
        watch.start()
        with executor_of(options.executor, options.workers) as executor:
            report = tlc.sweep(plan, store, executor=executor, cells_per_job=options.cells_per_job)
        watch.ended.set()
        watch.join()
        if not report.complete or report.n_measured != options.cells:
            raise SystemExit(f"{report}: {report.reasons}")
        print(f"{options.cells} cells in {report.seconds:.0f} s: {options.cells / report.seconds:.1f} cells/s")
        began = time.perf_counter()
        rows = len(store.table())
        print(f"table of {rows} rows: {time.perf_counter() - began:.1f} s", flush=True)
        began = time.perf_counter()
        again = tlc.sweep(plan, store)
        print(f"a re-run that finds all {again.n_kept} measured: {time.perf_counter() - began:.1f} s", flush=True)
        worst = 0.0
        for megabytes, slope in watch.growth(options.cells // 3).values():
            worst = max(worst, slope)
            print(f"a process of at most {megabytes:.0f} MB: {slope:+.0f} bytes a cell")
        flat = worst < FLAT
        print(f"memory is {'flat' if flat else 'not flat'}: {'below' if flat else 'not below'} {FLAT} bytes a cell")
        raise SystemExit(not flat)


if __name__ == "__main__":
    main()
