"""The published procedure on small models, against brute force; and what each of its defects does to a number."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from broken import forward
from cases import CASES, FEW, TOKENS, Case
from oracle import haar, plain_coupling

import tlcoupling as tlc
from tlcoupling.coupling.metric import coupling
from tlcoupling.coupling.null import null_coupling
from tlcoupling.errors import ArgumentError, DerivativeError
from tlcoupling.parity import DEFECTS, published

few = pytest.mark.parametrize("case", FEW, ids=str)
LAST = 2


def published_jacobian(trace: tlc.Trace, layer: int, src: int, dest: int, final_norm: bool) -> torch.Tensor:
    """Row by row, as published: the output coordinate's gradient at the input, minus the identity, whatever src is."""
    leaf = trace.block_input(layer).clone().requires_grad_()
    out = trace.run_block(layer, leaf, {})
    if final_norm and layer == LAST:
        out = trace.model.ln_final(out)
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0][0, src] for value in out[0, dest]]
    return torch.stack(rows) - torch.eye(trace.d_model, dtype=leaf.dtype)


@few
@pytest.mark.parametrize(("final_norm", "pair"), [(True, (6, 6)), (False, (6, 6)), (True, (2, 5))])
def test_published_is_the_procedure(case: Case, final_norm: bool, pair: tuple[int, int]):
    trace = tlc.trace(case.model(), TOKENS)
    src, dest = pair
    jacobians = [published_jacobian(trace, layer, src, dest, final_norm) for layer in range(3)]
    for normalizer, bases in (("frobenius", "uv"), ("trace", "vu")):
        found = published(
            case.model(),
            TOKENS,
            [2, 5],
            normalizer=normalizer,
            bases=bases,
            src=src,
            dest=dest,
            final_norm_in_last_block=final_norm,
        )
        assert found.identity_subtracted
        for index, k in enumerate(found.ks):
            for row, j1 in enumerate(jacobians):
                for column, j2 in enumerate(jacobians):
                    truth = 1 - plain_coupling(j1, j2, k, normalizer, bases, absolute=True)
                    # singular vectors move by the engines' gap over that of the singular values
                    assert abs(float(found.misalignment[index, row, column]) - truth) < 1e3 * case.tolerance
    mean = 1 - found.misalignment
    torch.testing.assert_close(found.mean_coupling(), mean.mean((1, 2)))
    off = [mean[:, i, j] for i in range(3) for j in range(3) if i != j]
    torch.testing.assert_close(found.mean_coupling(include_diagonal=False), torch.stack(off).mean(0))


@few
def test_without_its_defects_it_is_depth_coupling(case: Case):
    ours = tlc.depth_coupling(tlc.trace(case.model(), TOKENS), [2, 5], sublayers="block")
    found = published(case.model(), TOKENS, [2, 5])
    assert found.misalignment.shape == (2, 3, 3)
    torch.testing.assert_close(1 - found.misalignment, ours.values[0, 0], rtol=0, atol=1e3 * case.tolerance)


def test_each_defect_is_described_and_named_once():
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) == 6
    for defect in DEFECTS:
        assert all(len(text) > 30 for text in (defect.what, defect.effect, defect.instead))
    switches = set(inspect.signature(published).parameters)
    assert {"final_norm_in_last_block", "subtract_identity_off_diagonal"} <= switches & {d.name for d in DEFECTS}


@few
def test_the_final_norm_moves_the_last_row_and_column_alone(case: Case):
    with_norm = published(case.model(), TOKENS, 5, final_norm_in_last_block=True).misalignment[0]
    without = published(case.model(), TOKENS, 5).misalignment[0]
    moved = (with_norm - without).abs() > 1e-6
    assert not moved[:LAST, :LAST].any()
    assert moved[LAST, :LAST].any() and moved[:LAST, LAST].any()


def test_the_identity_left_over_between_tokens_gives_singular_values_of_one():
    """J - I is nearly -I where attention passes little on: |s_i - 1| is at most the largest singular value of J."""
    case = FEW[0]
    model = tlc.random_baseline(case.model())  # its library's own small weights pass little on
    wrong = published(model, TOKENS, 8, src=1, dest=6)
    right = published(model, TOKENS, 8, src=1, dest=6, subtract_identity_off_diagonal=False)
    assert not right.identity_subtracted
    largest = right.singular_values[:, :1]
    assert ((wrong.singular_values - 1).abs() <= largest + 1e-9).all()
    faint = largest[:, 0] < 0.3
    assert faint.any()
    # what is left of a Jacobian of s_1 < 0.3 is the identity: seen from K = 8, no direction stands out any more
    spread = wrong.singular_values[faint, 0] / wrong.singular_values[faint, -1]
    assert (spread < right.singular_values[faint, 0] / right.singular_values[faint, -1]).all()


