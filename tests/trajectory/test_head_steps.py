"""Each head's part in a step of the trajectory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case, relative_error
from oracle import NORMED, REPRESENTATIVE

import tlcoupling as tlc
from tlcoupling.errors import UnsupportedModelError
from tlcoupling.trajectory.head_steps import head_writes

each_case = pytest.mark.parametrize("case", [*REPRESENTATIVE, *NORMED], ids=str)


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
