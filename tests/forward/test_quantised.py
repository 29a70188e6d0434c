"""Weights of bitsandbytes and torchao against the same model with dequantised weights; what is refused, and why."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, TOKENS, randomise, relative_error, tiny_tokenizer
from packed import packed_and_plain
from torch import nn

import tlcoupling as tlc
from tlcoupling.errors import StaleTraceError, UnsupportedModelError
from tlcoupling.forward.lifting import lifted
from tlcoupling.forward.quantised import dequantised, quantisation_of, state_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from quantised import peak

BRIDGED = any(case.name == "bridge-llama" for case in CASES)


def quantised(kind: str, on_avx512: bool, **changes: int) -> tuple[Any, Any]:
    """A small Llama in 4 bits, and the same with the dequantised weights in float32."""
    if not BRIDGED:
        pytest.skip("4-bit models come as TransformerBridge")
    pytest.importorskip("bitsandbytes")
    return packed_and_plain(kind, on_avx512, **changes)


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


MEASUREMENTS = {
    "trace": lambda trace: tlc.trace(trace.model, TOKENS),
    "jacobian": lambda trace: tlc.residual_jacobian(trace, 1),
    "depth": lambda trace: tlc.depth_coupling(trace, 3, progress=False),
    "depth by autograd": lambda trace: tlc.depth_coupling(trace, 3, engine="autograd", progress=False),
    "tokens": lambda trace: tlc.token_coupling(trace, layers=[1], k=3, progress=False),
}


@pytest.mark.parametrize("name", MEASUREMENTS)
def test_a_measurement_holds_one_layer_in_float32_and_no_more(name: str):
    """Beyond what the dequantised model takes; MLPs far wider than the stream make weights most of all there is."""
    packed, plain = quantised("nf4", False, num_hidden_layers=4, intermediate_size=2048)
    layer = sum(4 * math.prod(state_of(part).shape) for part in packed.blocks[0].modules() if state_of(part))
    held = [peak(partial(MEASUREMENTS[name], tlc.trace(model, TOKENS))) for model in (packed, plain)]
    assert held[0] - held[1] < 1.05 * layer  # with the scales of blocks of weights


def small_llama(**changes: Any) -> Any:
    """A small random Llama of HuggingFace's."""
    if not BRIDGED:
        pytest.skip("a HuggingFace model is seen through a bridge")
    import transformers as hf

    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    return randomise(hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **sizes, **changes))).eval()


def require_same(packed: Any, plain: Any, quantisation: str) -> None:
    """A quantised model is measured as the one with dequantised weights, by both engines."""
    trace, truth = tlc.trace(packed, TOKENS), tlc.trace(plain, TOKENS)
    assert trace.weight_processing["quantisation"] == quantisation
    assert relative_error(trace.resid, truth.resid) < 1e-6
    for sublayer in trace.sublayers:
        exact = tlc.residual_jacobian(truth, 1, sublayer, engine="autograd").dense()
        for engine in ("analytic", "autograd"):
            found = tlc.residual_jacobian(trace, 1, sublayer, engine=engine).dense()
            assert relative_error(found, exact) < 1e-5, (sublayer, engine)  # float32
    coupling, exact = (tlc.depth_coupling(each, 3).values for each in (trace, truth))
    assert (coupling - exact).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_what_transformers_loads_in_4_bits_goes_straight_in(kind: str, compute: torch.dtype, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    plain = small_llama()
    plain.save_pretrained(tmp_path)
    import transformers as hf

    config = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=compute)
    packed = hf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    for layer, linear in zip(packed.model.layers.modules(), plain.model.layers.modules(), strict=True):
        if state_of(layer) is not None:
            linear.weight.data = dequantised(layer)
    require_same(packed, plain, f"bitsandbytes {kind}")


def torchao_config(name: str, **options: Any) -> Any:
    return getattr(pytest.importorskip("torchao.quantization"), name)(**options)


