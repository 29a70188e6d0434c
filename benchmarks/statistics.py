"""Hold each statement about chance against simulation: the null, the rotation test, intervals, and correlations.

Each row prints what the library says, what simulation found, the number of simulations and the standard error.

    python benchmarks/statistics.py            # about ten minutes on one core
    python benchmarks/statistics.py --quick    # a tenth of the simulations
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import tlcoupling as tlc
from tlcoupling.coupling.chance import Drawn, draw_excess
from tlcoupling.coupling.metric import coupling
from tlcoupling.coupling.null import null_coupling, null_std
from tlcoupling.results.intervals import mean_interval
from tlcoupling.scores.clusters import jackknife

PROMPT = "When Mary and John went to the store"
K = 10


def haar(*shape: int, generator: torch.Generator) -> Tensor:
    """Random frames in float64; signs of R's diagonal make them Haar-random."""
    q, r = torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def row(name: str, said: str, found: float, error: float, simulations: int) -> None:
    print(f"{name:<66} {said:>14}  found {found:10.5f} +- {error:.5f}  ({simulations} simulations)", flush=True)


def share(name: str, said: str, happened: np.ndarray) -> None:
    part = float(np.mean(happened))
    row(name, said, part, math.sqrt(max(part * (1 - part), 1e-9) / happened.size), happened.size)


def trained_spectra(trace: tlc.Trace) -> dict[str, Tensor]:
    """All singular values of SmolLM2's Jacobians of three layers, and of 1 / i^2."""
    spectra = {"1 / i^2": torch.arange(1, 577, dtype=torch.float64) ** -2.0}
    for layer in (0, 14, 29):
        jacobian = tlc.residual_jacobian(trace, layer=layer, sublayer="block", src=-1, dest=-1).dense()
        spectra[f"block {layer}"] = torch.linalg.svdvals(jacobian.double())
    return spectra


