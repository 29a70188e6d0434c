"""The encoder and the decoder of an encoder-decoder, each as a model of its own, against the whole real model."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TOKENS, tiny_tokenizer

import tlcoupling as tlc
from tlcoupling.errors import ArgumentError, UnsupportedModelError
from tlcoupling.models.load import _transformer_bridge

if not hasattr(_transformer_bridge(), "boot_native"):
    pytest.skip("encoder-decoders need transformer-lens 4", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import architectures

T5, MBART = "T5ForConditionalGeneration", "MBartForConditionalGeneration"  # MBart's hooks have other names
DECODER = architectures.DECODER_TOKENS
# Where the stream lies that a sublayer reads, and what it writes, by the names of either bridge.
READS = {
    T5: {"attn": "hook_in", "cross_attn": "hook_resid_mid", "mlp": "hook_resid_mid2"},
    MBART: {"attn": "hook_in", "cross_attn": "ln2.hook_in", "mlp": "ln3.hook_in"},
}
WRITES = {
    T5: {"attn": "self_attn.hook_out", "cross_attn": "cross_attn.hook_out", "mlp": "mlp.hook_out"},
    MBART: {"attn": "self_attn.hook_out", "cross_attn": "cross_attn.hook_out", "mlp": "mlp.out.hook_out"},
}


def traced(name: str, stack: Any, **options: Any) -> tuple[Any, tlc.Trace]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = architectures.boot(name)
        prompt = architectures.prompt(model, stack)
        return model, tlc.trace(model, prompt, stack=stack, decoder_input=DECODER, **options)


@pytest.mark.parametrize("name", [T5, MBART])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_stream_is_that_of_the_whole_model_and_adds_up(name: str, stack: str):
    model, trace = traced(name, stack)
    hidden: list[torch.Tensor] = []
    blocks = getattr(model, f"{stack}_blocks")
    handles = [
        block.register_forward_hook(lambda module, args, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        for block in blocks
    ]
    architectures.Real.of(model, stack).run()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(trace.resid[1:], torch.cat(hidden), rtol=1e-5, atol=1e-5)
    sublayers = ("block", "attn", "mlp") if stack == "encoder" else ("block", "attn", "cross_attn", "mlp")
    assert trace.sublayers == sublayers and trace.identity_gap < 1e-5 and trace.causal == (stack == "decoder")
    assert trace.layer_kinds == ("+".join(sublayers[1:]),) * 4


def changed(model: Any, name: str, sublayer: str, layer: int, src: int, dest: int, move: torch.Tensor) -> torch.Tensor:
    """How a sublayer's write at dest changes where the stream that it reads is moved at src, by the model's hooks."""
    written: list[torch.Tensor] = []

    def hooks(by: torch.Tensor) -> list[tuple[str, Any]]:
        def shift(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
            tensor = tensor.clone()
            tensor[0, src] += by
            return tensor

        def keep(tensor: torch.Tensor, hook: Any) -> None:
            written.append(tensor[0, dest].clone())

        prefix = f"decoder_blocks.{layer}."
        return [(prefix + READS[name][sublayer], shift), (prefix + WRITES[name][sublayer], keep)]

    for by in (move, -move):
        with torch.no_grad(), model.hooks(fwd_hooks=hooks(by)):
            architectures.Real.of(model, "decoder").run()
    return (written[0] - written[1]) / 2


@pytest.mark.parametrize("name", [T5, MBART])
@pytest.mark.parametrize("sublayer", ["attn", "cross_attn", "mlp"])
def test_a_sublayer_of_a_decoder_is_what_differences_of_the_whole_model_say(name: str, sublayer: str):
    model, trace = traced(name, "decoder")
    for layer, src, dest in ((0, 0, 0), (2, 5, 5), (3, 4, 6), (1, 0, 8)):
        length = trace.read_by(layer, sublayer)[src].norm()
        move = torch.randn(32, generator=torch.Generator().manual_seed(layer))
        move *= length / move.norm()
        product, gaps = tlc.residual_jacobian(trace, layer, sublayer, src, dest).mv(move), []
        for step in architectures.STEPS:  # ReLUs have kinks
            found = changed(model, name, sublayer, layer, src, dest, step * move) / step
            allowed = architectures.TOLERANCE * torch.maximum(found.norm(), product.norm())
            gaps.append(float((product - found).norm() / (allowed + architectures.NOTHING * length)))
        assert min(gaps) < 1, (layer, src, dest)
        reaches = src == dest or sublayer == "attn"
        assert (product.norm() > 1e-3 * length) == reaches


def test_slices_of_a_decoder_end_where_they_say():
    """At each place against differences through the hooks. Behind the cross-attention no place has a name."""
    _, trace = traced(T5, "decoder")
    pos, size = trace.n_tokens - 1, 1e-2 * trace.resid[0, -1].norm()
    move = size * torch.nn.functional.normalize(
        torch.randn(trace.d_model, generator=torch.Generator().manual_seed(0)), dim=0
    )

    def moved(sign: int, point: str) -> torch.Tensor:
        kept: list[torch.Tensor] = []

        def shift(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
            tensor = tensor.clone()
            tensor[0, pos] += sign * move
            return tensor

        def keep(tensor: torch.Tensor, hook: Any) -> None:
            kept.append(tensor[0, pos].clone())

        hooks = [("blocks.0.hook_resid_pre", shift), (f"blocks.1.hook_{point}", keep)]
        with torch.no_grad():
            trace.model.run_with_hooks(trace.tokens[None], return_type=None, fwd_hooks=hooks)
        return kept[0]

    for point in ("attn_out", "mlp_out", "resid_post"):
        change = (moved(1, point) - moved(-1, point)) / 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of autograd
            found = tlc.slice_jacobian(trace, ("resid_pre", 0), (point, 1)).mv(move)
        assert (found - change).norm() < 3e-3 * change.norm()  # of differences in float32, with a ReLU
    for source, target in ((("resid_pre", 0), ("cross_attn_out", 1)), (("attn_out", 0), ("resid_post", 1))):
        with pytest.raises(ArgumentError, match="allowed: .point, layer. with a point of resid_pre, resid_post, "):
            tlc.slice_jacobian(trace, source, target)


def test_the_other_stack_is_part_of_the_input():
    model, trace = traced(T5, "decoder")
    other = tlc.trace(model, TOKENS[:5], stack="decoder", decoder_input=DECODER)
    assert not torch.allclose(other.resid[1:], trace.resid[1:], rtol=1e-2)
    settings = tlc.depth_coupling(trace, k=3).provenance.settings
    assert (
        settings["stack"] == "decoder" and settings["encoder_input"] == architectures.prompt(model, "decoder").tolist()
    )
    encoders = [
        tlc.trace(model, TOKENS, stack="encoder", decoder_input=given).resid for given in (None, DECODER, DECODER[:2])
    ]
    assert torch.equal(encoders[0], encoders[1]) and torch.equal(encoders[0], encoders[2])


def test_a_stack_is_a_model_for_all_that_takes_one():
    _, trace = traced(T5, "decoder")
    again = tlc.trace(trace.model, DECODER)
    assert torch.equal(again.resid, trace.resid) and tlc.growth(again).provenance.settings["stack"] == "decoder"
    report = tlc.analyze(trace.model, DECODER, k=3)
    assert report.coupling.sublayers == trace.sublayers and report.coupling.values.isfinite().all()
    assert tlc.growth(trace).attn_share is None and "sublayer" in tlc.linearity(trace).paths
    assert tlc.context_coupling(trace, "dest", -1, k=3).sublayers == ("block", "attn")
    with pytest.raises(ArgumentError, match="sublayers='cross_attn' .*does not reach another position"):
        tlc.context_coupling(trace, "dest", -1, k=3, sublayers="cross_attn")
    effect = tlc.causal_effect(trace.model, [DECODER], 2, sublayer="mlp", layers=[1], draws=1)
    assert effect.effect.isfinite().all()
    assert tlc.read_directions(trace, 1, "cross_attn").scores.isfinite().all()


def test_a_stack_can_be_copied():
    _, trace = traced(T5, "decoder")
    again = tlc.trace(copy.copy(trace.model), DECODER)
    assert torch.equal(again.resid, trace.resid)


def test_hooks_of_a_stack_act_by_its_own_names():
    model, plain = traced(T5, "decoder")

    def double(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        return 2 * tensor

    once = tlc.trace(
        model,
        architectures.prompt(model, "decoder"),
        stack="decoder",
        decoder_input=DECODER,
        fwd_hooks=[("blocks.1.hook_cross_attn_out", double), (lambda name: name == "blocks.2.hook_mlp_out", double)],
    )
    torch.testing.assert_close(once.writes["cross_attn"][1], 2 * plain.writes["cross_attn"][1])
    assert once.hooked_layers == {1, 2}
    with model.hooks(fwd_hooks=[("decoder_blocks.1.hook_cross_attn_out", double)]):
        ours = tlc.residual_jacobian(tlc.trace(plain.model, DECODER), 1, "cross_attn").dense()
    torch.testing.assert_close(ours, 2 * tlc.residual_jacobian(plain, 1, "cross_attn").dense())


def test_text_of_a_decoder_begins_with_its_start_token():
    model = architectures.boot(T5)
    model.tokenizer = tiny_tokenizer()
    trace = tlc.trace(model, "w5 w6", stack="decoder", decoder_input="w7 w8")
    start = model.original_model.config.pad_token_id
    assert trace.tokens[0] == start and trace.str_tokens[1:] == ("w7", "w8")


def test_what_a_stack_cannot_be_asked_is_refused():
    model, trace = traced(T5, "encoder")
    with pytest.raises(UnsupportedModelError, match="^encoder-decoder: .*stack='encoder' or 'decoder'") as raised:
        tlc.trace(model, TOKENS)
    assert raised.value.reason == "encoder-decoder"
    with pytest.raises(ArgumentError, match="decoder_input=None.*with the start token"):
        tlc.trace(model, TOKENS, stack="decoder")
    with pytest.raises(ArgumentError, match="stack=None.*'encoder' or 'decoder'"):
        tlc.trace(model, TOKENS, decoder_input=DECODER)
    with pytest.raises(ArgumentError, match="not an encoder-decoder"):
        tlc.trace(trace.model, TOKENS, stack="encoder")
    with pytest.raises(UnsupportedModelError, match="an encoder has no logits"):
        tlc.read_directions(trace, 1)
    led = architectures.boot("LEDForConditionalGeneration")
    with pytest.raises(ArgumentError, match="prompt='7 tokens'.*does not pad: its blocks run on 8 positions"):
        tlc.trace(led, TOKENS, stack="encoder")


def test_a_random_baseline_of_a_stack_reads_the_same():
    model, trace = traced(T5, "decoder")
    model.tokenizer = tiny_tokenizer()
    fresh = tlc.trace(tlc.random_baseline(trace.model), DECODER)
    assert fresh.sublayers == trace.sublayers and not torch.allclose(fresh.resid[-1], trace.resid[-1], rtol=0.1)
