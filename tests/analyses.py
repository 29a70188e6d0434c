"""Analyses made by hand, of random numbers, for tests of what shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import tlcoupling as tlc
from tlcoupling import Analysis, ContextCoupling, DepthCoupling, Growth, Linearity, TokenCoupling, viz
from tlcoupling.analysis.shared import SharedDirections
from tlcoupling.results.base import Provenance

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
    token_layers: Sequence[int] = (),
    sequential: bool = True,
    **changes: Any,
) -> Analysis:
    """An analysis of a model of width 16 with the given tokens; ``changes`` replace fields of the Analysis.

    The coupling of tokens is there for the ``token_layers``.
    """
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
    metric: dict[str, Any] = {
        "provenance": provenance,
        "overlap_null": torch.tensor(ks, dtype=torch.float64) / 16,
        "ks": tuple(ks),
        "normalizer": "frobenius",
        "bases": "uv",
        "absolute": True,
    }

    def matrices(*group: int, size: int) -> dict[str, torch.Tensor]:
        axes, eye = (*group, len(ks), size, size), torch.eye(size)
        return {
            "values": 0.3 * random(*axes) * (1 - eye) + eye,
            "null": (0.02 * random(*axes[:-1], 1)).expand(axes),
            "null_std": 0.004 + 0.001 * random(*axes[:-1], 1).expand(axes),
            "overlap_u": random(*axes),
            "overlap_v": random(*axes),
            "singular_values": random(*group, size, max(ks)),
            "frobenius": random(*group, size),
            "frobenius_error": torch.zeros(*group, size),
            "residual": random(*group, size),
        }

    coupling = DepthCoupling(
        **metric,
        **matrices(len(sublayers), len(positions), size=n_layers),
        sublayers=tuple(sublayers),
        positions=tuple(pos % n_tokens for pos in positions),
        tokens=tuple(tokens[pos] for pos in positions),
        layers=tuple(range(n_layers)),
    )
    couplings: dict[str, Any] = {}
    if token_layers:
        shared = {**metric, "positions": tuple(range(n_tokens)), "tokens": tokens, "layers": tuple(token_layers)}
        couplings["token_coupling"] = TokenCoupling(
            **shared,
            **matrices(len(sublayers), len(token_layers), size=n_tokens),
            sublayers=tuple(sublayers),
            basis_layers=tuple(token_layers),
        )
        without_mlp = tuple(name for name in sublayers if name != "mlp")
        for fixed, position in (("src", 0), ("dest", n_tokens - 1)):
            couplings[f"context_{fixed}"] = ContextCoupling(
                **shared,
                **matrices(len(without_mlp), len(token_layers), size=n_tokens),
                sublayers=without_mlp,
                fixed=fixed,
                position=position,
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
        "attention": random(n_layers, n_heads, n_tokens, n_tokens).tril() if with_attention else None,
        "attention_layers": tuple(range(n_layers)) if with_attention else (),
        "tokens": tokens,
        **couplings,
    }
    return Analysis(**{**fields, **changes})


def every_widget(analysis: Analysis) -> dict[str, viz.Widget]:
    """One widget of each kind."""
    return {
        "attention_and_coupling": viz.attention_and_coupling(analysis, 1),
        "depth_coupling": viz.depth_coupling(analysis),
        "tokens": viz.tokens(analysis),
        "dashboard": viz.dashboard(analysis),
    }


def projected_by_hand(n_layers: int, token: str = " the", k: int = 3) -> tlc.ProjectedJacobians:
    """Projected Jacobians of random numbers, with a diagonal as singular vectors give it."""
    generator = torch.Generator().manual_seed(0)
    s = torch.rand(1, n_layers, k, generator=generator).sort(descending=True).values + 0.5
    values = 0.1 * torch.randn(1, n_layers, n_layers, k, k, generator=generator)
    for layer in range(n_layers):
        values[0, layer, layer] = torch.diag(s[0, layer])
    return tlc.ProjectedJacobians(
        provenance=Provenance(model_name="maker/tiny"),
        values=values,
        singular_values=s,
        frobenius=s.norm(dim=-1) + 1,
        sublayers=("block",),
        layers=tuple(range(0, 2 * n_layers, 2)),
        position=3,
        token=token,
        d_model=32,
        bases="uv",
    )


def shared_by_hand(n_layers: int) -> SharedDirections:
    """What every second layer shares, of random numbers, with hostile tokens."""
    projected = projected_by_hand(n_layers)
    k, generator = projected.values.shape[-1], torch.Generator().manual_seed(1)
    words = [HOSTILE_TOKENS[i] for i in range(2)]
    return SharedDirections(
        provenance=Provenance(model_name="maker/tiny"),
        projected=projected,
        scores=torch.rand(n_layers, 2, k, 2, 2, generator=generator).sort(descending=True).values,
        null=torch.tensor([[0.3, 0.2], [0.1, 0.05]]),
        texts=((((tuple(words),) * 2,) * k,) * 2,) * n_layers,
    )
