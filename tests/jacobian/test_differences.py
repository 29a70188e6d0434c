"""Differences: no derivative that is not the function's passes, and none that is gets refused."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from broken import CUTS, LLAMA, PAIRS, forward, half_detached, needs_llama
from cases import CASES, TOKENS, Case, part, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tlcoupling as tlc
from tlcoupling.errors import DerivativeError, HookError, TLCouplingError
from tlcoupling.jacobian.differences import Function
from tlcoupling.jacobian.engine import JacobianEngine

pytestmark = pytest.mark.filterwarnings("ignore:tlcoupling computes by autograd")


def by_differences(trace: tlc.Trace, layer: int, sublayer: str, src: int, dest: int) -> torch.Tensor:
    """A Jacobian column by column, from runs of the block with its input moved."""
    inside = sublayer == "mlp" and trace.topology == "sequential"
    stream = trace.mlp_input(layer) if inside else trace.block_input(layer)
    step = 1e-3 * float(stream[0, src].norm())  # above float32 rounding, where modules cast to it
    columns = []
    for axis in range(trace.d_model):
        ends = []
        for sign in (1, -1):
            moved, kept = stream.clone(), {}
            moved[0, src, axis] += sign * step
            hooks = {f"hook_{sublayer}_out": lambda x, kept=kept: kept.__setitem__("out", x.clone())}
            if sublayer == "block":
                hooks = {}
            if inside:
                hooks["hook_resid_mid"] = lambda x, moved=moved: moved
            with torch.no_grad():
                kept.setdefault("out", trace.run_block(layer, trace.block_input(layer) if inside else moved, hooks))
            ends.append(kept["out"][0, dest] - (moved[0, dest] if sublayer == "block" and src == dest else 0.0))
        columns.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(columns, dim=1)


def measured_or_refused(trace: tlc.Trace, layer: int, pairs: list[tuple[int, int]]) -> int:
    """Hold what is measured against dense differences; return how many pairs were refused."""
    engine, refused = JacobianEngine(trace, "auto", pairs), 0
    for sublayer in trace.sublayers:
        for src, dest in pairs:
            try:
                found = engine.operator(layer, sublayer, src, dest).dense()
            except (DerivativeError, HookError):
                refused += 1
                continue
            truth = by_differences(trace, layer, sublayer, src, dest)
            # one direction is held to 2 %; the whole matrix may be a few times as far off
            assert relative_error(found, truth) < 0.1 or truth.norm() < 1e-6, (sublayer, src, dest)
    return refused


@needs_llama
@given(
    path=st.sampled_from(["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out", "mlp"]),
    layer=st.integers(0, 2),
    kind=st.sampled_from(["no_grad", "half detached"]),
    pair=st.sampled_from(PAIRS),
)
@settings(max_examples=25)
def test_no_cut_graph_passes(path: str, layer: int, kind: str, pair: tuple[int, int]):
    """Where the cut part has a derivative; else the number is right."""
    model = LLAMA.model()
    with forward(part(model, layer, path), CUTS[kind]):
        measured_or_refused(tlc.trace(model, TOKENS), layer, [pair])


@needs_llama
@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("path", ["mlp", "mlp.out", "attn.o"])
def test_what_autograd_does_not_see_is_refused_with_layer_and_sublayer(kind: str, path: str):
    model = LLAMA.build(torch.float32).eval()
    sublayer = path.partition(".")[0]
    with forward(part(model, 1, path), CUTS[kind]):
        trace = tlc.trace(model, TOKENS)
        for engine in ("auto", "autograd"):
            for name in (sublayer, "block"):
                with pytest.raises(DerivativeError, match=f"layer 1, {name} from position 6 to 6: autograd's"):
                    tlc.residual_jacobian(trace, 1, name, engine=engine)
        with pytest.raises(DerivativeError, match="layer 1"):
            tlc.depth_coupling(trace, 3)
        tlc.residual_jacobian(trace, 0, "block")  # other layers are measured
        checked = tlc.check(model, TOKENS)
        assert not checked.passed
        assert any("differences" in one.what and one.outcome == "refused" for one in checked.findings)


@needs_llama
@pytest.mark.parametrize("through", [False, True], ids=["no derivative", "straight through"])
@pytest.mark.parametrize("sublayer", ["attn", "mlp"])
def test_activations_in_int8_are_refused(sublayer: str, through: bool):
    """As dynamic quantisation does it: each projection reads its input rounded to 127 steps of each row's largest."""

    def rounded(call):
        def edited(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            scale = x.detach().abs().amax(-1, keepdim=True) / 127
            whole = scale * (x.detach() / scale).round()
            return call(x + (whole - x).detach() if through else whole, *args, **kwargs)

        return edited

    model = LLAMA.model(torch.float32)
    names = {"attn": "qkvo", "mlp": ("gate", "in", "out")}[sublayer]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(forward(part(model, 1, f"{sublayer}.{name}"), rounded))
        trace = tlc.trace(model, TOKENS)
        for which in (sublayer, "block"):
            with pytest.raises(DerivativeError, match=f"layer 1, {which} .*rounded activations"):
                tlc.residual_jacobian(trace, 1, which)


def test_experts_that_run_without_a_graph_are_refused():
    case = next((case for case in CASES if case.name == "bridge-mixtral"), None)
    if case is None:
        pytest.skip("no mixture of experts")
    model = case.build(torch.float32).eval()
    experts = next(m for n, m in model.blocks[1].named_modules() if n.endswith("experts"))
    with forward(experts, CUTS["no_grad"]):
        trace = tlc.trace(model, TOKENS)
        with pytest.raises(DerivativeError, match="layer 1, block .*experts"):
            tlc.residual_jacobian(trace, 1, "block")


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_hooks_on_all_modules_are_the_users(case: Case):
    model = case.model()

    def detach(module: torch.nn.Module, args: object, output: object) -> object:
        return half_detached(output) if isinstance(output, torch.Tensor) and output.is_floating_point() else None

    handle = torch.nn.modules.module.register_module_forward_hook(detach)
    try:
        trace = tlc.trace(model, TOKENS)
        assert trace.hooked_layers == {0, 1, 2}
        with pytest.raises(HookError, match="autograd does not see all that is run"):
            tlc.residual_jacobian(trace, 1, "block")
    finally:
        handle.remove()
    assert tlc.trace(model, TOKENS).hooked_layers == frozenset()


def test_a_propagation_through_all_tokens_is_held_against_the_function():
    model = CASES[0].build(torch.float64).eval()
    with forward(model.blocks[1].mlp, CUTS["no_grad"]):
        trace = tlc.trace(model, TOKENS)
        with pytest.raises(TLCouplingError, match="layer 1, block at position 6"):
            tlc.linearized(trace, torch.randn(trace.d_model, dtype=torch.float64), pos=6, tokens="all")


def test_the_readout_is_held_against_the_function():
    model = CASES[0].build(torch.float64).eval()
    with forward(model.ln_final, CUTS["half detached"]), pytest.raises(DerivativeError, match="the logits"):
        tlc.read_directions(tlc.trace(model, TOKENS), layer=1)


def function(run, derivative, noise: float = 0.0, size: float = 1.0) -> Function:
    """A function of R^16 at zero, one row."""
    generator = torch.Generator().manual_seed(0)

    def moved(moves: torch.Tensor) -> torch.Tensor:
        out = torch.stack([run(move) - run(torch.zeros_like(move)) for move in moves])
        return (out + noise * torch.randn(out.shape, generator=generator, dtype=out.dtype))[:, None]

    return Function("here", moved, lambda one: derivative(one)[None], size, torch.ones(1, dtype=torch.float64), False)


WEIGHT = torch.randn(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PRE = torch.linspace(-1.0, 1.0, 64, dtype=torch.float64)
DIRECTIONS = torch.randn(4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
DIRECTIONS = DIRECTIONS / DIRECTIONS.norm(dim=1, keepdim=True)
RIGHT = {
    "linear": function(lambda x: WEIGHT @ x, lambda q: WEIGHT @ q),
    "zero": function(lambda x: 0 * (WEIGHT @ x), lambda q: 0 * (WEIGHT @ q)),
    "curved": function(lambda x: torch.sin(60 * (WEIGHT @ x)), lambda q: 60 * (WEIGHT @ q)),
    "kinks": function(lambda x: (PRE + WEIGHT @ x).relu(), lambda q: (PRE > 0) * (WEIGHT @ q)),
    "kinks all around": function(lambda x: (PRE / 9 + WEIGHT @ x).relu(), lambda q: (PRE > 0) * (WEIGHT @ q)),
    "under rounding": function(lambda x: 1e-4 * WEIGHT @ x, lambda q: 1e-4 * WEIGHT @ q, noise=1e-6),
}
WRONG = {
    "cut": function(lambda x: WEIGHT @ x, lambda q: 0.5 * (WEIGHT @ q)),
    "cut whole": function(lambda x: WEIGHT @ x, lambda q: 0 * (WEIGHT @ q)),
    "not zero": function(lambda x: 0 * (WEIGHT @ x), lambda q: WEIGHT @ q),
    "staircase": function(lambda x: (20 * (PRE + WEIGHT @ x)).round() / 20, lambda q: 0 * (WEIGHT @ q)),
    "straight through": function(lambda x: (20 * (PRE + WEIGHT @ x)).round() / 20, lambda q: WEIGHT @ q),
    "weak and cut": function(lambda x: 1e-4 * WEIGHT @ x, lambda q: 0.5e-4 * WEIGHT @ q, noise=1e-8),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_derivative_is_confirmed(name: str):
    assert RIGHT[name].require(DIRECTIONS) is None
    assert RIGHT[name].verdict(DIRECTIONS) is None


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_derivative_is_refused(name: str):
    with pytest.raises(DerivativeError, match="here: autograd's derivative is not that of the function"):
        WRONG[name].require(DIRECTIONS)


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights into 4 to 256 units, what they read at zero, and weights out of them."""
    units, seed = 4 ** draw(st.integers(1, 4)), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    into, at, out = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((units, 16), (units,), (16, units))
    )
    return into, at, out / units**0.5


# not 0: where all units are dead nothing is relative to the product
@given(layer=layers(), slope=st.floats(-1.0, -0.05) | st.floats(0.05, 0.9))
@settings(max_examples=60)
def test_no_kink_is_taken_for_a_false_derivative(layer, slope: float):
    """With up to 256 kinks, some of them within the step, and a slope beyond them."""
    into, at, out = layer

    def derivative(q: torch.Tensor) -> torch.Tensor:
        return out @ (torch.where(at > 0, 1.0, slope) * (into @ q))

    right = function(lambda x: out @ nn.functional.leaky_relu(at + into @ x, slope), derivative)
    assert right.verdict(DIRECTIONS) is None


@given(layer=layers(), share=st.floats(0.1, 1.0), kind=st.sampled_from([torch.tanh, torch.relu, torch.sin]))
@settings(max_examples=60)
def test_no_cut_passes_for_a_kink(layer, share: float, kind):
    into, at, out = layer
    slopes = torch.func.jvp(kind, (at,), (torch.ones_like(at),))[1]

    def derivative(q: torch.Tensor) -> torch.Tensor:
        return (1 - share) * out @ (slopes * (into @ q))

    if slopes.abs().max() > 0:
        with pytest.raises(DerivativeError):
            function(lambda x: out @ kind(at + into @ x), derivative).verdict(DIRECTIONS)


# longer ones are flat where they are measured; shorter ones are rounding
@given(layer=layers(), tread=st.floats(-3.0, -2.2), linear=st.floats(0.0, 1.0))
@settings(max_examples=60)
def test_no_staircase_passes_for_a_kink(layer, tread: float, linear: float):
    """Whatever is added to it: the smallest steps lie on one tread, where its derivative of zero is right."""
    (into, at, out), height = layer, 10**tread

    def run(x: torch.Tensor) -> torch.Tensor:
        pre = at + into @ x
        return out @ (linear * pre + height * (pre / height).round())

    with pytest.raises(DerivativeError):
        function(run, lambda q: linear * out @ (into @ q)).verdict(DIRECTIONS)