def test_the_trace_normaliser_moves_with_k_and_width_though_nothing_is_aligned():
    generator = torch.Generator().manual_seed(0)

    def chance(d: int, k: int, normalizer: str) -> tuple[float, float]:
        """Coupling of a flat spectrum with random bases, and its null."""
        jacobian = haar(d, d, generator)  # all singular values 1
        s1 = torch.ones(k, dtype=torch.float64)
        draws = [
            coupling(haar(d, k, generator).mT @ jacobian @ haar(d, k, generator), s1, normalizer) for _ in range(20)
        ]
        null = null_coupling(s1, jacobian.norm(), d, normalizer)
        return float(torch.stack(draws).mean()), float(null)

    for d, k in ((64, 4), (64, 16), (256, 16)):
        value, null = chance(d, k, "trace")
        assert value == pytest.approx(null, abs=0.02)
        # m = about ||S1||_F / tr S1 = 1 / sqrt(K)
        assert value == pytest.approx(1 - 1 / math.sqrt(k), abs=0.07)
        assert abs(chance(d, k, "frobenius")[0]) < 0.25
    assert chance(256, 16, "trace")[0] > chance(256, 4, "trace")[0] + 0.2


def test_absolute_values_count_anti_alignment_as_alignment():
    s1 = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    opposite = -torch.diag(s1)
    assert float(coupling(opposite, s1, absolute=True)) == pytest.approx(1)
    assert float(coupling(opposite, s1, absolute=False)) == pytest.approx(-1)
    frobenius = torch.tensor(10.0, dtype=torch.float64)
    assert null_coupling(s1, frobenius, 50, absolute=True) > null_coupling(s1, frobenius, 50, absolute=False)


def test_the_diagonal_in_the_mean_makes_shallow_models_look_coupled():
    """With L layers the mean over all pairs is c + (1 - c) / L, where c is that of different layers."""
    found = published(FEW[0].model(), TOKENS, 5)
    inside, outside = found.mean_coupling(), found.mean_coupling(include_diagonal=False)
    torch.testing.assert_close(inside, outside + (1 - outside) / 3)


def test_no_chance_level_hides_that_nothing_is_there():
    """A random model has the coupling of its null, which by the trace normaliser is most of the scale."""
    model = tlc.random_baseline(FEW[0].model())
    found = 1 - published(model, TOKENS, 10, normalizer="trace").misalignment
    trace = tlc.trace(model, TOKENS)
    null = tlc.depth_coupling(trace, 10, sublayers="block", normalizer="trace").mean("null")
    off = found[0][~torch.eye(3, dtype=torch.bool)].mean()
    assert off > 0.6  # of 1
    # three small Jacobians of width 32: the null is exact to O(1 / d) only
    assert off == pytest.approx(float(null), abs=0.05)


def test_bad_arguments_are_named(unchecked: None):
    model = FEW[0].model()
    for argument, settings in {
        "k": {"k": 33},
        "normalizer": {"normalizer": "max"},
        "bases": {"bases": "uu"},
        "src": {"src": 5, "dest": 3},
        "dest": {"dest": 9},
        "prompt": {"prompt": torch.tensor([], dtype=torch.long)},
    }.items():
        with pytest.raises(ArgumentError) as raised:
            published(model, **{"prompt": TOKENS, **settings})
        assert raised.value.name == argument


def test_a_model_without_a_final_norm_is_named():
    case = FEW[-1]
    model = case.build(torch.float64).eval()
    if "ln_final" in model._modules:
        del model._modules["ln_final"]
    trace = tlc.trace(case.model(), TOKENS)
    from tlcoupling.parity import _final_norm

    object.__setattr__(trace, "model", model)
    with pytest.raises(ArgumentError, match="this model has no ln_final"):
        _final_norm(trace, 6)


def test_it_comes_back_from_a_file(tmp_path):
    found = published(FEW[0].model(), TOKENS, [2, 5])
    back = tlc.load(found.save(tmp_path / "result.safetensors"))
    assert repr(back) == repr(found) and "\n" not in repr(found)
    assert len(found.to_dataframe()) == 2 * 9 + 3 * 5


def test_the_final_norm_is_held_against_the_function():
    """A scale off the graph, an error of rank one."""
    model = next(case for case in CASES if hasattr(case.model(), "ln_final")).build(torch.float64).eval()

    def frozen(call):
        return lambda x: call(x) * x.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True)

    with forward(model.ln_final, frozen), pytest.raises(DerivativeError, match="the final norm"):
        tlc.parity.published(model, TOKENS, 3, final_norm_in_last_block=True)
