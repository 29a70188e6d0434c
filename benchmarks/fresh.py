"""Coupling of fresh weights across depth, by kind of model: its excess over chance is 0 where layers share nothing.

PIP_NO_INDEX=1 python benchmarks/fresh.py
"""

from __future__ import annotations

import warnings

import architectures
import torch

import tlcoupling as tlc

KINDS = (
    "MambaForCausalLM",
    "JambaForCausalLM",
    "MixtralForCausalLM",
    "ViTModel",
    "T5ForConditionalGeneration decoder",
    "RwkvForCausalLM",
    "Zamba2ForCausalLM",
    "BertForMaskedLM",
)
SEEDS, K = 4, 4


def excess(name: str) -> dict[str, torch.Tensor]:
    """Return by sublayer the excess of the last token's coupling across depth, one number for each seed."""
    architecture, _, stack = name.partition(" ")
    model = architectures.boot(architecture)
    given = architectures.prompt(model, stack)
    options = {"stack": stack, "decoder_input": architectures.DECODER_TOKENS} if stack else {}
    base = tlc.trace(model, given, **options).model
    given = architectures.DECODER_TOKENS if stack == "decoder" else given
    found = [tlc.depth_coupling(tlc.trace(tlc.random_baseline(base, seed), given), K) for seed in range(SEEDS)]
    means = torch.stack([coupling.mean("excess").flatten() for coupling in found])
    return dict(zip(found[0].sublayers, means.T, strict=True))


def main() -> None:
    """Print a line for each kind."""
    warnings.simplefilter("ignore")
    for name in KINDS:
        parts = (f"{part} {each.mean():.3f} ± {each.std() / SEEDS**0.5:.3f}" for part, each in excess(name).items())
        print(f"{name}: {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
