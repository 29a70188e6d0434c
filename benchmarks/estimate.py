"""What ``tlc.estimate`` says against what the call takes: run it on a quiet machine.

    python benchmarks/estimate.py

Each call is timed three times and the fastest counts. The last column is estimate over measured.
"""

from __future__ import annotations

import json
import time
import warnings
from importlib.resources import files
from typing import Any

import torch
import transformers

import tlcoupling as tlc

ROUNDS = 3


def small() -> Any:
    """Return a small random model."""
    from transformer_lens.model_bridge import TransformerBridge

    from tlcoupling.models.smollm2 import smollm2_huggingface

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=256,
        architectures=["LlamaForCausalLM"],
    )
    tokenizer = smollm2_huggingface()[1]
    tokenizer.init_kwargs["add_bos_token"] = True  # or TransformerLens asks the hub for a tokenizer that adds it
    return TransformerBridge.boot_transformers(
        "meta-llama/Llama-3.2-1B",
        hf_model=transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval(),
        tokenizer=tokenizer,
    )


def main() -> None:
    """Print a line for each call."""
    warnings.simplefilter("ignore")
    landmarks = json.loads((files("tlcoupling") / "data/prompts.json").read_text())["landmarks"]
    smollm2, random = tlc.load_model("smollm2-135m"), small()
    calls = [
        ("SmolLM2, last token", smollm2, landmarks, {}),
        ("SmolLM2, all tokens", smollm2, landmarks, {"tokens": "all"}),
        ("SmolLM2, tokens of layers 0, 15, 29", smollm2, landmarks, {"token_layers": [0, 15, 29]}),
        ("small random model, last token", random, torch.arange(28), {}),
        ("small random model, all tokens", random, torch.arange(28), {"tokens": "all"}),
    ]
    print(f"{'call':40} {'estimate s':>10} {'measured s':>10} {'ratio':>6}")
    for name, model, prompt, options in calls:
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            tlc.analyze(model, prompt, **options)
            seconds.append(time.perf_counter() - started)
        estimated, taken = tlc.estimate(model, prompt, **options).seconds, min(seconds)
        print(f"{name:40} {estimated:10.2f} {taken:10.2f} {estimated / taken:6.2f}", flush=True)


if __name__ == "__main__":
    main()
