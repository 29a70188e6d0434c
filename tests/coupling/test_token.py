"""Token-wise and context coupling: against the full model's own derivatives, and what random matrices give."""

from __future__ import annotations

import math
import zlib
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, Case, fresh
from oracle import REPRESENTATIVE, full_model_jacobian, plain_coupling

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.jacobian.runs import BlockRun
from tlcoupling.linalg.maps import Projection

each_case = pytest.mark.parametrize("case", REPRESENTATIVE, ids=str)
HOW = [("frobenius", "uv", True), ("trace", "vu", False)]


def pairs_of(matrix: torch.Tensor, rows: list[torch.Tensor], columns: list[torch.Tensor], *how: Any) -> None:
    """Check a matrix of couplings, pair by pair."""
    k, normalizer, bases, absolute, tolerance = how
    for i, j1 in enumerate(rows):
        for j, j2 in enumerate(columns):
            assert abs(float(matrix[i, j]) - plain_coupling(j1, j2, k, normalizer, bases, absolute)) < tolerance


@each_case
@pytest.mark.parametrize(("normalizer", "bases", "absolute"), HOW)
def test_token_coupling_is_the_formula(case: Case, case_trace: tlc.Trace, normalizer: Any, bases: Any, absolute: bool):
    """Within a layer, and from one layer to another."""
    tokens, k = [1, 4, 6], 4
    for basis_layers in (None, [2, 0]):
        found = tlc.token_coupling(
            case_trace,
            [2, k],
            tokens=tokens,
            layers=[0, 2],
            basis_layers=basis_layers,
            normalizer=normalizer,
            bases=bases,
            absolute=absolute,
        )
        assert found.values.shape == (len(case_trace.sublayers), 2, 2, 3, 3)
        for s, sublayer in enumerate(found.sublayers):
            for i, (layer, other) in enumerate(zip(found.layers, found.basis_layers, strict=True)):
                rows, columns = (
                    [full_model_jacobian(case, which, sublayer, pos, pos) for pos in tokens] for which in (layer, other)
                )
                # singular vectors move by the engines' gap over that of the singular values
                pairs_of(found.values[s, i, 1], rows, columns, k, normalizer, bases, absolute, 1e3 * case.tolerance)
                if basis_layers is None and bases == "uv":
                    diagonal = found.values[s, i].diagonal(dim1=-2, dim2=-1)
                    torch.testing.assert_close(diagonal, torch.ones_like(diagonal))


@each_case
@pytest.mark.parametrize(("normalizer", "bases", "absolute"), HOW)
@pytest.mark.parametrize(("fixed", "position"), [("src", 3), ("dest", 3)])
def test_context_coupling_is_the_formula(
    case: Case, case_trace: tlc.Trace, fixed: Any, position: int, normalizer: Any, bases: Any, absolute: bool
):
    """Within a layer, and in the bases of another one.

    No identity is subtracted from what one token does to another: the oracle subtracts it for src = dest alone.
    """
    for basis_layer in (None, 2):
        found = tlc.context_coupling(
            case_trace,
            fixed,
            position,
            4,
            layers=[1],
            basis_layers=basis_layer,
            normalizer=normalizer,
            bases=bases,
            absolute=absolute,
        )
        assert found.positions == ((3, 4, 5, 6) if fixed == "src" else (0, 1, 2, 3))
        assert found.sublayers == ("block", "attn")
        for s, sublayer in enumerate(found.sublayers):
            rows, columns = (
                [
                    full_model_jacobian(
                        case, layer, sublayer, *((position, pos) if fixed == "src" else (pos, position))
                    )
                    for pos in found.positions
                ]
                for layer in (1, *found.basis_layers)
            )
            pairs_of(found.values[s, 0, 0], rows, columns, 4, normalizer, bases, absolute, 1e3 * case.tolerance)
            sizes = torch.stack([jacobian.norm() for jacobian in rows])
            torch.testing.assert_close(found.frobenius[s, 0], sizes, rtol=10 * case.tolerance, atol=0)


@each_case
def test_the_kinds_agree_where_they_meet(case: Case, case_trace: tlc.Trace):
    """One token's Jacobian is the same in all of them, and the bases of another layer are what depth coupling takes."""
    depth = tlc.depth_coupling(case_trace, 4, tokens=[2, 5])
    across = tlc.token_coupling(case_trace, 4, tokens=[2, 5], layers=[0], basis_layers=2)
    for token in (0, 1):
        close = {"rtol": 0, "atol": 1e3 * case.tolerance}
        torch.testing.assert_close(across.values[:, 0, :, token, token], depth.values[:, token, :, 0, 2], **close)
        torch.testing.assert_close(across.null[:, 0, :, token, token], depth.null[:, token, :, 0, 2], **close)
        spread = depth.null_std[:, token, :, 0, 2]
        torch.testing.assert_close(across.null_std[:, 0, :, token, token], spread, **close)
    reached = tlc.context_coupling(case_trace, "dest", 5, 4, tokens=[2, 5], layers=[0], basis_layers=2)
    for quantity in ("values", "null", "null_std"):  # at 5 -> 5, of layer 0 in the bases of layer 2
        here, there = getattr(reached, quantity)[:, 0, :, 1, 1], getattr(depth, quantity)[:2, 1, :, 0, 2]
        torch.testing.assert_close(here, there, **close)
    dest = tlc.context_coupling(case_trace, "dest", 5, 4, tokens=[2, 5], layers=[0])
    torch.testing.assert_close(dest.singular_values[:, 0, 1], depth.singular_values[:2, 1, 0], rtol=1e-5, atol=0)


