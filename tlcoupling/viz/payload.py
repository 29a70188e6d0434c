"""Convert an analysis to plain data for the page's sections, except the heat maps (those are in ``panes``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.headline import without_sinks
from tlcoupling.analysis.measures import MEASURES
from tlcoupling.analysis.summary import coupling_rows, growth_summary, linearity_rows, straightest
from tlcoupling.coupling.chance import CouplingTest, p_value
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.results.base import Provenance
from tlcoupling.text import counted, visible
from tlcoupling.viz.plain import packed, plain
from tlcoupling.viz.shown import BASELINE, CHANCE_OF_BASELINE, Lines, shown

_TITLES = {
    "geometry": "Eigenvalues, normality and rank",
    "lyapunov": "Lyapunov exponents",
    "profile": "What each layer does",
}


def header(analysis: Analysis) -> dict[str, Any]:
    """Return the headline, and what was measured on which model and prompt, with which settings."""
    provenance, coupling = analysis.provenance, analysis.coupling
    measured = [
        f"{pos} “\u2068{visible(text)}\u2069”" for pos, text in zip(coupling.positions, coupling.tokens, strict=True)
    ]
    compared = analysis.token_coupling.layers if analysis.token_coupling is not None else ()
    facts = {
        "Size": f"{counted(len(analysis.growth.alpha), 'layer')}, d_model {coupling.d_model}",
        "Tokens": str(len(analysis.tokens)),
        "Layers compared at token": measured[0] if len(measured) == 1 else f"{len(measured)} tokens",
        "Tokens compared in layers": _few(compared) if compared else "none",
        "Singular vectors": "K = " + ", ".join(map(str, coupling.ks)),
        "Metric": f"{coupling.normalizer} normaliser, {coupling.bases} bases, "
        + ("absolute values" if coupling.absolute else "signed"),
        "Weights": _plain(provenance.weight_processing),
        "Engine": _plain(provenance.engine),
        "Time": f"{provenance.seconds:.1f} s",
    }
    return {
        "model": provenance.model_name,
        "headline": analysis.headline(),
        "prompt": analysis.prompt,
        "facts": [[name, text] for name, text in facts.items() if text],
        "versions": _versions(provenance),
    }


def summary(analysis: Analysis) -> dict[str, Any]:
    """Return the numbers of the headline, with those of fresh weights if they were measured."""
    return {
        **_numbers(analysis, analysis.depth_test),
        "fresh": None if analysis.baseline is None else _numbers(analysis.baseline),
        "n_measured": len(analysis.coupling.positions),
    }


def _numbers(analysis: Analysis, test: CouplingTest | None = None) -> dict[str, Any]:
    """Return the rows of the three tables, with p-values as text."""
    rows = coupling_rows(analysis.coupling, test)
    return {
        "coupling": [
            {**plain(asdict(row)), "p": None if test is None or row.p is None else p_value(row.p, test.draws)}
            for row in rows
        ],
        "linearity": [plain(asdict(row)) for row in linearity_rows(analysis.linearity)],
        "growth": plain(asdict(growth_summary(analysis.growth))),
    }


def controls(analysis: Analysis) -> dict[str, Any]:
    """Return the selectable layers, tokens and K of the whole page, and which of them were measured."""
    n_layers = len(analysis.growth.alpha)
    compared = analysis.token_coupling.layers if analysis.token_coupling is not None else ()
    return {
        "layers": list(range(n_layers)),
        "compared": list(compared),
        "tokens": [visible(token) for token in analysis.tokens],
        "positions": list(range(len(analysis.tokens))),
        "measured": list(analysis.coupling.positions),
        "ks": analysis.coupling.ks,
        "start": {
            "layer": compared[len(compared) // 2] if compared else n_layers // 2,
            "token": analysis.coupling.positions[-1],
            "k": analysis.coupling.ks[0],
        },
    }


def depth_controls(coupling: DepthCoupling) -> dict[str, Any]:
    """Return the selectable tokens and K of depth-wise coupling alone."""
    return {
        "layers": [],
        "compared": [],
        "tokens": [visible(token) for token in coupling.tokens],
        "positions": coupling.positions,
        "measured": coupling.positions,
        "ks": coupling.ks,
        "start": {"layer": None, "token": coupling.positions[-1], "k": coupling.ks[0]},
    }


def layer_controls(layer: int, ks: Sequence[int]) -> dict[str, Any]:
    """Return the selectable K of one layer."""
    return {
        "layers": [layer],
        "compared": [],
        "tokens": [],
        "positions": [],
        "measured": [],
        "ks": ks,
        "start": {"layer": layer, "token": None, "k": ks[0] if ks else None},
    }


def tokens(analysis: Analysis) -> dict[str, Any]:
    """Return each token's numbers, and the tokens' order by straightness, without sinks."""
    linearity, growth = analysis.linearity, analysis.growth
    lss = linearity.path("block")
    shares = {"attn_share": growth.attn_share, "mlp_share": growth.mlp_share}
    return {
        "tokens": [visible(token) for token in analysis.tokens],
        "n_steps": linearity.steps[linearity.paths.index("block")],
        "lss": plain(lss),
        "ed": plain(growth.expodistance),
        "cv": plain(growth.cv),
        "norm": plain(growth.norms[-1]),
        "rate": plain(growth.rate),
        **{name: plain(share.mean(0)) for name, share in shares.items() if share is not None},
        "r_squared": plain(growth.r_squared),
        **dict(zip(("most", "least"), straightest(lss, without_sinks(growth)), strict=True)),
    }


def growth(analysis: Analysis) -> dict[str, Any]:
    """Return logarithms of the norms by token and depth, and the mean growth per layer split by sublayer."""
    result = analysis.growth
    log_norms = result.norms.log()
    kept = without_sinks(result)
    shares = {"attn": result.attn_share, "mlp": result.mlp_share}
    return {
        "tokens": [visible(token) for token in analysis.tokens],
        "depth": len(log_norms),
        "log_norms": packed(log_norms),
        "sinks": result.sinks.nonzero().flatten().tolist(),
        "median": plain(log_norms[:, kept].nanquantile(0.5, dim=1)),
        "alpha": plain(result.alpha[:, kept].nanmean(1)),
        "shares": {name: plain(share[:, kept].nanmean(1)) for name, share in shares.items() if share is not None},
    }


def measures(analysis: Analysis) -> list[dict[str, Any]] | None:
    """Return table and curves of the measures that were asked for, beside chance and baseline; None if none was."""
    found = {name: part for name in MEASURES if (part := getattr(analysis, name)) is not None}
    return [_measure(name, part) for name, part in found.items()] or None


def _measure(name: str, result: Any) -> dict[str, Any]:
    """Return what one measure shows of itself."""
    one = shown(result)
    return {
        "name": name,
        "title": f"{_TITLES[name]}: {one.below}",
        "note": one.note,
        "columns": one.columns,
        "rows": plain([list(row) for row in one.rows]),
        "has_baseline": result.baseline is not None,
        "charts": [_chart(picture) for picture in one.pictures if isinstance(picture, Lines)],
    }


def _chart(picture: Lines) -> dict[str, Any]:
    """Return the curves of the model, the baseline, and the chance level of each."""
    lines = {
        "model": next(values for name, values in picture.values.items() if name not in (BASELINE, CHANCE_OF_BASELINE)),
        "chance": picture.chance,
        "baseline": picture.values.get(BASELINE),
        "baseline_chance": picture.values.get(CHANCE_OF_BASELINE),
    }
    return {
        "title": picture.title,
        "group": picture.group or picture.title,
        "axis": picture.axis,
        "labels": list(picture.labels),
        "logarithmic": picture.logarithmic,
        "lines": {role: plain(values) for role, values in lines.items() if values is not None},
    }


def _few(layers: Sequence[int], longest: int = 6) -> str:
    """List the layers, or describe them if there are more than ``longest``."""
    if len(layers) > longest:
        return f"{len(layers)} of them, {layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def _plain(mapping: Mapping[str, Any]) -> str:
    """Describe a mapping of the provenance in words, with a value that all keys share only once."""
    if len(mapping) > 1 and all(value == next(iter(mapping.values())) for value in mapping.values()):
        return f"{next(iter(mapping.values()))} ({', '.join(mapping)})"
    words = {True: "yes", False: "no"}
    return ", ".join(
        f"{name.replace('_', ' ')}: {words[value] if isinstance(value, bool) else value}"
        for name, value in mapping.items()
    )


def _versions(provenance: Provenance) -> str:
    return ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
