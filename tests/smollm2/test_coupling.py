"""Token-wise, context and head coupling on a real language model, against its own derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import plain_coupling

import tlcoupling as tlc

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trace(smollm2: torch.nn.Module, prompts: dict[str, str]) -> tlc.Trace:
    return tlc.trace(smollm2, prompts["induction"])


def oracle(trace: tlc.Trace, places: list[tuple[Any, ...]]) -> list[torch.Tensor]:
    return [tlc.residual_jacobian(trace, *place, engine="autograd").dense() for place in places]


def test_token_coupling_of_every_layer(trace: tlc.Trace):
    found = tlc.token_coupling(trace, 10, sublayers="block", tokens=[0, 4, 12, 19])
    assert found.values.shape == (1, 30, 1, 4, 4)
    assert found.provenance.engine == {"block": "analytic"}
    assert found.residual[:, :, 1:].max() < 3e-5
    assert found.determined[:, :, 1:].all()
    # the first token's singular values fall to s_1 / 100, and residuals are relative to each triplet's own
    assert found.residual.max() < 1e-3
    diagonal = found.values.diagonal(dim1=-2, dim2=-1)
    # what Krylov's residual leaves
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal), rtol=0, atol=1e-4)
    first, second = oracle(trace, [(17, "block", pos, pos) for pos in (4, 12)])
    assert abs(found.values[0, 17, 0, 1, 2] - plain_coupling(first, second, 10, "frobenius", "uv", True)) < 1e-4
    # the trained blocks agree across tokens far beyond chance; the first token, an attention sink, does not always
    assert (found.z[0, :, 0][:, ~torch.eye(4, dtype=torch.bool)] > 3).float().mean() > 0.9


@pytest.mark.parametrize(("fixed", "pairs"), [("src", ((0, 7), (0, 15))), ("dest", ((7, 19), (15, 19)))])
def test_context_coupling_of_every_layer(trace: tlc.Trace, fixed: Any, pairs: Any):
    found = tlc.context_coupling(trace, fixed, k=10, sublayers="attn", tokens=[7, 15])
    assert found.values.shape == (1, 30, 1, 2, 2)
    assert found.provenance.engine == {"attn": "analytic"}
    first, second = oracle(trace, [(9, "attn", *pair) for pair in pairs])
    assert abs(found.values[0, 9, 0, 0, 1] - plain_coupling(first, second, 10, "frobenius", "uv", True)) < 1e-4


def test_heads_of_every_layer(trace: tlc.Trace):
    coupling = tlc.head_coupling(trace, 10, layers=[4])
    first, second = oracle(trace, [(4, "attn", 19, 19, head) for head in (2, 7)])
    assert abs(coupling.values[0, 0, 2, 7] - plain_coupling(first, second, 10, "frobenius", "uv", True)) < 1e-4
    alignment = tlc.head_alignment(trace, 10, layers=[4])
    whole = torch.linalg.svd(tlc.residual_jacobian(trace, 4).dense())
    share = (whole.U[:, :10].mT @ first).square().sum() / first.square().sum()
    assert abs(alignment.writes[0, 0, 2] - share) < 1e-4
    steps = tlc.head_steps(trace)
    total = steps.attn_share + steps.mlp_share
    # float32 rounding of the residual identity, on steps far shorter than the stream
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-3)
