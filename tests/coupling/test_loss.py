"""The differentiable coupling: its value is the measured one, its gradient that of finite differences."""

from __future__ import annotations

import pytest
import torch
from broken import CUTS, LLAMA, forward, needs_llama
from cases import CASES, FEW, TOKENS, Case, part, randomise
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.coupling.loss import differentiable_triplets
from tlcoupling.coupling.null import null_coupling
from tlcoupling.errors import (
    ArgumentError,
    DegenerateSpectrumError,
    DerivativeError,
    HookError,
    UnsupportedModelError,
)

few = pytest.mark.parametrize("case", FEW, ids=str)


@few
@pytest.mark.parametrize("sublayer", ["block", "attn", "mlp"])
@pytest.mark.parametrize("normalizer", ["frobenius", "trace"])
def test_its_value_is_that_of_depth_coupling(case: Case, sublayer: str, normalizer: str):
    model = case.model()
    trace = tlc.trace(model, TOKENS)
    if sublayer not in trace.sublayers:
        pytest.skip("no MLP")
    measured = tlc.depth_coupling(trace, 3, sublayers=sublayer, tokens=5, normalizer=normalizer)
    null = null_coupling(measured.singular_values, measured.frobenius, trace.d_model, normalizer).mean()
    for quantity, truth in (("values", 1 - measured.mean()), ("excess", null - measured.mean())):
        found = tlc.coupling_loss(
            model, TOKENS, 3, sublayer=sublayer, token=5, normalizer=normalizer, quantity=quantity
        )
        assert found.ndim == 0
        assert abs(float(found) - float(truth)) < 1e3 * case.tolerance  # singular vectors move by it over their gaps


@few
@pytest.mark.parametrize(
    ("sublayer", "settings"),
    [("block", {}), ("attn", {"quantity": "excess"}), ("mlp", {"absolute": False, "normalizer": "trace"})],
)
def test_its_gradient_is_that_of_finite_differences(case: Case, sublayer: str, settings: dict):
    """Along a random direction of all parameters at once; central differences, good to the square of their step."""
    model = case.build(torch.float64)
    if sublayer == "mlp" and case.topology == "single":
        pytest.skip("no MLP")
    for module in (*model.modules(), *getattr(model, "original_model", torch.nn.Module()).modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()

    def loss() -> torch.Tensor:
        return tlc.coupling_loss(model, TOKENS[:4], 2, layers=[0, 2], sublayer=sublayer, **settings)

    loss().backward()
    # a bridge of GPT-2 has its fused weights a second time, as views that nothing uses
    parameters = [p for p in model.parameters() if p.grad is not None]
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum(float((p.grad * direction).sum()) for p, direction in zip(parameters, directions, strict=True))
    step, ends = (1e-6 if case.exact else 1e-5), []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * step)
            ends.append(float(loss()))
    difference = (ends[0] - ends[1]) / (2 * step)
    assert abs(difference) > 1e-3
    # rounding of 1e-15 over the step; where modules cast to float32, 1e-7 of the Jacobians over it, and more by gaps
    assert slope == pytest.approx(difference, rel=1e-5 if case.exact else 3e-2)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), d=st.integers(4, 12), low=st.integers(0, 3))
