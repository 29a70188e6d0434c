"""The causal test on SmolLM2-135M: next-token loss without coupled directions, on the shared prompts, with its control.

    python benchmarks/causal_effect.py

In each layer by itself the top K left singular vectors of a sublayer's Jacobian at each position are taken out of its
write there; the control takes out random subspaces of as many dimensions and of the same share of the write's norm.
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
        found = tlc.causal_effect(
            model, prompts, options.k, layers=options.layers, sublayer=sublayer, draws=options.draws
        )
        by_prompt = Table(title=f"{sublayer}, K = {found.k}, mean over layers {', '.join(map(str, found.layers))}")
        by_layer = Table(title=f"{sublayer}, K = {found.k}, mean over the {len(found.prompts)} prompts")
        for table, what in ((by_prompt, "prompt"), (by_layer, "layer")):
            for column in (what, "share", "effect", "control", "sd of draws", "effect - control", "above all draws"):
                table.add_column(column, justify="left" if column == what else "right")
        # the draws of one row are averaged over the other axis first, so that their deviation is that of the row's mean
        for table, axis, labels in ((by_prompt, 1, found.prompts), (by_layer, 0, found.layers)):
            effect, share, draws = found.effect.mean(axis), found.share.mean(axis), found.control.mean(axis)
            for row, label in enumerate(labels):
                numbers = (effect[row], draws[row].mean(), draws[row].std(), effect[row] - draws[row].mean())
                above = "yes" if effect[row] > draws[row].max() else "no"
                table.add_row(str(label), f"{share[row]:.3f}", *(f"{number:+.4f}" for number in numbers), above)
            console.print(table)
        overall = found.control.mean((0, 1))
        console.print(
            f"{sublayer}: effect {found.effect.mean():+.4f}, control {overall.mean():+.4f} (sd of {len(overall)} draws "
            f"{overall.std():.4f}), mean loss {found.loss.mean():.4f} nats; the directions do more than the control's "
            f"mean in {int((found.excess > 0).sum())} of {found.excess.numel()} cases, less in "
            f"{int((found.excess < 0).sum())}; {found.provenance.seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
