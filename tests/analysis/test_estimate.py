"""Estimates: what a call would cost, before it is made."""

from __future__ import annotations

import pytest
from cases import CASES, TOKENS

import tlcoupling as tlc
import tlcoupling.analysis.analyze
from tlcoupling.errors import ArgumentError


def test_an_estimate_counts_the_coupling_of_tokens() -> None:
    model = CASES[0].model()
    without, one, two = (tlc.estimate(model, TOKENS, 4, token_layers=layers) for layers in (None, [1], [1, 2]))
    table = two.to_dataframe().set_index("name")["flops"]
    assert table.sum() == pytest.approx(two.flops)
    # as much for each layer, but for the forward pass and the coupling across depth
    assert two.flops - one.flops == pytest.approx(one.flops - without.flops)
    assert one.flops > 2 * without.flops  # 7 tokens of one layer, thrice, against 3 layers of one token
    for kind, sublayers in {"token-wise": ("block", "attn", "mlp"), "fixed src": ("block", "attn")}.items():
        assert [name.split(":")[0] for name in table.index if name.startswith(kind) and "comparison" in name] == [
            f"{kind} {sublayer}" for sublayer in sublayers
        ]
    with pytest.raises(ArgumentError, match="token_layers=3"):
        tlc.estimate(model, TOKENS, 4, token_layers=3)
