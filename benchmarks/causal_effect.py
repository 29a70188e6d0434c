"""Measure the next-token loss of SmolLM2-135M without coupled directions, with a control, on the shared prompts.

    python benchmarks/causal_effect.py

For one layer at a time, the top K left singular vectors of a sublayer's Jacobian are projected out of its write, at
every position. The control projects out random subspaces of the same dimension and the same share of the write's norm.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files

from rich.console import Console
from rich.table import Table

import tlcoupling as tlc


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 5, 10, 15, 20, 25, 29])
    options = parser.parse_args()

    prompts = json.loads((files("tlcoupling") / "data/prompts.json").read_text())
    model, console = tlc.load_model("smollm2-135m"), Console(width=110)
    for sublayer in ("attn", "mlp"):
        result = tlc.causal_effect(
            model, prompts, options.k, layers=options.layers, sublayer=sublayer, draws=options.draws
        )
        by_prompt = Table(title=f"{sublayer}, K = {result.k}, mean over layers {', '.join(map(str, result.layers))}")
        by_layer = Table(title=f"{sublayer}, K = {result.k}, mean over the {len(result.prompts)} prompts")
        for table, what in ((by_prompt, "prompt"), (by_layer, "layer")):
            for column in (what, "share", "effect", "control", "sd of draws", "effect - control", "above all draws"):
                table.add_column(column, justify="left" if column == what else "right")
        # average the draws over the other axis first: their deviation is then that of the row's mean
        for table, axis, labels in ((by_prompt, 1, result.prompts), (by_layer, 0, result.layers)):
            effect, share, draws = result.effect.mean(axis), result.share.mean(axis), result.control.mean(axis)
            for row, label in enumerate(labels):
                numbers = (effect[row], draws[row].mean(), draws[row].std(), effect[row] - draws[row].mean())
                above = "yes" if effect[row] > draws[row].max() else "no"
                table.add_row(str(label), f"{share[row]:.3f}", *(f"{number:+.4f}" for number in numbers), above)
            console.print(table)
        overall = result.control.mean((0, 1))
        console.print(
            f"{sublayer}: effect {result.effect.mean():+.4f}, control {overall.mean():+.4f} (sd of "
            f"{len(overall)} draws {overall.std():.4f}), mean loss {result.loss.mean():.4f} nats; the effect "
            f"exceeds the control's mean in {int((result.excess > 0).sum())} of {result.excess.numel()} cases and is "
            f"below it in {int((result.excess < 0).sum())}; {result.provenance.seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