def test_one_token_is_coupled_with_itself_alone():
    trace = tlc.trace(CASES[0].model(), TOKENS)
    found = tlc.token_coupling(trace, 4, tokens=[2], layers=[0, 1], basis_layers=[0, 1])
    torch.testing.assert_close(found.values, torch.ones_like(found.values))
    assert found.mean().isnan().all()
    assert found.profile().shape[-1] == 0


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("normalizer", ["frobenius", "trace"])
def test_independent_random_matrices_have_no_excess_in_any_kind(
    monkeypatch: pytest.MonkeyPatch, normalizer: Any, absolute: bool
):
    """Within three standard errors over independent traces; the pairs of one share bases, so they are not counted."""
    model = fresh(seed=0)
    drawn: dict[Any, torch.Tensor] = {}
    draw = 0

    def random_jacobian(self: JacobianEngine, layer: int, sublayer: str, src: int, dest: int, head: int | None = None):
        key = (draw, layer, sublayer, src, dest, head)
        if key not in drawn:
            generator = torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
            first, second = torch.randn(2, 96, 96, generator=generator)
            drawn[key] = first @ second  # Haar bases on both sides, and a spectrum that falls
        return Projection(drawn[key])

    monkeypatch.setattr(JacobianEngine, "operator", random_jacobian)
    how = {"k": 5, "sublayers": "block", "normalizer": normalizer, "absolute": absolute}
    means: dict[str, list[float]] = {"depth": [], "token": [], "src": [], "dest": []}
    scores = []
    for draw in range(12):  # noqa: B007 - read by random_jacobian
        trace = tlc.trace(model, TOKENS[:5])
        found = {
            "depth": tlc.depth_coupling(trace, **how),
            "token": tlc.token_coupling(trace, layers=[0], **how),
            "src": tlc.context_coupling(trace, "src", layers=[1], **how),
            "dest": tlc.context_coupling(trace, "dest", layers=[1], **how),
        }
        for name, result in found.items():
            means[name].append(float(result.mean("excess")))
        off = ~torch.eye(5, dtype=torch.bool)
        scores.append(found["token"].z[0, 0, 0][off])
    for name, values in means.items():
        excess = torch.tensor(values)
        assert abs(excess.mean()) < 3 * excess.std() / math.sqrt(len(excess)), name
    z = torch.cat(scores)
    # 240 scores: a standard error of 5 % if they were independent, twice that as they share bases
    assert abs(z.std() - 1) < 0.3
    assert z.abs().max() < 6


def test_a_random_model_has_no_excess_across_layers_and_much_within_one():
    """Tokens of one layer share its weights, so their Jacobians agree untrained: the null does not know of that."""
    normalizers: tuple[Any, ...] = ("frobenius", "trace")
    across, within = [], []
    for seed in range(8):
        trace = tlc.trace(fresh(seed), TOKENS[:5])
        means = []
        for each in normalizers:
            how = {"basis_layers": [1, 2, 0], "normalizer": each}
            shifted = [tlc.token_coupling(trace, 5, **how)]
            shifted += [tlc.context_coupling(trace, fixed, k=5, sublayers="attn", **how) for fixed in ("src", "dest")]
            means.append(torch.cat([found.excess.mean(dim=(1, 2, 3, 4)) for found in shifted]))
        across.append(torch.stack(means))
        same = [tlc.token_coupling(trace, 5, layers=[1], normalizer=each) for each in normalizers]
        within.append(torch.stack([found.mean("excess")[:, 0, 0] for found in same]))
    across, within = torch.stack(across), torch.stack(within)  # [model, normalizer, sublayer (and kind)]
    assert (across.mean(0).abs() < 3 * across.std(0) / math.sqrt(len(across))).all()
    assert (within > 10 * across.abs().amax(dim=(0, 2))[:, None]).all()


