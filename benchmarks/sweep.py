"""Cells per second of a sweep with one process and with two, of one thread each: ``python benchmarks/sweep.py``.

The model is a small random Llama, so that the work is that of a real cell and nothing is downloaded. Both sweeps are
processes of a pool, so that starting Python and loading the model weigh on both; rounds alternate, and each rate is
the best of its rounds. A rate counts from the first cell to the last, which leaves the start out.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

import tlcoupling as tlc


def save_model(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    ids = {f"w{index}": index for index in range(100)} | {"<unk>": 100}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=101,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=100,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def cells_per_second(plan: tlc.Plan, store: Path, workers: int) -> float:
    report = tlc.sweep(plan, store, workers=workers)
    if not report.complete:
        raise SystemExit(f"{report}: {report.reasons}")
    ends = sorted(path.stat().st_mtime for path in (store / "cells").iterdir())
    return (len(ends) - 1) / (ends[-1] - ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        prompts = [" ".join(f"w{(7 * i + 3 * j) % 100}" for j in range(24)) for i in range(100)]
        prompts += [f"w1 {prompt}" for prompt in prompts]
        plan = tlc.Plan.of({"models": ["model"], "prompts": {"text": prompts[: options.cells]}}, base=folder)
        best = {1: 0.0, 2: 0.0}
        for round_ in range(options.rounds):
            for workers in best:
                rate = cells_per_second(plan, folder / f"{round_}-{workers}", workers)
                best[workers] = max(best[workers], rate)
                print(f"round {round_}: {workers} process(es), one thread each: {rate:.2f} cells/s", flush=True)
    print(f"best: {best[1]:.2f} and {best[2]:.2f} cells/s, ratio {best[2] / best[1]:.2f}")


if __name__ == "__main__":
    main()
