"""Measures that an analysis has on request: the same numbers as from their own functions, saved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TOKENS, fresh

import tlcoupling as tlc
from tlcoupling.analysis.measures import MEASURES
from tlcoupling.errors import ArgumentError

pytestmark = pytest.mark.filterwarnings("ignore:linearity over")  # of a few tokens


def test_measures_are_those_of_their_functions_beside_the_same_baseline(tmp_path: Path) -> None:
    model, other = fresh(0), fresh(1)
    how: dict[str, Any] = {"sublayers": ("block", "mlp"), "baseline": other}
    analysis = tlc.analyze(model, TOKENS, k=2, tokens=[1, -2], measures="all", **how)
    trace: Any = analysis.trace
    alone = {
        "geometry": tlc.eigen_geometry(trace, tokens=-2, **how),
        "lyapunov": tlc.lyapunov_spectrum(trace, pos=-2, baseline=other),
        "profile": tlc.depth_profile(model, {"prompt": TOKENS}, 2, **how),
    }
    back = tlc.load(analysis.save(tmp_path / "result.safetensors"))
    for name in MEASURES:
        for found in (getattr(analysis, name), getattr(back, name)):
            for one, expected in ((found, alone[name]), (found.baseline, alone[name].baseline)):
                assert one._coords() == expected._coords()
                for quantity, (_, values) in expected._arrays().items():
                    torch.testing.assert_close(getattr(one, quantity), values, equal_nan=True, msg=quantity)
    assert analysis.baseline.geometry is None, "a measure has its own baseline"
    table = analysis.to_dataframe()
    assert set(MEASURES) < set(table["measurement"])
    (value,) = table.query("measurement == 'geometry' and quantity == 'symmetric' and sublayer == 'mlp'").query(
        "layer == 1 and map == 'I + J'"
    )["value"]
    assert value == pytest.approx(float(analysis.geometry.symmetric[1, 0, 1, 1]))


def test_a_profile_is_of_the_prompt_that_was_masked() -> None:
    model = fresh(0)
    padded, mask = torch.cat([TOKENS[:1], TOKENS])[None], torch.tensor([[0] + [1] * len(TOKENS)])
    masked = tlc.analyze(model, padded, k=2, attention_mask=mask, measures="profile").profile
    plain = tlc.analyze(model, TOKENS, k=2, measures=["profile"]).profile
    torch.testing.assert_close(masked.influence, plain.influence)


def test_across_layers_tokens_are_compared_in_the_bases_that_were_asked_for() -> None:
    model = fresh(0)
    analysis = tlc.analyze(model, TOKENS, k=2, token_layers=[0, 2], basis_layers=1, baseline=fresh(1))
    for one in (analysis, analysis.baseline):
        assert one is not None
        for part in (one.token_coupling, one.context_src, one.context_dest):
            assert (part.layers, part.basis_layers) == ((0, 2), (1, 1))
    alone = tlc.context_coupling(
        analysis.trace, "dest", k=2, sublayers=("block", "attn"), layers=[0, 2], basis_layers=1
    )
    # the solver's random start differs from one call to the next
    torch.testing.assert_close(analysis.context_dest.values, alone.values, rtol=1e-3, atol=1e-4)
    more = tlc.estimate(model, TOKENS, 2, token_layers=[0, 2], basis_layers=1)
    assert more.flops > tlc.estimate(model, TOKENS, 2, token_layers=[0, 2]).flops, "a third layer's bases"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"measures": "curvature"},
            "measures='curvature' is not allowed; allowed: 'all', or some of geometry, lyapunov",
        ),
        ({"measures": ["profile"], "fwd_hooks": [("blocks.0.hook_attn_out", lambda t, hook: t)]}, "without 'profile'"),
        ({"basis_layers": 1}, "basis_layers=1 .* None where no token_layers are compared"),
        ({"token_layers": [0, 2], "basis_layers": [0, 1, 2]}, "basis_layers=.* one for each of the 2 layers"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tlc.analyze(fresh(0), TOKENS, k=2, **options)