def test_within_a_layer_a_random_model_has_no_excess_over_the_random_baseline():
    """Chance with shared weights is what the baseline gives: within three standard errors, in each kind."""

    def means(model: Any) -> torch.Tensor:
        trace = tlc.trace(model, TOKENS[:5])
        found = [
            tlc.token_coupling(trace, 5, layers=[1]),
            tlc.context_coupling(trace, "src", k=5, layers=[1], sublayers="attn"),
            tlc.context_coupling(trace, "dest", k=5, layers=[1], sublayers="attn"),
        ]
        return torch.cat([each.mean("excess").flatten() for each in found])

    gaps = torch.stack([means(fresh(seed)) - means(tlc.random_baseline(fresh(0), 100 + seed)) for seed in range(8)])
    assert (gaps.mean(0).abs() < 3 * gaps.std(0) / math.sqrt(len(gaps))).all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("token_coupling", {"tokens": [7]}, r"tokens=7 .*from -7 to 6"),
        ("token_coupling", {"basis_layers": [0]}, r"basis_layers=\[0\] .*each of the 3 layers"),
        ("token_coupling", {"basis_layers": 3}, r"basis_layers=3 .*from -3 to 2"),
        ("token_coupling", {"k": 33}, r"k=33 .*d_model = 32"),
        ("token_coupling", {"k": 32}, r"k=32 .*numerical rank of this Jacobian \(.* of layer 0, token 6\)"),
        ("context_coupling", {"basis_layers": [0]}, r"basis_layers=\[0\] .*each of the 3 layers"),
        ("context_coupling", {"basis_layers": -4}, r"basis_layers=-4 .*from -3 to 2"),
        ("context_coupling", {"fixed": "head"}, r"fixed='head' .*src, dest"),
        ("context_coupling", {"position": 7}, r"position=7 .*from -7 to 6"),
        ("context_coupling", {"position": 6}, r"position=6 .*a src with two or more tokens"),
        ("context_coupling", {"fixed": "dest", "position": 0}, r"position=0 .*a dest with two or more tokens"),
        ("context_coupling", {"position": 3, "tokens": [2, 4]}, r"tokens=2 .*from 3 to 6"),
        ("context_coupling", {"fixed": "dest", "position": 3, "tokens": [4, 2]}, r"tokens=4 .*from 0 to 3"),
        ("context_coupling", {"tokens": [4]}, r"tokens=\[4\] .*two or more positions"),
        ("context_coupling", {"tokens": "some"}, r"tokens='some' .*'all'"),
        ("context_coupling", {"sublayers": "mlp"}, r"sublayers='mlp' .*does not reach another position"),
        ("context_coupling", {"k": 32}, r"k=32 .*numerical rank .*\(.* of layer 0, token 0 to token \d\)|token 0\)"),
    ],
)
def test_bad_arguments(call: str, arguments: dict, message: str):
    trace = tlc.trace(CASES[0].model(), TOKENS)
    with pytest.raises(ArgumentError, match=message):
        getattr(tlc, call)(trace, **{"k": 4, **arguments})


def test_a_token_out_of_the_window_is_refused():
    """Local attention gives it no weight: its Jacobian is zero and has no singular vectors."""
    local = next((case for case in CASES if case.name in ("hooked-local", "bridge-gpt-neo", "bridge-mistral")), None)
    if local is None:
        pytest.skip("no model with a local window")
    trace = tlc.trace(local.model(), TOKENS)
    with pytest.raises(
        ArgumentError, match=r"at most 0, the numerical rank .*\(attn of layer \d, token 0 to token 6\)"
    ):
        tlc.context_coupling(trace, "src", 0, 2, sublayers="attn", tokens=[0, 6])


@pytest.mark.parametrize("kind", ["token", "context"])
def test_a_layer_is_run_once_for_all_its_tokens(monkeypatch: pytest.MonkeyPatch, kind: str):
    """The shared work of all (src, dest) pairs of a layer is not done per pair."""
    trace = tlc.trace(CASES[0].model(), TOKENS)
    runs: list[int] = []
    real = BlockRun._run

    def counted(self: BlockRun, *arguments: Any) -> Any:
        runs.append(self.layer)
        return real(self, *arguments)

    monkeypatch.setattr(BlockRun, "_run", counted)
    found = tlc.token_coupling(trace, 4) if kind == "token" else tlc.context_coupling(trace, "dest", -1, 4)
    assert runs == [0, 1, 2]
    assert set(found.provenance.engine.values()) == {"analytic"}


def test_results_come_back_and_tabulate(tmp_path):
    trace = tlc.trace(CASES[0].model(), TOKENS)
    for found in (
        tlc.token_coupling(trace, [2, 4], tokens=[0, 3], layers=[1], basis_layers=2),
        tlc.context_coupling(trace, "dest", 4, [2, 4], layers=[0, 2], basis_layers=[2, 1]),
    ):
        back = tlc.load(found.save(tmp_path / "result.safetensors"))
        assert repr(back) == repr(found)
        assert torch.equal(back.z, found.z)
        table = found.to_dataframe().query("quantity == 'z' and sublayer == 'attn' and k == 4")
        row = table.query(f"layer == {found.layers[0]} and pos == 0 and basis_pos == 3")
        column = found.positions.index(3)
        assert row["value"].item() == pytest.approx(float(found.z[1, 0, 1, 0, column]))
        assert found.provenance.settings["layers"] == list(found.layers)
        assert back.basis_layers == found.basis_layers and "bases of layer" in repr(found)
        assert found.provenance.settings["basis_layers"] == list(found.basis_layers)
