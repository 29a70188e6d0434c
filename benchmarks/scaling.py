"""How cost grows with the length of the prompt and with the width of the model.

    python benchmarks/scaling.py

Prompts of 128 to 4,096 tokens on SmolLM2-135M: seconds and peak memory of the traced pass, of coupling at the last
token, and of a report (all that ``tlcoupling report`` measures of a long prompt). Then coupling at the last token in
one random block of d_model 576 to 8,192. Beside coupling at the last token: its floating-point operations, and
``tlc.estimate`` over what was measured, of seconds and of memory (goals: 0.5 to 2, and 1 to 1.2). Each call runs once;
on the CPU it runs once more in a process of its own, where memory is measured. The goal is 3 s at most for the last of
1,024 tokens on two cores. The whole takes about twelve minutes there, and 10 GiB for the widest block; ``--lengths``
and ``--widths`` choose some.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from llamas import bridge, shaped
from measure import measured, peak_alone, print_table
from smollm2 import K, Models, coupling, random, trained

import tlcoupling as tlc

LENGTHS, WIDTHS = (128, 512, 1024, 2048, 4096), (576, 2048, 4096, 8192)


def lengths(
    models: Models, lengths: Sequence[int] = LENGTHS, load: Callable[[], Models] | None = None
) -> Iterator[dict[str, str | float]]:
    """Yield a row for each length; ``load`` makes the models again where memory is measured in another process."""
    _, model, prompt = models
    device = next(model.parameters()).device
    coupling(model, prompt(28))  # the first call pays for lazy imports and thread pools
    for length in lengths:
        ids = prompt(length)
        row: dict[str, str | float] = {"tokens": str(length)}
        for name, call in {"trace": tlc.trace, "last token": coupling, "report": tlc.analyze}.items():
            one = measured(partial(call, model, ids), device, fresh=True)
            peak = one.peak_bytes if load is None else peak_alone(load, partial(_on_prompt, call, length))
            row |= {f"{name} s": one.seconds, f"{name} GiB": peak / 2**30}
            if name == "last token":
                row |= beside(model, ids, one.seconds, peak)
            del one
        yield row


def _on_prompt(call: Callable[[Any, torch.Tensor], Any], length: int, models: Models) -> Any:
    return call(models[1], models[2](length))


def widths(device: torch.device, widths: Sequence[int] = WIDTHS, alone: bool = False) -> Iterator[dict[str, Any]]:
    """Yield a row for one block of each width; ``alone`` measures memory in a process of its own."""
    for width in widths:
        model, ids = _block(width, device)
        coupling(model, ids)
        one = measured(partial(coupling, model, ids), device, fresh=True)
        peak = peak_alone(partial(_block, width, device), _coupling_of) if alone else one.peak_bytes
        row = {"d_model": str(width), "seconds": one.seconds, "GiB": peak / 2**30}
        yield {**row, **beside(model, ids, one.seconds, peak)}
        del model, one


def _block(width: int, device: torch.device) -> tuple[Any, torch.Tensor]:
    return bridge(shaped(width, 1, device, torch.bfloat16)), torch.arange(28)


def _coupling_of(given: tuple[Any, torch.Tensor]) -> tlc.DepthCoupling:
    return coupling(*given)


def beside(model: Any, ids: torch.Tensor, seconds: float, peak_bytes: float) -> dict[str, float]:
    """Return what stands beside coupling at the last token: its operations, their rate, and how right estimates are."""
    said = tlc.estimate(model, ids, K, sublayers="block")
    return {
        "GFLOP": said.flops / 1e9,
        "GFLOP/s": said.flops / 1e9 / seconds,
        "said / s": said.seconds / seconds,
        "said / GiB": said.memory_bytes / peak_bytes,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", type=int, nargs="*", help="of prompts")
    parser.add_argument("--widths", type=int, nargs="*", help="of blocks")
    parser.add_argument("--random", action="store_true", help="random weights of SmolLM2-135M's shape")
    options = parser.parse_args()
    device = torch.device(options.device)
    chosen = LENGTHS if options.lengths is None else options.lengths
    wide = WIDTHS if options.widths is None else options.widths
    if chosen:
        load = partial(random if options.random else trained, device)
        print_table("SmolLM2-135M, K = 10", lengths(load(), chosen, load if device.type == "cpu" else None))
    if wide:
        print_table("one block, bfloat16, 28 tokens, K = 10", widths(device, wide, device.type == "cpu"))


if __name__ == "__main__":
    main()
