"""The certificate: what a closed form does not describe goes to autograd, whichever pair is asked for."""

from __future__ import annotations

import gc
import warnings
import weakref
from contextlib import ExitStack

import pytest
import torch
from broken import LLAMA, PAIRS, adapter, forward, needs_llama, on_output, shifting
from cases import CASES, TOKENS, Case, part, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

import tlcoupling as tlc
from tlcoupling.errors import CertificateError, UnsupportedModelError
from tlcoupling.jacobian.engine import JacobianEngine

pytestmark = pytest.mark.filterwarnings("ignore:tlcoupling computes by autograd")


def agree_everywhere(trace: tlc.Trace, layer: int, pairs: list[tuple[int, int]], tolerance: float) -> set[str]:
    """Hold ``auto`` against autograd on pairs of a layer; return which engines it used."""
    auto, oracle = JacobianEngine(trace, "auto", pairs), JacobianEngine(trace, "autograd", pairs)
    for sublayer in trace.sublayers:
        for src, dest in pairs:
            found, truth = (each.operator(layer, sublayer, src, dest).dense() for each in (auto, oracle))
            assert relative_error(found, truth) < tolerance, (sublayer, src, dest)
    return set(auto.used.values())


@needs_llama
@pytest.mark.parametrize("first", [(0, 0), (6, 6)])
def test_an_adapter_is_seen_wherever_it_has_a_derivative(first: tuple[int, int]):
    """At (0, 0), one key, queries and keys have none: that pair says nothing of others."""
    model = LLAMA.build(torch.float64).eval()
    with forward(part(model, 1, "attn.q"), adapter), forward(part(model, 1, "attn.k"), adapter):
        trace = tlc.trace(model, TOKENS)
        agree_everywhere(trace, 1, [first, (2, 5), (0, 6), (3, 3), (6, 6)], LLAMA.tolerance)
        found = tlc.token_coupling(trace, k=3, tokens="all", layers=1).values
        truth = tlc.token_coupling(trace, k=3, tokens="all", layers=1, engine="autograd").values
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)


@needs_llama
def test_a_layer_keeps_no_matrix_of_a_pair_that_is_done_with():
    """What is promised of memory counts the matrices that are held: a long prompt has more pairs than fit."""
    trace = tlc.trace(LLAMA.model(), TOKENS)
    engine = JacobianEngine(trace, pairs=[(pos, pos) for pos in range(len(TOKENS))], formed=True)
    made = [weakref.ref(engine.operator(1, "attn", pos, pos)) for pos in range(len(TOKENS))]
    gc.collect()
    assert engine.used == {"attn": "analytic"}
    assert all(operator() is None for operator in made[:-1])


GATED = [case for case in CASES if case.name in ("bridge-llama", "bridge-gemma2", "bridge-qwen3", "bridge-mistral")]
PROJECTIONS = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out"]
some_pairs = st.lists(st.sampled_from(PAIRS), min_size=1, max_size=3, unique=True)


@st.composite
def wraps(draw: st.DrawFn):
    """What a projection may do beside applying its weight: adapters, scales, bends, biases, or several of these."""
    share, number = draw(st.floats(0.01, 1.0)), draw(st.integers(0, 1000))
    kinds = {
        "adapter": lambda x, out: out + share * (x @ _random(x, 2, number).mT) @ _random(out, 2, number + 1),
        "scaled": lambda x, out: (1 + share) * out,
        "bent": lambda x, out: out + share * torch.tanh(out),
        "biased": lambda x, out: out + share * _random(out, 1, number)[0],
        "masked": lambda x, out: out * (_random(out, 1, number)[0] > -share).to(out),
    }
    return [kinds[name] for name in draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3))]


def _random(like: torch.Tensor, rows: int, seed: int) -> torch.Tensor:
    return 0.3 * torch.randn(rows, like.shape[-1], generator=torch.Generator().manual_seed(seed)).to(like)


