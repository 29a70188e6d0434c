"""Hold each statement about chance against simulation: the null, the rotation test, intervals, and correlations.

Each row has what is to hold, what simulation found, its standard error and the number of simulations.

    python benchmarks/chance.py                        # all rows: about four minutes of one core
    python benchmarks/chance.py --rows null intervals  # some groups of rows
    python benchmarks/chance.py --write                # also replace these rows in docs/concepts/chance.csv
    python benchmarks/chance.py --quick                # a tenth of the simulations
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import tlcoupling as tlc
from tlcoupling.coupling.chance import Drawn, draw_excess
from tlcoupling.coupling.metric import coupling
from tlcoupling.coupling.null import null_coupling, null_std
from tlcoupling.linalg.haar import haar_of
from tlcoupling.results.intervals import LEAST, mean_interval
from tlcoupling.scores.clusters import jackknife

STORED = Path(__file__).parents[1] / "docs" / "concepts" / "chance.csv"
PROMPT = "When Mary and John went to the store"
K = 10
SMALL = {"n_layers": 6, "d_model": 64, "n_heads": 4, "d_head": 16, "d_mlp": 128, "n_ctx": 16, "d_vocab": 50}
SMALL |= {"act_fn": "gelu_new", "normalization_type": "LN"}


@dataclass(frozen=True)
class Row:
    """A statement about chance.

    Attributes:
        what: the number.
        low: the least that is to hold.
        high: the most.
        found: the number in simulation.
        error: its standard error.
        simulations: how many.
    """

    what: str
    low: float
    high: float
    found: float
    error: float
    simulations: int

    def holds(self, errors: float) -> bool:
        """Return whether simulation agrees, given so many standard errors."""
        return self.low - errors * self.error <= self.found <= self.high + errors * self.error

    def __str__(self) -> str:
        """One line."""
        said = f"{self.low:g} to {self.high:g}"
        return f"{self.what:<76} {said:>16}  found {self.found:9.5f} +- {self.error:.5f}  ({self.simulations})"


def mean(what: str, low: float, high: float, values: Any) -> Row:
    """Return the row of a mean of independent numbers."""
    values = np.asarray(values, float)
    return Row(what, low, high, float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values)), len(values))


def share(what: str, low: float, high: float, happened: Any) -> Row:
    """Return the row of a share; in an array ``[world, event]``, the events of a world may be dependent."""
    happened = np.asarray(happened, float)
    part, n = float(happened.mean()), happened.size
    near = min(max(part, low), high)
    error = math.sqrt(near * (1 - near) / n)
    if happened.ndim > 1:
        worlds = happened.mean(1)
        error = max(error, float(worlds.std(ddof=1)) / math.sqrt(len(worlds)))
    return Row(what, low, high, part, error, n)


def haar(*shape: int, generator: torch.Generator) -> Tensor:
    """Random frames in float64."""
    return haar_of(torch.randn(*shape, generator=generator, dtype=torch.float64))


@functools.cache
def smollm2() -> Any:
    return tlc.load_model("smollm2-135m")


@functools.cache
def trained_spectra() -> dict[str, Tensor]:
    """All singular values of SmolLM2's Jacobians of three layers, and 1 / i^2."""
    trace = tlc.trace(smollm2(), PROMPT)
    spectra = {"1 / i^2": torch.arange(1, 577, dtype=torch.float64) ** -2.0}
    for layer in (0, 14, 29):
        jacobian = tlc.residual_jacobian(trace, layer=layer, sublayer="block", src=-1, dest=-1).dense()
        spectra[f"block {layer} of SmolLM2"] = torch.linalg.svdvals(jacobian.double())
    return spectra


