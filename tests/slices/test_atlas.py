"""The atlas against singular values of the whole model's Jacobians by autograd."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cases import FEW, TOKENS, Case, built_here, fresh, relative_error
from oracle import graph_between

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, CertificateError, InsufficientMemoryError
from tlcoupling.slices.sweep import SHARE

few = pytest.mark.parametrize("case", FEW, ids=str)
LAST, SAME = {"src": -1, "dest": -1}, {"src": "all", "dest": [4, 6]}


def slice_by_autograd(trace: tlc.Trace, entry: str, end: str, src: list[int], dest: list[int]) -> torch.Tensor:
    """The mean over dest of d end by what is added to ``entry`` at all src, row by row through the model."""
    leaf, out = graph_between(trace.model, trace.tokens, entry, end)
    rows = [torch.autograd.grad(one, leaf, retain_graph=True)[0][0, src].sum(0) for one in out[0, dest].mean(0)]
    return torch.stack(rows)


@few
@pytest.mark.parametrize("where", [LAST, SAME], ids=["last", "same"])
def test_singular_triplets_are_those_of_the_whole_model(case: Case, where: dict[str, Any]):
    trace = tlc.trace(case.model(), TOKENS)
    atlas = tlc.sensitivity_atlas(trace, 3, **where)
    assert atlas.alone == (where is LAST) and atlas.converged[0, 1:].all()
    for i, j in atlas.pairs:
        points = f"blocks.{i}.hook_resid_post", f"blocks.{j}.hook_resid_post"
        truth = slice_by_autograd(trace, *points, list(atlas.src), list(atlas.dest))
        values = torch.linalg.svdvals(truth)
        assert relative_error(atlas.singular_values[i, j], values[:3]) < 10 * case.tolerance
        pushed = truth @ atlas.v[i, j]
        assert relative_error(pushed, atlas.u[i, j] * values[:3]) < 1e3 * case.tolerance  # the solver's own residual
        assert values[0] < 1.001 * atlas.norm_product[i, j]


@pytest.mark.parametrize("case", [FEW[0], FEW[1]], ids=str)  # sequential and parallel
@pytest.mark.parametrize("where", [LAST, SAME], ids=["last", "same"])
def test_slices_between_other_sites(case: Case, where: dict[str, Any]):
    trace = tlc.trace(case.model(), TOKENS)
    for source, target in (("resid_pre", "mlp_out"), ("attn_out", "attn_out"), ("mlp_out", "resid_pre")):
        atlas = tlc.sensitivity_atlas(trace, 2, source_site=source, target_site=target, **where)
        modes: dict[str, Any] = {"src_mode": "same", "dest_mode": "same"}
        for i, j in atlas.pairs:
            if target == "resid_pre" and source == "mlp_out" and j == i + 1:
                continue  # the same place: slice_jacobian has no such slice
            slice_ = tlc.slice_jacobian(trace, (source, i), (target, j), **where, **modes)
            expected = torch.linalg.svdvals(slice_.dense())[:2]
            assert relative_error(atlas.singular_values[i, j], expected) < 10 * case.tolerance
            assert expected[0] < 1.001 * atlas.norm_product[i, j]


def test_one_position_is_alone_where_nothing_leads_back_to_it():
    """In the middle of a causal model it is; behind a hook that brings later positions to earlier ones it is not."""
    model = built_here({})
    mixing = [("blocks.1.hook_mlp_out", lambda tensor, hook: tensor + tensor.mean(1, keepdim=True))]
    for hooks, pos in (([], 2), ([], 0), (mixing, 6), (mixing, 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of autograd
            trace = tlc.trace(model, TOKENS, fwd_hooks=hooks)
            atlas = tlc.sensitivity_atlas(trace, 2, src=pos, dest=pos)
            ends = ("resid_post", 0), ("resid_post", 2)
            expected = torch.linalg.svdvals(tlc.slice_jacobian(trace, *ends, src=pos, dest=pos).dense())[:2]
        assert atlas.alone == (not hooks)
        assert relative_error(atlas.singular_values[0, 2], expected) < 1e-8


def test_hooks_act():
    model = built_here({})
    halve = [("blocks.2.hook_mlp_out", lambda tensor, hook: 0.5 * tensor)]
    trace = tlc.trace(model, TOKENS, fwd_hooks=halve)
    with pytest.warns(UserWarning, match="block 2"):
        atlas = tlc.sensitivity_atlas(trace, 2)
    expected = torch.eye(trace.d_model, dtype=torch.float64)
    for layer in (1, 2):
        block = tlc.residual_jacobian(trace, layer, engine="autograd").dense()
        expected = expected + block @ expected
    assert relative_error(atlas.singular_values[0, 2], torch.linalg.svdvals(expected)[:2]) < 1e-8
    assert relative_error(atlas.singular_values, tlc.sensitivity_atlas(tlc.trace(model, TOKENS), 2).singular_values)
    for where in (LAST, SAME):
        with pytest.raises(CertificateError, match="hooks"):
            tlc.sensitivity_atlas(trace, 2, **where, engine="analytic")


def test_overlaps_are_those_of_the_subspaces():
    trace = tlc.trace(fresh(0, n_layers=5), TOKENS)
    atlas = tlc.sensitivity_atlas(trace, 3)
    reads, writes, fed = atlas.block_overlap

    def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.mT @ b).square().sum() / 3)

    assert atlas.null == 3 / 96
    for i, j in atlas.pairs:
        for block in range(5):
            assert float(reads[i, j, block]) == pytest.approx(overlap(atlas.v[i, j], atlas.block_v[block]), abs=1e-5)
            assert float(writes[i, j, block]) == pytest.approx(overlap(atlas.u[i, j], atlas.block_u[block]), abs=1e-5)
            assert float(fed[i, j, block]) == pytest.approx(overlap(atlas.v[i, j], atlas.block_u[block]), abs=1e-5)
    assert float(atlas.source_overlap[0, 1, 3]) == pytest.approx(overlap(atlas.v[0, 1], atlas.v[0, 3]), abs=1e-5)
    assert float(atlas.target_overlap[0, 4, 2]) == pytest.approx(overlap(atlas.u[0, 4], atlas.u[2, 4]), abs=1e-5)
    own = tlc.truncated_svd(tlc.residual_jacobian(trace, 3), 3)
    assert overlap(atlas.block_u[3], own.u) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(atlas.block_values[3], own.s, rtol=1e-4, atol=0)


def test_what_fresh_weights_read_is_unrelated_to_what_the_block_before_writes():
    atlas = tlc.sensitivity_atlas(tlc.trace(fresh(1, n_layers=8), TOKENS), 4)
    overlap = atlas.by_pair()["reads_source"]
    assert len(overlap) == 28 and atlas.null == 4 / 96
    # each is a mean of 16 squares of about 1/96 each; pairs of one source share a basis, which leaves 7 units
    assert abs(float(overlap.mean()) - atlas.null) < 5 * atlas.null * (2 / 16 / 7) ** 0.5


def test_a_baseline_stands_beside(tmp_path: Path):
    model = fresh(0)
    trace, other = tlc.trace(model, TOKENS), tlc.trace(tlc.random_baseline(model), TOKENS)
    alone, beside = tlc.sensitivity_atlas(trace, 2), tlc.sensitivity_atlas(other, 2)
    for baseline in ("fresh", other, beside, other.model):
        atlas = tlc.sensitivity_atlas(trace, 2, baseline=baseline)
        assert atlas.baseline is not None
        torch.testing.assert_close(atlas.baseline.singular_values, beside.singular_values, equal_nan=True)
        torch.testing.assert_close(atlas.singular_values, alone.singular_values, equal_nan=True)
    with pytest.raises(ArgumentError, match="baseline=.an atlas of k=2.*k=3"):
        tlc.sensitivity_atlas(trace, 3, baseline=beside)
    loaded = tlc.load(atlas.save(tmp_path / "atlas.safetensors"))
    table = loaded.to_dataframe()
    pd.testing.assert_frame_equal(table, atlas.to_dataframe())
    assert len(table) == 2 * len(atlas.pairs) == 6 and not table.isna().any(axis=None)
    assert list(table[table["rank"] == 0]["singular_value"]) == [
        float(atlas.singular_values[i, j, 0]) for i, j in atlas.pairs
    ]
    summary = loaded.summary()
    assert list(summary["pairs"]) == [2, 1] and summary["null"][0] == pytest.approx(2 / 96)
    nearest = atlas.singular_values[0, 1, 0] * atlas.singular_values[1, 2, 0]
    assert summary["s"][0] == pytest.approx(float(nearest.sqrt()))
    assert alone.by_pair()["baseline"].isnan().all() and "3 pairs of layers" in repr(alone)


@pytest.mark.parametrize("where", [LAST, SAME], ids=["last", "same"])
def test_layers_and_groups_change_nothing(where: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    trace = tlc.trace(built_here({"n_layers": 5}), TOKENS)
    whole = tlc.sensitivity_atlas(trace, 2, **where)
    part = tlc.sensitivity_atlas(trace, 2, layers=[3, 0, 1], **where)
    assert part.layers == (0, 1, 3) and part.blocks == (0, 1, 2, 3)
    for i, j in part.pairs:
        at = part.layers.index(i), part.layers.index(j)
        for name in ("singular_values", "norm_product"):
            torch.testing.assert_close(getattr(part, name)[at], getattr(whole, name)[i, j])
    rows = trace.d_model * (1 if whole.alone else trace.n_tokens)
    each = 8 * rows * trace.d_model / SHARE
    monkeypatch.setattr("tlcoupling.slices.sweep.free_memory", lambda device: 2.5 * each)
    grouped = tlc.sensitivity_atlas(trace, 2, **where)
    torch.testing.assert_close(grouped.singular_values, whole.singular_values, equal_nan=True)
    torch.testing.assert_close(grouped.norm_product, whole.norm_product, equal_nan=True)
    monkeypatch.setattr("tlcoupling.slices.sweep.free_memory", lambda device: 0.5 * each)
    with pytest.raises(InsufficientMemoryError, match="shorter prompt"):
        tlc.sensitivity_atlas(trace, 2, **where)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0 "),
        ({"k": 97}, "k=97 .*width"),
        ({"source_site": "z"}, "source_site='z' .*resid_pre, resid_mid, resid_post, attn_out, mlp_out"),
        ({"target_site": "logits"}, "target_site='logits' "),
        ({"layers": [1]}, "layers=.*two or more"),
        ({"layers": [0, 7]}, "layers=7 "),
        ({"src": 4, "dest": [1, 2]}, "dest=.*causal"),
        ({"src": 9}, "src=9 "),
        ({"baseline": "random"}, "model='random' "),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, unchecked: None):
    trace = tlc.trace(fresh(0), TOKENS)
    with pytest.raises(ArgumentError, match=message):
        tlc.sensitivity_atlas(trace, **{"k": 2, **options})
