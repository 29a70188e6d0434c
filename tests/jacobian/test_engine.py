"""Jacobians: both engines against each other, plain autograd of the whole model, and finite differences."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case, relative_error

import tlcoupling as tlc
from tlcoupling.errors import CertificateError, StaleTraceError, UnsupportedModelError
from tlcoupling.forward.block import Block, Sublayer, Uncovered
from tlcoupling.forward.hooked import attached
from tlcoupling.forward.split import ATTENTION, SEQUENTIAL
from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.jacobian.evidence import Evidence
from tlcoupling.jacobian.norms import Norm
from tlcoupling.jacobian.runs import BlockRun
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.operator import JacobianOperator

PLACES = [(0, 6, 6), (2, 0, 0), (1, 2, 5), (2, 0, 6)]  # layer, src, dest
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def case_trace(case: Case) -> tlc.Trace:
    return tlc.trace(case.model(), TOKENS)


@each_case
@pytest.mark.parametrize(("layer", "src", "dest"), PLACES)
def test_the_engines_agree_in_float64(case: Case, case_trace: tlc.Trace, layer: int, src: int, dest: int):
    for sublayer in case_trace.sublayers:
        if sublayer == "mlp" and src != dest:
            continue
        oracle = tlc.residual_jacobian(case_trace, layer, sublayer, src, dest, engine="autograd")
        truth = oracle.dense()
        if sublayer not in case.analytic:
            with pytest.raises(CertificateError):
                tlc.residual_jacobian(case_trace, layer, sublayer, src, dest, engine="analytic")
            closed = oracle
        else:
            closed = tlc.residual_jacobian(case_trace, layer, sublayer, src, dest, engine="analytic")
        x = torch.randn(truth.shape[1], 3, dtype=torch.float64)
        assert relative_error(closed.mm(x), truth @ x) < case.tolerance, sublayer
        assert relative_error(closed.rmm(x), truth.mT @ x) < case.tolerance, sublayer
        assert relative_error(closed.dense(), truth) < case.tolerance, sublayer
        assert relative_error(closed.mm(x), truth @ x) < case.tolerance, f"{sublayer}, after dense()"
        assert relative_error(oracle.mm(x), truth @ x) < case.tolerance, sublayer
        assert relative_error(oracle.rmv(x[:, 0]), truth.mT @ x[:, 0]) < case.tolerance, sublayer


@each_case
@pytest.mark.filterwarnings("ignore:tlcoupling computes by autograd")
def test_auto_takes_the_closed_form_where_there_is_one(case: Case, case_trace: tlc.Trace):
    engine = JacobianEngine(case_trace, "auto")
    for sublayer in case_trace.sublayers:
        for layer in range(case_trace.n_layers):
            engine.operator(layer, sublayer, 6, 6)
            if sublayer != "mlp":
                engine.operator(layer, sublayer, 2, 5)
    expected = {name: "analytic" if name in case.analytic else "autograd" for name in engine.used}
    assert engine.used == expected


@each_case
@pytest.mark.filterwarnings("ignore:tlcoupling computes by autograd")
def test_heads_agree_and_sum_to_the_attention(case: Case, case_trace: tlc.Trace):
    """A post-norm mixes the heads: a head's share is taken before it."""
    if not case.splits:
        for call in (lambda: tlc.residual_jacobian(case_trace, 1, "attn", head=0), lambda: tlc.head_steps(case_trace)):
            with pytest.raises(UnsupportedModelError, match=r"attention of layer \d .* cannot be split into heads"):
                call()
        return
    normed = isinstance(getattr(case_trace.model.blocks[1], "ln1_post", None), torch.nn.Module)
    for src, dest in ((6, 6), (2, 5)):
        by_engine = [
            torch.stack(
                [
                    tlc.residual_jacobian(case_trace, 1, "attn", src, dest, head=head, engine=engine).dense()
                    for head in range(case_trace.model.cfg.n_heads)
                ]
            )
            for engine in ("analytic" if "attn" in case.analytic else "auto", "autograd")
        ]
        assert relative_error(*by_engine) < case.tolerance
        whole = tlc.residual_jacobian(case_trace, 1, "attn", src, dest, engine="autograd").dense()
        assert (relative_error(by_engine[1].sum(0), whole) < case.tolerance) != normed


