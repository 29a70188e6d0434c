"""Depth-wise coupling against the published procedure, on the same model and prompt, in one process.

    python benchmarks/depth_coupling.py

Times alternate: the published procedure (d vector-Jacobian products over the whole sequence per block, full SVDs, the
metric), then ours (the whole call, with its forward pass and its certificate), several times over; the table gives the
fastest of each, their ratio, and how far the numbers lie apart.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from published import depth_misalignment
from rich.console import Console
from rich.table import Table

import tlcoupling as tlc
from tlcoupling.smollm2 import smollm2_huggingface


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result of one call."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def matmul_peak(size: int = 1024, repeats: int = 20) -> float:
    """The machine's matrix-product rate in GFLOP/s, float32, the fastest of several products."""
    a = torch.randn(size, size)
    return 2 * size**3 / min(timed(lambda: a @ a)[0] for _ in range(repeats)) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="rounds of published, then ours")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=28, help="length; the prompt is repeated to fill it")
    options = parser.parse_args()

    prompts = json.loads((files("tlcoupling") / "data/prompts.json").read_text())
    hf_model, tokenizer = smollm2_huggingface()
    ids = torch.tensor(tokenizer(prompts["landmarks"])["input_ids"])
    ids = ids.repeat(-(-options.tokens // len(ids)))[: options.tokens]
    model = tlc.load_model("smollm2-135m")

    def ours() -> tlc.DepthCoupling:
        return tlc.depth_coupling(tlc.trace(model, ids), options.k, sublayers="block")

    ours()  # first calls pay for lazy imports and thread pools
    theirs_s, ours_s = [], []
    for _ in range(options.repeats):
        seconds, published = timed(lambda: depth_misalignment(hf_model, ids[None], options.k))
        theirs_s.append(seconds)
        for _ in range(3):
            seconds, found = timed(ours)
            ours_s.append(seconds)
    gap = (1 - found.values[0, 0, 0] - published)[:-1, :-1].abs().max()

    table = Table(title=f"SmolLM2-135M, {len(ids)} tokens, last token, blocks, K = {options.k}")
    for column in ("procedure", "seconds", "ratio"):
        table.add_column(column, justify="right" if column != "procedure" else "left")
    table.add_row("published", f"{min(theirs_s):.2f}", "1")
    table.add_row("tlcoupling", f"{min(ours_s):.2f}", f"{min(theirs_s) / min(ours_s):.1f}")
    console = Console()
    console.print(table)
    console.print(
        f"{torch.get_num_threads()} threads, {matmul_peak():.0f} GFLOP/s matrix products; "
        f"largest gap in misalignment, last block left out: {gap:.1e}"
    )


if __name__ == "__main__":
    main()
