"""SAELens: autoencoders attached by its own model classes, and the maps between their features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import TOKENS, tiny_tokenizer
from families import CONTEXT, D_HEAD, D_MLP, D_MODEL, N_HEADS, N_LAYERS, VOCABULARY, families
from splices import right_or_hook_error

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, ResidualIdentityError

sae_lens = pytest.importorskip("sae_lens")

PLACES = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "ln2.hook_normalized")


def _hooked() -> Any:
    from transformer_lens import HookedTransformerConfig

    return sae_lens.HookedSAETransformer(
        HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=D_MODEL,
            n_ctx=CONTEXT,
            d_head=D_HEAD,
            n_heads=N_HEADS,
            d_mlp=D_MLP,
            d_vocab=VOCABULARY,
            act_fn="gelu",
            seed=0,
            dtype=torch.float64,
        )
    ).eval()


def _bridge() -> Any:
    import transformers
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    name, architecture, config = families()["gpt2"]
    config.architectures = [architecture]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    return SAETransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tiny_tokenizer(), dtype=torch.float64)


@pytest.fixture(scope="module", params=[_hooked, _bridge])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


def _sae(place: str) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    config = sae_lens.StandardSAEConfig(
        d_in=D_MODEL,
        d_sae=2 * D_MODEL,
        dtype="float64",
        device="cpu",
        metadata=SAEMetadata(hook_name=f"blocks.1.{place}"),
    )
    sae, generator = sae_lens.StandardSAE(config), torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    sae.b_enc.data += 20  # all features active: a difference over the kink of a ReLU says nothing about a derivative
    return sae


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_an_attached_autoencoder_is_followed_or_refused(model: Any, place: str, error_term: bool):
    plain = tlc.trace(model, TOKENS)
    truth = tlc.residual_jacobian(plain, 1, "block").dense()
    with model.saes([_sae(place)], use_error_term=error_term):
        trace = tlc.trace(model, TOKENS)
        layer = 0 if place == "hook_resid_pre" else 1
        assert layer in trace.hooked_layers
        right_or_hook_error(trace, layer, error_term)
    # SAELens leaves new hook points behind: what was traced before is measured as before
    assert torch.equal(tlc.residual_jacobian(plain, 1, "block").dense(), truth)
    assert torch.equal(tlc.trace(model, TOKENS).resid, plain.resid)


def test_between_the_sublayers_it_is_refused(model: Any):
    with (
        model.saes([_sae("hook_resid_mid")], use_error_term=False),
        pytest.raises(ResidualIdentityError, match="autoencoders in its place"),
    ):
        tlc.trace(model, TOKENS)


@pytest.mark.parametrize(
    ("normalisation", "subtracts"),
    [("none", True), ("none", False), ("layer_norm", True), ("constant_norm_rescale", False)],
)
@pytest.mark.parametrize("architecture", ["Standard", "TopK", "JumpReLU", "Gated"])
def test_maps_between_autoencoders_are_differences(
    model: Any, architecture: str, normalisation: str, subtracts: bool
) -> None:
    """A feature of the earlier one is pushed, the block is run, and the later one encodes what comes of it."""
    trace = tlc.trace(model, TOKENS)
    options = {"normalize_activations": normalisation, "apply_b_dec_to_input": subtracts}
    earlier, later = (_of(architecture, f"blocks.{layer}.hook_resid_pre", layer, **options) for layer in (1, 2))
    found = tlc.feature_map(trace, ("resid_pre", 1), ("resid_pre", 2), earlier, later, src=2, dest=4, most=4)
    at = trace.resid[1, 2]
    acts = earlier.encode(at[None]).detach()
    assert set(found.source_features) <= set(acts[0].nonzero()[:, 0].tolist())

    def decoded(moved: torch.Tensor) -> torch.Tensor:
        earlier.encode(at[None])  # the scale of this activation, which decode takes once
        return earlier.decode(moved)[0]

    def read(move: torch.Tensor) -> torch.Tensor:
        stream = trace.block_input(1).clone()
        stream[0, 2] += move
        return later.encode(trace.run_block(1, stream, {})[0, 4][None])[0, list(found.target_features)]

    step = 1e-4
    with torch.no_grad():
        for column, feature in enumerate(found.source_features):
            unit = torch.zeros_like(acts)
            unit[0, feature] = 1.0
            move = step * (decoded(acts + unit) - decoded(acts))  # decoders are affine
            quotient = (read(move) - read(-move)) / (2 * step)
            # the square of the step, and modules of a bridge that round to float32
            torch.testing.assert_close(found.values[:, column], quotient, rtol=1e-2, atol=1e-2 * float(quotient.norm()))


def _of(architecture: str, place: str, seed: int, **options: Any) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    size = {"d_in": D_MODEL, "d_sae": 2 * D_MODEL, "dtype": "float64", "device": "cpu"}
    if architecture == "TopK":
        options["k"] = 6
    config = getattr(sae_lens, f"{architecture}SAEConfig")(**size, **options, metadata=SAEMetadata(hook_name=place))
    sae, generator = getattr(sae_lens, f"{architecture}SAE")(config), torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return sae


def test_autoencoders_that_do_not_fit_are_told_apart(model: Any) -> None:
    trace = tlc.trace(model, TOKENS)
    ends = ("resid_pre", 1), ("resid_pre", 2)
    good = [_of("Standard", f"blocks.{layer}.hook_resid_pre", layer) for layer in (1, 2)]
    with pytest.warns(UserWarning, match="later= was trained at blocks.0.hook_resid_post"):
        tlc.feature_map(trace, *ends, good[0], _of("Standard", "blocks.0.hook_resid_post", 2))
    # the same place under its other name
    tlc.feature_map(trace, *ends, _of("Standard", "blocks.0.hook_resid_post", 1), good[1])
    unfolded = _of("Standard", "blocks.2.hook_resid_pre", 2, normalize_activations="expected_average_only_in")
    with pytest.raises(ArgumentError, match="later=.*fold_activation_norm_scaling_factor"):
        tlc.feature_map(trace, *ends, good[0], unfolded)
    size = {"d_in": D_MODEL, "d_sae": 8, "d_out": D_MODEL, "dtype": "float64", "apply_b_dec_to_input": False}
    with pytest.raises(ArgumentError, match="earlier=.*a transcoder reads one and writes another"):
        tlc.feature_map(trace, *ends, sae_lens.Transcoder(sae_lens.TranscoderConfig(**size)), good[1])