@each_case
def test_the_real_model_moves_as_the_jacobian_says(case: Case, case_trace: tlc.Trace):
    """Central differences of the whole model, run with a hook that moves the stream where a block reads it."""
    model, layer = case.model(), 1
    step = 1e-4 if case.exact else 1e-2  # above float32 rounding, where modules cast to it
    direction = torch.randn(case_trace.d_model, dtype=torch.float64)
    for src, dest in ((6, 6), (2, 5)):
        ends = []
        for sign in (1, -1):

            def move(stream: torch.Tensor, sign: int = sign, src: int = src) -> torch.Tensor:
                stream = stream.clone()
                stream[0, src] += sign * step * direction
                return stream

            kept: list[torch.Tensor] = []
            points = model.hook_dict
            hooks = [
                (points[f"blocks.{layer}.hook_resid_pre"], move),
                (points[f"blocks.{layer}.hook_resid_post"], kept.append),
            ]
            with torch.no_grad(), attached(hooks):
                model(TOKENS[None])
            ends.append(kept[0][0, dest].detach())
        difference = (ends[0] - ends[1]) / (2 * step) - (src == dest) * direction
        found = tlc.residual_jacobian(case_trace, layer, "block", src, dest).mv(direction)
        # the remainder of the step, and rounding over it
        assert relative_error(found, difference) < 2e-3


@each_case
def test_sublayers_compose_to_the_block(case: Case, case_trace: tlc.Trace):
    """J_block = J_attn + J_mlp (delta I + J_attn) in sequential blocks, J_attn + J_mlp in parallel ones."""
    if case_trace.topology == "single":
        pytest.skip("no MLP to compose with")
    for src, dest in ((6, 6), (2, 5)):
        block, attn = (
            tlc.residual_jacobian(case_trace, 1, name, src, dest, engine="autograd").dense()
            for name in ("block", "attn")
        )
        mlp = tlc.residual_jacobian(case_trace, 1, "mlp", dest, dest, engine="autograd").dense()
        same = float(src == dest) * torch.eye(len(block), dtype=block.dtype)
        composed = attn + mlp @ (same + attn) if case_trace.topology == "sequential" else attn + mlp @ same
        assert relative_error(composed, block) < case.tolerance


@each_case
def test_no_identity_is_subtracted_between_positions(case: Case, case_trace: tlc.Trace):
    """The Jacobian from one position to a later one is that of x^{l+1}_dest itself (the published code subtracts I)."""
    layer, src, dest = 1, 2, 5
    leaf = case_trace.block_input(layer).clone().requires_grad_()
    with torch.enable_grad():
        out = case_trace.run_block(layer, leaf, {})[0, dest]
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0][0, src] for value in out]
    found = tlc.residual_jacobian(case_trace, layer, "block", src, dest).dense()
    assert relative_error(found, torch.stack(rows)) < case.tolerance


@each_case
def test_an_mlp_does_not_reach_another_position(case: Case, case_trace: tlc.Trace):
    if "mlp" not in case_trace.sublayers:
        pytest.skip("no MLP")
    for engine in ("auto", "autograd"):
        operator = tlc.residual_jacobian(case_trace, 1, "mlp", 2, 5, engine=engine)
        assert operator.dense().norm() == 0
        assert operator.mv(torch.ones(case_trace.d_model, dtype=torch.float64)).norm() == 0


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precisions_stay_near_their_own_lift(case: Case, dtype: torch.dtype):
    """Float32 models against themselves in float64, half-precision models against themselves in float32."""
    lift = {torch.float32: torch.float64, torch.bfloat16: torch.float32}[dtype]
    trace = tlc.trace(case.model(dtype), TOKENS)
    lifted = case.build(dtype).eval().to(lift)
    lifted.cfg.dtype = lift
    reference = tlc.trace(lifted, TOKENS)
    for sublayer in trace.sublayers:
        found = tlc.residual_jacobian(trace, 2, sublayer).dense()
        truth = tlc.residual_jacobian(reference, 2, sublayer, engine="autograd").dense()
        assert found.dtype == torch.float32
        # float32 rounding of three blocks; a half-precision model computed in half would be off by 1e-2
        assert relative_error(found.to(truth), truth) < 1e-4, sublayer
        oracle = tlc.residual_jacobian(trace, 2, sublayer, engine="autograd").dense()
        assert relative_error(oracle, found) < 1e-4, sublayer
    couplings = [tlc.depth_coupling(one, 3, sublayers="block").values.double() for one in (trace, reference)]
    allowed = {torch.float32: 1e-4, torch.bfloat16: 1e-3}[dtype]
    assert (couplings[0] - couplings[1]).abs().max() < allowed


