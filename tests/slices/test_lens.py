"""The Jacobian lens against its definition, and against TransformerLens's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CASES, FEW, TOKENS, Case, relative_error
from oracle import graph_between

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.slices.sites import part_between

PROMPTS = {"one": TOKENS, "two": torch.tensor([3, 17, 28, 9, 40])}


def definition(model: Any, tokens: torch.Tensor, layer: int, skipped: int) -> torch.Tensor:
    """The mean over sources of the sum over targets of d x^L by the block's output, row by row through the model."""
    points = (f"blocks.{one}.hook_resid_post" for one in (layer, len(model.blocks) - 1))
    leaf, out = graph_between(model, tokens, *points)
    valid = list(range(skipped, len(tokens) - 1))
    rows = []
    for number in out[0, valid].sum(0):
        (pulled,) = torch.autograd.grad(number, leaf, retain_graph=True)
        rows.append(pulled[0, valid].mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("skipped", [0, 1, 2])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_it_is_its_definition(case: Case, skipped: int):
    """Of one position to itself too: two are left out of five, and the last."""
    model = case.model()
    lens = tlc.jacobian_lens(model, PROMPTS, skip_first_positions=skipped)
    assert lens.layers == (0, 1) and lens.n_prompts == 2 and lens.provenance.engine == {"block": "analytic"}
    for layer, matrix in zip(lens.layers, lens.matrices, strict=True):
        each = [definition(model, tokens, layer, skipped) for tokens in PROMPTS.values()]
        mean = torch.stack(each).mean(0)
        # both in float64; HuggingFace's modules round to float32 inside
        assert relative_error(matrix, mean) < (1e-12 if case.exact else 1e-4)
        spread = (torch.stack(each) - mean).square().sum() / 2  # of n = 2 prompts: n (n - 1) = 2
        torch.testing.assert_close(lens.error[layer], (spread / mean.square().sum()).sqrt(), rtol=1e-4, atol=0)


def test_other_positions_are_left_out_where_nothing_leads_through_them():
    """By keys and values that the model cached; a hook may expect all positions."""
    model = next(case for case in CASES if case.name == "bridge-llama").model()
    trace = tlc.trace(model, TOKENS)
    part, first = part_between(trace, range(3, 6), "auto")
    assert part.str_tokens == trace.str_tokens[3:6] and first == 3
    with model.hooks([("blocks.1.hook_mlp_out", lambda tensor, hook: 0.5 * tensor)]):
        hooked = tlc.trace(model, TOKENS)
        assert part_between(hooked, range(3, 6), "auto") == (hooked, 0)
    bidirectional = replace(trace, model=SimpleNamespace(cfg=SimpleNamespace(attention_dir="bidirectional")))
    assert not bidirectional.alone(3, 5)


def test_a_sketch_is_right_on_average():
    """The error of a mean over draws is that of one draw over the root of their number."""
    model = FEW[0].model()
    whole = tlc.jacobian_lens(model, {"one": TOKENS}, skip_first_positions=0, layers=[1]).matrices
    draws = [
        tlc.jacobian_lens(model, {"one": TOKENS}, skip_first_positions=0, layers=[1], sketch=8, seed=seed).matrices
        for seed in range(8)
    ]
    off = torch.stack(draws) - whole
    single, mean = float(off.square().sum() / len(off)), float(off.mean(0).square().sum())
    # with 1,024 coordinates the ratio spreads little
    assert 0.5 * single / len(off) < mean < 2 * single / len(off)
    exact = tlc.jacobian_lens(model, {"one": TOKENS}, skip_first_positions=0, layers=[1], sketch=32).matrices
    torch.testing.assert_close(exact, whole)


def test_merged_lenses_are_the_lens_of_all_prompts(tmp_path: Path):
    model = FEW[0].model()
    whole = tlc.jacobian_lens(model, PROMPTS, skip_first_positions=0)
    parts = [tlc.jacobian_lens(model, {name: prompt}, skip_first_positions=0) for name, prompt in PROMPTS.items()]
    assert parts[0].error.isnan().all()
    merged = tlc.JacobianLens.merge([tlc.load(part.save(tmp_path / "part")) for part in parts])
    torch.testing.assert_close(merged.matrices, whole.matrices)
    torch.testing.assert_close(merged.error, whole.error)
    assert merged.n_prompts == 2 and "2 prompts" in repr(merged)
    table = merged.to_dataframe()
    assert list(table.columns) == ["layer", "norm", "error"] and len(table) == 2
    moved = whole.transport(torch.eye(whole.matrices.shape[-1]), 1)
    torch.testing.assert_close(moved, whole.matrices[1].mT)
    with pytest.raises(ArgumentError, match="lenses=0 "):
        other = tlc.jacobian_lens(model, PROMPTS, skip_first_positions=1)
        tlc.JacobianLens.merge([other, whole])
    with pytest.raises(ArgumentError, match="lenses="):
        tlc.JacobianLens.merge([])
    with pytest.raises(ArgumentError, match="layer=2 "):
        whole.transport(torch.zeros(whole.matrices.shape[-1]), 2)


def test_it_is_transformer_lens_own(tmp_path: Path):
    """Theirs sums in float32; both read the same logits from the same file."""
    theirs_of = pytest.importorskip("transformer_lens.tools.analysis.jacobian_lens").JacobianLens
    model = next(case for case in FEW if case.name == "bridge-llama").model(torch.float32)
    text = "w1 w5 w7 w9 w11 w2 w8"
    ours = tlc.jacobian_lens(model, [text], skip_first_positions=0)
    theirs = theirs_of.fit(model, [text], corpus="here", skip_first_positions=0, show_progress=False)
    for layer, matrix in zip(ours.layers, ours.matrices, strict=True):
        assert relative_error(matrix, theirs.jacobians[layer]) < 1e-6
    ours.to_transformer_lens().save(str(tmp_path / "lens.pt"), dtype=torch.float32)
    loaded = theirs_of.load(str(tmp_path / "lens.pt"))
    read = [lens.readout(model, text, return_full_logits=True).lens_logits for lens in (loaded, theirs)]
    for layer in ours.layers:
        torch.testing.assert_close(read[0][layer], read[1][layer], rtol=1e-4, atol=1e-4)


def test_bad_input():
    model = FEW[0].model()
    with pytest.raises(ArgumentError, match="prompts of more than 17 tokens"):
        tlc.jacobian_lens(model, PROMPTS)
    with pytest.raises(ArgumentError, match="sketch=33 "):
        tlc.jacobian_lens(model, PROMPTS, skip_first_positions=0, sketch=33)
    with pytest.raises(ArgumentError, match="layers=3 "):
        tlc.jacobian_lens(model, PROMPTS, skip_first_positions=0, layers=[3])