def test_triplets_carry_their_derivative(seed: int, d: int, low: int):
    """Also of matrices of low rank, whose other singular values coincide at zero."""
    generator = torch.Generator().manual_seed(seed)
    rank, k = d - low, min(2, d - low)
    left, right, a, b = (torch.randn(d, rank, generator=generator, dtype=torch.float64) for _ in range(4))

    def at(t: torch.Tensor | float) -> torch.Tensor:
        return (left + t * a) @ (right + t * b).mT

    def invariant(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (u.mT @ mix @ v).abs().sum() + (u @ u.mT * mix).sum() + (v @ (s[:, None] * v.mT) * mix).sum()

    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    values = torch.linalg.svdvals(at(0.0))
    if (values[:k] - torch.cat([values, values.new_zeros(1)])[1 : k + 1]).min() < 0.1:
        return  # differences across a small gap are not good enough
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(invariant(*differentiable_triplets(at(t), k)), t)

    def plain(t: float) -> torch.Tensor:
        u, s, vh = torch.linalg.svd(at(t))
        return invariant(u[:, :k], s[:k], vh[:k].mT)

    h = 1e-6
    torch.testing.assert_close(slope, (plain(h) - plain(-h)) / (2 * h), rtol=1e-4, atol=1e-4)


def test_descending_it_couples_the_layers():
    case = FEW[0]
    model = randomise(case.build(torch.float64))
    before = tlc.depth_coupling(tlc.trace(model.eval(), TOKENS), 2, sublayers="block", layers=[1, 2]).mean()
    parameters = list(model.blocks.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.02)
    for _ in range(5):
        optimizer.zero_grad()
        tlc.coupling_loss(model, TOKENS, 2, layers=[1, 2]).backward()
        optimizer.step()
    after = tlc.depth_coupling(tlc.trace(model, TOKENS), 2, sublayers="block", layers=[1, 2]).mean()
    assert after > before + 0.01
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_coinciding_singular_values_have_no_derivative():
    for matrix in (torch.eye(4), torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))):
        with pytest.raises(DegenerateSpectrumError, match="coincides with the next one or with zero"):
            differentiable_triplets(matrix.double(), 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": [5, 10]}, r"k=\[5, 10\] .*one number"),
        ({"layers": [1]}, "at least two layers"),
        ({"layers": [0, 3]}, "layers=3"),
        ({"sublayer": "head"}, "sublayer='head'"),
        ({"quantity": "null"}, "quantity='null'"),
        ({"normalizer": "l1"}, "normalizer='l1'"),
        ({"token": 7}, "token=7"),
        ({"tokens": TOKENS.repeat(2, 1)}, "one prompt"),
    ],
)
def test_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ArgumentError, match=message):
        tlc.coupling_loss(FEW[0].model(), **{"tokens": TOKENS, "k": 2, **arguments})


def test_dropout_and_half_precision_are_refused():
    case = FEW[0]
    with pytest.raises(UnsupportedModelError, match="torch.bfloat16"):
        tlc.coupling_loss(case.model(torch.bfloat16), TOKENS, 2)
    model = case.build(torch.float64)
    model.blocks[2].mlp.bfloat16()
    with pytest.raises(UnsupportedModelError, match="torch.bfloat16"):
        tlc.coupling_loss(model, TOKENS, 2)
    model = case.build(torch.float64).train()
    drop = [("blocks.1.hook_attn_out", lambda tensor, hook: torch.nn.functional.dropout(tensor, 0.1))]
    with model.hooks(fwd_hooks=drop), pytest.raises(UnsupportedModelError, match="as dropout does"):
        tlc.coupling_loss(model, TOKENS, 2)


@needs_llama
@pytest.mark.parametrize("sublayer", ["block", "mlp"])
@pytest.mark.parametrize("cut", CUTS)
def test_what_autograd_does_not_see_is_refused(cut: str, sublayer: str):
    model = LLAMA.build(torch.float64).eval()
    with (
        forward(part(model, 1, "mlp.out"), CUTS[cut]),
        pytest.raises(DerivativeError, match=r"coupling_loss, entry 1 of layers=\[0, 1\]"),
    ):
        tlc.coupling_loss(model, TOKENS[:4], 2, layers=[0, 1], sublayer=sublayer)


def test_a_hook_that_detaches_is_refused():
    model = CASES[0].build(torch.float64).eval()
    hooks = [("blocks.1.hook_mlp_out", lambda tensor, hook: tensor.detach())]
    with model.hooks(fwd_hooks=hooks), pytest.raises(HookError, match="coupling_loss"):
        tlc.coupling_loss(model, TOKENS[:4], 2, layers=[0, 1])
