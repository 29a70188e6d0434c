"""The paper's claims on SmolLM2-135M-Instruct, beside its own shape with fresh weights, and on the published points."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch

import tlcoupling as tlc
from tlcoupling.scores.tables import published_points

K = 10


@cache
def models() -> dict[str, Any]:
    """Return the trained model and one of its shape with fresh weights."""
    trained = tlc.load_model("smollm2-135m")
    return {"trained": trained, "fresh": tlc.random_baseline(trained)}


@cache
def prompts() -> dict[str, str]:
    """Return the shared prompts by name."""
    return json.loads((files("tlcoupling") / "data/prompts.json").read_text(encoding="utf-8"))


@cache
def traces() -> dict[str, tlc.Trace]:
    """Return a trace of each model on the same prompt."""
    return {name: tlc.trace(model, prompts()["landmarks"]) for name, model in models().items()}


def aligned(folder: Path) -> dict[str, Any]:
    """Coupling of the blocks at the last token, over prompts and beside fresh weights."""
    numbers: dict[str, Any] = {"prompts": len(prompts())}
    many = {name: tlc.analyze_many(model, prompts(), k=K) for name, model in models().items()}
    for name, each in many.items():
        interval = each.interval("excess")
        for row, sublayer in enumerate(each.sublayers):
            numbers[f"{name} {sublayer} coupling"] = float(each.coupling[:, row, 0].mean())
            numbers[f"{name} {sublayer} null"] = float(each.null[:, row, 0].mean())
            numbers[f"{name} {sublayer} excess"] = float(interval.estimate[row, 0])
            numbers[f"{name} {sublayer} low"] = float(interval.low[row, 0])
            numbers[f"{name} {sublayer} high"] = float(interval.high[row, 0])
    block = many["trained"].excess[:, 0, 0]
    numbers |= {"least of prompts": float(block.min()), "most of prompts": float(block.max())}
    couplings = {name: tlc.depth_coupling(trace, K) for name, trace in traces().items()}
    for name, found in couplings.items():
        numbers[f"{name} p"] = float(found.test(draws=999).p[0, 0, 0, 0])
        numbers[f"{name} overlap u"] = float(found.mean("overlap_u")[0, 0, 0])
        numbers[f"{name} overlap v"] = float(found.mean("overlap_v")[0, 0, 0])
    numbers["overlap null"] = K / traces()["trained"].d_model
    profile = couplings["trained"].profile("excess")[0, 0, 0]
    numbers |= {"excess of neighbours": float(profile[0]), "excess 20 apart": float(profile[19])}
    save(
        tlc.viz.figures.coupling_by_distance(couplings["trained"], baseline=couplings["fresh"]), folder / "aligned.png"
    )
    return numbers


def tokens(folder: Path) -> dict[str, Any]:
    """Coupling between the tokens of one layer, and between layers at different tokens, beside fresh weights."""
    numbers: dict[str, Any] = {}
    layer, other = 15, 20
    chosen = range(1, traces()["trained"].n_tokens, 3)
    for name, trace in traces().items():
        within = tlc.token_coupling(trace, K, sublayers="block", layers=[layer], tokens=chosen)
        across = tlc.token_coupling(trace, K, sublayers="block", layers=[layer], basis_layers=[other], tokens=chosen)
        context = tlc.context_coupling(trace, "dest", -1, K, sublayers="block", layers=[layer], tokens=chosen)
        for kind, found in (("within", within), ("across", across), ("context", context)):
            values = found.excess.flatten(-2)
            off = torch.ones(found.excess.shape[-2:], dtype=torch.bool)
            off.fill_diagonal_(False)
            numbers[f"{name} {kind}"] = float(values[..., off.flatten()].mean())
        if name == "trained":
            save(within.plot(), folder / "tokens.png")
    return numbers | {"layer": layer, "other": other, "tokens": len(chosen)}


def trajectories(folder: Path) -> dict[str, Any]:
    """Linearity, growth and principal components of the tokens' trajectories."""
    numbers: dict[str, Any] = {}
    for name, trace in traces().items():
        growth, line = tlc.growth(trace), tlc.linearity(trace)
        kept = ~growth.sinks
        parts = tlc.trajectory_components(trace, 3)
        numbers[f"{name} lss"] = float(line.lss[0][kept].mean())
        numbers[f"{name} ed"] = float(growth.expodistance[kept].mean())
        numbers[f"{name} rate"] = float(growth.rate[kept].mean())
        numbers[f"{name} three components"] = float(parts.explained.sum())
        if name == "trained":
            save(tlc.viz.figures.trajectories(parts), folder / "trajectories.png")
    steps = len(traces()["trained"].resid) - 1
    return numbers | {"layers": steps, "random steps": steps**0.5}


def spectrum(folder: Path) -> dict[str, Any]:
    """The law of the singular values by depth, s(l) = 1 / (a + l)."""
    numbers: dict[str, Any] = {}
    for name, trace in traces().items():
        profile = tlc.singular_value_profile(tlc.depth_coupling(trace, K, sublayers="block"))
        numbers[f"{name} slope"] = float(profile.slope[0, 0, 0])
        numbers[f"{name} r2"] = float(profile.r_squared[0, 0, 0])
        if name == "trained":
            save(tlc.viz.figures.singular_values(profile), folder / "spectrum.png")
    return numbers


def points(folder: Path) -> dict[str, Any]:
    """The published points: coupling against score over all 28, and above a score of 50."""
    table = published_points()
    numbers: dict[str, Any] = {"n": len(table)}
    for name, where in (("all", None), ("above", "score > 50")):
        found = tlc.correlate(table, where=where)
        for row, predictor in enumerate(found.predictors):
            numbers[f"{name} {predictor} r"], numbers[f"{name} {predictor} p"] = (
                float(found.r[row]),
                float(found.p[row]),
            )
        row = found.predictors.index("coupling")
        numbers[f"{name} r2"], numbers[f"{name} n"] = float(found.r_squared[row]), int(found.n[row])
        numbers[f"{name} low"], numbers[f"{name} high"] = float(found.low[row]), float(found.high[row])
        given = found.given.index("same width")
        numbers[f"{name} r at equal width"] = float(found.partial[row, given])
    twins = table[table.duplicated("score", keep=False) & table["model"].str.startswith("phi-1")]
    numbers["twins"] = " and ".join(f"`{one}`" for one in twins["model"])
    numbers["their score"] = float(twins["score"].iloc[0])
    save(tlc.viz.figures.coupling_against_score(table[table["score"] > 50]), folder / "points.png")
    return numbers


def pythia(folder: Path) -> dict[str, Any]:
    """The published points of coupling along the training of two Pythias, as digitised from the paper's figure."""
    table = pd.read_csv(Path(__file__).parent / "published_training.csv")
    numbers: dict[str, Any] = {}
    figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for model, rows in table.groupby("model"):
        steps, coupling = rows["step"].to_numpy(), rows["normalized_coupling"].to_numpy()
        first, last = float(coupling[0]), float(coupling[-1])
        numbers |= {f"{model} first": first, f"{model} last": last}
        for step in (8000, 16000, 64000):
            at = float(coupling[steps == step][0])
            numbers[f"{model} risen by {step}"] = (at - first) / (last - first)
        axes.plot(steps, coupling, "o-", label=model)
    axes.set(xscale="log", xlabel="step", ylabel="normalised coupling, as published")
    axes.legend()
    save(figure, folder / "pythia.png")
    return numbers


def save(figure: Any, path: Path) -> None:
    """Write a figure for the page, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