@needs_llama
@given(
    case=st.sampled_from(GATED),
    path=st.sampled_from(PROJECTIONS),
    layer=st.integers(0, 2),
    edits=wraps(),
    pairs=some_pairs,
)
@settings(max_examples=12)
def test_no_wrapped_projection_passes(case: Case, path: str, layer: int, edits: list, pairs: list[tuple[int, int]]):
    def wrap(call):
        def edited(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            out = call(x, *args, **kwargs)
            for edit in edits:
                out = edit(x, out)
            return out

        return edited

    model = case.model()
    with forward(part(model, layer, path), wrap), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree_everywhere(tlc.trace(model, TOKENS), layer, pairs, case.tolerance)


@st.composite
def by_position(draw: st.DrawFn):
    """A module that does something else at each position, or reads positions before its own."""
    length = len(TOKENS)
    factors = torch.tensor(draw(st.lists(st.floats(-2.0, 2.0), min_size=length, max_size=length)))
    lag, share = draw(st.integers(1, length - 1)), draw(st.floats(0.05, 1.0))

    def scaled(x: torch.Tensor) -> torch.Tensor:
        start = max(0, length - x.shape[1])  # a window has the last positions alone
        return x * factors[start:].to(x)[:, None] if x.shape[1] <= length else x

    def lagged(x: torch.Tensor) -> torch.Tensor:
        return x + share * torch.cat([torch.zeros_like(x[:, :lag]), x[:, :-lag]], 1)[:, : x.shape[1]]

    def averaged(x: torch.Tensor) -> torch.Tensor:
        return x + share * x.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(x)[:, None]

    return draw(st.sampled_from([scaled, lagged, averaged]))


@needs_llama
@given(
    case=st.sampled_from(GATED),
    path=st.sampled_from([*PROJECTIONS, "mlp", "ln1", "ln2"]),
    layer=st.integers(0, 2),
    edit=by_position(),
    pairs=some_pairs,
)
@settings(max_examples=12)
def test_no_module_that_depends_on_the_position_passes(
    case: Case, path: str, layer: int, edit, pairs: list[tuple[int, int]]
):
    model = case.model()
    with forward(part(model, layer, path), on_output(edit)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agree_everywhere(tlc.trace(model, TOKENS), layer, pairs, case.tolerance)


def hidden_adapter(call):
    """An adapter so small, and cut off the graph, that only what the projection gives shows it."""

    def edited(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        out = call(x, *args, **kwargs)
        return out + 3e-3 * (adapter(call)(x, *args, **kwargs) - out).detach()

    return edited


@needs_llama
@pytest.mark.parametrize(
    ("path", "weight"),
    [(f"attn.{name}", f"W_{name.upper()}") for name in "qkvo"]
    + [(f"mlp.{name}", f"W_{name}") for name in ("gate", "in", "out")],
)
def test_a_projection_that_does_not_apply_its_weight_is_named(path: str, weight: str):
    model = LLAMA.build(torch.float64).eval()
    sublayer = path.partition(".")[0]
    with forward(part(model, 1, path), hidden_adapter):
        trace = tlc.trace(model, TOKENS)
        with pytest.raises(CertificateError, match=rf"{path} of type Linear does not apply {weight}"):
            JacobianEngine(trace, "analytic", [(3, 3), (6, 6)]).operator(1, sublayer, 6, 6)


@needs_llama
def test_queries_that_grow_with_the_position_count_beside_pairs_outside_a_window():
    """A pair outside of a sliding window is 0 = 0, which proves nothing of the others."""
    case = next(case for case in CASES if case.name == "bridge-mistral")
    model = case.model()
    with forward(
        part(model, 1, "attn.q"), on_output(lambda q: q * (1 + 0.2 * torch.arange(q.shape[1]).to(q))[:, None])
    ):
        agree_everywhere(tlc.trace(model, TOKENS), 1, [(0, 6), (1, 5), (6, 6), (4, 6), (5, 6)], case.tolerance)


@needs_llama
def test_an_mlp_that_reads_its_neighbour_is_no_function_of_one_position():
    model = LLAMA.build(torch.float64).eval()
    with forward(part(model, 1, "mlp"), shifting):
        trace = tlc.trace(model, TOKENS)
        engine = JacobianEngine(trace)
        with pytest.warns(UserWarning, match="the MLP reads other positions than its own"):
            mixed = engine.operator(1, "mlp", 4, 5)
        assert mixed.dense().norm() > 0.1
        assert engine.operator(1, "mlp", 3, 5).dense().norm() == 0
        for tokens in ([5], [4, 5], list(range(7))):  # also where its neighbour is run beside it
            pairs = [(4, 5)] + [(token, token) for token in tokens]
            assert agree_everywhere(trace, 1, pairs, LLAMA.tolerance) == {"autograd", "analytic"}


@pytest.mark.parametrize("scale", [10.0, 20.0])
def test_a_soft_cap_counts_where_scores_are_large(scale: float):
    """The pattern of short prefixes fits without the cap to 1e-4."""
    case = next((case for case in CASES if case.name == "bridge-gemma2"), None)
    if case is None:
        pytest.skip("no Gemma 2")
    model = case.build(torch.float64).eval()
    for layer in range(3):
        model.blocks[layer].attn.q.original_component.weight.data.mul_(scale)
    agree_everywhere(tlc.trace(model, TOKENS), 1, [(src, 6) for src in range(7)], 1e-4)


def test_a_scale_of_scores_shows_with_two_tokens():
    case = next((case for case in CASES if case.name == "bridge-mpt"), None)
    if case is None:
        pytest.skip("no MPT")
    model = case.build(torch.float64).eval()
    for block in model.blocks:
        block.attn.original_component.softmax_scale = 0.8
    agree_everywhere(tlc.trace(model, TOKENS[:2]), 1, [(0, 0), (0, 1), (1, 1)], case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_pair_of_a_healthy_model_keeps_its_engine(case: Case, dtype: torch.dtype):
    """No false alarm: at no pair is a closed form refused that is right, nor a derivative doubted."""
    trace = tlc.trace(case.model(dtype), TOKENS)
    engine = JacobianEngine(trace, "auto", PAIRS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(misses|reads other|do not settle)")
        for sublayer in trace.sublayers:
            for src, dest in PAIRS if sublayer != "mlp" else [(pos, pos) for pos in range(len(TOKENS))]:
                engine.operator(1, sublayer, src, dest)
    assert engine.used == {name: "analytic" if name in case.analytic else "autograd" for name in trace.sublayers}


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_pairs_that_are_announced_are_certified_as_those_that_are_not(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        announced = JacobianEngine(trace, "analytic", PAIRS).operator(1, "block", 2, 5).dense()
        other = JacobianEngine(trace, "analytic", [(5, 5)]).operator(1, "block", 2, 5).dense()
        # HuggingFace's modules compute in float32, and round otherwise in a batch of streams
        torch.testing.assert_close(announced, other, rtol=0, atol=1e-6)


@needs_llama
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1]], ids=["prompt", "one token"])
def test_heads_beside_an_adapter_on_the_output_are_refused(tokens: torch.Tensor):
    """A head's share is made with the module's W_O, which is then not all that the module applies.

    At a single position an adapter and a bias show alike in what is written; not where the heads give nothing.
    """
    model, dest = LLAMA.model(), len(tokens) - 1
    with forward(part(model, 1, "attn.o"), adapter):
        trace = tlc.trace(model, tokens)
        for engine in ("auto", "autograd"):
            with pytest.raises(UnsupportedModelError, match="heads of layer 1 do not add up"):
                tlc.residual_jacobian(trace, 1, "attn", 0, dest, head=0, engine=engine)
        with pytest.raises(UnsupportedModelError, match="heads of layer 1 do not add up"):
            tlc.head_steps(trace)
    with forward(part(model, 1, "attn.o"), on_output(lambda out: out + 0.3)):  # a bias
        trace = tlc.trace(model, tokens)
        heads = [tlc.residual_jacobian(trace, 1, "attn", 0, dest, head=h).dense() for h in range(model.cfg.n_heads)]
        whole = tlc.residual_jacobian(trace, 1, "attn", 0, dest, engine="autograd").dense()
        assert relative_error(torch.stack(heads).sum(0), whole) < LLAMA.tolerance