@pytest.mark.parametrize("case", [case for case in CASES if "qk-norm" in case.name or "qwen3" in case.name], ids=str)
def test_norms_of_queries_and_keys_are_read_in_float32(case: Case):
    """A half-precision norm rounds what it gives to 4e-3, and would fit no formula to 1e-4."""
    engine = JacobianEngine(tlc.trace(case.model(torch.bfloat16), TOKENS))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if "attn" in case.analytic else "ignore")
        engine.operator(1, "attn", 2, 5)
    assert engine.used == {"attn": "analytic" if "attn" in case.analytic else "autograd"}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("bridge-gemma2", "bridge-olmo2", "hooked-sandwich")], ids=str
)
def test_a_post_norm_of_equal_gains_is_no_factor_of_the_write(case: Case):
    """Row by row, 1 / r is such a factor; where one row is run, it must not be taken for one."""
    model = tlc.random_baseline(case.model())
    trace = tlc.trace(model, TOKENS)
    engine, oracle = JacobianEngine(trace, "auto", pairs=[(6, 6)]), JacobianEngine(trace, "autograd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sublayer in trace.sublayers:
            found, truth = (each.operator(1, sublayer, 6, 6).dense() for each in (engine, oracle))
            assert relative_error(found, truth) < case.tolerance
    # the first token sees itself alone: its Jacobians are those of a prompt of one
    alone = tlc.trace(model, TOKENS[:1])
    for name in ("analytic", "autograd"):
        found, truth = (tlc.residual_jacobian(each, 1, "attn", 0, 0, head=1, engine=name) for each in (alone, trace))
        assert relative_error(found.dense(), truth.dense()) < case.tolerance, name


@each_case
def test_the_model_is_left_as_it_was(case: Case):
    model = case.model(torch.bfloat16)
    before = {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()}
    hooks = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    cfg_dtype = model.cfg.dtype
    trace = tlc.trace(model, TOKENS)
    tlc.depth_coupling(trace, 3)
    tlc.residual_jacobian(trace, 0, "block", engine="autograd").dense()
    assert not model.training
    assert model.cfg.dtype == cfg_dtype
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == hooks
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == gradients
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert value.dtype == before[name][0]
        assert torch.equal(value, before[name][1])


@pytest.mark.parametrize("formed", [False, True])
def test_auto_falls_back_and_says_so_once_when_the_closed_form_is_wrong(formed: bool, monkeypatch: pytest.MonkeyPatch):
    """A wrong closed form never comes back as a number: here every MLP projection is off by one part in a thousand.

    Tested by products, and as a matrix, in a window of the prompt.
    """
    case = CASES[0]
    trace = tlc.trace(case.model(), TOKENS)
    truth = tlc.residual_jacobian(trace, 1, "block", engine="autograd").dense()
    real = Projection.__init__
    monkeypatch.setattr(Projection, "__init__", lambda self, weight: real(self, 1.001 * weight))
    engine = JacobianEngine(trace, pairs={(6, 6)} if formed else (), formed=formed)
    with pytest.warns(UserWarning, match="misses the module's own derivative") as caught:
        operators = [engine.operator(layer, "block", 6, 6) for layer in (1, 1)]
    assert len(caught) == 1
    assert engine.used == {"block": "autograd"}
    assert relative_error(operators[1].dense(), truth) < case.tolerance
    with pytest.raises(CertificateError, match="misses the module's own derivative"):
        tlc.residual_jacobian(trace, 1, "block", engine="analytic")


def test_matrices_that_are_formed_together_are_those_that_are_tested():
    """Each closed form is made once, and let go with the last Jacobian that is made of it."""
    trace = tlc.trace(CASES[0].model(), TOKENS)
    expected = JacobianEngine(trace, "analytic", {(6, 6)})
    engine = JacobianEngine(trace, "analytic", {(6, 6)}, formed=True)
    wanted = [(layer, "block", 6, 6) for layer in range(trace.n_layers)]
    parts = []

    def run(form: Callable[[JacobianOperator], torch.Tensor], given: list[JacobianOperator]) -> None:
        parts.extend((weakref.ref(part), form(part)) for part in given)

    with engine.formed_together(wanted, run):
        made = [engine.operator(*each) for each in wanted]
    assert len(parts) == 2 * trace.n_layers
    for one, each in zip(made, wanted, strict=True):
        torch.testing.assert_close(one.dense(), expected.operator(*each).dense())
        shared = {id(one.attn.dense()), id(one.mlp.dense())}
        assert shared <= {id(matrix) for _, matrix in parts}
    del made, one
    gc.collect()
    assert [part() is None for part, _ in parts].count(False) == 2  # of the last layer


def test_a_graph_that_was_let_go_is_made_again_where_more_is_asked_for():
    trace = tlc.trace(CASES[0].model(), TOKENS)
    run, alone = BlockRun(trace, 1, [6], Evidence(trace, 1, False, {(6, 6)}).moves), BlockRun(trace, 1)
    for name in trace.writes:
        asked = [{6: 1.0}]
        torch.testing.assert_close(run.pull(name, asked), alone.pull(name, asked))
    assert not run._graph.points
    moved = run.moved
    for name in trace.writes:
        asked = [{6: 1.0}, {3: -2.0}]
        torch.testing.assert_close(run.pull(name, asked), alone.pull(name, asked))
    assert moved
    assert run.moved is moved


def test_hooks_of_the_user_act_on_the_jacobian():
    """Zeroing the MLP's write leaves the attention's Jacobian as the block's, and only autograd sees it."""
    case = CASES[0]
    model = case.model()
    zero = [("blocks.1.hook_mlp_out", lambda tensor, hook: torch.zeros_like(tensor))]
    with model.hooks(fwd_hooks=zero):
        trace = tlc.trace(model, TOKENS)
        with pytest.warns(UserWarning, match="hooks are attached"):
            block = tlc.residual_jacobian(trace, 1, "block")
        attn = tlc.residual_jacobian(trace, 1, "attn", engine="autograd")
        assert relative_error(block.dense(), attn.dense()) < 1e-12
    with pytest.raises(StaleTraceError, match="layer 1"):
        tlc.residual_jacobian(trace, 1, "block", engine="autograd")
    assert relative_error(tlc.residual_jacobian(tlc.trace(model, TOKENS), 1, "block").dense(), block.dense()) > 0.1


def test_a_permanent_hook_is_the_users_unless_transformer_lens_attached_it():
    model = CASES[0].build(torch.float64).eval()
    assert not tlc.trace(model, TOKENS).hooked_layers
    model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda tensor, hook: 2 * tensor, is_permanent=True)
    trace = tlc.trace(model, TOKENS)
    assert trace.hooked_layers == {1}
    with pytest.warns(UserWarning, match="hooks are attached"):
        tlc.residual_jacobian(trace, 1, "block")


