"""What the directions mean: singular vectors as tokens, against derivatives of the model's own logits."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, FEW, OF_EACH_CLASS, TOKENS, Case

import tlcoupling as tlc
from tlcoupling.directions.readout import RANDOM_DIRECTIONS, readout_jacobian
from tlcoupling.errors import ArgumentError, HookError, StaleTraceError, UnsupportedModelError

few = pytest.mark.parametrize("case", FEW, ids=str)
of_each_class = pytest.mark.parametrize("case", OF_EACH_CLASS, ids=str)
EXACT = [case for case in FEW if case.exact]
POS = 4
FINAL_NORM = "ln_final.hook_normalized"


def logits_along(trace: tlc.Trace, direction: torch.Tensor, pos: int, step: float) -> torch.Tensor:
    """Central difference of the model's logits at a token along a direction of x^L, by a hook on a forward pass."""

    def logits(distance: float) -> torch.Tensor:
        def move(tensor: torch.Tensor, hook: object) -> torch.Tensor:
            moved = tensor.clone()
            moved[0, pos] += distance * direction
            return moved

        name = f"blocks.{trace.n_layers - 1}.hook_resid_post"
        with torch.no_grad():
            return trace.model.run_with_hooks(trace.tokens[None], fwd_hooks=[(name, move)])[0, pos]

    return (logits(step) - logits(-step)) / (2 * step)


@few
def test_what_is_written_is_the_derivative_of_the_logits(case: Case):
    """Final norm, unembedding and Gemma 2's soft-cap, all the model's own: against differences and against autograd."""
    trace = tlc.trace(case.model(), TOKENS)
    found = tlc.read_directions(trace, 1, pos=POS, k=2, top=5)
    last = f"blocks.{trace.n_layers - 1}.hook_resid_post"
    leaf = trace.resid[-1][None].clone().requires_grad_()
    logits = trace.model.run_with_hooks(TOKENS[None], fwd_hooks=[(last, lambda tensor, hook: leaf)])[0, POS]
    jacobian = torch.stack([torch.autograd.grad(logit, leaf, retain_graph=True)[0][0, POS] for logit in logits])
    dense = readout_jacobian(trace, POS).dense()
    assert (dense - jacobian).norm() < 10 * case.tolerance * jacobian.norm()
    for rank in range(2):
        along = jacobian @ found.left[:, rank]
        # differences of second order in the step; a step of 1e-2 keeps float32 inside some norms above its rounding
        truth = logits_along(trace, found.left[:, rank], POS, 1e-2 if not case.exact else 1e-4)
        assert (along - truth).norm() < 1e-3 * truth.norm() + (0 if case.exact else 1e-2 * truth.norm())
        for end, sign in enumerate((1, -1)):
            expected = (sign * along).topk(5)
            torch.testing.assert_close(
                found.scores[0, rank, end], expected.values, rtol=0, atol=10 * case.tolerance * jacobian.norm()
            )
            torch.testing.assert_close((sign * along)[found.ids[0, rank, end]], found.scores[0, rank, end])


def test_what_is_written_is_the_derivative_of_transformer_lenss_readout():
    """From transformer-lens 4.3 on: central differences of ``logit_readout``, in float64."""
    theirs = pytest.importorskip("transformer_lens.tools.analysis.logit_lens")
    if not hasattr(theirs, "logit_readout"):
        pytest.skip("logit_readout comes with transformer-lens 4.3")
    case = next(case for case in CASES if case.name == "bridge-gpt2")
    trace = tlc.trace(case.model(), TOKENS)
    x, direction = trace.resid[-1, POS], torch.randn(trace.d_model, generator=torch.Generator().manual_seed(0)).double()
    ends = [theirs.logit_readout(trace.model, (x + step * direction)[None]).values[0] for step in (1e-4, -1e-4)]
    torch.testing.assert_close(
        readout_jacobian(trace, POS).mv(direction), (ends[0] - ends[1]) / 2e-4, rtol=1e-5, atol=1e-7
    )


@few
def test_what_is_read_is_the_cosine_with_embeddings(case: Case):
    trace = tlc.trace(case.model(), TOKENS)
    for sublayer in trace.sublayers:
        found = tlc.read_directions(trace, 1, sublayer, pos=POS, k=2, top=50)
        embeddings = trace.model.W_E.detach()
        for rank in range(2):
            for end, sign in enumerate((1, -1)):
                cosines = torch.cosine_similarity(embeddings, sign * found.right[None, :, rank], dim=1)
                torch.testing.assert_close(found.scores[1, rank, end], cosines.sort(descending=True).values)
                torch.testing.assert_close(cosines[found.ids[1, rank, end]], found.scores[1, rank, end])
        # the vectors are singular pairs of the sublayer's own Jacobian, sign and all
        jacobian = tlc.residual_jacobian(trace, 1, sublayer, POS, POS).dense()
        product = jacobian @ found.right - found.left * found.singular_values
        assert product.norm() < 1e-8 * found.singular_values[0]


