"""Detached maps against the model's own modules with their nonlinear factors frozen, under autograd."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, FEW, TOKENS, Case, built_here, relative_error
from oracle import graph_between
from torch import Tensor

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, CertificateError
from tlcoupling.forward.hooked import attached

few = pytest.mark.parametrize("case", FEW, ids=str)
SRC, DEST = (1, 3), (3, 4)
# their attention multiplies what heads give by gates that have no hook point to freeze here
GATED_HEADS = {"bridge-qwen3-next", "bridge-afmoe"}


def frozen_norm(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The norm's own output as a constant factor of its input, elementwise, and its bias."""
    x = args[0]
    shifted = module._frozen(x + 3.0)
    centred = torch.allclose(shifted, output, rtol=1e-3, atol=1e-3)
    inner = x - x.mean(-1, keepdim=True) if centred else x
    bias = next((value for name, value in module.named_parameters() if name.rpartition(".")[2] in ("bias", "b")), 0.0)
    return ((output - bias) / inner).detach() * inner + bias


def frozen_units(post: Tensor, read: dict[str, Tensor], added: Tensor | float) -> Tensor:
    """What an MLP's units are as a constant factor of what is gated, or else of what they read."""
    last = read.get("linear", read["pre"])[..., -post.shape[-1] :]  # ModernBERT reads a gate and what it gates at once
    if "linear" not in read:
        return (post / last).detach() * last
    return ((post - added) / last).detach() * last + added


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Freeze the scales of norms, the patterns, the gates and act(x) / x of a model as it runs."""
    points = model.hook_dict
    hooks: list[tuple[Any, Any]] = []
    for layer in range(len(model.blocks)):
        where = f"blocks.{layer}."
        # the pattern, and what it is made of: some attention modules show their pattern behind their write
        attn = [f"{where}attn.hook_{name}" for name in ("q", "k", "pattern")]
        hooks += [(points[name], Tensor.detach) for name in attn if name in points]
        if where + "mlp.hook_pre" in points:
            read: dict[str, Tensor] = {}
            hooks += [
                (points[name], partial(read.__setitem__, name.rpartition("_")[2]))
                for name in (where + "mlp.hook_pre", where + "mlp.hook_pre_linear")
                if name in points
            ]
            # HookedTransformer adds the bias of a gated MLP behind its gate
            added = 0.0 if hasattr(model, "original_model") else model.blocks[layer].mlp.b_in.detach()
            hooks.append((points[where + "mlp.hook_post"], partial(frozen_units, read=read, added=added)))
    with ExitStack() as stack:
        stack.enter_context(attached(hooks))
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                module._frozen = type(module).forward.__get__(module)
                stack.callback(delattr, module, "_frozen")
                stack.callback(module.register_forward_hook(frozen_norm).remove)
        yield


def truth(trace: tlc.Trace, source: str, target: str | None) -> tuple[Tensor, Tensor]:
    """The source as a leaf, and the target in the frozen model; of logits, what a soft-cap does is frozen too."""
    raw: list[Tensor] = []
    handle = trace.model.unembed.register_forward_hook(lambda module, args, output: raw.append(output))
    try:
        with frozen(trace.model):
            leaf, out = graph_between(trace.model, trace.tokens, source, target)
    finally:
        handle.remove()
    return leaf, out if target is not None else (out / raw[-1]).detach() * raw[-1]


def pulled(leaf: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Three random cotangents of the output, and what they are at the source."""
    cotangents = torch.randn(3, out.numel(), generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    rows = [torch.autograd.grad(out.flatten() @ each, leaf, retain_graph=True)[0] for each in cotangents]
    return cotangents.mT, torch.stack(rows).detach()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_output_is_rebuilt_by_one_map_per_token_and_a_constant(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = tlc.detached_map(trace, ("resid_post", -1))
        except CertificateError as refused:
            assert case.analytic != ("block", "attn", "mlp") or "expert" in str(refused), refused
            pytest.skip(str(refused))
    tolerance = 1e-12 if case.exact else 1e-5  # float32 inside the modules
    assert made.error < tolerance
    assert relative_error(made.shares().sum(0) + made.constant, trace.resid[-1, -1]) < tolerance
    if case.name in GATED_HEADS:
        return
    leaf, out = truth(trace, "blocks.0.hook_resid_pre", f"blocks.{trace.n_layers - 1}.hook_resid_post")
    cotangents, expected = pulled(leaf, out[0, -1])
    assert relative_error(made.rmm(cotangents), expected.flatten(1).mT) < 10 * case.tolerance


@few
def test_every_kind_of_target_is_rebuilt(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    targets: list[Any] = [("attn_out", 2), ("z", 2, 1), ("resid_pre", 1), ("logits", [5, 9]), ("logit_diff", 5, 9)]
    if case.topology != "single":
        targets.append(("mlp_out", 2))
    if case.topology == "sequential":
        targets.append(("resid_mid", 2))
    tolerance = 1e-12 if case.exact else 1e-5
    with torch.no_grad():
        logits = trace.model(TOKENS[None], return_type="logits")[0, list(DEST)]
    for target in targets:
        made = tlc.detached_map(trace, target, dest=DEST)
        assert made.error < tolerance, target
        if target[0] == "logits":
            assert relative_error(made.value, logits[:, [5, 9]].flatten()) < case.tolerance
            assert relative_error(made.shares().sum(0) + made.constant, made.value) < tolerance
    if case.topology == "sequential":
        assert tlc.detached_map(trace, ("resid_post", -1), ("resid_mid", 1)).error < tolerance
    assert tlc.detached_map(trace, "logits").value.shape == (logits.shape[-1],)


@few
def test_maps_are_those_of_the_frozen_modules(case: Case):
    """From a place within the model, for some positions, to chosen logits."""
    trace = tlc.trace(case.model(), TOKENS)
    leaf, logits = truth(trace, "blocks.1.hook_resid_pre", None)
    cotangents, expected = pulled(leaf, logits[0, list(DEST)][:, [5, 9]])
    made = tlc.detached_map(trace, ("logits", [5, 9]), ("resid_pre", 1), src=SRC, dest=DEST)
    assert relative_error(made.rmm(cotangents), expected[:, 0, list(SRC)].flatten(1).mT) < 10 * case.tolerance
    assert relative_error(made.mm(made.rmm(cotangents)), made.dense() @ expected[:, 0, list(SRC)].flatten(1).mT) < 1e-4


def test_the_two_maps_side_by_side(tmp_path: Path):
    """The detached map rebuilds and does not predict; the Jacobian predicts small changes and does not rebuild."""
    trace = tlc.trace(FEW[0].model(), TOKENS)
    found = tlc.compare_detached(trace, ("resid_post", -1), k=3, sizes=(1e-4, 1e-3), draws=2)
    maps = (
        tlc.slice_jacobian(trace, ("resid_pre", 0), ("resid_post", -1), src="all"),
        tlc.detached_map(trace, ("resid_post", -1)),
    )
    for row, one in enumerate(maps):
        torch.testing.assert_close(found.singular_values[row], torch.linalg.svdvals(one.dense())[:3])
        rebuilt = one.mv(trace.resid[0].flatten()) + maps[1].constant
        error = relative_error(rebuilt, trace.resid[-1, -1])
        torch.testing.assert_close(float(found.reconstruction[row]), error, rtol=1e-6, atol=1e-13)
    assert found.reconstruction[1] < 1e-12 < 1e-2 < found.reconstruction[0]
    exact, frozen_factors = found.prediction.mean(-1)
    assert 5 < exact[1] / exact[0] < 20  # of order 1 in the size, along other directions
    assert (frozen_factors > 0.1).all()
    u = [torch.linalg.svd(one.dense()).U[:, :3] for one in maps]
    torch.testing.assert_close(found.overlap[0], (u[0].mT @ u[1]).square().sum() / 3)
    assert found.null.tolist() == [3 / 32, 3 / (7 * 32)]
    again = tlc.load(found.save(tmp_path / "comparison"))
    assert torch.equal(again.prediction, found.prediction) and "error of reconstruction: jacobian" in repr(again)
    assert repr(again).startswith("DetachedComparison(blocks.0.hook_resid_pre -> blocks.2.hook_resid_post: ")
    logits = tlc.compare_detached(trace, ("logit_diff", 5, 9), k=1, sizes=(1e-4,), draws=1)
    assert logits.target == "logits[5 − 9]"
    assert logits.prediction[0] < 1e-2 < logits.prediction[1] and logits.reconstruction[1] < 1e-12


def test_what_cannot_be_frozen_is_refused():
    model = built_here({})
    trace = tlc.trace(model, TOKENS)
    with pytest.raises(ArgumentError, match="source=.*one head's z"):
        tlc.detached_map(trace, ("resid_post", -1), ("z", 0, 1))
    with pytest.raises(ArgumentError, match="target=.*comes after"):
        tlc.detached_map(trace, ("resid_pre", 0))
    with pytest.raises(ArgumentError, match="dest=.*choose some"):
        tlc.detached_map(trace, "logits", dest="all")
    with pytest.raises(ArgumentError, match="sizes="):
        tlc.compare_detached(trace, ("resid_post", -1), sizes=())
    halve = [("blocks.1.hook_attn_out", lambda tensor, hook: 0.5 * tensor)]
    with pytest.raises(CertificateError, match="no detached map: hooks act in block 1"):
        tlc.detached_map(tlc.trace(model, TOKENS, fwd_hooks=halve), ("resid_post", -1))
    embed = [("hook_embed", lambda tensor, hook: 0.5 * tensor)]
    with pytest.raises(CertificateError, match="hooks act outside the blocks"):
        tlc.detached_map(tlc.trace(model, TOKENS, fwd_hooks=embed), ("logits", [5]))
