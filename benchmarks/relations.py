"""Print what slices of SmolLM2-135M follow from, by their number of blocks, beside fresh weights.

The tables are those of docs/concepts/slices.md. A gain is the mean over the top K of ln s - ln s of uncoupled blocks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.resources import files

import torch

import tlcoupling as tlc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    arguments = parser.parse_args()
    model = tlc.load_model("smollm2-135m")
    text = json.loads((files("tlcoupling") / "data/prompts.json").read_text())["landmarks"]
    for name, one in (("SmolLM2-135M", model), ("fresh weights", tlc.random_baseline(model))):
        trace = tlc.trace(one, text)
        pairs = [(a, a + n) for n in arguments.blocks for a in starts(trace.n_layers, n)]
        table = tlc.slice_relations(trace, pairs, k=arguments.k, draws=arguments.draws).to_dataframe()
        means = table.drop(columns=["start", "end"]).groupby("blocks").mean()
        print(
            f"{name}, K = {arguments.k}, last token\n\n{means.filter(regex='^(?!.*std)').round(3).to_string()}\n",
            flush=True,
        )


def starts(n_layers: int, n: int) -> Sequence[int]:
    """Three starts over the model, without its first and its last block where there is room: these differ."""
    return sorted({1, (n_layers - n) // 2, max(0, n_layers - 1 - n)})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
