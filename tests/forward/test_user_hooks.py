"""Composition: the forward pass and every Jacobian see the user's hooks, and what cannot be followed is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import CASES, FEW, OF_EACH_CLASS, TOKENS, Case, relative_error

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, HookError, ResidualIdentityError, StaleTraceError
from tlcoupling.jacobian.engine import JacobianEngine

few = pytest.mark.parametrize("case", FEW, ids=str)
of_each_class = pytest.mark.parametrize("case", OF_EACH_CLASS, ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:tlcoupling computes by autograd")

WIDTH = CASES[0].model().cfg.d_model
ROTATION = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).double()).Q
STEER = torch.linspace(-1.0, 1.0, WIDTH, dtype=torch.float64)


def hook(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of an activation as TransformerLens calls it."""
    return lambda activation, hook: function(activation)


def ablate(head: int) -> Callable[..., torch.Tensor]:
    """TransformerLens's way: in place."""

    def zero(z: torch.Tensor, hook: Any) -> torch.Tensor:
        z[:, :, head] = 0.0
        return z

    return zero


def mean_ablate(z: torch.Tensor, hook: Any) -> torch.Tensor:
    """Head 1 puts out its mean over the positions."""
    z = z.clone()
    z[:, :, 1] = z[:, :, 1].mean(1, keepdim=True)
    return z


def autoencode(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ ROTATION) @ ROTATION.mT


KINDS: dict[str, list[tuple[Any, Callable[..., Any]]]] = {
    "steering": [("blocks.1.hook_resid_pre", hook(lambda x: x + STEER))],
    "embedding": [("hook_embed", hook(lambda x: 1.5 * x))],
    "stream autoencoder": [("blocks.1.hook_resid_post", hook(autoencode))],
    "the same before the next block": [("blocks.2.hook_resid_pre", hook(autoencode))],
    "write autoencoder": [(lambda name: name.endswith("1.hook_attn_out"), hook(autoencode))],
    "mean ablation": [("blocks.1.attn.hook_z", mean_ablate), ("blocks.2.attn.hook_z", ablate(0))],
    "in place": [
        ("blocks.1.hook_resid_pre", hook(lambda x: x.add_(STEER))),
        ("blocks.2.hook_attn_out", hook(lambda x: x.mul_(0.5))),
    ],
}


