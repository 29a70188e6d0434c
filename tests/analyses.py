"""Analyses made by hand, of random numbers, for tests of what shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tlcoupling import Analysis, DepthCoupling, Growth, Linearity
from tlcoupling.results import Provenance

HOSTILE_TOKENS = (
    "<bos>",
    "</script><script>window.x=1</script>",
    "&lt;",
    "<img src=x onerror=window.x=2>",
    "🦜🏳️‍🌈",
    "שלום",
    "\u202eevil",
    "\n",
    "",
    '"><b>[red]',
    "$body ${data}",
    "\ud83e",
)


def make_analysis(
    tokens: Sequence[str] = ("The", " cat", " sat", "."),
    *,
    n_layers: int = 4,
    n_heads: int = 2,
    positions: Sequence[int] = (-1,),
    ks: Sequence[int] = (3,),
    sublayers: Sequence[str] = ("block", "attn", "mlp"),
    with_attention: bool = True,
    sequential: bool = True,
    **changes: Any,
) -> Analysis:
    """An analysis of a model of width 16 with the given tokens; ``changes`` replace fields of the Analysis."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    tokens, n_tokens = tuple(tokens), len(tokens)
    provenance = Provenance(
        model_name="maker/tiny",
        weight_processing={"normalization_type": "RMS", "layer_norm_folded": False},
        str_tokens=tokens,
        engine={"block": "analytic", "attn": "autograd"},
        seconds=1.25,
    )
    pairs = (len(sublayers), len(positions), len(ks), n_layers, n_layers)
    eye = torch.eye(n_layers)
    coupling = DepthCoupling(
        provenance=provenance,
        values=0.3 * random(*pairs) * (1 - eye) + eye,
        null=(0.02 * random(*pairs[:-1], 1)).expand(pairs),
        null_std=0.004 + 0.001 * random(*pairs[:-1], 1).expand(pairs),
        overlap_u=random(*pairs),
        overlap_v=random(*pairs),
        overlap_null=torch.tensor(ks, dtype=torch.float64) / 16,
        singular_values=random(*pairs[:2], n_layers, max(ks)),
        frobenius=random(*pairs[:2], n_layers),
        frobenius_error=torch.zeros(*pairs[:2], n_layers),
        residual=random(*pairs[:2], n_layers),
        sublayers=tuple(sublayers),
        positions=tuple(pos % n_tokens for pos in positions),
        tokens=tuple(tokens[pos] for pos in positions),
        ks=tuple(ks),
        layers=tuple(range(n_layers)),
        normalizer="frobenius",
        bases="uv",
        absolute=True,
    )
    paths = {"block": n_layers, "sublayer": 2 * n_layers, "attn": n_layers, "mlp": n_layers}
    linearity = Linearity(
        provenance=provenance,
        lss=1 + random(len(paths), n_tokens),
        straightness=random(len(paths), n_tokens),
        paths=tuple(paths),
        steps=tuple(paths.values()),
        tokens=tokens,
    )
    norms = 1 + random(n_layers + 1, n_tokens).cumsum(0)
    alpha = norms.log().diff(dim=0)
    attn_share = 0.4 * alpha if sequential else None
    growth = Growth(
        provenance=provenance,
        norms=norms,
        alpha=alpha,
        attn_share=attn_share,
        mlp_share=None if attn_share is None else alpha - attn_share,
        expodistance=1 + random(n_tokens),
        rate=alpha.mean(0),
        slope=random(n_tokens),
        r_squared=random(n_tokens),
        tokens=tokens,
    )
    fields: dict[str, Any] = {
        "provenance": provenance,
        "coupling": coupling,
        "linearity": linearity,
        "growth": growth,
        "attention": random(n_heads, n_tokens, n_tokens).tril() if with_attention else None,
        "attention_layer": 1,
        "tokens": tokens,
    }
    return Analysis(**{**fields, **changes})
