"""How far 4 bits move SmolLM2-135M: coupling, linearity and growth of NF4 beside the float32 model; memory.

Needs bitsandbytes and the weights of ``load_model("smollm2-135m")``, which were themselves dequantised from 4 bits
(Q4_1): what is called float32 here is that model. The 4-bit model is what transformers' ``BitsAndBytesConfig`` loads.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import tlcoupling as tlc
from tlcoupling.forward.quantised import dequantised, state_of
from tlcoupling.models.smollm2 import smollm2_huggingface

K = 10


def packed(kind: str) -> Any:
    """Return SmolLM2-135M with block weights in 4 bits, as transformers loads it."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        smollm2_huggingface()[0].save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, attn_implementation="eager", device_map="cpu"
        ).eval()


def unpacked(model: Any) -> Any:
    """Return SmolLM2-135M with the dequantised weights of a 4-bit model in float32."""
    plain, _ = smollm2_huggingface()
    for layer, linear in zip(model.model.layers.modules(), plain.model.layers.modules(), strict=True):
        if state_of(layer) is not None:
            linear.weight.data = dequantised(layer)
    return plain.eval()


def measured(model: Any, tokens: Any) -> tuple[tlc.Trace, dict[str, torch.Tensor]]:
    """Return the trace of a prompt and what is compared, one number or one matrix each."""
    trace = tlc.trace(model, tokens)
    coupling, growth = tlc.depth_coupling(trace, K, tokens=-1), tlc.growth(trace)
    values = {
        f"coupling, {name}": coupling.mean("values")[index].flatten()[0] for index, name in enumerate(trace.sublayers)
    }
    excess = {
        f"excess, {name}": coupling.mean("excess")[index].flatten()[0] for index, name in enumerate(trace.sublayers)
    }
    line = {"line-shape score, mean over tokens": tlc.linearity(trace).path("block").mean()}
    rate = {
        "mean growth rate per layer": growth.rate.mean(),
        "expodistance, median over tokens": growth.expodistance.quantile(0.5),
    }
    return trace, {**values, **excess, **line, **rate}


def peak(measure: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that a measurement holds at once, beyond those that were there before."""
    measure()  # what libraries allocate once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        measure()
    recorded = run.profiler.kineto_results.events()
    events = sorted((each for each in recorded if each.name() == "[memory]"), key=lambda each: each.start_ns())
    return max(itertools.accumulate(each.nbytes() for each in events))


def main() -> None:
    """Print the table, how far the 4-bit model lies from its own dequantised copy, and what it takes of memory."""
    prompt = json.loads((files("tlcoupling") / "data/prompts.json").read_text())["landmarks"]
    model = packed("nf4")
    tokens = tlc.trace(model, prompt, tokenizer=smollm2_huggingface()[1], prepend_bos=False).tokens
    layers = [
        sum(4 * part.in_features * part.out_features for part in layer.modules() if state_of(part) is not None)
        for layer in model.model.layers
    ]
    traces = (tlc.trace(each, tokens) for each in (model, unpacked(model)))
    in_4_bits, in_float32 = (
        peak(partial(tlc.depth_coupling, one, K, sublayers="block", progress=False)) / 2**20 for one in traces
    )
    trace, ours = measured(model, tokens)
    copy, own = measured(unpacked(model), tokens)
    plain, base = measured(smollm2_huggingface()[0].eval(), tokens)
    print("| | float32 | NF4 |\n|---|---|---|")
    for name in base:
        print(f"| {name} | {base[name]:.4f} | {ours[name]:.4f} |")
    worst = max(float((ours[name] - value).abs()) for name, value in own.items())
    stream, moved = ((trace.resid - other.resid).norm() / other.resid.norm() for other in (copy, plain))
    print(f"\nstream {stream:.1e} from that of its dequantised copy, numbers of the table at most {worst:.1e}")
    print(f"stream {moved:.2f} from that of float32")
    print(
        f"beyond the model, a measurement holds {in_4_bits:.0f} MB of tensors at its peak, and {in_float32:.0f} MB of "
        f"the float32 copy; the weights of one layer are {layers[0] / 2**20:.0f} MB in float32, of all "
        f"{sum(layers) / 2**20:.0f} MB"
    )


if __name__ == "__main__":
    main()