def test_the_two_ends_are_one_another_reversed():
    trace = tlc.trace(EXACT[0].model(), TOKENS)
    found = tlc.read_directions(trace, 0, k=3, top=50)  # the whole vocabulary
    torch.testing.assert_close(found.scores[:, :, 0], -found.scores[:, :, 1].flip(-1))
    assert torch.equal(found.ids[:, :, 0], found.ids[:, :, 1].flip(-1))
    assert (found.scores.diff(dim=-1) <= 0).all()


def test_random_directions_give_the_null():
    """A random direction's scores are of the size of the null: its mean over fresh directions, within its own error."""
    trace = tlc.trace(EXACT[0].model(), TOKENS)
    found = tlc.read_directions(trace, 0, k=1, top=3)
    fresh = torch.randn(trace.d_model, 2000, dtype=torch.float64)
    fresh = fresh / fresh.norm(dim=0)
    logits = readout_jacobian(trace, 6).dense()
    embeddings = trace.model.W_E.detach()
    embeddings = embeddings / embeddings.norm(dim=1, keepdim=True)
    for side, read in enumerate((logits, embeddings)):
        top = (read @ fresh).topk(3, dim=0).values
        error = top.std(1) / RANDOM_DIRECTIONS**0.5
        assert ((found.null[side] - top.mean(1)).abs() < 4 * error).all()


def test_the_table_and_the_text():
    case = next((case for case in FEW if case.name.startswith("bridge")), None)
    trace = tlc.trace((case or FEW[0]).model(), TOKENS)
    found = tlc.read_directions(trace, 1, k=2, top=4)
    table = found.to_dataframe()
    assert len(table) == 2 * 2 * 2 * 4
    row = table.query("side == 'reads' and rank == 1 and end == '-' and place == 2").iloc[0]
    assert row["id"] == int(found.ids[1, 1, 1, 2]) and row["score"] == float(found.scores[1, 1, 1, 2])
    assert row["token"] == found.texts[1][1][1][2]
    assert row["token"] == (f"w{row['id']}" if case and row["id"] < 48 else row["token"])
    if case is None:
        assert row["token"] == str(row["id"])  # no tokenizer: the ids
    assert row["null"] == float(found.null[1, 2])


def test_a_readout_comes_back_from_a_file(tmp_path):
    found = tlc.read_directions(tlc.trace(FEW[0].model(), TOKENS), 1, k=2, top=4)
    back = tlc.load(found.save(tmp_path / "result.safetensors"))
    assert repr(back) == repr(found) and "\n" not in repr(found)
    assert back.to_dataframe().equals(found.to_dataframe())


def test_the_model_is_left_as_it_was():
    case = EXACT[0]
    trace = tlc.trace(case.model(), TOKENS)
    before = {name: parameter.clone() for name, parameter in trace.model.named_parameters()}
    hooks = {name: len(point.fwd_hooks) for name, point in trace.model.hook_dict.items()}
    with torch.no_grad():
        tlc.read_directions(trace, 1)
        assert not torch.is_grad_enabled()
    tlc.read_directions(trace, 1)
    assert torch.is_grad_enabled()
    for name, parameter in trace.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert hooks == {name: len(point.fwd_hooks) for name, point in trace.model.hook_dict.items()}


def test_half_precision_reads_through_float32():
    """The derivative of a bfloat16 model is that of the float32 model with the same rounded weights."""
    name = next(case.name for case in CASES if case.exact and case.topology == "sequential")
    case = next(case for case in CASES if case.name == name)
    half = case.build(torch.bfloat16).eval()
    trace = tlc.trace(half, TOKENS)
    found = readout_jacobian(trace, POS).dense()
    assert found.dtype == torch.float32
    whole = case.build(torch.float32).eval()
    with torch.no_grad():
        for (_, to), (_, source) in zip(whole.named_parameters(), half.named_parameters(), strict=True):
            to.copy_(source.float())
    expected = readout_jacobian(tlc.trace(whole, TOKENS), POS).dense()
    assert (found - expected).norm() < 1e-4 * expected.norm()  # float32 rounding


