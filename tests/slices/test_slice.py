"""Slices against one backward pass through the hooked model, between every kind of hook point."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from broken import CUTS, forward, half_detached
from cases import CASES, FEW, TOKENS, Case, built_here, relative_error
from oracle import graph_between

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, CertificateError, DerivativeError, HookError, StaleTraceError

few = pytest.mark.parametrize("case", FEW, ids=str)
SRC, DEST = (1, 3), (3, 4)
MIXTURES = [case for case in CASES if case.name in ("bridge-mixtral", "bridge-gpt-oss")]


def hook_name(site: tuple[Any, ...]) -> str:
    point, layer, *_ = site
    return f"blocks.{layer}.attn.hook_z" if point == "z" else f"blocks.{layer}.hook_{point}"


def of_site(x: torch.Tensor, site: tuple[Any, ...]) -> torch.Tensor:
    return x[..., site[2], :] if site[0] == "z" else x


def truth(trace: tlc.Trace, source: tuple[Any, ...], target: tuple[Any, ...]) -> torch.Tensor:
    """d target_dest / d source_src, row by row, by hooks on a forward pass of the whole model.

    What is added to hook_resid_mid is added to the attention's write: a bridge's hook_resid_mid is beside the stream.
    """
    entry = hook_name(("attn_out", source[1]) if source[0] == "resid_mid" else source)
    leaf, out = graph_between(trace.model, trace.tokens, entry, hook_name(target))
    rows = []
    for number in of_site(out, target)[0, list(DEST)].flatten():
        (pulled,) = torch.autograd.grad(number, leaf, retain_graph=True)
        rows.append(of_site(pulled, source)[0, list(SRC)].flatten())
    return torch.stack(rows)


def sites(case: Case) -> list[tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Every kind of source to the last block's output, and from block 0's input to every kind of target."""
    sources = [("resid_pre", 0), ("attn_out", 0), ("z", 0, 1)]
    targets = [("resid_post", 2), ("attn_out", 2), ("z", 2, 0)]
    if case.topology != "single":
        sources.append(("mlp_out", 0))
        targets.append(("mlp_out", 2))
    if case.topology == "sequential":
        sources.append(("resid_mid", 1))
        targets.append(("resid_mid", 2))
    pairs = [(source, targets[0]) for source in sources] + [(sources[0], target) for target in targets[1:]]
    return [*pairs, (sources[-1], targets[-1]), (sources[2], targets[2])]


