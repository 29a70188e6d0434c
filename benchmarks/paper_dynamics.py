"""Measures of the paper's neighbours on SmolLM2-135M, by sublayer and beside fresh weights."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from paper_smollm2 import models, prompts, save

import tlcoupling as tlc
from tlcoupling.dynamics.depth_profile import AGAINST, spearman
from tlcoupling.dynamics.geometry import MAPS
from tlcoupling.results.base import Result
from tlcoupling.viz.shown import Lines, shown

PROMPTS = ("landmarks", "induction")
OF_MAPS = ("symmetric", "rotation", "departure", "effective_rank", "stable_rank")
TOKENS_PER_WIDTH, LENGTH = 10.5, 512


def rotation(folder: Path) -> dict[str, Any]:
    """Eigenvalues, symmetry, normality and rank of J and I + J at the last token of two prompts."""
    numbers: dict[str, Any] = {}
    for prompt in PROMPTS:
        found = tlc.eigen_geometry(tlc.trace(models()["trained"], prompts()[prompt]), baseline=models()["fresh"])
        for weights, one in (("trained", found), ("fresh", found.baseline)):
            assert one is not None
            for s, sublayer in enumerate(one.sublayers):
                numbers[f"{prompt} {weights} {sublayer} complex_share"] = float(one.complex_share[s].mean())
                numbers[f"{prompt} {weights} {sublayer} complex_share null"] = float(one.complex_share_null[s].mean())
                for quantity, (at, of) in ((each, pair) for each in OF_MAPS for pair in enumerate(MAPS)):
                    values, name = getattr(one, quantity)[s, 0, :, at], f"{prompt} {weights} {sublayer} {quantity} {of}"
                    numbers[name] = float(values.mean())
                    numbers[f"{name} rho"] = float(spearman(values, values.new_tensor(one.layers)))
                    null = getattr(one, f"{quantity}_null", None)
                    if null is not None:
                        numbers[f"{name} null"] = float(null[s, 0, :, at].mean())
        if prompt == PROMPTS[0]:
            save(drawn(found, ("symmetric of J", "symmetric of I + J", "stable rank of J")), folder / "rotation.png")
    return numbers


def exponents(folder: Path) -> dict[str, Any]:
    """Lyapunov exponents at the last token of two prompts, and the rank of what is carried to each depth."""
    numbers: dict[str, Any] = {}
    for prompt in PROMPTS:
        found = tlc.lyapunov_spectrum(tlc.trace(models()["trained"], prompts()[prompt]), baseline=models()["fresh"])
        for weights, one in (("trained", found), ("fresh", found.baseline)):
            assert one is not None and one.effective_rank is not None and one.stable_rank is not None
            name, n = f"{prompt} {weights}", len(one.exponents)
            numbers |= {f"{name} {at}": float(one.exponents[at]) for at in (0, n // 2, n - 1)}
            numbers |= {f"{name} by {each}": float(one.growth[:, s, 0].sum()) for s, each in enumerate(one.sublayers)}
            numbers |= {f"{name} rank at {depth}": float(one.effective_rank[depth]) for depth in (1, 7, 15, 30)}
            numbers |= {f"{name} stable rank": float(one.stable_rank[-1]), f"{name} moved": one.change}
        if prompt == PROMPTS[0]:
            save(found.plot(), folder / "exponents.png")
    return numbers


@cache
def texts() -> list[Any]:
    """Return tokens of the help topics that come with Python, ten for each dimension together with the prompts."""
    model: Any = models()["trained"]
    ids = model.to_tokens("\n".join(pydoc_data.topics.topics.values()), prepend_bos=False, truncate=False)
    return list(ids[0].split(LENGTH)[: -(-int(TOKENS_PER_WIDTH * model.cfg.d_model) // LENGTH)])


def layers(folder: Path) -> dict[str, Any]:
    """What each layer and sublayer does to the stream and to the loss, and how that goes with its coupling."""
    found = tlc.depth_profile(models()["trained"], prompts(), texts=texts(), baseline=models()["fresh"])
    numbers: dict[str, Any] = {"prompts": len(found.prompts), "tokens": found.n_tokens}
    numbers["noise"] = float(found.linearity_null.mean())
    for weights, one in (("trained", found), ("fresh", found.baseline)):
        assert one is not None
        interval = one.correlation()
        numbers[f"{weights} loss"] = float(one.loss.mean())
        for s, sublayer in enumerate(one.sublayers):
            for quantity in (*AGAINST[:-1], "coupling", "influence_null", "angular_null"):
                each = getattr(one, quantity)
                by_layer = each[:, s].mean(0) if each.ndim == 3 else each[s]
                numbers[f"{weights} {sublayer} {quantity}"] = float(by_layer.mean())
                for layer in (0, 5, 10, 15, 20, 25, 29):
                    numbers[f"{weights} {sublayer} {quantity} {layer}"] = float(by_layer[layer])
            for row, quantity in enumerate(AGAINST):
                for end in ("estimate", "low", "high"):
                    numbers[f"{weights} {sublayer} {quantity} rho {end}"] = float(getattr(interval, end)[row, s])
    save(drawn(found, ("influence", "linearity", "loss effect", "coupling")), folder / "layers.png")
    return numbers


def drawn(found: Result, groups: Sequence[str]) -> Any:
    """Draw some quantities of a result: a row for each, a panel for each sublayer."""
    rows = [[one for one in shown(found).pictures if isinstance(one, Lines) and one.group == group] for group in groups]
    figure, panels = plt.subplots(
        len(rows), len(rows[0]), figsize=(9, 2.3 * len(rows)), layout="constrained", squeeze=False
    )
    for row, pictures in zip(panels, rows, strict=True):
        for axes, one in zip(row, pictures, strict=True):
            for name, values in one.values.items():
                axes.plot(one.labels, values, "--" if name.startswith("chance") else "-", label=name)
            if one.chance is not None:
                axes.plot(one.labels, one.chance, "k--", label="chance", linewidth=1)
            axes.set(title=one.title, yscale="log" if one.logarithmic else "linear")
        row[0].legend(fontsize=7)
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    return figure
