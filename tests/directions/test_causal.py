"""The causal effect of directions on the loss, against a loop by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, FEW, TOKENS, Case

import tlcoupling as tlc
from tlcoupling.directions.causal import next_token_loss

few = pytest.mark.parametrize("case", FEW, ids=str)


WIDTH = FEW[0].model().cfg.d_model


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_loss(model: Any, hooks: list[Any]) -> float:
    logits = model.run_with_hooks(TOKENS[None], fwd_hooks=hooks)[0]
    return -float(sum(logits[t].log_softmax(-1)[TOKENS[t + 1]] for t in range(6)) / 6)


@few
def test_the_causal_effect_is_the_change_in_loss(case: Case):
    """Against a loop that writes the projected write of each position back by hand."""
    model = case.model()
    found = tlc.causal_effect(model, {"one": TOKENS}, 3, layers=[1, 2], sublayer="attn", draws=4, engine="autograd")
    trace, name = tlc.trace(model, TOKENS), "blocks.2.hook_attn_out"
    write = trace.attn_out[2].clone()
    for t in range(6):
        u = torch.linalg.svd(tlc.residual_jacobian(trace, 2, "attn", t, t, engine="autograd").dense()).U[:, :3]
        write[t] -= u @ (u.mT @ write[t])
    clean = plain_loss(model, [])
    assert float(found.loss[0]) == pytest.approx(clean, rel=1e-6)
    change = plain_loss(model, [(name, lambda tensor, hook: write[None].to(tensor))]) - clean
    assert float(found.effect[0, 1]) == pytest.approx(change, abs=1e3 * case.tolerance)
    taken = (write[:6] - trace.attn_out[2, :6]).norm() / trace.attn_out[2, :6].norm()
    torch.testing.assert_close(found.share[0, 1], taken, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.control_share, found.share[..., None].expand(-1, -1, 4))
    assert (found.control_std > 0).all()
    torch.testing.assert_close(found.excess, found.effect - found.control.mean(-1))
    table = found.to_dataframe()
    assert set(table[table.quantity == "control"].prompt) == {"one"}
    assert len(table[table.quantity == "control"]) == 8
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_given_directions_and_a_seed():
    model, directions = FEW[0].model(), random(WIDTH, 2)
    first, again, other = (
        tlc.causal_effect(model, [TOKENS, TOKENS[:4]], directions, layers=[1], draws=2, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.control, again.control)
    assert not torch.equal(first.control, other.control)
    assert torch.equal(first.effect, other.effect)
    change = plain_loss(model, [tlc.project_out(directions, 1, "mlp_out", range(6))]) - plain_loss(model, [])
    assert float(first.effect[0, 0]) == pytest.approx(change)
    assert tlc.causal_effect(model, [TOKENS], directions, layers=[1], draws=1).control_std.isnan().all()


def test_the_loss_is_that_of_transformer_lenss_readout():
    """From transformer-lens 4.3 on: log-probabilities that ``logit_readout`` takes from the last residual stream."""
    theirs = pytest.importorskip("transformer_lens.tools.analysis.logit_lens")
    if not hasattr(theirs, "logit_readout"):
        pytest.skip("logit_readout comes with transformer-lens 4.3")
    trace = tlc.trace(next(case for case in CASES if case.name == "bridge-gpt2").model(), TOKENS)
    read = theirs.logit_readout(trace.model, trace.resid[-1, :-1], targets=TOKENS[1:], return_type="log_probs")
    assert float(next_token_loss(trace)) == pytest.approx(-float(read.values.mean()), rel=1e-6)  # theirs is in float32