def null(part: float) -> Iterator[Row]:
    """Mean and standard deviation of the coupling of one pair with random bases, for K / d up to 1.

    At the whole width for K up to 10, and for each eighth singular value at a width of 72.
    """
    generator, draws = torch.Generator().manual_seed(0), int(4000 * part)
    cases = [(name, s, k) for name, s in trained_spectra().items() for k in (1, K)]
    cases += [(f"{name}, each eighth value", s[::8], k) for name, s in trained_spectra().items() for k in (36, 68, 72)]
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
        n, spread = len(values), float(values.std())
        said, std = (float(each(s[:k], s.norm(), d)) for each in (null_coupling, null_std))
        kurtosis = float(((values - values.mean()) / spread).pow(4).mean())
        where = f"{name}, K = {k} of {d}"
        yield Row(f"null off by spreads: {where}", -0.05, 0.05, (float(values.mean()) - said) / spread, n**-0.5, n)
        yield Row(f"spread over null_std: {where}", 0.9, 1.1, spread / std, math.sqrt((kurtosis - 1) / (4 * n)), n)


def rotation(part: float) -> Iterator[Row]:
    """Size of the test where bases are independent, with spectra of trained Jacobians shrunk to a width of 48."""
    generator, worlds, count, k = torch.Generator().manual_seed(1), int(10_000 * part), int(39_999 * part), 4
    s = torch.stack([spectrum[::12] for spectrum in list(trained_spectra().values())[1:] for _ in range(2)])
    n, d = s.shape
    off = ~torch.eye(n, dtype=torch.bool)
    top, norm = s[None, :, :k], s.norm(dim=-1)[None]
    chance = null_coupling(s[:, :k], norm[0], d)[:, None].expand(n, n)
    found = []
    for _ in range(worlds):
        u, v = haar(n, d, d, generator=generator), haar(n, d, d, generator=generator)
        projected = u[None, ..., :k].mT @ ((u * s[:, None] @ v.mT)[:, None] @ v[None, ..., :k])
        found.append((coupling(projected, s[:, None, :k].expand(n, n, k)) - chance)[off].mean())
    whole = torch.full((1, n, n), float(d))
    drawn = Drawn(top, norm, chance[None, None], whole, torch.tensor([True]), d, (k,), "frobenius", "uv", True)
    draws = torch.cat(list(draw_excess(drawn, count, 0)))[:, 0, 0, off].double().mean(-1)
    sides = [1.0 + (compare(draws[:, None], torch.stack(found))).sum(0) for compare in (torch.ge, torch.le)]
    p = 2 * torch.minimum(*sides) / (count + 1)
    yield share("p <= 0.05, independent bases with SmolLM2's spectra", 0.04, 0.06, (p <= 0.05).numpy())
    yield share("p <= 0.01, the same", 0.005, 0.015, (p <= 0.01).numpy())


def fresh(part: float) -> Iterator[Row]:
    """Size of the test on fresh LayerNorm models of width 64, over depth and over heads, at the last token."""
    p, p_of_heads, excess = [], [], []
    for seed in range(int(800 * part)):
        trace = tlc.trace(native(seed, **SMALL), torch.randint(50, (3,), generator=torch.Generator().manual_seed(seed)))
        found = tlc.depth_coupling(trace, 4)
        test = found.test(draws=199, seed=seed)
        p.append(test.p[:, 0, 0, 0].tolist())
        excess.append(float(found.mean("excess").mean()))
        p_of_heads.append(tlc.head_coupling(trace, 4).test(draws=199, seed=seed).p[:, 0, 0].tolist())
    name = "fresh models of width 64"
    yield share(f"p <= 0.05 over depth, {name}", 0.04, 0.06, np.array(p) <= 0.05)
    yield share(f"p <= 0.05 over the heads of a layer, {name}", 0.04, 0.06, np.array(p_of_heads) <= 0.05)
    yield mean(f"mean excess over depth, {name}", -0.0005, 0.0005, excess)


