"""Print where the time of one coupling goes: SmolLM2-135M's blocks, K = 10, on one thread.

    python benchmarks/profile_call.py
    python benchmarks/profile_call.py --lengths 28 --tokens all --layers 0 1 2 3
    python benchmarks/profile_call.py --lengths 28 --tokens report --layers 0 15 29

Each part counts the processor's time in its own functions, without that of other parts called within: other programs
on the machine disturb it less than a clock's. ``products`` is the least that the part's floating-point operations take,
at the rate of large float32 products on one thread. ``docs/concepts/speed.md`` shows the output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import smollm2
import torch
from measure import print_table

import tlcoupling as tlc
from tlcoupling.linalg.work import measured_rates

# What each part is made of, as ``mock.patch`` names it.
PARTS = {
    "traced pass": ("forward.trace.record_forward", "forward.trace._split_stream"),
    "schedule": ("coupling.result.make_schedule",),
    "runs of blocks": ("jacobian.runs.BlockRun._run", "jacobian.differences.BlockDifferences._run"),
    "backward passes": ("jacobian.runs._grad",),
    "closed forms": ("jacobian.analytic.AnalyticLayer.sublayer", "jacobian.engine.JacobianEngine.__init__"),
    "checks": ("jacobian.evidence.Evidence.refusal", "jacobian.evidence.Evidence.contradiction"),
    "forming matrices": ("linalg.operator.Composition.dense", "linalg.operator.Sum.dense", "linalg.maps.Shared.dense"),
    "decomposing": ("coupling.spectra.truncated_svds",),
    "comparing": ("coupling.pairs._compare",),
}
COUNTED = {"traced pass": "forward pass", "forming matrices": "Jacobians", "decomposing": "decomposition"}


class Clock:
    """The processor's time in parts that call each other, each without the others'."""

    def __init__(self) -> None:
        """Start in no part."""
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._last = time.process_time()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs within for a part."""
        self._tick()
        self._open.append(name)
        try:
            yield
        finally:
            self._tick()
            self._open.pop()

    def _tick(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._last
        self._last = now


def profiled(call: Callable[[], Any]) -> Mapping[str, float]:
    """Return the seconds of a call by part; as ``the rest`` what is in none."""
    clock = Clock()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def within(*args: Any, **kwargs: Any) -> Any:
            with clock.part(part):
                return function(*args, **kwargs)

        return within

    with ExitStack() as stack:
        for part, places in PARTS.items():
            for place in places:
                owner, _, name = f"tlcoupling.{place}".rpartition(".")
                patched = mock.patch(f"{owner}.{name}", timed(part, _found(owner, name)))
                stack.enter_context(patched)
        with clock.part("the rest"):
            call()
    return clock.seconds


def _found(owner: str, name: str) -> Callable[..., Any]:
    import pkgutil

    return getattr(pkgutil.resolve_name(owner), name)


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[28, 128, 1000])
    parser.add_argument("--tokens", choices=("last", "all", "report"), default="last")
    parser.add_argument("--layers", type=int, nargs="+", default=None)
    parser.add_argument("--rounds", type=int, default=3, help="calls, of which the fastest is shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    _, model, prompt = smollm2.trained(device)
    rate = measured_rates(device).matmul
    chosen: dict[str, Any] = {"tokens": -1 if options.tokens == "last" else "all", "layers": options.layers}
    chosen = {"token_layers": options.layers} if options.tokens == "report" else {**chosen, "sublayers": "block"}

    def coupling(ids: torch.Tensor) -> None:
        if options.tokens == "report":  # all that it measures of the model itself
            tlc.analyze(model, ids, k=smollm2.K, **chosen)
        else:
            tlc.depth_coupling(tlc.trace(model, ids), smollm2.K, **chosen)

    coupling(prompt(4))  # the first call pays for lazy imports
    for length in options.lengths:
        ids = prompt(length)
        runs = [profiled(lambda ids=ids: coupling(ids)) for _ in range(options.rounds)]
        seconds = min(runs, key=lambda run: sum(run.values()))
        total = sum(seconds.values())
        stages = tlc.estimate(model, ids, smollm2.K, **chosen).stages
        least = {part: sum(s.flops for s in stages if s.name.endswith(of)) / rate for part, of in COUNTED.items()}
        print_table(
            f"{length} tokens, {options.tokens}: {total:.3g} s of one thread, {rate / 1e9:.0f} GFLOP/s",
            (
                {
                    "part": f"{part:16}",
                    "seconds": seconds.get(part, 0.0),
                    "share": f"{seconds.get(part, 0.0) / total:.0%}",
                    "products": f"{least[part]:.3g}" if part in least else "–",
                }
                for part in (*PARTS, "the rest")
            ),
        )


if __name__ == "__main__":
    main()