def test_bad_arguments_and_models():
    trace = tlc.trace(FEW[0].model(), TOKENS)
    for argument, call in {
        "layer": lambda: tlc.read_directions(trace, 3),
        "sublayer": lambda: tlc.read_directions(trace, 0, "head"),
        "pos": lambda: tlc.read_directions(trace, 0, pos=7),
        "k": lambda: tlc.read_directions(trace, 0, k=0),
        "top": lambda: tlc.read_directions(trace, 0, top=51),
    }.items():
        with pytest.raises(ArgumentError) as raised:
            call()
        assert raised.value.name == argument


def test_a_model_that_has_changed_is_refused():
    trace = tlc.trace(FEW[0].model(), TOKENS)
    name = "blocks.0.hook_attn_out" if "hooked" in FEW[0].name else "blocks.0.attn.hook_out"
    with trace.model.hooks(fwd_hooks=[(name, lambda tensor, hook: 3 * tensor)]), pytest.raises(StaleTraceError):
        readout_jacobian(trace, POS)


@of_each_class
def test_hooks_of_the_trace_act_on_the_logits(case: Case):
    """Those within the blocks and those behind them: as where the same hooks are attached around it all."""
    model = case.model()
    scale = torch.linspace(0.5, 2.0, model.cfg.d_model, dtype=torch.float64)
    hooks = [
        ("blocks.1.hook_attn_out", lambda write, hook: torch.tanh(write)),
        (FINAL_NORM, lambda x, hook: torch.tanh(x) * scale),
    ]
    trace = tlc.trace(model, TOKENS, fwd_hooks=hooks)
    found = readout_jacobian(trace, POS).dense()
    with model.hooks(fwd_hooks=hooks):
        leaf = trace.resid[-1][None].clone().requires_grad_()
        last = f"blocks.{trace.n_layers - 1}.hook_resid_post"
        logits = model.run_with_hooks(TOKENS[None], fwd_hooks=[(last, lambda tensor, hook: leaf)])[0, POS]
    truth = torch.stack([torch.autograd.grad(logit, leaf, retain_graph=True)[0][0, POS] for logit in logits])
    assert (found - truth).norm() < 10 * case.tolerance * truth.norm()
    unhooked = readout_jacobian(tlc.trace(model, TOKENS), POS).dense()
    assert (found - unhooked).norm() > 0.1 * unhooked.norm()
    assert tlc.read_directions(trace, 1, pos=POS).scores.isfinite().all()
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@of_each_class
def test_hooks_behind_the_blocks_are_checked_too(case: Case):
    model = case.model()
    detached = [(FINAL_NORM, lambda x, hook: torch.tanh(x) + (x - torch.tanh(x)).detach())]
    with pytest.raises(HookError, match="the logits: autograd does not see all that is run"):
        tlc.read_directions(tlc.trace(model, TOKENS, fwd_hooks=detached), 1)
    with model.hooks(fwd_hooks=detached), pytest.raises(HookError, match="the logits"):
        tlc.read_directions(tlc.trace(model, TOKENS), 1)


@of_each_class
def test_one_token_alone_is_unembedded(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Products do not go through the vocabulary once a token, unless a hook behind the blocks expects all tokens."""
    trace = tlc.trace(case.model(), TOKENS)
    rows: list[int] = []
    unembed = type(trace.model.unembed)
    forward = unembed.forward

    def noted(self: torch.nn.Module, *args: torch.Tensor) -> torch.Tensor:
        out = forward(self, *args)
        rows.append(out.shape[1])
        return out

    monkeypatch.setattr(unembed, "forward", noted)
    alone = readout_jacobian(trace, POS).dense()
    assert rows[0] == 1
    rows.clear()
    with trace.model.hooks(fwd_hooks=[(FINAL_NORM, lambda x, hook: None)]):
        whole = readout_jacobian(trace, POS).dense()
    assert set(rows) == {len(TOKENS)}
    torch.testing.assert_close(alone, whole, rtol=1e-6, atol=case.tolerance)


def test_logits_that_hide_their_graph_are_refused():
    trace = tlc.trace(FEW[0].model(), TOKENS)
    name = "unembed.hook_in" if "unembed.hook_in" in trace.model.hook_dict else "ln_final.hook_normalized"
    hook = (name, lambda tensor, hook: tensor.detach())
    with (
        trace.model.hooks(fwd_hooks=[hook]),
        pytest.raises(UnsupportedModelError, match="do not depend on the last block"),
    ):
        readout_jacobian(trace, POS)