def weights(part: float) -> Iterator[Row]:
    """Excess of fresh weights of SmolLM2's shape."""
    depth, trace_norm, heads, shared, beyond = [], [], [], [], []
    for seed in range(max(2, int(4 * part))):
        trace = tlc.trace(tlc.random_baseline(smollm2(), seed), PROMPT)
        over_depth, over_heads = tlc.depth_coupling(trace, K), tlc.head_coupling(trace, K)
        depth.append(float(over_depth.mean("excess").mean()))
        heads.append(float(over_heads.mean("excess").mean()))
        trace_norm.append(
            float(tlc.depth_coupling(trace, K, sublayers="block", normalizer="trace").mean("excess").mean())
        )
        groups = torch.tensor(over_heads.key_value_heads)
        same = (groups[:, None] == groups) & ~torch.eye(len(groups), dtype=torch.bool)
        shared.append(float(over_heads.excess[..., same].mean()))
        off = ~torch.eye(over_depth.values.shape[-1], dtype=torch.bool)
        beyond.append((over_depth.z[..., off] > 3.09).flatten().tolist())
    name = "fresh weights of SmolLM2's shape"
    yield mean(f"mean excess over depth, {name}", -0.0005, 0.0005, depth)
    yield mean(f"the same with the trace normaliser, {name}", -0.001, 0.001, trace_norm)
    yield mean(f"mean excess over heads, {name}", -0.0005, 0.0005, heads)
    yield mean("the same of heads of one key-value head, which are left out", 0.005, 1, shared)
    yield share("z > 3.09 of single pairs, which describes and is no test", 0.002, 0.02, beyond)


def tokens(part: float) -> Iterator[Row]:
    """Token-wise coupling of fresh models: a layer's own weights couple its tokens, far beyond the null."""
    means = []
    for seed in range(max(2, int(12 * part))):
        model = native(seed, **{**SMALL, "d_model": 96, "d_head": 24, "d_mlp": 384, "n_layers": 3})
        found = tlc.token_coupling(tlc.trace(model, torch.arange(5)), 4, layers=[0, 1])
        means.append(found.mean("excess").flatten().tolist())
    yield share("excess of tokens is 0.3 to 0.8, fresh models of width 96", 0.95, 1, [
        [0.3 <= one <= 0.8 for one in of] for of in means
    ])  # fmt: skip


def overlaps(part: float) -> Iterator[Row]:
    """Overlap of what small fresh models read: the norm projects the stream's direction out of 32."""
    gaps, of_width = [], []
    for seed in range(int(80 * part)):
        model = native(seed, **{**SMALL, "d_model": 32, "d_head": 8, "d_mlp": 64, "n_layers": 4})
        found = tlc.depth_coupling(tlc.trace(model, torch.arange(5)), 4)
        overlap = found.mean("overlap_v").mean()
        gaps.append(float(overlap - found.mean("overlap_null_v").mean()))
        of_width.append(float(overlap) - 4 / 32)
    yield mean("overlap V minus its null, fresh models of width 32", 0, 0, gaps)
    yield mean("overlap V minus K / d, the same models", 0, 1, of_width)


def power(part: float) -> Iterator[Row]:
    """The test on the trained model, with the least p that its draws can show."""
    draws = int(399 * part)
    test = tlc.depth_coupling(tlc.trace(smollm2(), PROMPT), K).test(draws=draws)
    for index, name in enumerate(test.labels[0]):
        yield Row(f"p of SmolLM2's {name}, all pairs", 0, 2 / (draws + 1), float(test.p[index, 0, 0, 0]), 0.0, draws)
        found = (test.p[index, 0, 0, 1:] <= 0.05).float().mean()
        yield Row(f"distances of SmolLM2's {name} with p <= 0.05, a share", 0.5, 1, float(found), 0.0, 29)


def intervals(part: float) -> Iterator[Row]:
    """Coverage of 95 % intervals over prompts, and of paired differences."""
    rng, samples = np.random.default_rng(0), int(100_000 * part)
    kinds: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
        "normal": (lambda x: x, 0.0),
        "lognormal (sigma 0.5)": (lambda x: np.exp(0.5 * x), math.exp(0.125)),
    }
    for kind, (of, truth) in kinds.items():
        for n in (LEAST, 8, 12, 20, 30):
            ends = mean_interval(torch.from_numpy(of(rng.standard_normal((n, samples)))), 0.95, kind)
            yield share(f"95 % interval covers, {n} {kind} prompts", 0.93, 1, covers(ends, truth))
    few = mean_interval(torch.from_numpy(rng.standard_normal((LEAST - 1, samples))), 0.95, "few")
    yield share(f"the ends are NaN, {LEAST - 1} prompts", 1, 1, few["low"].isnan().numpy())
    level = 5 * rng.standard_normal((8, samples))  # prompts differ more than models
    one, other = (level + rng.standard_normal((8, samples)) for _ in range(2))
    ends = mean_interval(torch.from_numpy(one - other), 0.95, "difference")
    yield share("paired difference of two models covers, 8 prompts", 0.93, 1, covers(ends, 0.0))


