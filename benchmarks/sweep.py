"""Measure the cells per second of a sweep with one process and with two, one thread each.

    python benchmarks/sweep.py

The model is a small random Llama: a cell does the work of a real one, and nothing is downloaded. Both sweeps use a pool
of processes, so both pay for starting Python and loading the model. Rounds alternate, and each rate is the best of its
rounds. A rate counts from the first finished cell to the last, which excludes the start. Two processes should measure
at least 1.6 times the cells of one. The last line says whether they did, and so does the exit code (0 or 1).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from llamas import llama, save, word_tokenizer

import tlcoupling as tlc

EXPECTED = 1.6  # on a machine with two cores for the two processes


def cells_per_second(plan: tlc.Plan, store: Path, workers: int) -> float:
    report = tlc.sweep(plan, store, workers=workers)
    if not report.complete:
        raise SystemExit(f"{report}: {report.reasons}")
    ends = sorted(path.stat().st_mtime for path in (store / "cells").iterdir())
    return (len(ends) - 1) / (ends[-1] - ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        save(llama(256, 8, 4, 101), word_tokenizer(100), folder / "model")
        prompts = [" ".join(f"w{(7 * i + 3 * j) % 100}" for j in range(24)) for i in range(100)]
        prompts += [f"w1 {prompt}" for prompt in prompts]
        plan = tlc.Plan.of({"models": ["model"], "prompts": {"text": prompts[: options.cells]}}, base=folder)
        best = {1: 0.0, 2: 0.0}
        for round_ in range(options.rounds):
            for workers in best:
                rate = cells_per_second(plan, folder / f"{round_}-{workers}", workers)
                best[workers] = max(best[workers], rate)
                print(f"round {round_}: {workers} process(es), one thread each: {rate:.2f} cells/s", flush=True)
    line, enough = verdict(best[1], best[2])
    print(line)
    raise SystemExit(not enough)


def verdict(one: float, two: float) -> tuple[str, bool]:
    """Return a line that compares the best rates of one and two processes, and whether their ratio is as expected."""
    enough = two / one >= EXPECTED
    compared = "at least" if enough else "below"
    return f"best: {one:.2f} and {two:.2f} cells/s, ratio {two / one:.2f}: {compared} the {EXPECTED} expected", enough


if __name__ == "__main__":
    main()
