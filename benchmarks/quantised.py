"""How far 4 bits move SmolLM2-135M: coupling, linearity and growth of NF4 beside the float32 model.

Needs bitsandbytes and the weights of ``load_model("smollm2-135m")``, which were themselves dequantised from 4 bits
(Q4_1): what is called float32 here is that model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

import tlcoupling as tlc
from tlcoupling.forward.quantised import dequantised

K = 10


def linears(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Yield each linear layer of a model's blocks, with the module that holds it and its name there."""
    for holder in model.blocks.modules():
        for name, part in list(holder.named_children()):
            if type(part) is nn.Linear:
                yield holder, name, part


def rounded(kind: str, packed: bool) -> Any:
    """Return SmolLM2-135M with block weights in 4 bits, or with these dequantised to float32."""
    model = tlc.load_model("smollm2-135m", device="cpu")
    made: dict[int, nn.Module] = {}  # a layer may be reached by several names
    for holder, name, linear in linears(model):
        if id(linear) not in made:
            layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.float32, quant_type=kind)
            layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=kind, module=layer)
            made[id(linear)] = layer.to("cpu").eval()
            if not packed:
                linear.weight.data = dequantised(layer)
        if packed:
            holder._modules[name] = made[id(linear)]
    return model


def measured(model: Any, prompt: str) -> tuple[tlc.Trace, dict[str, torch.Tensor]]:
    """Return the trace of a prompt and what is compared, one number or one matrix each."""
    trace = tlc.trace(model, prompt)
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


def main() -> None:
    """Print the table, and how far each 4-bit model lies from its own dequantised copy."""
    prompt = json.loads((files("tlcoupling") / "data/prompts.json").read_text())["landmarks"]
    plain, base = measured(tlc.load_model("smollm2-135m", device="cpu"), prompt)
    columns, remarks = {"float32": base}, []
    for kind in ("nf4",):
        trace, columns[kind] = measured(rounded(kind, packed=True), prompt)
        copy, own = measured(rounded(kind, packed=False), prompt)
        stream = (trace.resid - copy.resid).norm() / copy.resid.norm()
        worst = max(float((columns[kind][name] - value).abs()) for name, value in own.items())
        moved = (trace.resid - plain.resid).norm() / plain.resid.norm()
        remarks.append(
            f"{kind}: stream {stream:.1e} from that of its dequantised copy, numbers of the table at most {worst:.1e}; "
            f"stream {moved:.2f} from that of float32"
        )
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for name in base:
        print(f"| {name} | " + " | ".join(f"{column[name]:.4f}" for column in columns.values()) + " |")
    print("\n" + "\n".join(remarks))


if __name__ == "__main__":
    main()
