"""The causal test on a real language model: it runs, its control matches, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch

import tlcoupling as tlc

pytestmark = pytest.mark.slow


def test_the_control_takes_the_share_of_the_coupled_directions(smollm2: torch.nn.Module, prompts: dict[str, str]):
    ids = smollm2.to_tokens(prompts["capital"])
    before = smollm2(ids)
    found = tlc.causal_effect(smollm2, {"capital": prompts["capital"]}, 10, layers=[2, 15], draws=3)
    assert found.provenance.engine == {"mlp": "analytic"}
    torch.testing.assert_close(found.control_share, found.share[..., None].expand(-1, -1, 3), rtol=1e-4, atol=0)
    truth = torch.nn.functional.cross_entropy(before[0, :-1].double(), ids[0, 1:])
    torch.testing.assert_close(found.loss[0], truth, rtol=1e-5, atol=0)
    # ten directions of 576 carry far more of the write than chance, sqrt(10 / 576) = 0.13
    assert (found.share > 0.2).all()
    assert torch.equal(smollm2(ids), before)
