"""Heads: their coupling, whose directions they serve, and their part in each step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case, fresh, relative_error
from oracle import REPRESENTATIVE, plain_coupling

import tlcoupling as tlc
from tlcoupling.coupling.alignment import _aligned
from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.trajectory.head_steps import head_writes

NORMED = [case for case in CASES if case.name in ("hooked-sandwich", "bridge-gemma2")]
each_case = pytest.mark.parametrize("case", [*REPRESENTATIVE, *NORMED], ids=str)


@pytest.fixture
def case_trace(case: Case) -> tlc.Trace:
    return tlc.trace(case.model(), TOKENS)


def head_jacobians(trace: tlc.Trace, layer: int, pos: int) -> list[torch.Tensor]:
    """By autograd through the block's modules."""
    heads = range(trace.model.cfg.n_heads)
    return [tlc.residual_jacobian(trace, layer, "attn", pos, pos, head, engine="autograd").dense() for head in heads]


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


@each_case
@pytest.mark.parametrize("of", ["block", "attn"])
def test_head_alignment_is_the_formula(case: Case, case_trace: tlc.Trace, of: str):
    found = tlc.head_alignment(case_trace, [1, 5], of=of, token=5, layers=[0, 2])
    for i, layer in enumerate(found.layers):
        whole = tlc.residual_jacobian(case_trace, layer, of, 5, 5, engine="autograd").dense()
        u, _, vh = torch.linalg.svd(whole)
        for h, jacobian in enumerate(head_jacobians(case_trace, layer, 5)):
            total = float((jacobian**2).sum())
            for j, k in enumerate(found.ks):
                close = {"rtol": 0, "atol": 1e3 * case.tolerance}
                writes = float(((u[:, :k].mT @ jacobian) ** 2).sum()) / total
                reads = float(((jacobian @ vh[:k].mT) ** 2).sum()) / total
                torch.testing.assert_close(found.writes[i, j, h].item(), writes, **close)
                torch.testing.assert_close(found.reads[i, j, h].item(), reads, **close)
            torch.testing.assert_close(found.frobenius[i, h], jacobian.norm(), rtol=10 * case.tolerance, atol=0)
    assert found.null.tolist() == [1 / 32, 5 / 32]
    assert torch.equal(found.z_writes, (found.writes - found.null[:, None]) / found.null_std)


@pytest.mark.parametrize("d_head", [4, 16])
def test_the_chance_of_alignment_is_what_random_directions_give(d_head: int):
    """Mean and standard deviation of 600 draws, within four standard errors: both are exact."""
    d, ks, draws = 48, (1, 7, 48), 600
    generator = torch.Generator().manual_seed(0)
    out, inner = torch.randn(2, d, d_head, generator=generator, dtype=torch.float64)
    jacobian = out @ inner.mT
    shares = []
    for _ in range(draws):
        u, v = torch.linalg.qr(torch.randn(2, d, d, generator=generator, dtype=torch.float64)).Q
        found = _aligned(jacobian, u, v, ks, d_head)
        shares += [found["writes"], found["reads"]]
    values = torch.stack(shares)
    null = torch.tensor(ks, dtype=torch.float64) / d
    error = values.std(0) / math.sqrt(2 * draws)
    assert ((values.mean(0) - null).abs() <= 4 * error + 1e-12).all()
    spread = values.std(0)[:2] / found["null_std"][:2]
    assert ((spread - 1).abs() < 4 * math.sqrt(3 / (8 * draws))).all()  # a share of few directions is near chi-square
    assert found["null_std"][2] < 1e-6  # all directions hold all of it


def test_heads_of_a_random_model_have_no_excess():
    """Each head has weights of its own: within three standard errors over independent models."""
    for normalizer in ("frobenius", "trace"):
        means = []
        for seed in range(8):
            trace = tlc.trace(fresh(seed), TOKENS[:5])
            means.append(tlc.head_coupling(trace, 4, layers=[0, 1], normalizer=normalizer).mean("excess").mean())
        excess = torch.stack(means)
        assert abs(excess.mean()) < 3 * excess.std() / math.sqrt(len(excess))


@each_case
def test_shares_of_the_step_sum_to_one(case: Case, case_trace: tlc.Trace):
    found = tlc.head_steps(case_trace)
    total = found.attn_share if found.mlp_share is None else found.attn_share + found.mlp_share
    # the sum of the sublayers' writes is checked to IDENTITY_TOLERANCE on every trace
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-7)
    assert (found.cosine.abs() <= 1 + 1e-9).all()
    layer, head, pos = 1, 2, 4
    step = case_trace.resid[layer + 1, pos] - case_trace.resid[layer, pos]
    write = head_writes(case_trace, layer)[head, pos]
    torch.testing.assert_close(found.share[layer, head, pos], write @ step / (step @ step))
    torch.testing.assert_close(found.length[layer, head, pos], write.norm() / step.norm())


@each_case
def test_heads_write_what_the_attention_writes(case: Case, case_trace: tlc.Trace):
    """By switching one head off in the real model: its write is what is missing, up to a post-norm's scale."""
    model, layer, head = case.model(), 1, 2
    writes = head_writes(case_trace, layer)

    def off(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z = z.clone()
        z[..., head, :] = 0
        return z

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", off)]):
        _, cache = model.run_with_cache(TOKENS[None])
    missing = case_trace.attn_out[layer] - cache[f"blocks.{layer}.hook_attn_out"][0]
    if case not in NORMED:
        assert relative_error(writes[head], missing) < 10 * case.tolerance
    else:  # the norm's scale changes too, so the rest of the write is scaled: the directions must span what changed
        for pos in range(len(TOKENS)):
            basis = torch.stack([writes[head, pos], case_trace.attn_out[layer, pos]], dim=1)
            left = missing[pos] - basis @ torch.linalg.lstsq(basis, missing[pos, :, None]).solution[:, 0]
            assert left.norm() < 1e-5 * missing[pos].norm()


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


def test_an_edited_write_is_not_split_into_heads():
    """A hook that changes what the attention writes at one position: its heads do not account for it."""
    model = CASES[0].model()

    def edit(write: torch.Tensor, hook: Any) -> torch.Tensor:
        write = write.clone()
        write[0, 3] += 1.0
        return write

    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", edit)]):
        trace = tlc.trace(model, TOKENS)
        with pytest.raises(UnsupportedModelError, match="heads of layer 1 do not add up"):
            tlc.head_steps(trace)


def test_attention_without_what_a_split_needs_is_refused():
    """The Jacobian of a head and the steps of all heads refuse the same, by name."""
    trace = tlc.trace(CASES[0].model(), TOKENS)
    points = {name: point for name, point in trace._points.items() if not name.endswith("attn.hook_z")}
    without = dataclasses.replace(trace, _points=points)
    for call in (
        lambda: tlc.residual_jacobian(without, 0, "attn", head=0, engine="autograd"),
        lambda: tlc.head_steps(without),
    ):
        with pytest.raises(UnsupportedModelError, match=r"layer 0 .* has no hook_z to split it into heads"):
            call()


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
