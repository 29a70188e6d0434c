"""Hook points of a model, and modules in their places."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import CASES, OF_EACH_CLASS, TOKENS, Case, relative_error
from splices import Autoencoder, put_in_place, right_or_hook_error

import tlcoupling as tlc
from tlcoupling.errors import ResidualIdentityError
from tlcoupling.forward.points import Splice, hook_points, in_place


@functools.cache
def own_model(case: Case) -> Any:
    """A model that no other test uses: what was put in place and taken away again leaves some aliases behind."""
    return case.build(torch.float64).eval()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_model_without_splices_has_the_points_that_it_names(case: Case):
    model = case.model()
    points, named = hook_points(model), model.hook_dict
    assert points.keys() == named.keys()
    assert all(points[name] is point for name, point in named.items())
    assert all(in_place(model, point) for point in points.values())


# the names under which both classes run them: a bridge's other names are aliases
_PLACES = {
    "hooked": ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "ln2.hook_normalized"),
    "bridge": ("hook_in", "hook_out", "attn.hook_out", "mlp.hook_out", "ln2.hook_normalized"),
}
_SPLICED = [
    (case, place)
    for case in OF_EACH_CLASS
    for kind, places in _PLACES.items()
    if case.name.startswith(kind)
    for place in places
    if case.exact and case.topology == "sequential"
]


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize(("case", "place"), _SPLICED, ids=str)
def test_an_autoencoder_is_followed_or_refused(case: Case, place: str, error_term: bool):
    model = own_model(case)
    plain = tlc.trace(model, TOKENS)
    with put_in_place(model, f"blocks.1.{place}", Autoencoder(error_term)):
        trace = tlc.trace(model, TOKENS)
        # a hook on the stream between two blocks makes x^{l+1} of the block before it
        layer = 0 if place in ("hook_resid_pre", "hook_in") else 1
        assert layer in trace.hooked_layers
        right_or_hook_error(trace, layer, error_term)
        changed = relative_error(trace.resid[-1], plain.resid[-1])
        assert (changed < 1e-12) == error_term
    # what was measured before is measured as before, although the points were replaced meanwhile
    again = tlc.residual_jacobian(plain, 1, "block").dense()
    assert torch.equal(again, tlc.residual_jacobian(tlc.trace(model, TOKENS), 1, "block").dense())


def test_an_autoencoder_between_the_sublayers_is_refused():
    case = next((case for case, _ in _SPLICED), None)
    if case is None:
        pytest.skip("no such model on this transformer-lens")
    place = "hook_resid_mid" if case.name.startswith("hooked") else "ln2.hook_in"
    with (
        put_in_place(own_model(case), f"blocks.1.{place}", Autoencoder(False)),
        pytest.raises(ResidualIdentityError, match="autoencoders in its place"),
    ):
        tlc.trace(own_model(case), TOKENS)


def test_hooks_of_a_splice_see_its_output_and_its_input():
    module = torch.nn.Linear(2, 2, dtype=torch.float64)
    splice, x, seen = Splice("blocks.0.hook_resid_pre", module), torch.ones(1, 2, dtype=torch.float64), []
    splice.add_hook(lambda tensor, hook: seen.append(tensor), dir="fwd", level=1, prepend=False)
    splice.add_hook(lambda tensor, hook: seen.append(tensor), dir="fwd", level=1, prepend=True)
    out = splice(x)
    assert torch.equal(seen[0], x) and torch.equal(seen[1], out)
    splice.remove_hooks("fwd", level=1)
    splice(x)
    assert len(seen) == 2
