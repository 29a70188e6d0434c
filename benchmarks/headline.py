"""Count how often the headline claims a finding where there is none: fresh models, with fresh weights as baseline.

python benchmarks/headline.py [--models 20]   # of each of two architectures: some minutes
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from llamas import bridge
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tlcoupling as tlc

VOCABULARY, LAYERS, WIDTH, HEADS = 64, 12, 96, 4
KINDS: dict[str, Callable[[], Any]] = {
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    ),
    "Llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
        )
    ),
}
K = 4
PROMPTS = {
    "16 tokens, one measured": (16, (-1,)),
    "16 tokens, six measured": (16, (2, 4, 7, 10, 13, -1)),
    "2 tokens, one measured": (2, (-1,)),
}
CLAIMS = {
    "coupling above chance": r"times chance|\d above chance|little above chance",
    "coupling below chance": r"below chance",
    "most in layers": r"most in layers",
    "attention against MLP": r"more than (attention|MLP)",
    "neighbours": r"neighbours",
    "straightness": r"[;.] ?trajectories straighter",
    "growth against baseline": r"\(fresh weights",
}


def fresh(seed: int, build: Callable[[], Any]) -> Any:
    """A model with weights as HuggingFace draws them."""
    torch.manual_seed(seed)
    return bridge(build())


def headlines(models: int, build: Callable[[], Any]) -> dict[str, list[str]]:
    """Headlines of fresh models, with another seed's weights as baseline and a prompt of their own, by how measured."""
    texts: dict[str, list[str]] = {name: [] for name in PROMPTS}
    for seed in range(models):
        model, baseline = (fresh(each, build) for each in (seed, 1000 + seed))
        for name, (length, tokens) in PROMPTS.items():
            prompt = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
            report = tlc.analyze(model, prompt, k=K, tokens=tokens, attention=False, baseline=baseline)
            texts[name].append(report.headline())
    return texts


def claims(texts: list[str]) -> Counter[str]:
    """Count in how many headlines each clause claims something."""
    return Counter({name: sum(bool(re.search(said, text)) for text in texts) for name, said in CLAIMS.items()})


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20, help="models of each architecture")
    models = parser.parse_args().models
    for kind, build in KINDS.items():
        for name, texts in headlines(models, build).items():
            print(f"\n{kind}, {name}, {models} models. The first: {texts[0]}")
            for clause, count in claims(texts).items():
                print(f"  {clause:<26} {count:>3} of {models}  {count / models:6.1%}", flush=True)


if __name__ == "__main__":
    main()
