"""Time token-wise and context coupling of every layer of SmolLM2-135M on a shared prompt.

    python benchmarks/pairs.py
    python benchmarks/pairs.py --sublayers block

Times whole calls and prints the time per Jacobian. By default, token-wise coupling measures block, attn and mlp of all
pairs of tokens; context coupling measures block and attn of all pairs from the first token, and of all pairs to the
last.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.resources import files

import torch
from rich.console import Console
from rich.table import Table

import tlcoupling as tlc


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompt", default="induction", help="a name in data/prompts.json")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--sublayers", nargs="+", help="default: all that each kind of coupling has")
    options = parser.parse_args()

    prompts = json.loads((files("tlcoupling") / "data/prompts.json").read_text())
    trace = tlc.trace(tlc.load_model("smollm2-135m"), prompts[options.prompt])
    tlc.depth_coupling(trace, options.k, layers=[0])  # the first call pays for lazy imports and thread pools
    calls = {
        "token-wise": lambda: tlc.token_coupling(trace, options.k, sublayers=options.sublayers),
        "context, src 0": lambda: tlc.context_coupling(trace, "src", k=options.k, sublayers=options.sublayers),
        "context, dest -1": lambda: tlc.context_coupling(trace, "dest", k=options.k, sublayers=options.sublayers),
    }
    table = Table(title=f"SmolLM2-135M, {options.prompt!r}: {trace.n_tokens} tokens, all layers, K = {options.k}")
    for column in ("coupling", "seconds", "ms per Jacobian", "mean excess"):
        table.add_column(column, justify="left" if column == "coupling" else "right")
    total = 0.0
    for name, call in calls.items():
        started = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - started
        total += seconds
        excess = result.mean("excess").mean(dim=(1, 2))
        shown = ", ".join(f"{part} {value:.3f}" for part, value in zip(result.sublayers, excess, strict=True))
        table.add_row(name, f"{seconds:.1f}", f"{1e3 * seconds / result.frobenius.numel():.1f}", shown)
    table.add_row("total", f"{total:.1f}", "", "")
    console = Console()
    console.print(table)
    console.print(f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
