"""Our time, memory and share of the machine's peak beside the published procedure's, in one table for this machine.

    python benchmarks/table.py

Both run in one process on the same work, alternating; the fastest call and the largest peak of memory count. Ratios are
of seconds. The peak is the fastest of several float32 matrix products, and shares count the floating-point operations
that the work takes. About ten minutes on two CPU cores, nearly all of it the published procedure's.
"""

from __future__ import annotations

import argparse
import platform

import smollm2
import torch
import wide_block
from measure import Row, table
from rich.console import Console

from tlcoupling.linalg.work import matmul_rate


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds of published, then ours")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    peak = matmul_rate(device)
    found: list[Row | str] = []
    for part in (smollm2.rows(device, options.rounds), wide_block.rows(device)):
        for one in part:
            found.append(one)
            if isinstance(one, Row):  # a sign of life: the published procedure takes minutes
                print(f"{one.work}: {one.published_s:.4g} s, {one.ours_s:.4g} s", flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    console = Console(width=120)
    title = f"blocks, K = 10, float32; {name} ({platform.machine()}), {peak / 1e9:.0f} GFLOP/s"
    console.print(table(title, [one for one in found if isinstance(one, Row)], peak))
    for remark in found:
        if isinstance(remark, str):
            console.print(remark, highlight=False)


if __name__ == "__main__":
    main()
