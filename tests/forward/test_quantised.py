"""4-bit weights of bitsandbytes against the same model with dequantised weights; what is refused, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, relative_error
from packed import packed_and_plain
from torch import nn

import tlcoupling as tlc
from tlcoupling.errors import StaleTraceError, UnsupportedModelError
from tlcoupling.forward.lifting import lifted
from tlcoupling.forward.quantised import quantisation_of, state_of

BRIDGED = any(case.name == "bridge-llama" for case in CASES)


def quantised(kind: str, on_avx512: bool) -> tuple[Any, Any]:
    """A small Llama in 4 bits, and the same with the dequantised weights in float32."""
    if not BRIDGED:
        pytest.skip("4-bit models come as TransformerBridge")
    pytest.importorskip("bitsandbytes")
    return packed_and_plain(kind, on_avx512)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("on_avx512", [True, False])
def test_a_4_bit_model_is_its_dequantised_one(kind: str, on_avx512: bool):
    packed, plain = quantised(kind, on_avx512)
    trace, truth = tlc.trace(packed, TOKENS), tlc.trace(plain, TOKENS)
    assert relative_error(trace.resid, truth.resid) < 1e-6
    assert trace.weight_processing["quantisation"] == f"bitsandbytes {kind}"
    assert "quantisation" not in truth.weight_processing
    for sublayer in trace.sublayers:
        exact = tlc.residual_jacobian(truth, 1, sublayer, engine="autograd").dense()
        for engine in ("analytic", "autograd"):
            found = tlc.residual_jacobian(trace, 1, sublayer, engine=engine).dense()
            assert relative_error(found, exact) < 1e-5, (sublayer, engine)  # float32
    of_head = tlc.residual_jacobian(truth, 1, "attn", head=2, engine="autograd").dense()
    for engine in ("analytic", "autograd"):
        found = tlc.residual_jacobian(trace, 1, "attn", head=2, engine=engine).dense()
        assert relative_error(found, of_head) < 1e-5, engine
    steps, exact = (tlc.head_steps(each) for each in (trace, truth))
    assert relative_error(steps.share, exact.share) < 1e-5
    coupling, exact = (tlc.depth_coupling(each, 3).values for each in (trace, truth))
    assert (coupling - exact).abs().max() < 1e-4


@pytest.mark.parametrize("on_avx512", [True, False])
def test_what_was_measured_is_left_as_it_was_and_what_was_repacked_is_refused(on_avx512: bool):
    """A forward of bitsandbytes' own repacks weights for some CPUs: derivatives are lost, and weights rounded again."""
    packed, _ = quantised("nf4", on_avx512)
    layers = [module for module in packed.blocks.modules() if state_of(module) is not None]
    before = [(layer.weight, layer.weight.data.clone()) for layer in layers]
    assert len(layers) == 14
    tlc.depth_coupling(tlc.trace(packed, TOKENS), 3)
    for layer, (weight, data) in zip(layers, before, strict=True):
        assert layer.weight is weight and torch.equal(weight.data, data) and "forward" not in vars(layer)
    with torch.no_grad():
        packed(TOKENS[None])
    if any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers):
        assert on_avx512
        with pytest.raises(UnsupportedModelError, match="repacked for this CPU by a forward pass"):
            tlc.trace(packed, TOKENS)
    else:
        tlc.trace(packed, TOKENS)


def test_an_edited_forward_of_a_packed_layer_is_refused():
    """The layer is run in float32 by a forward of ours, which would leave the edit out without a word."""
    packed, _ = quantised("nf4", False)
    traced, layer = tlc.trace(packed, TOKENS), packed.blocks[1].mlp.out.original_component
    own = layer.forward
    layer.__dict__["forward"] = lambda x: 2 * own(x)
    for call in (lambda: tlc.trace(packed, TOKENS), lambda: tlc.residual_jacobian(traced, 1)):
        with pytest.raises(UnsupportedModelError, match="4-bit layer .* has a forward of its own"):
            call()


def test_a_held_jacobian_notices_other_scales():
    packed, _ = quantised("nf4", False)
    operator = tlc.residual_jacobian(tlc.trace(packed, TOKENS), 1)
    vector = torch.ones(operator.shape[1])
    operator.mv(vector)
    state_of(packed.blocks[1].mlp.out.original_component).absmax.add_(1)
    with pytest.raises(StaleTraceError, match=r"blocks\.1\..*\.quant_state\.absmax has changed"):
        operator.mv(vector)


def test_a_layer_at_a_time_is_held_in_float32():
    packed, _ = quantised("nf4", False)
    first, second = (block.mlp for block in packed.blocks)
    with lifted(packed, first):
        assert quantisation_of(first) is None and quantisation_of(second) == "bitsandbytes nf4"
    assert quantisation_of(first) == "bitsandbytes nf4"


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("qweight", torch.zeros(4, 4, dtype=torch.int32), "in a format that is not read"),
        ("W_q", torch.zeros(4, 4, dtype=torch.uint8), "in a format that is not read"),
        ("weight", torch.zeros(4, 4).to(torch.float8_e4m3fn), "with activations rounded beside it"),
    ],
)
@pytest.mark.parametrize("buffer", [True, False])
def test_packed_weights_are_refused_wherever_they_lie(name: str, tensor: torch.Tensor, reason: str, buffer: bool):
    """GPTQ, AWQ, HQQ and MXFP4 keep theirs in buffers, or in parameters without a gradient."""
    module = nn.Module()
    if buffer:
        module.register_buffer(name, tensor)
    else:
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    with pytest.raises(UnsupportedModelError, match=rf"blocks\.0\.{name} is quantised \(.*{reason}"):
        quantisation_of(nn.ModuleList([module]))


def test_masks_and_indices_are_no_packed_weights():
    module = nn.Module()
    module.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
    module.register_buffer("positions", torch.arange(4))
    assert quantisation_of(nn.ModuleList([module])) is None