def covers(ends: dict[str, Tensor], truth: float) -> np.ndarray:
    return ((ends["low"] <= truth) & (truth <= ends["high"])).numpy()


def correlations(part: float) -> Iterator[Row]:
    """False positives and coverage of correlations over checkpoints of runs, which are random walks."""
    rng = np.random.default_rng(0)
    for runs, steps in ((4, 10), (6, 10), (8, 10), (20, 10), (8, 1)):
        names = np.repeat([str(run) for run in range(runs)], steps).tolist()
        for rho in (0.0, 0.6):
            p, covered = [], []
            for _ in range(int(2000 * part)):
                x, noise = rng.standard_normal((2, runs, steps)).cumsum(-1).reshape(2, -1)
                y = rho * x + math.sqrt(1 - rho**2) * noise
                found = jackknife(lambda rows, x=x, y=y: float(np.corrcoef(x[rows], y[rows])[0, 1]), names, 0.95)
                p.append(found.p <= 0.05)
                covered.append(found.low <= rho <= found.high)
            where = f"{runs} runs of {steps} checkpoints"
            if rho == 0:
                yield share(f"p <= 0.05, unrelated, {where}", 0.03, 0.06, p)
            yield share(f"interval covers r = {rho}, {where}", 0.94, 0.98, covered)


def native(seed: int, **settings: Any) -> Any:
    """A model of transformer-lens with fresh weights."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        from transformer_lens.model_bridge import TransformerBridge

        torch.manual_seed(seed)
        return TransformerBridge.boot_native({**settings, "seed": seed}).eval()
    return HookedTransformer(HookedTransformerConfig(**settings, seed=seed)).eval()


GROUPS: dict[str, Callable[[float], Iterator[Row]]] = {
    each.__name__: each for each in (null, rotation, fresh, weights, tokens, overlaps, power, intervals, correlations)
}


def stored() -> dict[str, list[Row]]:
    """Return the rows in the documentation, by group."""
    rows: dict[str, list[Row]] = {}
    with STORED.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            numbers = [float(line[name]) for name in ("low", "high", "found", "error")]
            rows.setdefault(line["group"], []).append(Row(line["what"], *numbers, int(line["simulations"])))
    return rows


def write(group: str, rows: list[Row]) -> None:
    """Replace a group's rows in the documentation."""
    known = {**(stored() if STORED.exists() else {}), group: rows}
    with STORED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["group", *Row.__dataclass_fields__], lineterminator="\n")
        writer.writeheader()
        for name in GROUPS:
            for row in known.get(name, []):
                short = {
                    field: float(f"{value:.4g}") for field, value in asdict(row).items() if field in ("found", "error")
                }
                writer.writerow({"group": name, **asdict(row), **short})


def simulated(name: str, part: float) -> list[Row]:
    """Return the rows of a group, from a part of the simulations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(GROUPS[name](part))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the simulations")
    parser.add_argument("--write", action="store_true", help=f"also replace these rows in {STORED.name}")
    chosen = parser.parse_args(arguments)
    failing: list[Row] = []
    for name in chosen.rows:
        started = time.process_time()
        rows = simulated(name, 0.1 if chosen.quick else 1.0)
        print(f"\n{name}, {time.process_time() - started:.0f} s", *rows, sep="\n  ", flush=True)
        failing += [row for row in rows if not row.holds(3)]
        if chosen.write:
            write(name, rows)
    if failing:
        raise SystemExit("\nNot as said, by more than three standard errors:\n" + "\n".join(map(str, failing)))


if __name__ == "__main__":
    main()
