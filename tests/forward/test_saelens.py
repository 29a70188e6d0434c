"""SAELens: autoencoders attached by its own model classes, at each point, with and without the error term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import TOKENS, tiny_tokenizer
from families import CONTEXT, D_HEAD, D_MLP, D_MODEL, N_HEADS, N_LAYERS, VOCABULARY, families
from splices import right_or_hook_error

import tlcoupling as tlc
from tlcoupling.errors import ResidualIdentityError

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
