"""Estimates: what a call would cost, before it is made."""

from __future__ import annotations

import pytest
from cases import CASES, TOKENS

import tlcoupling as tlc
import tlcoupling.analysis.analyze
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.split import splits_of_model
from tlcoupling.jacobian.cost import layer_costs


def test_an_estimate_counts_the_coupling_of_tokens() -> None:
    model = CASES[0].model()
    without, one, two = (tlc.estimate(model, TOKENS, 4, token_layers=layers) for layers in (None, [1], [1, 2]))
    table = two.to_dataframe().set_index("name")["flops"]
    assert table.sum() == pytest.approx(two.flops)
    # as much for each layer, but for the forward pass and the coupling across depth
    assert two.flops - one.flops == pytest.approx(one.flops - without.flops)
    assert one.flops > 2 * without.flops  # 7 tokens of one layer, thrice, against 3 layers of one token
    kind = "tokens and contexts"
    parts = [f"{kind} {sublayer}: decomposition" for sublayer in ("block", "mlp")]
    assert [name for name in table.index if name.startswith(kind)][2::3] == [
        f"{kind} {sublayer}: comparison" for sublayer in ("block", "attn", "mlp")
    ]
    # of blocks J[t -> t], J[0 -> t] and J[s -> last], two of which are the same twice; of MLPs the first alone
    of_block, of_mlp = (table[part] for part in parts)
    n = len(TOKENS)
    assert of_block / of_mlp == pytest.approx((n + 2 * (n - 1) - 1) / n)
    # those that reach a token share its MLP
    cost = layer_costs(model, [1], splits_of_model(model), n)[1]
    once = (2 * (n - 1) + n - 1) * (cost["block"].dense_flops - cost["mlp"].dense_flops) + n * cost["mlp"].dense_flops
    assert table[f"{kind} block: Jacobians"] == pytest.approx(2 * once)
    with pytest.raises(ArgumentError, match="token_layers=3"):
        tlc.estimate(model, TOKENS, 4, token_layers=3)


def test_the_draws_of_a_test_are_counted():
    model = CASES[0].model()
    plain, tested, twice = (tlc.estimate(model, TOKENS, 4, draws=draws) for draws in (0, 100, 200))
    assert twice.flops - plain.flops == pytest.approx(2 * (tested.flops - plain.flops)) and tested.flops > plain.flops
    assert tested.stages[-1].name == "rotation test" and len(tested.stages) == len(plain.stages) + 1
    several = tlc.estimate(model, TOKENS, 4, tokens=[0, 1], draws=100)
    assert tested.stages[-1].flops < several.stages[-1].flops < 2 * tested.stages[-1].flops  # they share numbers


def test_what_blocks_share_is_counted():
    model = CASES[0].model()
    plain, shared = (tlc.estimate(model, TOKENS, 4, shared=each) for each in (False, True))
    matrices, tokens = shared.stages[-2:]
    assert (matrices.name, tokens.name) == ("shared block: matrices", "shared block: tokens")
    assert shared.flops - plain.flops == pytest.approx(matrices.flops + tokens.flops)
    # one decomposes and compares the Jacobians of all blocks, the other reads the vocabulary along each vector
    one, two = (tlc.estimate(model, TOKENS, k, shared=True).stages[-1].flops for k in (3, 4))
    vectors = len(model.blocks) * 6 * model.cfg.d_vocab * model.cfg.d_model
    assert two - one == pytest.approx(vectors)
    many = tlc.estimate(model, TOKENS, [4, 12], tokens="all", shared=True)
    assert [each.flops for each in many.stages[-2:]] == [matrices.flops, tokens.flops], "the first K at one token"
