"""Lyapunov exponents: against the singular values of the product, formed in float64, and where it cannot be formed."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from cases import TOKENS, Case, fresh
from oracle import REPRESENTATIVE, full_model_jacobian, haar

import tlcoupling as tlc
from tlcoupling.dynamics.lyapunov import _spectrum
from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.linalg.maps import Projection


@pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
def test_exponents_and_ranks_are_those_of_the_product(case: Case, case_trace: tlc.Trace):
    found = tlc.lyapunov_spectrum(case_trace, pos=4)
    product = np.eye(case_trace.d_model)
    determinants = 0.0
    for layer in range(case_trace.n_layers):
        step = np.eye(case_trace.d_model) + full_model_jacobian(case, layer, "block", 4, 4).numpy()
        determinants += np.linalg.slogdet(step)[1]
        product = step @ product
        s = np.linalg.svd(product, compute_uv=False)
        share = s / s.sum()
        assert found.effective_rank is not None and found.stable_rank is not None
        rank = math.exp(-(share * np.log(share)).sum())
        assert float(found.effective_rank[layer + 1]) == pytest.approx(rank, rel=1e2 * case.tolerance)
        assert float(found.stable_rank[layer + 1]) == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e2 * case.tolerance)
    assert found.effective_rank is not None and float(found.effective_rank[0]) == pytest.approx(case_trace.d_model)
    tolerance = 1e3 * case.tolerance  # small singular values move by the error of the large ones
    np.testing.assert_allclose(found.exponents, np.log(s) / case_trace.n_layers, atol=tolerance)
    # all of them together: how the factors change volume, whatever the basis
    assert float(found.growth.sum()) == pytest.approx(determinants, abs=tolerance)
    sequential = case.topology == "sequential"
    assert found.sublayers == (("attn", "mlp") if sequential else ("block",))
    if sequential:
        for at, name in enumerate(found.sublayers):
            parts = [np.eye(len(s)) + full_model_jacobian(case, layer, name, 4, 4).numpy() for layer in range(3)]
            volume = sum(np.linalg.slogdet(part)[1] for part in parts)
            assert float(found.growth[:, at].sum()) == pytest.approx(volume, abs=tolerance)
    torch.testing.assert_close(found.cumulative[-1], case_trace.n_layers * found.exponents)


def test_a_few_exponents_are_the_first_of_all():
    trace = tlc.trace(fresh(0), TOKENS)
    whole, few = tlc.lyapunov_spectrum(trace), tlc.lyapunov_spectrum(trace, 3, seed=5)
    torch.testing.assert_close(few.exponents, whole.exponents[:3], rtol=0, atol=1e-3)  # of float32 products
    torch.testing.assert_close(few.growth, whole.growth[..., :3], rtol=0, atol=1e-2)
    assert few.effective_rank is None and few.stable_rank is None


@pytest.mark.parametrize("columns", [6, 16])
def test_exponents_hold_where_the_product_underflows(columns: int):
    """Singular values from 1e36 to 1e-124: rounding of the formed product would hide all below 1e20."""
    d, steps, generator = 16, 40, torch.Generator().manual_seed(0)
    rates = torch.logspace(0.9, -3.1, d, dtype=torch.float64)
    bases = [haar(d, d, generator) for _ in range(steps + 1)]
    factors = [
        Projection(after @ torch.diag(rates) @ before.T - torch.eye(d, dtype=torch.float64))
        for before, after in itertools.pairwise(bases)
    ]
    logs, _, change = _spectrum(factors, columns, 4, 0)
    found = logs.sum(0)[: min(columns, 10)]
    # I is subtracted and added again, which costs rounding relative to 1 in each step: 3e-14 of the smallest here
    torch.testing.assert_close(found[:4], steps * rates.log()[:4], rtol=0, atol=1e-8)
    torch.testing.assert_close(logs[:, 0], rates[0].log().expand(steps), rtol=0, atol=1e-8)
    assert change < 1e-6
    if columns == d:
        torch.testing.assert_close(logs.sum(0), steps * rates.log(), rtol=0, atol=1e-6)


def test_unsteady_exponents_are_said_to_be():
    """Equal growth of 12 directions and 3 carried: no three of them are the first."""
    factors = [Projection(torch.zeros(12, 12, dtype=torch.float64))] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(_spectrum(factors, 3, 3, 0)[0].abs().max()) < 1e-14  # but their growth is known
    noisy = torch.Generator().manual_seed(0)

    class Unsteady(Projection):
        def mm(self, x: torch.Tensor) -> torch.Tensor:
            return 0.1 * torch.randn(x.shape, generator=noisy, dtype=x.dtype)

    with pytest.warns(UserWarning, match="still moved by"):
        _spectrum([Unsteady(torch.eye(12, dtype=torch.float64))] * 2, 3, 3, 0)


def test_a_baseline_stands_beside(tmp_path: Any):
    model, other = fresh(0), fresh(1)
    found = tlc.lyapunov_spectrum(tlc.trace(model, TOKENS), baseline=other)
    alone = tlc.lyapunov_spectrum(tlc.trace(other, TOKENS))
    back: Any = tlc.load(found.save(tmp_path / "lyapunov.safetensors"))
    for one in (found, back):
        assert one.baseline is not None and torch.equal(one.baseline.exponents, alone.exponents)
    assert repr(back) == repr(found) and torch.equal(back.cumulative, found.cumulative)
    few: Any = tlc.lyapunov_spectrum(tlc.trace(model, TOKENS), 2)
    assert tlc.load(few.save(tmp_path / "few.safetensors")).effective_rank is None
    assert set(few.to_dataframe()["quantity"]) == {"exponents", "growth", "cumulative"}


def test_hooks_that_edit_the_stream_count():
    """Doubling x^2 behind block 1 doubles every singular value of the product; the writes alone do not show it."""
    model = fresh(3)
    hooks = [("blocks.1.hook_resid_post", lambda tensor, hook: 2 * tensor)]
    plain, edited = (tlc.trace(model, TOKENS, fwd_hooks=each) for each in ((), hooks))
    found = tlc.lyapunov_spectrum(edited, 2, engine="autograd")
    assert found.sublayers == ("block",) and tlc.lyapunov_spectrum(plain, 2).sublayers == ("attn", "mlp")
    product = torch.eye(96)
    for layer in range(3):
        product = product + tlc.residual_jacobian(edited, layer).dense() @ product
    truth = torch.linalg.svdvals(product.double())[:2].log() / 3
    torch.testing.assert_close(found.exponents, truth, rtol=0, atol=1e-3)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch):
    trace = tlc.trace(fresh(0), TOKENS)
    wrong: list[tuple[dict[str, Any], str]] = [({"n": 97}, "n=97 .*1 to 96"), ({"n": 0}, "n=0"), ({"pos": 7}, "pos=7")]
    for arguments, message in wrong:
        with pytest.raises(ArgumentError, match=message):
            tlc.lyapunov_spectrum(trace, **arguments)
    monkeypatch.setitem(vars(trace), "causal", False)
    with pytest.raises(UnsupportedModelError, match="comes back to its token"):
        tlc.lyapunov_spectrum(trace)


def test_a_token_within_a_prefix_that_reads_ahead_is_refused():
    """The last token is alone, so that the model counts as causal: the test of each token tells the others."""

    def prefix(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[:, :4] += tensor[:, :4].mean(1, keepdim=True)
        return tensor

    trace = tlc.trace(fresh(0), TOKENS, fwd_hooks=[("blocks.1.hook_mlp_out", prefix)])
    assert trace.causal and trace.alone(6) and not trace.alone(2)
    assert trace.alone(4, 6) and trace.alone(0, 6) and not trace.alone(3, 6) and not trace.alone(0, 2)
    with pytest.raises(UnsupportedModelError, match="position 2 comes back to it by way of others"):
        tlc.lyapunov_spectrum(trace, 2, pos=2)
    with pytest.warns(UserWarning, match="hooks are attached"):
        tlc.lyapunov_spectrum(trace, 2, pos=6)