def brute_force(model: Any, hooks: list, layer: int, src: int, dest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x^{l+1}_dest and its Jacobian with respect to x^l_src, from whole runs of the hooked model."""
    last = layer == len(model.blocks) - 1
    reads = f"blocks.{layer}.hook_resid_pre"
    leaves = f"blocks.{layer}.hook_resid_post" if last else f"blocks.{layer + 1}.hook_resid_pre"
    kept: dict[str, torch.Tensor] = {}

    def start(stream: torch.Tensor, hook: Any) -> torch.Tensor:
        kept["in"] = stream.detach().clone().requires_grad_()
        return kept["in"].clone()

    def stop(stream: torch.Tensor, hook: Any) -> None:
        kept["out"] = stream.clone()

    with torch.enable_grad(), model.hooks(fwd_hooks=[*hooks, (reads, start), (leaves, stop)]):
        model(TOKENS[None])
    rows = [
        torch.autograd.grad(value, kept["in"], retain_graph=True, allow_unused=True, materialize_grads=True)[0][0, src]
        for value in kept["out"][0, dest]
    ]
    return kept["out"][0, dest].detach(), torch.stack(rows)


@few
@pytest.mark.parametrize("kind", KINDS)
def test_forward_pass_and_jacobians_see_the_hooks(case: Case, kind: str):
    model, hooks = case.model(), KINDS[kind]
    trace = tlc.trace(model, TOKENS, fwd_hooks=hooks)
    with model.hooks(fwd_hooks=hooks):
        attached = tlc.trace(model, TOKENS)
        theirs = tlc.residual_jacobian(attached, 1, "block").dense()
    assert relative_error(theirs, tlc.residual_jacobian(trace, 1, "block").dense()) < case.tolerance
    assert torch.equal(attached.resid, trace.resid)
    assert trace.hooked_layers == attached.hooked_layers
    for layer, src, dest in ((0, 6, 6), (1, 6, 6), (1, 2, 5), (2, 2, 5)):
        out, truth = brute_force(model, hooks, layer, src, dest)
        truth = truth - (src == dest) * torch.eye(WIDTH, dtype=torch.float64)
        assert relative_error(trace.resid[layer + 1, dest], out) < case.tolerance
        found = tlc.residual_jacobian(trace, layer, "block", src, dest).dense()
        assert relative_error(found, truth) < case.tolerance, (layer, src, dest)
    assert not any(point.fwd_hooks for name, point in model.hook_dict.items() if "opt" not in name)


@few
def test_only_hooked_blocks_leave_the_closed_form(case: Case):
    model = case.model()
    hooks = [("blocks.1.attn.hook_z", mean_ablate)]
    trace = tlc.trace(model, TOKENS, fwd_hooks=hooks)
    assert trace.hooked_layers == {1}
    engine, oracle = JacobianEngine(trace), JacobianEngine(trace, "autograd")
    for sublayer in trace.sublayers:
        for layer in range(3):
            found = engine.operator(layer, sublayer, 6, 6).dense()
            assert relative_error(found, oracle.operator(layer, sublayer, 6, 6).dense()) < case.tolerance
        assert engine.used[sublayer] == "analytic (layers [0, 2]), autograd (layers [1])"
    # steering makes x^1 and leaves no block's Jacobian to the closed form but that of the block before it
    assert tlc.trace(model, TOKENS, fwd_hooks=KINDS["steering"]).hooked_layers == {0}
    assert tlc.trace(model, TOKENS, fwd_hooks=KINDS["embedding"]).hooked_layers == frozenset()


@few
def test_an_ablated_head_changes_exactly_the_jacobians_that_it_should(case: Case):
    """Behind a post-norm heads do not add up to the write, so that its own layer is left out there."""
    model, layer, head = case.model(), 1, 2
    adds_up = getattr(model.blocks[layer], "ln1_post", None) is None
    clean = tlc.trace(model, TOKENS)
    hooks = [(f"blocks.{layer}.attn.hook_z", ablate(head))]
    ablated = tlc.trace(model, TOKENS, fwd_hooks=hooks)
    # before it: the same stream, to the last bit, and the same Jacobians. Without hooks, the last row is run alone,
    # and HuggingFace's modules cast to float32 inside: rounding differs.
    assert torch.equal(ablated.resid[: layer + 1], clean.resid[: layer + 1])
    for sublayer in clean.sublayers:
        before = [tlc.residual_jacobian(trace, 0, sublayer).dense() for trace in (clean, ablated)]
        torch.testing.assert_close(*before, rtol=1e-5, atol=1e-5)
    # its own layer: the attention's Jacobian is that of the other heads
    for src, dest in ((6, 6), (2, 5)) if adds_up else ():
        others = sum(
            tlc.residual_jacobian(clean, layer, "attn", src, dest, head=other).dense()
            for other in range(model.cfg.n_heads)
            if other != head
        )
        found = tlc.residual_jacobian(ablated, layer, "attn", src, dest).dense()
        assert relative_error(found, others) < case.tolerance
        assert tlc.residual_jacobian(ablated, layer, "attn", src, dest, head=head).dense().norm() == 0
    # behind it: those of the unhooked model on the ablated stream
    patch = [(f"blocks.{layer + 1}.hook_resid_pre", hook(lambda x: ablated.resid[layer + 1][None].clone()))]
    patched = tlc.trace(model, TOKENS, fwd_hooks=patch)
    for sublayer in clean.sublayers:
        found = tlc.residual_jacobian(ablated, layer + 1, sublayer).dense()
        same = tlc.residual_jacobian(patched, layer + 1, sublayer).dense()  # by autograd, and rounded otherwise
        torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-5)
        assert relative_error(found, tlc.residual_jacobian(clean, layer + 1, sublayer).dense()) > 1e-3


@few
def test_an_identity_autoencoder_changes_nothing(case: Case):
    """An orthogonal matrix and its transpose: to rounding of two products."""
    model = case.model()
    splice = hook(lambda x: (x @ ROTATION) @ ROTATION.mT)
    clean = tlc.trace(model, TOKENS)
    write = "hook_attn_out" if clean.mlp_out is None else "hook_mlp_out"
    for name, layers in (("blocks.1.hook_resid_pre", (0, 1)), (f"blocks.1.{write}", (1, 2))):
        spliced = tlc.trace(model, TOKENS, fwd_hooks=[(name, splice)])
        assert relative_error(spliced.resid, clean.resid) < case.tolerance
        for sublayer in clean.sublayers:
            for layer in layers:
                found, truth = (tlc.residual_jacobian(trace, layer, sublayer).dense() for trace in (spliced, clean))
                assert relative_error(found, truth) < case.tolerance, (name, sublayer, layer)


@few
def test_a_patched_activation_passes_no_derivative_on(case: Case):
    model = case.model()
    constant = torch.ones(1, len(TOKENS), WIDTH, dtype=torch.float64)
    trace = tlc.trace(model, TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", hook(lambda x: constant.clone()))])
    assert tlc.residual_jacobian(trace, 1, "attn").dense().norm() == 0
    assert tlc.residual_jacobian(trace, 1, "block", 2, 5).dense().norm() == 0
    if trace.mlp_out is not None:
        mlp, block = (tlc.residual_jacobian(trace, 1, name).dense() for name in ("mlp", "block"))
        assert relative_error(block, mlp) < case.tolerance
    with pytest.raises(ArgumentError, match="k=2 .*at most 0, the numerical rank"):
        tlc.depth_coupling(trace, 2, sublayers="attn")
    # a stream that is replaced whole: x^2 does not move with x^1, so J = -I
    trace = tlc.trace(model, TOKENS, fwd_hooks=[("blocks.2.hook_resid_pre", hook(lambda x: constant.clone()))])
    found = tlc.residual_jacobian(trace, 1, "block").dense()
    torch.testing.assert_close(found, -torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=0)


@few
def test_edits_of_the_stream_belong_to_no_sublayer(case: Case):
    trace = tlc.trace(case.model(), TOKENS, fwd_hooks=KINDS["steering"])
    assert trace.edits is not None
    torch.testing.assert_close(trace.edits[0], STEER.expand(len(TOKENS), -1))
    assert trace.edits[1:].norm() == 0
    assert trace.identity_gap < 1e-10
    assert tlc.trace(case.model(), TOKENS).edits is None
    grown = tlc.growth(trace)
    if grown.attn_share is not None:
        left = grown.alpha - grown.attn_share - grown.mlp_share
        moved = trace.resid[1].norm(dim=-1).log() - (trace.resid[1] - STEER).norm(dim=-1).log()
        torch.testing.assert_close(left[0], moved)
        torch.testing.assert_close(left[1:], torch.zeros_like(left[1:]))


def test_a_half_precision_model_is_hooked_in_float32():
    case, hooks = FEW[0], [("blocks.1.attn.hook_z", mean_ablate), ("blocks.2.hook_resid_pre", hook(lambda x: x + 1.0))]
    lifted = case.build(torch.bfloat16).eval().float()
    lifted.cfg.dtype = torch.float32
    found, truth = (tlc.trace(model, TOKENS, fwd_hooks=hooks) for model in (case.model(torch.bfloat16), lifted))
    for layer in range(3):
        jacobians = [tlc.residual_jacobian(trace, layer, "block").dense() for trace in (found, truth)]
        assert (
            relative_error(*jacobians) < 1e-4
        )  # float32 rounding of three blocks; half precision would be off by 1e-2


@few
def test_an_analysis_in_one_call(case: Case):
    model = case.model()
    hooks = [("blocks.1.attn.hook_z", mean_ablate)]
    report = tlc.analyze(model, TOKENS, k=3, fwd_hooks=hooks)
    with model.hooks(fwd_hooks=hooks):
        same = tlc.analyze(model, TOKENS, k=3)
    torch.testing.assert_close(report.coupling.values, same.coupling.values)
    torch.testing.assert_close(report.linearity.lss, same.linearity.lss)
    assert (report.coupling.values - tlc.analyze(model, TOKENS, k=3).coupling.values).abs().max() > 1e-3
    assert report.coupling.provenance.settings["fwd_hooks"] == ["blocks.1.attn.hook_z"]
    assert "fwd_hooks" not in same.coupling.provenance.settings
    clean = tlc.analyze(model, TOKENS, k=3)
    for part in ("coupling", "linearity", "growth"):  # an ablated result does not look like a clean one
        assert getattr(report, part).provenance.settings["hooked_layers"] == [1]
        assert getattr(same, part).provenance.settings["hooked_layers"] == [1]
        assert "hooked_layers" not in getattr(clean, part).provenance.settings
    with model.hooks(fwd_hooks=hooks):
        many = tlc.analyze_many(model, [TOKENS], k=3)
        effect = tlc.causal_effect(model, [TOKENS], 2, layers=[0], sublayer="attn", draws=1)
    assert many.provenance.settings["hooked_layers"] == effect.provenance.settings["hooked_layers"] == [1]


def test_a_cache_of_a_hooked_model_becomes_a_trace_with_its_hooks():
    model = FEW[0].model()
    hooks = [("blocks.1.attn.hook_z", mean_ablate)]
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(TOKENS[None])
    with pytest.raises(StaleTraceError, match="hooks that are not attached"):
        tlc.Trace.from_cache(model, cache, TOKENS)
    trace = tlc.Trace.from_cache(model, cache, TOKENS, fwd_hooks=hooks)
    torch.testing.assert_close(trace.resid, tlc.trace(model, TOKENS, fwd_hooks=hooks).resid)


BAD_HOOKS = [
    (
        [("blocks.1.hook_atn_out", mean_ablate)],
        ArgumentError,
        "fwd_hooks='blocks.1.hook_atn_out' .*model's hook points",
    ),
    ([("blocks.3.hook_attn_out", mean_ablate)], ArgumentError, "blocks.3.hook_attn_out"),
    ([(lambda name: False, mean_ablate)], ArgumentError, "filters that pick at least one"),
    (["blocks.1.hook_attn_out"], ArgumentError, "pairs"),
    ([("blocks.1.hook_attn_out", 3.0)], ArgumentError, "pairs"),
    ([(3, mean_ablate)], ArgumentError, "fwd_hooks=3 "),
    (
        [("blocks.1.hook_attn_out", hook(lambda x: x.mean(1, keepdim=True)))],
        HookError,
        r"blocks.1.*changes the shape from \(1, 7, \d+\) to \(1, 1, \d+\)",
    ),
    ([("blocks.1.hook_attn_out", hook(lambda x: 3.0))], HookError, "gives back float"),
    ([("blocks.1.hook_mlp_in", hook(lambda x: 2 * x))], ArgumentError, "fwd_hooks=.*switche[sd] on|switched off"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("hooks", "error", "message"), BAD_HOOKS)
def test_bad_hooks_are_refused(hooks: list, error: type[Exception], message: str):
    model = FEW[0].model()
    with pytest.raises(error, match=message):
        tlc.trace(model, TOKENS, fwd_hooks=hooks)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_changed_shape_is_refused_where_hooks_are_attached_too():
    model = FEW[0].model()
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", hook(lambda x: x.mean(1, keepdim=True)))]),
        pytest.raises(ArgumentError, match=r"blocks.1.hook_attn_out=.*keep the shape"),
    ):
        tlc.trace(model, TOKENS)


@few
def test_hooks_that_edit_the_middle_of_a_block_are_refused(case: Case):
    if case.topology != "sequential":
        pytest.skip("no hook_resid_mid")
    with pytest.raises(ResidualIdentityError, match="block 1: .*edit hook_attn_out instead|block 1: .*edit.*instead"):
        tlc.trace(case.model(), TOKENS, fwd_hooks=[("blocks.1.hook_resid_mid", hook(lambda x: x + STEER))])


DETACHING = {
    "whole": lambda x: 0.9 * x.detach(),
    "by a trip through numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "an error term": lambda x: autoencode(x) + (x - autoencode(x)).detach(),
}


@few
@pytest.mark.parametrize("kind", DETACHING)
@pytest.mark.parametrize("attach", ["fwd_hooks", "context"])
def test_hooks_that_detach_the_graph_are_refused(case: Case, kind: str, attach: str):
    model, hooks = case.model(), [("blocks.1.hook_attn_out", hook(DETACHING[kind]))]
    with model.hooks(fwd_hooks=hooks if attach == "context" else []):
        trace = tlc.trace(model, TOKENS, fwd_hooks=hooks if attach == "fwd_hooks" else ())
        for sublayer in ("attn", "block"):
            with pytest.raises(HookError, match=f"layer 1, {sublayer} .*: autograd does not see all that is run"):
                tlc.residual_jacobian(trace, 1, sublayer)
        tlc.residual_jacobian(trace, 0, "block")


def detach_at(*positions: int) -> Callable[..., torch.Tensor]:
    """A splice that hides its derivative at some positions, as an autoencoder run on those alone."""

    def splice(write: torch.Tensor, hook: Any) -> torch.Tensor:
        write = write.clone()
        for pos in positions:
            write[:, pos] = autoencode(write[:, pos]).detach()
        return write

    return splice


@of_each_class
def test_a_graph_detached_at_one_position_is_found_there(case: Case):
    """The check of one position says nothing of another."""
    trace = tlc.trace(case.model(), TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", detach_at(5))])
    for measure in (
        lambda: tlc.depth_coupling(trace, 2, tokens=[2, 5]),
        lambda: tlc.context_coupling(trace, fixed="src", position=2, k=2, sublayers="attn", layers=[1]),
    ):
        with pytest.raises(HookError, match="layer 1, .*to 5: autograd does not see all"):
            measure()
    engine = JacobianEngine(trace)
    for src, dest in ((2, 2), (2, 4), (5, 6)):
        engine.operator(1, "attn", src, dest)
    with pytest.raises(HookError, match="layer 1, attn from position 2 to 5"):
        engine.operator(1, "attn", 2, 5)


@of_each_class
def test_a_propagation_through_all_tokens_checks_what_hooks_hide(case: Case):
    """At the token that is moved, at a later one that reads it, and nowhere where the hook is out of reach."""
    move = torch.randn(WIDTH, dtype=torch.float64)
    for pos, hidden in ((3, 3), (3, 5)):
        trace = tlc.trace(case.model(), TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", detach_at(hidden))])
        for measure in (tlc.linearized, tlc.linearization_gap):
            with pytest.raises(HookError, match=f"layer 1, block at position {hidden}: autograd does not see all"):
                measure(trace, move, pos=pos, tokens="all")
    # a token before the one that moves; and a hook whose derivative is all there
    for hooks in ([("blocks.1.hook_attn_out", detach_at(2))], KINDS["write autoencoder"]):
        trace = tlc.trace(case.model(), TOKENS, fwd_hooks=hooks)
        found = tlc.linearized(trace, move, pos=3, tokens="all")
        small = 1e-4 * trace.resid[0, 3].norm() / move.norm()  # errors of the order of the step
        moved = trace.resid[0].clone()
        moved[3] += small * move
        for layer in range(3):
            with torch.no_grad():
                moved = trace.run_block(layer, moved[None], {})[0]
        assert relative_error((moved - trace.resid[3])[3:] / small, found[-1]) < 1e-2


@of_each_class
def test_a_propagation_through_a_patched_stream_ends_there(case: Case):
    patch = hook(lambda x: torch.ones_like(x))
    trace = tlc.trace(case.model(), TOKENS, fwd_hooks=[("blocks.2.hook_resid_pre", patch)])
    found = tlc.linearized(trace, torch.ones(WIDTH, dtype=torch.float64), pos=3, tokens="all")
    assert (found[:2].norm(dim=(1, 2)) > 0).all() and (found[2:] == 0).all()


def triple_last(module: Any, args: Any, output: Any) -> Any:
    """A hook of PyTorch's own, on the last position alone."""
    whole = output[0] if isinstance(output, tuple) else output
    scaled = torch.cat([whole[:, :-1], 3 * whole[:, -1:]], 1)
    return (scaled, *output[1:]) if isinstance(output, tuple) else scaled


@contextmanager
def registered(module: torch.nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()


@of_each_class
@pytest.mark.parametrize("part", ["mlp", "attn"])
def test_hooks_registered_on_modules_are_followed(case: Case, part: str):
    """Where only the last position is edited, the closed form holds at all others."""
    model = case.model()
    clean = tlc.trace(model, TOKENS)
    assert clean.hooked_layers == frozenset()
    before = {pos: tlc.residual_jacobian(clean, 1, part, pos, pos).dense() for pos in (0, 6)}
    module = getattr(model.blocks[1], part)
    if case.name.startswith("bridge"):  # whose own output is behind the hook point of the write
        with (
            registered(module, triple_last),
            pytest.raises(ResidualIdentityError, match="registered on a module behind its hook point"),
        ):
            tlc.trace(model, TOKENS)
        module = module.out if part == "mlp" else module.o
    with registered(module, triple_last):
        trace = tlc.trace(model, TOKENS)
        assert trace.hooked_layers == {1}
        engine = JacobianEngine(trace)
        for pos, factor in ((0, 1.0), (6, 3.0)):
            found = engine.operator(1, part, pos, pos).dense()
            assert relative_error(found, factor * before[pos]) < case.tolerance, pos
        _, truth = brute_force(model, [], 1, 6, 6)
        found = engine.operator(1, "block", 6, 6).dense()
        assert relative_error(found, truth - torch.eye(WIDTH, dtype=torch.float64)) < case.tolerance
        assert engine.used == {part: "autograd", "block": "autograd"}
    with pytest.raises(StaleTraceError):
        tlc.residual_jacobian(trace, 1, part)
    assert tlc.trace(model, TOKENS).hooked_layers == frozenset()


@of_each_class
def test_a_hook_registered_on_a_hook_point_acts_where_the_point_is(case: Case):
    model = case.model()
    point = model.hook_dict["blocks.2.hook_resid_pre"]
    with registered(point, lambda module, args, output: torch.tanh(output)):
        trace = tlc.trace(model, TOKENS)
        assert trace.hooked_layers == {1}
        assert trace.edits is not None and trace.edits[1].norm() > 0
        out, truth = brute_force(model, [], 1, 6, 6)
        assert relative_error(trace.resid[2, 6], out) < case.tolerance
        found = tlc.residual_jacobian(trace, 1, "block").dense()
        assert relative_error(found, truth - torch.eye(WIDTH, dtype=torch.float64)) < case.tolerance


@of_each_class
def test_hooks_outside_the_blocks_are_told(case: Case):
    model = case.model()
    trace = tlc.trace(model, TOKENS)
    same = hook(lambda x: x)
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", same)]), registered(model.blocks[1].attn, lambda *_: None):
        assert not trace.hooked_outside_blocks()
    with model.hooks(fwd_hooks=[("hook_embed", same)]):
        assert trace.hooked_outside_blocks()
    with registered(model.unembed, lambda *_: None):
        assert trace.hooked_outside_blocks()
    assert not trace.hooked_outside_blocks()


@of_each_class
def test_a_hook_may_look_ahead(case: Case):
    """A pattern that a hook makes even over all positions makes no encoder of the model."""
    even = hook(lambda pattern: torch.full_like(pattern, 1 / len(TOKENS)))
    trace = tlc.trace(case.model(), TOKENS, fwd_hooks=[("blocks.0.attn.hook_pattern", even)])
    assert trace.hooked_layers == {0}
    torch.testing.assert_close(trace.attn_out[0], trace.attn_out[0, :1].expand(len(TOKENS), -1))


def test_a_hook_that_is_not_smooth_is_said_to_be_once():
    case = FEW[0]
    jagged = hook(lambda x: x + 0.3 * torch.sign(torch.sin(1e4 * x)))
    trace = tlc.trace(case.model(), TOKENS, fwd_hooks=[("blocks.1.hook_attn_out", jagged)])
    with pytest.warns(UserWarning, match="layer 1, attn .*differences, which do not settle") as said:
        tlc.context_coupling(trace, fixed="dest", position=6, k=2, sublayers="attn", layers=[1])
    assert sum("do not settle" in str(one.message) for one in said) == 1


def test_an_edit_in_place_that_the_derivative_cannot_take_is_named():
    """HuggingFace's softmax keeps its output for the derivative, and the hook overwrites it."""
    case = next((case for case in FEW if case.name.startswith("bridge")), None)
    if case is None:
        pytest.skip("a HookedTransformer's pattern is a copy of what its softmax keeps")

    def uniform(pattern: torch.Tensor, hook: Any) -> torch.Tensor:
        pattern[:, 0] *= 0.5
        return pattern

    trace = tlc.trace(case.model(), TOKENS, fwd_hooks=[("blocks.1.attn.hook_pattern", uniform)])
    with pytest.raises(HookError, match="edits in place.*clone"):
        tlc.residual_jacobian(trace, 1, "attn")


def test_a_trace_keeps_its_hooks_and_says_when_others_are_attached():
    model = FEW[0].model()
    trace = tlc.trace(model, TOKENS, fwd_hooks=KINDS["mean ablation"])
    kept = tlc.residual_jacobian(trace, 1, "attn").dense()
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", hook(lambda x: 2 * x))]),
        pytest.raises(StaleTraceError, match="layer 1 gives another output"),
    ):
        tlc.residual_jacobian(trace, 1, "attn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative_error(tlc.residual_jacobian(trace, 0, "attn").dense(), kept) > 0.1