@pytest.mark.parametrize(
    ("name", "options", "quantisation"),
    [
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int4}, "torchao int4"),
        ("IntxWeightOnlyConfig", {"weight_dtype": torch.int8}, "torchao int8"),
        ("Int8WeightOnlyConfig", {}, "torchao int8"),
        ("Float8WeightOnlyConfig", {}, "torchao float8_e4m3fn"),
    ],
)
def test_weights_that_torchao_rounds_alone_are_their_dequantised_ones(name: str, options: dict, quantisation: str):
    config, packed = torchao_config(name, **options), small_llama()
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    quantize_(packed.model.layers, config)
    plain = small_llama()
    for layer, linear in zip(packed.model.layers.modules(), plain.model.layers.modules(), strict=True):
        if isinstance(linear, nn.Linear):
            linear.weight.data = dequantised(layer)
    require_same(packed, plain, quantisation)


@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_activations_that_torchao_rounds_are_refused(name: str):
    config, packed = torchao_config(name), small_llama()
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    quantize_(packed.model.layers, config)
    with pytest.raises(UnsupportedModelError, match="^quantised weights: .*rounds activations") as raised:
        tlc.trace(packed, TOKENS)
    assert raised.value.reason == "quantised weights"


def test_llm_int8_is_refused_because_it_rounds_activations(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    small_llama().save_pretrained(tmp_path)
    import transformers as hf

    config = hf.BitsAndBytesConfig(load_in_8bit=True)
    packed = hf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    with pytest.raises(UnsupportedModelError, match="^quantised weights: .*LLM.int8, which rounds activations"):
        tlc.trace(packed, TOKENS)


class Packed(nn.Module):
    """A linear layer whose weights are held in another format; what it gives is of no matter here."""

    def __init__(self, linear: nn.Linear, parameters: bool, **tensors: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, tensor in tensors.items():
            if parameters:
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# By format: the tensors that hold a layer of n x m weights, by the names and shapes of their libraries.
STAND_INS: dict[str, Any] = {
    "GPTQ": lambda n, m: dict(
        parameters=False,
        qweight=zeros(torch.int32, m // 8, n),
        qzeros=zeros(torch.int32, m // 32, n // 8),
        scales=zeros(torch.float16, m // 32, n),
        g_idx=zeros(torch.int32, m),
    ),
    "AWQ": lambda n, m: dict(
        parameters=False,
        qweight=zeros(torch.int32, m, n // 8),
        qzeros=zeros(torch.int32, m // 32, n // 8),
        scales=zeros(torch.float16, m // 32, n),
    ),
    "HQQ": lambda n, m: dict(parameters=True, W_q=zeros(torch.uint8, n * m // 128, 64)),
    "MXFP4": lambda n, m: dict(
        parameters=True, weight_blocks=zeros(torch.uint8, n, m // 32, 16), weight_scales=zeros(torch.uint8, n, m // 32)
    ),
    "BitLinear": lambda n, m: dict(
        parameters=False, weight=zeros(torch.uint8, n // 4, m), weight_scale=zeros(torch.float32, 1)
    ),
    "fp8": lambda n, m: dict(
        parameters=True, weight=zeros(torch.float8_e4m3fn, n, m), weight_scale_inv=zeros(torch.float32, 1, 1)
    ),
}


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("name", STAND_INS)
def test_other_formats_are_refused(name: str, bare: bool):
    """In a bare model, and in a bridge: TransformerLens fails to make one of some, with an error of its own."""
    model = small_llama()
    for part, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.layers.set_submodule(part, Packed(linear, **STAND_INS[name](*linear.weight.shape)).eval())
    if not bare:
        from transformer_lens.model_bridge import TransformerBridge

        boot = TransformerBridge.boot_transformers
        model = boot("LlamaForCausalLM", hf_model=model, tokenizer=tiny_tokenizer(), dtype=torch.float32).eval()
    rounded = "activations rounded beside it" if name == "fp8" else "in a format that is not read"
    with pytest.raises(UnsupportedModelError, match=f"^quantised weights: .* is quantised .*{rounded}") as raised:
        tlc.trace(model, TOKENS)
    assert raised.value.reason == "quantised weights"


def test_masks_and_indices_are_no_packed_weights():
    module = nn.Module()
    module.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool))
    module.register_buffer("positions", torch.arange(4))
    assert quantisation_of(nn.ModuleList([module])) is None
