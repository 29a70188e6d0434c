"""Eigenvalues, normality, symmetry, rank and Lyapunov exponents of SmolLM2-135M, trained against fresh weights.

    python benchmarks/geometry.py

Tests the claims of arXiv 2605.14258 on the last token of the prompts ``landmarks`` and ``induction``: rotation early,
near-symmetry late, a low-rank bottleneck, none of it at initialisation. The definitions are those of
``tlc.eigen_geometry``; the paper's own could not be read beyond its abstract.
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files

from rich.console import Console
from rich.table import Table

import tlcoupling as tlc
from tlcoupling.dynamics.depth_profile import spearman
from tlcoupling.dynamics.geometry import MAPS, WITH_NULL

THIRDS = ("first third", "middle", "last third")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", nargs="+", default=["landmarks", "induction"])
    options = parser.parse_args()
    prompts = json.loads((files("tlcoupling") / "data/prompts.json").read_text())
    model, console = tlc.load_model("smollm2-135m"), Console(width=130)
    fresh = tlc.random_baseline(model)
    for name in options.prompts:
        trace = tlc.trace(model, prompts[name])
        geometry(tlc.eigen_geometry(trace, baseline=fresh), name, console)
        lyapunov(tlc.lyapunov_spectrum(trace, baseline=fresh), name, console)


def geometry(found: tlc.EigenGeometry, name: str, console: Console) -> None:
    """Print means over thirds of the depth, and how far each quantity follows depth."""
    table = Table(title=f"{name}, last token: means over thirds of the layers; rho: Spearman's with the layer")
    for column in ("map", "sublayer", "quantity", "weights", *THIRDS, "chance", "rho"):
        table.add_column(column, justify="right" if column in (*THIRDS, "chance", "rho") else "left")
    assert found.baseline is not None
    for at, of in enumerate(MAPS):
        for s, sublayer in enumerate(found.sublayers):
            for quantity in (*WITH_NULL, "effective_rank", "stable_rank", "spectral_radius", "spectral_norm"):
                if quantity == "complex_share" and at:
                    continue  # the same of both
                for weights, one in (("trained", found), ("fresh", found.baseline)):
                    values, null = (
                        None if each is None else (each[s, 0] if each.ndim == 3 else each[s, 0, :, at])
                        for each in (getattr(one, quantity), getattr(one, f"{quantity}_null", None))
                    )
                    assert values is not None
                    thirds = [f"{float(part.mean()):.3f}" for part in values.tensor_split(3)]
                    depth = values.new_tensor(one.layers)
                    chance = "" if null is None else f"{float(null.mean()):.3f}"
                    table.add_row(of, sublayer, quantity, weights, *thirds, chance, f"{spearman(values, depth):+.2f}")
    console.print(table)
    console.print(f"{found.provenance.seconds:.0f} s trained, {found.baseline.provenance.seconds:.0f} s fresh")


def lyapunov(found: tlc.LyapunovSpectrum, name: str, console: Console) -> None:
    """Print exponents, growth by sublayer, and the rank of the product by depth."""
    n_layers, n = len(found.growth), len(found.exponents)
    depths = sorted({0, 1, 2, n_layers // 4, n_layers // 2, 3 * n_layers // 4, n_layers - 1, n_layers})
    table = Table(
        title=f"{name}, last token: Lyapunov exponents per layer, and the rank of the product up to each depth"
    )
    for column in (
        "weights",
        "exponents 1, 1/4, 1/2, 3/4, last",
        "ln s1 by sublayer",
        "depth: effective rank (stable)",
    ):
        table.add_column(column)
    for weights, one in (("trained", found), ("fresh", found.baseline)):
        assert one is not None and one.effective_rank is not None and one.stable_rank is not None
        chosen = ", ".join(f"{float(one.exponents[i]):+.3f}" for i in (0, n // 4, n // 2, 3 * n // 4, n - 1))
        by = ", ".join(f"{each} {float(one.growth[:, at, 0].sum()):+.2f}" for at, each in enumerate(one.sublayers))
        ranks = ", ".join(f"{d}: {float(one.effective_rank[d]):.0f} ({float(one.stable_rank[d]):.1f})" for d in depths)
        table.add_row(weights, chosen, by, ranks)
        console.print(
            f"{weights}: ln s_i(P) moved by {one.change:.1e} in the last sweep; {one.provenance.seconds:.0f} s"
        )
    console.print(table)


if __name__ == "__main__":
    main()
