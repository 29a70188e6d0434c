"""Maps between features against differences with a feature pushed, in the model itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import FEW, TOKENS, Case, relative_error
from torch import Tensor, nn

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, DerivativeError

WIDTH, SIZE = 32, 48


def weights(seed: int, width: int = WIDTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((width, SIZE), (SIZE, width))]
    return {"W_enc": 0.3 * drawn[0], "W_dec": 0.3 * drawn[1], "b_enc": torch.full((SIZE,), 0.2, dtype=torch.float64)}


class Autoencoder(nn.Module):
    """One with methods of its own: softplus features, which a decoder of another scale reads."""

    def __init__(self, seed: int, width: int = WIDTH) -> None:
        super().__init__()
        self.inner = nn.ParameterDict(weights(seed, width))
        self.hidden = False

    def encode(self, x: Tensor) -> Tensor:
        acts = nn.functional.softplus(x @ self.inner["W_enc"] + self.inner["b_enc"])
        return acts * (acts > 0.5) if not self.hidden else acts.detach()

    def decode(self, acts: Tensor) -> Tensor:
        return 3.0 * acts @ self.inner["W_dec"] + 1.0


class Normalising(Autoencoder):
    """One that measures the scale of what it encodes, and undoes it once, as SAELens's ``constant_norm_rescale``."""

    def encode(self, x: Tensor) -> Tensor:
        self.scale = 3.0 / x.norm(dim=-1, keepdim=True)
        return super().encode(x * self.scale)

    def decode(self, acts: Tensor) -> Tensor:
        made = super().decode(acts) / self.scale
        del self.scale
        return made


def pushed(trace: tlc.Trace, point: str, move: Tensor, end: str, pos: int) -> Tensor:
    """The activation at a later hook point with one position of an earlier one moved."""
    kept: list[Tensor] = []

    def push(tensor: Tensor, hook: Any) -> Tensor:
        moved = tensor.clone()
        moved[0, pos] += move
        return moved

    hooks = [(point, push), (end, lambda tensor, hook: kept.append(tensor[0]))]
    with torch.no_grad():
        trace.model.run_with_hooks(trace.tokens[None], fwd_hooks=hooks)
    return kept[-1]


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["methods", "matrices"])
def test_a_derivative_is_what_pushing_a_feature_does(case: Case, own: bool):
    trace = tlc.trace(case.model(), TOKENS)
    earlier, later = (Autoencoder(seed) if own else SimpleNamespace(**weights(seed)) for seed in (1, 2))
    source, target = ("resid_pre", 1), ("attn_out", 2)
    found = tlc.feature_map(trace, source, target, earlier, later, src=2, dest=4, most=5)
    assert found.values.shape == (5, 5) and min(found.active) >= 5

    def features(dictionary: Any, x: Tensor) -> Tensor:
        if own:
            return dictionary.encode(x)
        return torch.relu(x @ dictionary.W_enc + dictionary.b_enc)

    acts = features(earlier, trace.resid[1, 2]).detach()
    assert acts.topk(5).indices.tolist() == list(found.source_features)
    torch.testing.assert_close(found.source_acts, acts.topk(5).values)
    step = 1e-4 if case.exact else 3e-3  # above the rounding of modules that compute in float32
    directions = (3.0 if own else 1.0) * weights(1)["W_dec"]
    for column, feature in enumerate(found.source_features):
        ends = [
            features(
                later,
                pushed(
                    trace, "blocks.1.hook_resid_pre", sign * step * directions[feature], "blocks.2.hook_attn_out", 2
                )[4],
            )
            for sign in (1, -1)
        ]
        quotient = ((ends[0] - ends[1]) / (2 * step))[list(found.target_features)]
        # curvature of order step^2, and that rounding
        tolerance = 1e-5 if case.exact else 2e-2
        assert relative_error(found.values[:, column], quotient.detach()) < tolerance


def test_a_normalisation_is_undone_as_it_was_measured():
    """The decoder's scale is that of the activation, whatever was encoded before."""
    trace = tlc.trace(FEW[0].model(), TOKENS)
    earlier, later, ends = Normalising(1), Autoencoder(2), (("resid_pre", 1), ("resid_post", 1))
    found = tlc.feature_map(trace, *ends, earlier, later, src=2, dest=4, most=3)
    plain = tlc.feature_map(trace, *ends, _Rescaled(1, 3.0 / float(trace.resid[1, 2].norm())), later, src=2, dest=4)
    for at, feature in enumerate(found.source_features):
        same = plain.values[:, plain.source_features.index(feature)]
        rows = [plain.target_features.index(one) for one in found.target_features]
        torch.testing.assert_close(found.values[:, at], same[rows])
    reader = tlc.feature_map(trace, *ends, later, Normalising(1), src=2, dest=4, most=3)
    assert reader.values.abs().max() > 0  # its derivative, scale included, held against differences


