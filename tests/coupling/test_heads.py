"""Head coupling of small models, against a plain computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case, fresh
from oracle import NORMED, REPRESENTATIVE, head_jacobians, plain_coupling

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError

each_case = pytest.mark.parametrize("case", [*REPRESENTATIVE, *NORMED], ids=str)


@each_case
@pytest.mark.parametrize(("normalizer", "bases", "absolute"), [("frobenius", "uv", True), ("trace", "vu", False)])
def test_head_coupling_is_the_formula(case: Case, case_trace: tlc.Trace, normalizer: Any, bases: Any, absolute: bool):
    found = tlc.head_coupling(
        case_trace, [2, 4], token=4, layers=[1], normalizer=normalizer, bases=bases, absolute=absolute
    )
    jacobians = head_jacobians(case_trace, 1, 4)
    assert found.values.shape == (1, 2, len(jacobians), len(jacobians))
    for i, j1 in enumerate(jacobians):
        for j, j2 in enumerate(jacobians):
            truth = plain_coupling(j1, j2, 4, normalizer, bases, absolute)
            # singular vectors move by the engines' gap over that of the singular values
            assert abs(float(found.values[0, 1, i, j]) - truth) < 1e3 * case.tolerance
    assert found.provenance.engine == {"attn": "analytic"}


def test_heads_of_a_random_model_have_no_excess():
    """Each head has weights of its own: within three standard errors over independent models."""
    for normalizer in ("frobenius", "trace"):
        means = []
        for seed in range(8):
            trace = tlc.trace(fresh(seed), TOKENS[:5])
            means.append(tlc.head_coupling(trace, 4, layers=[0, 1], normalizer=normalizer).mean("excess").mean())
        excess = torch.stack(means)
        assert abs(excess.mean()) < 3 * excess.std() / math.sqrt(len(excess))


def test_heads_of_one_key_value_head_are_left_out():
    """They share W_K and W_V, so they read the same space with fresh weights; of others chance remains, K / d."""
    found = [
        tlc.head_coupling(tlc.trace(fresh(seed, n_key_value_heads=2), TOKENS[:5]), 4, layers=[0, 1])
        for seed in range(4)
    ]
    assert found[0].key_value_heads == (0, 0, 1, 1)
    assert torch.stack([one.overlap_v[..., 0, 1] for one in found]).mean() > 2 * 4 / 96
    between = torch.stack([one.mean("overlap_v").mean() for one in found])
    assert abs(between.mean() - 4 / 96) < 4 * between.std() / math.sqrt(len(between)) < 0.01
    test = found[0].test(draws=99)
    torch.testing.assert_close(test.excess[..., 0], found[0].mean("excess").double())
    assert test.count.tolist() == [8]
    alone = tlc.head_coupling(tlc.trace(fresh(0, n_key_value_heads=1), TOKENS[:5]), 4, layers=[0])
    assert alone.mean().isnan().all() and alone.test(draws=99).p.isnan().all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("head_coupling", {"token": 7}, r"token=7 .*from -7 to 6"),
        ("head_coupling", {"token": [1]}, r"token=\[1\] .*an int"),
        ("head_coupling", {"k": 9}, r"k=9 .*at most 8, the numerical rank .*\(attn of head 0 of layer 0, token 6\)"),
        ("head_coupling", {"layers": [5]}, r"layers=5 .*from -3 to 2"),
        ("head_alignment", {"of": "head"}, r"^of='head' .*block, attn, mlp"),
        ("head_alignment", {"k": 40}, r"k=40 .*d_model = 32"),
        ("head_alignment", {"token": -8}, r"token=-8"),
    ],
)
def test_bad_arguments(call: str, arguments: dict, message: str):
    trace = tlc.trace(CASES[0].model(), TOKENS)
    with pytest.raises(ArgumentError, match=message):
        getattr(tlc, call)(trace, **{"k": 4, **arguments})


def test_results_come_back_and_tabulate(tmp_path):
    trace = tlc.trace(CASES[0].model(), TOKENS)
    for found, query in (
        (tlc.head_coupling(trace, 4, layers=[2]), "quantity == 'z' and head == 1 and basis_head == 3"),
        (tlc.head_alignment(trace, 4, layers=[2]), "quantity == 'z_writes' and head == 1"),
        (tlc.head_steps(trace), "quantity == 'share' and head == 1 and layer == 2 and pos == 6"),
    ):
        back = tlc.load(found.save(tmp_path / "result.safetensors"))
        assert "\n" not in repr(found)
        assert repr(back) == repr(found)
        assert len(found.to_dataframe().query(query)) == 1