@pytest.mark.parametrize("engine", ["analytic", "autograd"])
def test_a_trace_of_changed_weights_is_refused(engine: str):
    """Whichever matrix of the block has changed; with the old weights back, the trace is good again."""
    model = CASES[0].model(torch.float32)
    trace = tlc.trace(model, TOKENS)
    before = tlc.residual_jacobian(trace, 1, "block", engine=engine).dense()
    # biases of heads are matrices too, and that of the keys changes nothing
    named = model.blocks[1].named_parameters()
    matrices = [parameter for name, parameter in named if parameter.ndim > 1 and ".b_" not in name]
    assert len(matrices) >= 4
    for weight in matrices:
        kept = weight.data.clone()
        weight.data.mul_(1.1)
        try:
            with pytest.raises(StaleTraceError, match="Take a new trace"):
                tlc.residual_jacobian(trace, 1, "block", engine=engine)
        finally:
            weight.data.copy_(kept)
    assert torch.equal(tlc.residual_jacobian(trace, 1, "block", engine=engine).dense(), before)


@pytest.mark.parametrize(
    ("q", "k", "v", "pattern"),
    [
        ((2, 5, 4), (2, 5, 4), (2, 5, 4), (2, 5, 5)),  # heads before positions
        ((5, 2, 4), (5, 2, 6), (5, 2, 4), (2, 5, 5)),
        ((5, 3, 4), (5, 2, 4), (5, 2, 4), (3, 5, 5)),
        ((5, 8), (5, 8), (5, 8), (2, 5, 5)),
    ],
)
def test_values_that_do_not_fit_each_other_go_to_autograd(q: Any, k: Any, v: Any, pattern: Any):
    shapes = {"q": q, "k": k, "v": v, "pattern": pattern}
    values = {f"attn.hook_{name}": torch.zeros(shape) for name, shape in shapes.items()}
    attn = Sublayer(SEQUENTIAL.parts[0], torch.nn.Identity(), None, None)
    with pytest.raises(Uncovered, match="have shapes"):
        AttentionCore.from_values(Block(None, 0, ATTENTION, {"attn": attn}), values, {})


def test_a_failure_of_reading_an_architecture_goes_to_autograd(monkeypatch: pytest.MonkeyPatch):
    """Whatever a module does that the closed forms do not expect is no error of another library's."""
    case = CASES[0]
    trace = tlc.trace(case.model(), TOKENS)
    truth = tlc.residual_jacobian(trace, 1, "mlp", engine="autograd").dense()

    def fail(*args: Any) -> None:
        torch.ones(2, 3) @ torch.ones(2, 3)

    monkeypatch.setattr(Norm, "read", fail)
    with pytest.warns(UserWarning, match=r"mlp: reading the sublayer failed with RuntimeError: mat1 and mat2 shapes"):
        found = tlc.residual_jacobian(trace, 1, "mlp")
    assert relative_error(found.dense(), truth) < 1e-12
    with pytest.raises(CertificateError, match="reading the sublayer failed"):
        tlc.residual_jacobian(trace, 1, "mlp", engine="analytic")
