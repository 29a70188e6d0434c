"""The random baseline: the same architecture, weights as its own library draws them, nothing else touched."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import transformers
from cases import CASES, FEW, TOKENS, Case, tiny_tokenizer

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.forward.block import norms_are_folded, weight_of
from tlcoupling.forward.offline import answered_locally, offline
from tlcoupling.models.baseline import _is_centered, _writing_weights

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def drawn_std(model: torch.nn.Module) -> float:
    """The standard deviation of the library's initialisation, from the model's own configuration."""
    huggingface = getattr(getattr(model, "original_model", None), "config", None)
    for name in ("initializer_range", "init_std"):
        if (std := getattr(huggingface, name, None)) is not None:
            return std
    return model.cfg.initializer_range


@each_case
def test_the_same_architecture_with_its_librarys_weights(case: Case):
    model = case.model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = {name: str(value) for name, value in vars(model.cfg).items()}
    fresh = tlc.random_baseline(model, seed=3)
    assert type(fresh) is type(model) and not fresh.training
    assert {name: str(value) for name, value in vars(model.cfg).items()} == config
    named = config | {"model_name": f"{config['model_name']} (fresh weights, seed 3)"}
    assert {name: str(value) for name, value in vars(fresh.cfg).items()} == named
    found = dict(fresh.named_parameters())
    assert found.keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter is not found[name]
        assert (found[name].shape, found[name].dtype) == (parameter.shape, parameter.dtype)
    # the weights that read the stream: those that write it are scaled by depth in some libraries
    queries, values = ([weight_of(block.attn, name) for block in fresh.blocks] for name in ("W_Q", "W_V"))
    # DeepSeek's attention reads through other names
    compressed = [weight_of(block.mlp, "W_in") for block in fresh.blocks] if queries[0] is None else []
    reading = [weight for weight in (*queries, *values, *compressed) if weight is not None]
    drawn = drawn_std(model) * (0.88 if "modernbert" in case.name else 1)  # which cuts its draws at two deviations
    for spread in [torch.cat([weight.detach().flatten() for weight in reading]).std()] if reading else []:
        assert float(spread) == pytest.approx(drawn, rel=0.06)  # 6144 draws, or fewer in groups: 1 / sqrt(2 n)
    tlc.trace(fresh, TOKENS)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_seed_is_all_that_matters_and_no_generator_moves(case: Case):
    model = case.model()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    one, same, other = (dict(tlc.random_baseline(model, seed).named_parameters()) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    torch.manual_seed(99)
    after = dict(tlc.random_baseline(model, 0).named_parameters())
    for name, parameter in one.items():
        assert torch.equal(parameter, same[name]) and torch.equal(parameter, after[name])
    assert any(not torch.equal(parameter, other[name]) for name, parameter in one.items())


def test_a_wide_random_model_has_no_excess():
    """Attention and MLP of independent weights; what they share, the norm's null direction, is one of d_model."""
    from cases import built_here

    model = tlc.random_baseline(built_here({"d_model": 256, "d_mlp": 512, "n_heads": 8, "d_head": 32, "n_layers": 4}))
    found = tlc.depth_coupling(tlc.trace(model, TOKENS), 10, tokens=[2, 4, 6])
    # 12 ordered pairs of each of 3 tokens: as on SmolLM2, a thousandth per unit of 576 / d_model
    assert found.mean("excess").mean(1).abs().max() < 3e-3


def test_folding_and_centring_are_done_again():
    """A processed model's baseline is processed alike: no gains, writes without a mean."""
    name = next(case.name for case in CASES if "layernorm" in case.name or case.name == "bridge-gpt2")
    case = next(case for case in CASES if case.name == name)
    model = case.build(torch.float64).eval()
    raw = tlc.random_baseline(model)
    assert not norms_are_folded(raw) and not all(map(_is_centered, _writing_weights(raw)))
    if hasattr(model, "enable_compatibility_mode"):
        model.enable_compatibility_mode(disable_warnings=True)
    else:
        model.process_weights_()
        model.setup()
        model.eval()  # the norms are new modules
    assert norms_are_folded(model)
    fresh = tlc.random_baseline(model)
    assert norms_are_folded(fresh)
    assert all(map(_is_centered, _writing_weights(model))) and all(map(_is_centered, _writing_weights(fresh)))
    assert _is_centered(fresh.W_U)
    trace = tlc.trace(fresh, TOKENS)
    assert trace.weight_processing == tlc.trace(model, TOKENS).weight_processing
    # centring is a projection of what is written: the random model itself is the one without processing
    writes = tlc.trace(raw, TOKENS).attn_out[0]
    torch.testing.assert_close(trace.attn_out[0], writes - writes.mean(-1, keepdim=True), rtol=0, atol=1e-6)


