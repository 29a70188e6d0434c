"""Results as plain data for the page: rounded, NaN and infinity as None, invisible characters of tokens shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from tlcoupling.analysis import Analysis
from tlcoupling.coupling import DepthCoupling
from tlcoupling.results import Provenance
from tlcoupling.viz.summary import (
    by_straightness,
    coupling_rows,
    d_model_of,
    growth_summary,
    linearity_rows,
)

# Cells that the attention component draws without a noticeable wait: all heads, and the zoomed one once more.
ATTENTION_CELLS = 40_000
_SHOWN = {"\n": "↵", "\r": "␍", "\t": "⇥", "\xa0": "⍽"}
_JOINERS = "\u200c\u200d"  # invisible, but they shape the letters and emoji around them


def header(analysis: Analysis) -> dict[str, Any]:
    """What was measured, on what, and how."""
    provenance, coupling = analysis.provenance, analysis.coupling
    measured = [f"{pos} “{visible(text)}”" for pos, text in zip(coupling.positions, coupling.tokens, strict=True)]
    facts = {
        "Size": f"{len(analysis.growth.alpha)} layers, d_model {d_model_of(coupling)}",
        "Tokens": str(len(analysis.tokens)),
        "Jacobians of token": measured[0] if len(measured) == 1 else f"{len(measured)} tokens",
        "Singular vectors": "K = " + ", ".join(map(str, coupling.ks)),
        "Metric": f"{coupling.normalizer} normaliser, {coupling.bases} bases, "
        + ("absolute values" if coupling.absolute else "signed"),
        "Weights": _plain(provenance.weight_processing),
        "Engine": _plain(provenance.engine),
        "Time": f"{provenance.seconds:.1f} s",
    }
    return {
        "model": provenance.model_name,
        "prompt": "".join(analysis.tokens),
        "facts": [[name, text] for name, text in facts.items() if text],
        "versions": _versions(provenance),
    }


def summary(analysis: Analysis) -> dict[str, Any]:
    """The headline numbers."""
    return {
        "coupling": [_rounded(asdict(row)) for row in coupling_rows(analysis.coupling)],
        "linearity": [_rounded(asdict(row)) for row in linearity_rows(analysis.linearity)],
        "growth": _rounded(asdict(growth_summary(analysis.growth))),
        "n_measured": len(analysis.coupling.positions),
    }


def coupling(result: DepthCoupling) -> dict[str, Any]:
    """Matrices and profiles by distance, ``[sublayer][token][k]...``; the null depends on the row alone."""
    return {
        "formula": _formula(result),
        "diagonal_is_one": result.bases == "uv",
        "sublayers": result.sublayers,
        "layers": result.layers,
        "ks": result.ks,
        "positions": result.positions,
        "tokens": [visible(token) for token in result.tokens],
        "values": _rounded(result.values),
        "null": _rounded(result.null[..., 0]),
        "mean": {name: _rounded(result.mean(name)) for name in ("values", "null", "excess")},
        "profile": {name: _rounded(result.profile(name)) for name in ("values", "null")},
    }


def attention(analysis: Analysis) -> dict[str, Any] | None:
    """Attention patterns of one layer, of the last tokens where there are too many to draw; None without patterns."""
    if analysis.attention is None:
        return None
    n_tokens = len(analysis.tokens)
    shown = min(n_tokens, math.isqrt(ATTENTION_CELLS // (len(analysis.attention) + 1)))
    return {
        "layer": analysis.attention_layer,
        "n_tokens": n_tokens,
        "tokens": [_label(visible(token)) for token in analysis.tokens[-shown:]],
        "first": n_tokens - shown,
        "patterns": _rounded(analysis.attention[:, -shown:, -shown:], 3),
    }


def tokens(analysis: Analysis) -> dict[str, Any]:
    """Each token's numbers, and their order by straightness."""
    linearity, growth = analysis.linearity, analysis.growth
    lss = linearity.path("block")
    return {
        "tokens": [visible(token) for token in analysis.tokens],
        "n_steps": linearity.steps[linearity.paths.index("block")],
        "lss": _rounded(lss, 3),
        "ed": _rounded(growth.expodistance, 3),
        "norm": _rounded(growth.norms[-1], 2),
        "rate": _rounded(growth.rate),
        "r_squared": _rounded(growth.r_squared),
        "order": by_straightness(lss),
    }


def growth(analysis: Analysis) -> dict[str, Any]:
    """Logarithms of the norms by token and depth, and their mean growth per layer split by sublayer."""
    result = analysis.growth
    log_norms = result.norms.log()
    shares = {"attn": result.attn_share, "mlp": result.mlp_share}
    return {
        "tokens": [visible(token) for token in analysis.tokens],
        "log_norms": _rounded(log_norms.T, 3),
        "median": _rounded(log_norms.nanmedian(1).values, 3),
        "alpha": _rounded(result.alpha.nanmean(1)),
        "shares": {name: _rounded(share.nanmean(1)) for name, share in shares.items() if share is not None},
    }


def visible(text: str) -> str:
    """A token with line breaks and invisible characters as signs, so that no token looks empty or reorders others."""

    def shown(char: str) -> str:
        if char.isprintable() or (char in _JOINERS and len(text) > 1):
            return char
        return _SHOWN.get(char) or f"\\u{{{ord(char):x}}}"

    return "".join(map(shown, text)) or "∅"


def _formula(result: DepthCoupling) -> str:
    """The coupling as it was measured."""
    projected = "U₂ᵀ J₁ V₂" if result.bases == "uv" else "V₂ᵀ J₁ U₂"
    size = "‖S₁‖" if result.normalizer == "frobenius" else "tr S₁"
    return f"c = 1 − ‖ {f'|{projected}|' if result.absolute else projected} − S₁ ‖ / {size}"


def _label(text: str, longest: int = 16) -> str:
    """A token short enough for an axis."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _plain(mapping: Mapping[str, Any]) -> str:
    """A mapping of provenance in words; one word where all its values are the same."""
    if len(mapping) > 1 and all(value == next(iter(mapping.values())) for value in mapping.values()):
        return f"{next(iter(mapping.values()))} ({', '.join(mapping)})"
    words = {True: "yes", False: "no"}
    return ", ".join(
        f"{name.replace('_', ' ')}: {words[value] if isinstance(value, bool) else value}"
        for name, value in mapping.items()
    )


def _versions(provenance: Provenance) -> str:
    return ", ".join(f"{name} {version}" for name, version in provenance.versions.items())


def _rounded(value: Any, digits: int = 4) -> Any:
    """Numbers rounded, with None for NaN and infinity (JSON has neither), in tensors, lists and dictionaries."""
    if isinstance(value, Tensor):
        return _rounded(value.tolist(), digits)
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    if isinstance(value, dict):
        return {name: _rounded(item, digits) for name, item in value.items()}
    if isinstance(value, float):
        return round(value, digits) + 0.0 if math.isfinite(value) else None  # + 0.0: no "-0.0"
    return value
