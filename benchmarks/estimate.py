"""What ``tlc.estimate`` says against what the call takes: run it on a quiet machine.

    python benchmarks/estimate.py

Each call is timed three times (once where it takes more than 5 seconds), and the fastest counts. Memory is the peak
resident memory of the call in a process of its own, beyond the loaded model. A ratio is estimate over measured: the
goals are 0.5 to 2 for seconds and 1 to 1.2 for memory. This takes about six minutes on two CPU cores.
"""

from __future__ import annotations

import json
import warnings
from functools import partial
from importlib.resources import files
from typing import Any

import torch
from llamas import bridge, shaped
from measure import alternating, peak_alone

import tlcoupling as tlc

ROUNDS, LENGTHS, DRAWS = 3, (128, 512, 1024), 199


def _smollm2() -> Any:
    return tlc.load_model("smollm2-135m")


def _small() -> Any:
    return bridge(shaped(64, 4, torch.device("cpu")))


def _analyze(model: Any, prompt: torch.Tensor, **options: Any) -> tlc.Analysis:
    return tlc.analyze(model, prompt, attention=False, **options)


def main() -> None:
    """Print a line for each call."""
    warnings.simplefilter("ignore")
    landmarks = json.loads((files("tlcoupling") / "data/prompts.json").read_text())["landmarks"]
    device = torch.device("cpu")
    smollm2, random = _smollm2(), _small()
    tlc.analyze(random, torch.arange(28))  # the first call pays for lazy imports and thread pools
    ids = smollm2.to_tokens(landmarks)[0]
    calls = [
        ("SmolLM2, last token", smollm2, ids, {}),
        *((f"SmolLM2, last of {n} tokens", smollm2, ids.repeat(n // len(ids) + 1)[:n], {}) for n in LENGTHS),
        ("SmolLM2, all tokens", smollm2, ids, {"tokens": "all"}),
        ("SmolLM2, tokens of layers 0, 15, 29", smollm2, ids, {"token_layers": [0, 15, 29]}),
        ("small random model, last token", random, torch.arange(28), {}),
        ("small random model, all tokens", random, torch.arange(28), {"tokens": "all"}),
    ]
    times = f"{'estimate s':>10} {'measured s':>10} {'ratio':>6}"
    print(f"{'call':36} {times} {'estimate MiB':>13} {'peak MiB':>9} {'ratio':>6}")
    for name, model, prompt, options in calls:
        run = partial(_analyze, model, prompt, **options)
        ((seconds, *_),) = alternating([run], 1, device, again=ROUNDS - 1)
        peak = peak_alone(_smollm2 if model is smollm2 else _small, partial(_analyze, prompt=prompt, **options))
        said = tlc.estimate(model, prompt, **options)
        times = f"{said.seconds:10.2f} {seconds:10.2f} {said.seconds / seconds:6.2f}"
        memory = f"{said.memory_bytes / 2**20:13.0f} {peak / 2**20:9.0f} {said.memory_bytes / peak:6.2f}"
        print(f"{name:36} {times} {memory}", flush=True)
    for name, model, prompt in (("SmolLM2", smollm2, ids), ("small random model", random, torch.arange(28))):
        found = tlc.depth_coupling(tlc.trace(model, prompt))
        ((seconds, *_),) = alternating([partial(found.test, draws=DRAWS)], 1, device, again=ROUNDS - 1)
        said = tlc.estimate(model, prompt, draws=DRAWS).stages[-1].seconds
        print(f"{f'{name}, test of {DRAWS} draws':36} {said:10.2f} {seconds:10.2f} {said / seconds:6.2f}", flush=True)


if __name__ == "__main__":
    main()
