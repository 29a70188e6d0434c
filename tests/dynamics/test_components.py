"""Principal components of trajectories."""

from __future__ import annotations

import pytest
import torch
from cases import FEW, TOKENS, Case
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.trace import Stream


@pytest.mark.parametrize("case", FEW, ids=str)
def test_components_rebuild_the_trajectories(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    whole = tlc.trajectory_components(trace, n=28)  # 4 depths, 7 tokens: all points, in fewer dimensions than d_model
    rebuilt = whole.center + whole.coordinates @ whole.components.mT
    torch.testing.assert_close(rebuilt, trace.resid)
    assert float(whole.explained.sum()) == pytest.approx(1)
    found = tlc.trajectory_components(trace, n=3)
    torch.testing.assert_close(found.components.mT @ found.components, torch.eye(3, dtype=torch.float64))
    cloud = trace.resid.flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(cloud.mT, correction=0))
    torch.testing.assert_close(found.explained, values.flip(0)[:3] / values.sum())
    overlap = (found.components.mT @ vectors.flip(1)[:, :3]).abs()
    torch.testing.assert_close(overlap, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(found.coordinates, whole.coordinates[..., :3])
    _, cache = trace.model.run_with_cache(TOKENS[None])
    from_cache = tlc.trajectory_components(cache, n=3)
    torch.testing.assert_close(from_cache.coordinates, found.coordinates, rtol=0, atol=1e-5)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_components_follow_a_rotation_and_ignore_a_shift(seed: int):
    trace = tlc.trace(next(case for case in FEW if case.exact).model(), TOKENS)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(trace.d_model, trace.d_model, generator=generator, dtype=torch.float64)).Q
    shift = torch.randn(trace.d_model, generator=generator, dtype=torch.float64)
    found = tlc.trajectory_components(trace, n=3)
    turned_stream = trace.resid @ rotation.mT + shift
    writes = {name: write @ rotation.mT for name, write in trace.writes.items()}
    turned = tlc.trajectory_components(Stream(turned_stream, writes, trace.splits, None), n=3)
    torch.testing.assert_close(turned.explained, found.explained)
    torch.testing.assert_close(turned.coordinates.abs(), found.coordinates.abs())  # up to each component's sign
    torch.testing.assert_close(turned.components.abs(), (rotation @ found.components).abs())


def test_components_of_chosen_tokens_and_bad_input():
    trace = tlc.trace(FEW[0].model(), TOKENS)
    found = tlc.trajectory_components(trace, tokens=[2, -1])
    assert found.positions == (2, 6) and found.coordinates.shape == (4, 2, 2)
    assert found.tokens == (trace.str_tokens[2], trace.str_tokens[6])
    expected = trace.resid[:, [2, 6]].flatten(0, 1).mean(0)
    torch.testing.assert_close(found.center, expected)
    for n in (0, 29, True):
        with pytest.raises(ArgumentError, match="n="):
            tlc.trajectory_components(trace, n=n)
    with pytest.raises(ArgumentError, match="tokens="):
        tlc.trajectory_components(trace, tokens=7)
    writes = {name: write * 0 for name, write in trace.writes.items()}
    stream = Stream(torch.ones(4, 7, 32).double() / 3, writes, trace.splits, None)
    with pytest.raises(ArgumentError, match="all its points coincide"):
        tlc.trajectory_components(stream)