def test_switches_and_half_precision_are_kept():
    case = FEW[0]
    model = case.build(torch.bfloat16).eval()
    model.set_use_attn_result(True)
    fresh = tlc.random_baseline(model)
    assert fresh.cfg.use_attn_result
    assert next(fresh.blocks.parameters()).dtype == torch.bfloat16
    assert fresh.cfg.default_prepend_bos == model.cfg.default_prepend_bos


def test_what_cannot_be_made_again_is_refused(unchecked: None, monkeypatch: pytest.MonkeyPatch):
    model = FEW[0].build(torch.float32).eval()
    for seed in (-1, 1.5, True):
        with pytest.raises(ArgumentError, match="seed="):
            tlc.random_baseline(model, seed)
    with pytest.raises(UnsupportedModelError):
        tlc.random_baseline(torch.nn.Linear(2, 2))
    if not hasattr(model, "original_model"):
        return
    tokenizer = model._tokenizer if "_tokenizer" in vars(model) else model.tokenizer
    assert tokenizer is not None
    monkeypatch.setattr(type(model), "tokenizer", None)
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        tlc.random_baseline(model)


def test_the_initialisations_width_is_that_of_the_configuration():
    """Another ``initializer_range`` in the configuration is another width of the fresh weights."""
    from cases import built_here

    narrow = tlc.random_baseline(built_here({"initializer_range": 0.01}))
    spread = torch.cat([block.attn.W_Q.detach().flatten() for block in narrow.blocks]).std()
    assert float(spread) == pytest.approx(0.01, rel=3 / math.sqrt(2 * 3 * 32 * 32))


def test_a_model_of_images_gets_a_baseline_without_an_installer(monkeypatch: pytest.MonkeyPatch):
    bridge = pytest.importorskip("transformer_lens.model_bridge")
    ran = []

    def refuse(*args: object, **kwargs: object) -> None:
        ran.append(args)
        raise OSError

    monkeypatch.setattr("subprocess.check_call", refuse)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=32),
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        image_token_index=40,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    hf_model, tokenizer = transformers.LlavaForConditionalGeneration(config).eval(), tiny_tokenizer()
    with offline(), answered_locally(hf_model, tokenizer):
        model = bridge.TransformerBridge.boot_transformers(
            "llava-hf/llava-1.5-7b-hf", hf_model=hf_model, tokenizer=tokenizer
        )
    assert tlc.trace(tlc.random_baseline(model), TOKENS).n_layers == 2
    assert not ran


def test_the_weights_are_those_of_transformer_lenss_random_control():
    """From transformer-lens 4.3 on: ``random_init_bridge`` draws the same weights from the same seed."""
    theirs = pytest.importorskip("transformer_lens.tools.analysis.interchange")
    if not hasattr(theirs, "random_init_bridge"):
        pytest.skip("random_init_bridge comes with transformer-lens 4.3")
    model = next(case for case in CASES if case.name == "bridge-llama").model(torch.float32)
    how = {"dtype": torch.float32, "device": "cpu", "tokenizer": model.tokenizer}
    with answered_locally(model.original_model, model.tokenizer), offline():
        control = theirs.random_init_bridge(model.cfg.model_name, seed=3, **how)
    found, drawn = (dict(each.named_parameters()) for each in (tlc.random_baseline(model, seed=3), control))
    assert found.keys() == drawn.keys() and all(torch.equal(found[name], drawn[name]) for name in found)