class _Rescaled(Autoencoder):
    """One of a scale that is known beforehand."""

    def __init__(self, seed: int, scale: float) -> None:
        super().__init__(seed)
        self.fixed = scale

    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x * self.fixed)

    def decode(self, acts: Tensor) -> Tensor:
        return super().decode(acts) / self.fixed


def test_random_directions_do_what_the_null_says(tmp_path: Path):
    """The root mean square over many random decoders is the null: of 400 draws it is known to 1 part in 28."""
    trace = tlc.trace(FEW[0].model(), TOKENS)
    later = SimpleNamespace(**weights(2))
    generator = torch.Generator().manual_seed(5)
    decoder = torch.randn(400, WIDTH, generator=generator, dtype=torch.float64)
    many = SimpleNamespace(
        W_enc=torch.zeros(WIDTH, 400, dtype=torch.float64),
        W_dec=decoder / decoder.norm(dim=1, keepdim=True),
        b_enc=torch.ones(400, dtype=torch.float64),
    )
    found = tlc.feature_map(trace, ("resid_pre", 1), ("resid_post", 1), many, later, most=400)
    ratio = found.values.square().mean(1).sqrt() / found.null[:, 0]
    assert ((ratio - 1).abs() < 0.15).all()  # four standard deviations
    table = found.to_dataframe()
    assert len(table) == found.values.count_nonzero() and table["effect"].abs().is_monotonic_decreasing
    row = table.iloc[0]
    at = (found.target_features.index(row["target_feature"]), found.source_features.index(row["source_feature"]))
    assert row["derivative"] == float(found.values[at]) and row["effect"] == row["derivative"] * row["source_act"]
    again = tlc.load(found.save(tmp_path / "features"))
    assert torch.equal(again.values, found.values) and "FeatureMap(blocks.1.hook_resid_pre -> " in repr(again)


def test_bad_dictionaries_are_refused():
    trace = tlc.trace(FEW[0].model(), TOKENS)
    good, ends = SimpleNamespace(**weights(1)), (("resid_pre", 1), ("resid_post", 1))
    for wrong in (SimpleNamespace(**weights(1, width=16)), Autoencoder(1, width=16)):
        with pytest.raises(ArgumentError, match="later=.*width 32, that of its hook point"):
            tlc.feature_map(trace, *ends, good, wrong)
        with pytest.raises(ArgumentError, match="earlier=.*width 32"):
            tlc.feature_map(trace, *ends, wrong, good)
    with pytest.raises(ArgumentError, match="earlier='object'.*encode and decode, or with W_enc and W_dec"):
        tlc.feature_map(trace, *ends, object(), good)
    for part in ("b_dec", "threshold"):  # Gemma Scope's are JumpReLU autoencoders
        more = SimpleNamespace(**weights(1), **{part: torch.ones(SIZE)})
        with pytest.raises(ArgumentError, match=f"later=.*with {part}.*would leave this out"):
            tlc.feature_map(trace, *ends, good, more)
    off = SimpleNamespace(**{**weights(1), "b_enc": torch.full((SIZE,), -1e6, dtype=torch.float64)})
    with pytest.raises(ArgumentError, match="later=.*an active feature"):
        tlc.feature_map(trace, *ends, good, off)
    with pytest.raises(ArgumentError, match="target='logits'.*no dictionary"):
        tlc.feature_map(trace, ends[0], "logits", good, good)
    with pytest.raises(ArgumentError, match="target='ln_final'.*no dictionary"):
        tlc.feature_map(trace, ends[0], "ln_final", good, good)
    hidden = Autoencoder(1)
    hidden.hidden = True
    with pytest.raises(DerivativeError, match="without a graph"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tlc.feature_map(trace, *ends, good, hidden)
    cut = Autoencoder(1)
    whole = cut.decode
    cut.decode = lambda acts: whole(acts.detach()) + 0.5 * whole(acts)
    with pytest.raises(DerivativeError, match="decode of earlier="):
        tlc.feature_map(trace, *ends, cut, good)
    lying = Autoencoder(1)
    plain = lying.encode
    lying.encode = lambda x: plain(x.detach()) + 0.5 * x.sum(-1, keepdim=True) - 0.5 * x.detach().sum(-1, keepdim=True)
    with pytest.raises(DerivativeError, match="encode of later="):
        tlc.feature_map(trace, *ends, good, lying)