@few
def test_a_slice_is_the_derivative_of_the_hooked_model(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    for source, target in sites(case):
        jacobian = tlc.slice_jacobian(trace, source, target, src=SRC, dest=DEST)
        assert set(jacobian.engine.values()) <= {"analytic"}
        expected = truth(trace, source, target)
        eye = torch.eye(jacobian.shape[1], dtype=jacobian.dtype)
        for found in (jacobian.mm(eye), jacobian.rmm(torch.eye(jacobian.shape[0], dtype=jacobian.dtype)).mT):
            assert relative_error(found, expected) < 10 * case.tolerance, (source, target)
        assert relative_error(jacobian.dense(), expected) < 10 * case.tolerance


@pytest.mark.parametrize("where", [{"src": "all"}, {"src": 3, "dest": 5}], ids=["all", "between"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_engines_agree(case: Case, where: dict[str, Any]):
    """Blocks without a closed form, such as mixtures of experts, are by autograd in either.

    By autograd, blocks run on all positions; by closed forms, on those between src and dest where they can.
    """
    trace = tlc.trace(case.model(), TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fallback
        found = tlc.slice_jacobian(trace, ("resid_pre", 1), ("attn_out", 2), **where)
    direction = torch.randn(found.shape[1], generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    expected = tlc.slice_jacobian(trace, ("resid_pre", 1), ("attn_out", 2), engine="autograd", **where)
    assert set(expected.engine.values()) == {"autograd"}
    assert relative_error(found.mv(direction), expected.mv(direction)) < 10 * case.tolerance


@few
def test_at_the_last_position_a_slice_is_the_product_of_the_blocks(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    product = torch.eye(trace.d_model, dtype=torch.float64)
    for layer in range(trace.n_layers):
        product = product + tlc.residual_jacobian(trace, layer).dense() @ product
    found = tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", -1)).dense()
    assert relative_error(found, product) < 10 * case.tolerance


def test_modes_and_composition():
    """One vector for all src adds up their Jacobians, and the mean over dest averages; slices compose into slices."""
    trace = tlc.trace(FEW[0].model(), TOKENS)
    ends = ("resid_pre", 0), ("resid_post", -1)
    whole = tlc.slice_jacobian(trace, *ends, src=SRC, dest=DEST).dense().unflatten(0, (2, -1)).unflatten(2, (2, -1))
    same = tlc.slice_jacobian(trace, *ends, src=SRC, dest=DEST, src_mode="same").dense()
    torch.testing.assert_close(same, whole.sum(2).flatten(0, 1))
    mean = tlc.slice_jacobian(trace, *ends, src=SRC, dest=DEST, dest_mode="same").dense()
    torch.testing.assert_close(mean, whole.mean(0).flatten(1, 2))
    first = tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", 0), src=SRC, dest="all")
    second = tlc.slice_jacobian(trace, "blocks.1.hook_resid_pre", ("resid_post", -1), src="all", dest=DEST)
    torch.testing.assert_close((second @ first).dense(), whole.flatten(2, 3).flatten(0, 1))
    top = tlc.truncated_svd(second @ first, 3)
    torch.testing.assert_close(top.s, torch.linalg.svdvals(whole.flatten(2, 3).flatten(0, 1))[:3])


@pytest.mark.parametrize("case", [*FEW, *MIXTURES], ids=str)
def test_one_vector_added_at_all_positions(case: Case):
    """As in steering, the mean of the target read, against backward passes through the whole model."""
    trace = tlc.trace(case.model(), TOKENS)
    leaf, out = graph_between(trace.model, trace.tokens, "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post")
    rows = [torch.autograd.grad(one, leaf, retain_graph=True)[0][0].sum(0) for one in out[0].mean(0)]
    modes: dict[str, Any] = {"src": "all", "dest": "all", "src_mode": "same", "dest_mode": "same"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fallback: mixtures of experts are by autograd
        found = tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", 2), **modes)
    assert set(found.engine.values()) == {"autograd" if case in MIXTURES else "analytic"}
    assert relative_error(found.dense(), torch.stack(rows)) < 10 * case.tolerance


@few
def test_logits(case: Case):
    """Chosen logits, their difference and all of them, against a backward pass from the model's own logits."""
    trace = tlc.trace(case.model(), TOKENS)
    leaf, logits = graph_between(trace.model, trace.tokens, "blocks.1.hook_resid_pre")
    rows = torch.stack(
        [torch.autograd.grad(logits[0, -1, token], leaf, retain_graph=True)[0][0, 2] for token in (5, 9)]
    )
    chosen = tlc.slice_jacobian(trace, ("resid_pre", 1), ("logits", [5, 9]), src=2)
    assert relative_error(chosen.dense(), rows) < 10 * case.tolerance
    difference = tlc.slice_jacobian(trace, ("resid_pre", 1), ("logit_diff", 5, 9), src=2)
    assert relative_error(difference.dense(), rows[:1] - rows[1:]) < 10 * case.tolerance
    every = tlc.slice_jacobian(trace, ("resid_pre", 1), "logits", src=2)
    assert every.shape == (logits.shape[-1], trace.d_model)
    assert relative_error(every.dense()[[5, 9]], rows) < 10 * case.tolerance


@few
def test_the_final_norm(case: Case):
    """Against a backward pass from the output of the model's own module, at two positions."""
    trace = tlc.trace(case.model(), TOKENS)
    kept: list[torch.Tensor] = []
    handle = trace.model.ln_final.register_forward_hook(lambda module, inputs, output: kept.append(output))
    leaf, _ = graph_between(trace.model, trace.tokens, "blocks.1.hook_resid_pre")
    handle.remove()
    numbers = kept[-1][0, list(DEST)].flatten()
    rows = torch.stack([torch.autograd.grad(number, leaf, retain_graph=True)[0][0, 2] for number in numbers])
    found = tlc.slice_jacobian(trace, ("resid_pre", 1), "ln_final", src=2, dest=DEST)
    assert relative_error(found.dense(), rows) < 10 * case.tolerance
    assert repr(found).startswith("SliceJacobian(blocks.1.hook_resid_pre at (2,) -> ln_final at (3, 4)")
    with pytest.raises(ArgumentError, match="target='ln_final'"):
        tlc.detached_map(trace, "ln_final")


def test_hooks_act():
    """A hook that halves a write halves what goes through it."""
    model = built_here({"attn_only": True})
    halve = [("blocks.1.hook_attn_out", lambda tensor, hook: 0.5 * tensor)]
    with pytest.warns(UserWarning, match="hooks act in block 1"):
        hooked = tlc.slice_jacobian(tlc.trace(model, TOKENS, fwd_hooks=halve), ("resid_pre", 1), ("resid_post", 1))
    assert hooked.engine == {1: "autograd"}
    plain = tlc.slice_jacobian(tlc.trace(model, TOKENS), ("resid_pre", 1), ("resid_post", 1)).dense()
    eye = torch.eye(len(plain), dtype=plain.dtype)
    torch.testing.assert_close(hooked.dense() - eye, 0.5 * (plain - eye))
    with pytest.raises(CertificateError, match="hooks act"):
        trace = tlc.trace(model, TOKENS, fwd_hooks=halve)
        tlc.slice_jacobian(trace, ("resid_pre", 1), ("resid_post", 1), engine="analytic")


def test_what_autograd_does_not_see_is_an_error():
    model = built_here({})
    detach = [("blocks.1.hook_mlp_out", lambda tensor, hook: half_detached(tensor))]
    with warnings.catch_warnings(), pytest.raises(HookError, match="layer 1"):
        warnings.simplefilter("ignore")
        tlc.slice_jacobian(tlc.trace(model, TOKENS, fwd_hooks=detach), ("resid_pre", 0), ("resid_post", -1))
    with forward(model.blocks[1].mlp, CUTS["no_grad"]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = tlc.trace(model, TOKENS)
        for source in (("resid_pre", 0), ("attn_out", 1)):
            with pytest.raises(DerivativeError, match="layer 1"):
                tlc.slice_jacobian(trace, source, ("resid_post", -1))


def test_a_changed_model_is_stale():
    model = built_here({})
    trace = tlc.trace(model, TOKENS)
    jacobian = tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", -1))
    next(model.blocks[1].mlp.parameters()).data.mul_(1.01)
    with pytest.raises(StaleTraceError, match="blocks.1"):
        jacobian.mv(torch.ones(trace.d_model))
    with pytest.raises(StaleTraceError, match="layer 1"):
        tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", -1))


@pytest.mark.parametrize(
    ("source", "target", "options", "message"),
    [
        (("resid_post", 2), ("resid_pre", 1), {}, "target=.*comes after source"),
        (("attn_out", 1), ("attn_out", 1), {}, "comes after source"),
        (("resid_pre", 1), ("resid_pre", 1), {}, "comes after source"),
        (("logits",), ("resid_post", 2), {}, "source=.*a point of resid_pre"),
        (("resid_pre", 3), ("resid_post", 2), {}, "layer of source=3 "),
        (("pattern", 0), ("resid_post", 2), {}, "source=.*resid_pre, resid_mid, resid_post"),
        ("ln_final.hook_normalized", ("resid_post", 2), {}, "source="),
        (("z", 0), ("resid_post", 2), {}, "'z', layer, head"),
        (("z", 0, 9), ("resid_post", 2), {}, "head of source=9 "),
        (("resid_pre", 0), ("logit_diff", 1), {}, "logit_diff"),
        (("resid_pre", 0), ("logits", [999]), {}, "target=999 "),
        (("resid_pre", 0), "logits", {"dest": "all"}, "choose some"),
        (("resid_pre", 0), ("resid_post", 2), {"src": 4, "dest": [1, 2]}, "dest=.*causal"),
        (("resid_pre", 0), ("resid_post", 2), {"src": 7}, "src=7 "),
        (("resid_pre", 0), ("resid_post", 2), {"src_mode": "sum"}, "src_mode='sum' "),
    ],
)
def test_bad_input(source: Any, target: Any, options: dict[str, Any], message: str, unchecked: None):
    trace = tlc.trace(built_here({}), TOKENS)
    with pytest.raises(ArgumentError, match=message):
        tlc.slice_jacobian(trace, source, target, **options)


def test_one_line():
    trace = tlc.trace(FEW[0].model(), TOKENS)
    jacobian = tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", 1), src=1, dest=3)
    assert repr(jacobian).startswith(
        "SliceJacobian(blocks.0.hook_resid_pre at (1,) -> blocks.1.hook_resid_post at (3,), shape="
    )
    assert jacobian.product_flops > 0 and jacobian.mm(torch.zeros(trace.d_model, 0)).shape == (trace.d_model, 0)
