"""What each layer of SmolLM2-135M does, and how that goes with its coupling.

    python benchmarks/depth_profile.py                    # blocks and sublayers, against fresh weights
    python benchmarks/depth_profile.py --sublayers block --baseline none

Loss, coupling and angles are of the shared prompts. Linearity is fitted over these and over the text of this project's
documentation, 512 tokens at a time, until there are ten tokens for each dimension.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import tlcoupling as tlc

TOKENS_PER_WIDTH, LENGTH = 10.5, 512


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sublayers", nargs="+")
    parser.add_argument("--baseline", choices=("fresh", "none"), default="fresh")
    options = parser.parse_args()
    prompts = json.loads((files("tlcoupling") / "data/prompts.json").read_text())
    console, model = Console(width=130), tlc.load_model("smollm2-135m")
    cfg: Any = model.cfg
    to_tokens: Any = model.to_tokens
    pages = sorted((Path(__file__).parent.parent / "docs").rglob("*.md"))
    ids = to_tokens("\n".join(page.read_text(encoding="utf-8") for page in pages), prepend_bos=False, truncate=False)
    chunks = ids[0].split(LENGTH)[: -(-int(TOKENS_PER_WIDTH * cfg.d_model) // LENGTH)]
    baseline = None if options.baseline == "none" else options.baseline
    found = tlc.depth_profile(model, prompts, texts=chunks, sublayers=options.sublayers, baseline=baseline)
    for weights, one in (("trained", found), ("fresh", found.baseline)):
        if one is not None:
            layers(one, weights, console)
            correlations(one, weights, console)
            console.print(f"{one.n_tokens} tokens, loss {float(one.loss.mean()):.3f}, {one.provenance.seconds:.0f} s")


def layers(found: tlc.DepthProfile, weights: str, console: Console) -> None:
    """Print a row for each layer and sublayer, chance in brackets."""
    table = Table(title=f"{weights}: mean over {len(found.prompts)} prompts; in brackets: chance")
    for column in (
        "layer",
        "",
        "influence",
        "angle / pi",
        "cosine",
        "linearity",
        "of the write",
        "loss effect",
        "coupling",
    ):
        table.add_column(column, justify="right")
    for layer in found.layers:
        for at, sublayer in enumerate(found.sublayers):
            mean = {
                name: float(getattr(found, name)[:, at, layer].mean())
                for name in ("influence", "influence_null", "angular_distance", "angular_null", "cosine", "loss_effect")
            }
            null = float(found.linearity_null[at, layer])
            table.add_row(
                str(layer),
                sublayer,
                f"{mean['influence']:.4f} ({mean['influence_null']:.4f})",
                f"{mean['angular_distance']:.3f} ({mean['angular_null']:.3f})",
                f"{mean['cosine']:+.3f}",
                f"{float(found.linearity[at, layer]):.4f} ({null:.3f})",
                f"{float(found.linearity_of_write[at, layer]):.3f} ({null:.3f})",
                f"{mean['loss_effect']:+.3f}",
                f"{float(found.coupling[:, at, layer].mean()):.4f}",
            )
    console.print(table)


def correlations(found: tlc.DepthProfile, weights: str, console: Console) -> None:
    """Print Spearman's correlation with coupling, with its interval over prompts."""
    interval = found.correlation()
    table = Table(title=f"{weights}: Spearman's rho with coupling over layers, mean over prompts, 95 % interval")
    table.add_column("quantity")
    for sublayer in found.sublayers:
        table.add_column(sublayer)
    for row, name in enumerate(interval.labels[0]):
        cells = (
            f"{interval.estimate[row, at]:+.2f} [{interval.low[row, at]:+.2f}, {interval.high[row, at]:+.2f}]"
            for at in range(len(found.sublayers))
        )
        table.add_row(name, *cells)
    console.print(table)


if __name__ == "__main__":
    main()
