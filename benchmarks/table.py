"""Compare our time, memory and share of the machine's peak with the published procedure's, in one table.

    python benchmarks/table.py

Both run in one process on the same work, alternating. The table shows the fastest call and the largest memory peak, and
the ratio of seconds. The published procedure is batched as its authors run it. The machine's peak is the fastest of
several float32 matrix products; the share of it counts the floating-point operations of the work. Goals are seconds on
two CPU cores. Then come a report of 28 tokens, and the command line's help. This takes about five and a half minutes on
two CPU cores, nearly all of it for the published procedure.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import smollm2
import torch
import wide_block
from measure import Row, measured, table
from rich.console import Console

import tlcoupling as tlc
from tlcoupling.linalg.work import measured_rates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of published, then ours")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    peak = measured_rates(device).matmul
    lines: list[Row | str] = []
    models = smollm2.trained(device)
    for part in (smollm2.rows(models, options.rounds), wide_block.rows(device), report(models[1], models[2](28))):
        for one in part:
            lines.append(one)
            if isinstance(one, Row):  # show progress: the published procedure takes minutes
                print(f"{one.work}: {one.published_s:.4g} s, {one.ours_s:.4g} s", flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console = Console(width=120)
    title = f"blocks, K = 10, float32; {name} ({platform.machine()}), {peak / 1e9:.0f} GFLOP/s"
    console.print(table(title, [one for one in lines if isinstance(one, Row)], peak))
    for remark in lines:
        if isinstance(remark, str):
            console.print(remark, highlight=False)


def report(model: Any, ids: torch.Tensor) -> Iterator[str]:
    """Yield remarks on a report, as ``tlcoupling report`` makes it by default, and on the command line's start."""
    device = next(model.parameters()).device
    measuring = measured(partial(tlc.analyze, model, ids, token_layers=[0, 15, 29]), device).seconds
    yield f"report of {len(ids)} tokens: {measuring:.3g} s measuring, without a baseline (goal: 4 s)"
    with tempfile.TemporaryDirectory() as folder:
        page = measured(partial(_run, "report", "--output", folder), device).seconds
    yield f"report of {len(ids)} tokens, from the prompt to the page, with a baseline: {page:.3g} s (goal: 12 s)"
    yield f"tlcoupling --help: {measured(partial(_run, '--help'), device).seconds:.2g} s (goal: 0.4 s)"


def _run(*arguments: str) -> None:
    command = [sys.executable, "-c", "from tlcoupling.cli import app; app()", *arguments]
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