def null(spectra: dict[str, Tensor], draws: int) -> None:
    """Mean and standard deviation of the coupling of one pair with random bases, for K / d up to 1.

    At the whole width for K up to 10, and for each eighth singular value at a width of 72.
    """
    generator = torch.Generator().manual_seed(0)
    cases = [(name, s, k) for name, s in spectra.items() for k in (1, K)]
    cases += [(f"{name}, each eighth", s[::8], k) for name, s in spectra.items() for k in (36, 68, 72)]
    for name, s, k in cases:
        d, batch = len(s), 50
        values = torch.cat(
            [
                coupling(
                    haar(batch, d, k, generator=generator).mT * s @ haar(batch, d, k, generator=generator),
                    s[:k].expand(batch, k),
                )
                for _ in range(draws // batch)
            ]
        )
        n, spread = len(values), values.std()
        said, std = (float(each(s[:k], s.norm(), d)) for each in (null_coupling, null_std))
        kurtosis = float(((values - values.mean()) / spread).pow(4).mean())
        shift = float(values.mean() - said) / float(spread)
        row(f"null's miss in standard deviations, {name}, K = {k} of {d}", "0 +- 0.05", shift, n**-0.5, n)
        row(f"spread over null_std, {name}, K = {k} of {d}", "0.9 to 1.1", float(spread) / std,
            math.sqrt((kurtosis - 1) / (4 * n)), n)  # fmt: skip


def rotations(s: Tensor, worlds: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the mean excess of Jacobians whose whole bases are rotated, one rotation for all pairs of a layer."""
    n, d = s.shape
    off = ~torch.eye(n, dtype=torch.bool)
    chance = null_coupling(s[:, :K], s.norm(dim=-1), d)
    for _ in range(worlds):
        u, v = haar(n, d, d, generator=generator), haar(n, d, d, generator=generator)
        jacobians = u * s[:, None] @ v.mT
        projected = u[None, ..., :K].mT @ (jacobians[:, None] @ v[None, ..., :K])
        yield (coupling(projected, s[:, None, :K].expand(n, n, K)) - chance[:, None])[off].mean()


def rotation_test(spectra: dict[str, Tensor], worlds: int) -> None:
    """Size of the test where bases are independent, with spectra of trained Jacobians shrunk to a width of 72."""
    generator = torch.Generator().manual_seed(1)
    s = torch.stack([spectra[name][::8] for name in ("block 0", "block 14", "block 29") for _ in range(2)])
    found = torch.stack(list(rotations(s, worlds, generator)))
    top, norm = s[None, :, :K], s.norm(dim=-1)[None]
    n = len(s)
    chance = null_coupling(top, norm, 72)[:, None, :, None].expand(1, 1, n, n)
    drawn = Drawn(
        top, norm, chance, torch.full((1, n, n), 72.0), torch.tensor([True]), 72, (K,), "frobenius", "uv", True
    )
    off = ~torch.eye(n, dtype=torch.bool)
    draws = torch.cat(list(draw_excess(drawn, 9999, 0)))[:, 0, 0, off].double().mean(-1)
    above = 1.0 + (draws[:, None] >= found).sum(0)
    below = 1.0 + (draws[:, None] <= found).sum(0)
    p = 2 * torch.minimum(above, below) / 10_000
    share("rotation test, independent bases with trained spectra, p <= 0.05", "0.05", (p <= 0.05).numpy())
    z = (found - draws.mean()) / found.std()
    share("the same mean beyond 1.96 of its own standard deviations", "0.05", (z.abs() > 1.96).numpy())


def fresh_weights(model: Any, seeds: int) -> None:
    """Excess of fresh weights of SmolLM2's shape, over depth and over heads, and the size of the test on them."""
    depth, heads, shared, p, of_heads, beyond = [], [], [], [], [], []
    for seed in range(seeds):
        trace = tlc.trace(tlc.random_baseline(model, seed), PROMPT)
        over_depth, over_heads = tlc.depth_coupling(trace, K), tlc.head_coupling(trace, K)
        depth.append(over_depth.mean("excess").mean().item())
        heads.append(over_heads.mean("excess").mean().item())
        groups = torch.tensor(over_heads.key_value_heads)
        same = (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool)
        shared.append(over_heads.excess[..., same].mean().item())
        test = over_depth.test(draws=399, seed=seed)
        p += test.p[..., 0].flatten().tolist()
        of_heads += over_heads.test(draws=399, seed=seed).p[..., 0].flatten().tolist()
        off = ~torch.eye(over_depth.values.shape[-1], dtype=torch.bool)
        beyond += (over_depth.z[..., off] > 3.09).flatten().tolist()
    for name, values in (
        ("mean excess of fresh weights over depth", depth),
        ("over heads, pairs of one key-value head left out", heads),
    ):
        row(name, "0 +- 0.0005", float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(seeds), seeds)
    row("over heads of one key-value head", "left out", float(np.mean(shared)), float(np.std(shared)), seeds)
    share("rotation test on fresh weights over depth, p <= 0.05", "0.05", np.array(p) <= 0.05)
    share("rotation test on fresh weights over heads, p <= 0.05", "0.05", np.array(of_heads) <= 0.05)
    share("z of single pairs beyond 3.09 (descriptive, no test)", "about 0.01", np.array(beyond))


def power(trace: tlc.Trace) -> None:
    """The test on the trained model."""
    test = tlc.depth_coupling(trace, K).test(draws=399)
    for index, name in enumerate(test.labels[0]):
        values = test.p[index, 0, 0]
        row(f"p of SmolLM2's {name}, all pairs", "small", float(values[0]), 0.0, 399)
        share(f"distances of {name} with p <= 0.05", "", (values[1:] <= 0.05).numpy())


def intervals(samples: int) -> None:
    """Coverage of 95 % intervals over prompts, and of paired differences."""
    rng = np.random.default_rng(0)
    draws: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
        "normal": (lambda x: x, 0.0),
        "lognormal, sigma 0.5": (lambda x: np.exp(0.5 * x), math.exp(0.125)),
    }
    for kind, (of, truth) in draws.items():
        for n in (6, 8, 12, 20, 30):
            found = mean_interval(torch.from_numpy(of(rng.standard_normal((n, samples)))), 0.95, kind)
            share(f"95 % interval, {n} {kind} prompts, covers", "0.93 or more", covers(found, truth))
    level = 5 * rng.standard_normal((8, samples))  # prompts differ more than models
    one, other = (level + rng.standard_normal((8, samples)) for _ in range(2))
    share("paired difference of two models, 8 prompts, covers", "0.93 or more", covers(
        mean_interval(torch.from_numpy(one - other), 0.95, "difference"), 0.0
    ))  # fmt: skip


def covers(found: dict[str, Tensor], truth: float) -> np.ndarray:
    return ((found["low"] <= truth) & (truth <= found["high"])).numpy()


def clusters(tables: int) -> None:
    """False positives and coverage of correlations over checkpoints of runs, which are random walks."""
    rng = np.random.default_rng(0)
    for runs, steps in ((4, 10), (6, 10), (8, 10), (20, 10), (8, 1)):
        names = np.repeat([str(run) for run in range(runs)], steps).tolist()
        for rho in (0.0, 0.6):
            p, covered = [], []
            for _ in range(tables):
                x, noise = rng.standard_normal((2, runs, steps)).cumsum(-1).reshape(2, -1)
                y = rho * x + math.sqrt(1 - rho**2) * noise
                found = jackknife(lambda rows, x=x, y=y: float(np.corrcoef(x[rows], y[rows])[0, 1]), names, 0.95)
                p.append(found.p <= 0.05)
                covered.append(found.low <= rho <= found.high)
            if rho == 0:
                share(f"correlate, {runs} runs of {steps}, unrelated, p <= 0.05", "0.03 to 0.06", np.array(p))
            share(f"correlate, {runs} runs of {steps}, r = {rho}, covers", "0.94 to 0.98", np.array(covered))


def overlaps(seeds: int) -> None:
    """Overlap of what small fresh models read: the norm projects the stream's direction out of 32."""
    table = pd.DataFrame(
        [
            {"found": found.mean("overlap_v").mean().item(), "null": found.mean("overlap_null_v").mean().item()}
            for found in (tlc.depth_coupling(tlc.trace(small(seed), torch.arange(5)), 4) for seed in range(seeds))
        ]
    )
    gap = table["found"] - table["null"]
    row("overlap V minus its null, width 32, fresh weights", "0", gap.mean(), gap.std() / math.sqrt(seeds), seeds)
    gap = table["found"] - 4 / 32
    row("overlap V minus K / d, the same models", "above 0", gap.mean(), gap.std() / math.sqrt(seeds), seeds)


def small(seed: int) -> object:
    """A fresh model of width 32."""
    settings = {"n_layers": 4, "d_model": 32, "n_heads": 4, "d_head": 8, "d_mlp": 64, "n_ctx": 16, "d_vocab": 50}
    settings |= {"act_fn": "gelu_new", "normalization_type": "LN", "seed": seed}
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.model_bridge import TransformerBridge

        torch.manual_seed(seed)
        return TransformerBridge.boot_native(settings).eval()
    return HookedTransformer(HookedTransformerConfig(**settings)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the simulations")
    share_of = 10 if parser.parse_args().quick else 1
    warnings.simplefilter("ignore")
    intervals(100_000 // share_of)
    clusters(1000 // share_of)
    overlaps(60 // share_of)
    model = tlc.load_model("smollm2-135m")
    trace = tlc.trace(model, PROMPT)
    spectra = trained_spectra(trace)
    null(spectra, 4000 // share_of)
    rotation_test(spectra, 4000 // share_of)
    power(trace)
    fresh_weights(model, 20 // share_of)


if __name__ == "__main__":
    main()
