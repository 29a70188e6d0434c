"""Everything that only a GPU shows, in one script: speed, memory, reads from the host, and the tests marked ``device``.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --small     # the same parts with small sizes

Models have random weights and are made on the device, so nothing is downloaded. Each part prints as it goes. A part
that fails prints its error, and the next one starts; after ``--seconds`` no further part starts. The exit code is 1 if
a part failed.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import scaling
import smollm2
import torch
import wide_block
from llamas import bridge, shaped
from measure import Row, cells, print_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tlcoupling.linalg.krylov import _small_svd
from tlcoupling.linalg.work import measured_rates

ROOT = Path(__file__).parents[1]
SHOWN = 14  # lines of a profile


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is measured.

    Attributes:
        small: width and layers of the model of SmolLM2-135M's shape.
        deep: width and layers of the deep model.
        widest: width of the single block.
        lengths: of prompts, in tokens; the first two are compared with the published procedure.
        widths: of single blocks.
    """

    small: tuple[int, int]
    deep: tuple[int, int]
    widest: int
    lengths: tuple[int, ...]
    widths: tuple[int, ...]


LARGE = Sizes((576, 30), (4096, 32), 8192, (28, 128, 512, 1024, 2048, 4096), (576, 2048, 4096))
SMALL = Sizes((48, 2), (64, 2), 96, (8, 12, 16), (48, 64))


class HostReads(TorchDispatchMode):
    """Counts where the host waits for a number of the device: ``float(x)``, ``if x``, ``nonzero``, copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        waits = func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)
        if func is aten._to_copy.default and isinstance(out, Tensor):
            waits = out.device != args[0].device
        if waits:
            self.lines[_line_of_ours()] += 1
        return out


def _line_of_ours() -> str:
    """Return the innermost line of the package that is being run."""
    frame = sys._getframe(1)
    while frame is not None and f"{os.sep}tlcoupling{os.sep}" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{frame.f_code.co_filename.rpartition('tlcoupling' + os.sep)[2]}:{frame.f_lineno}"


def solvers(device: torch.device, sizes: Sizes) -> None:
    """Print the milliseconds of small decompositions, as Krylov needs them, on the device and on the host."""
    stacks = {"30 x 160 x 160": (30, 160, 160), "1 x 96 x 96": (1, 96, 96), "1 x 160 x 160": (1, 160, 160)}
    blocks = {"30 x 576 x 16": (30, 576, 16), "1 x 4096 x 16": (1, 4096, 16), "1 x 8192 x 16": (1, 8192, 16)}

    def timed(call: Callable[[], Any]) -> float | str:
        try:
            call()
            best = []
            for _ in range(3):
                _wait(device)
                started = time.perf_counter()
                call()
                _wait(device)
                best.append(time.perf_counter() - started)
            return 1e3 * min(best)
        except RuntimeError as error:
            return type(error).__name__

    drivers = ("gesvd", "gesvdj", "gesvda") if device.type == "cuda" else ()

    def cholesky(x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.linalg.solve_triangular(torch.linalg.cholesky(x.mT @ x).mT, x, upper=True, left=False)
        return x

    def rows() -> Iterator[dict[str, str | float]]:
        for name, shape in stacks.items():
            x = torch.randn(shape, device=device)
            yield {
                "svd of": name,
                "default": timed(lambda x=x: torch.linalg.svd(x)),
                **{one: timed(lambda x=x, one=one: torch.linalg.svd(x, driver=one)) for one in drivers},
                "eigh, float64": timed(lambda x=x: torch.linalg.eigh(x.double().mT @ x.double())),
                "eigh, float32": timed(lambda x=x: torch.linalg.eigh(x.mT @ x)),
                "on the host": timed(lambda x=x: torch.linalg.svd(x.cpu())),
            }

    def rows_of_qr() -> Iterator[dict[str, str | float]]:
        for name, shape in blocks.items():
            x = torch.randn(shape, device=device)
            yield {
                "qr of": name,
                "default": timed(lambda x=x: torch.linalg.qr(x)),
                "Cholesky twice": timed(lambda x=x: cholesky(x)),
                "on the host": timed(lambda x=x: torch.linalg.qr(x.cpu())),
            }

    print_table("milliseconds of a decomposition", rows())
    if device.type == "cuda":  # as Krylov takes it
        for shape in stacks.values():
            x = torch.randn(shape, device=device)
            u, s, vh = _small_svd(x)
            error = (u[..., :10] * s[..., None, :10] - x @ vh[..., :10, :].mT).norm(dim=-2).max() / s.max()
            print(f"{shape}: {timed(lambda x=x: _small_svd(x)):.3g} ms by eigenvectors in float64, error {error:.1e}")
    print_table("milliseconds of an orthonormal basis", rows_of_qr())


def deep(device: torch.device, sizes: Sizes) -> None:
    """Print the row of the deep model."""
    _print_rows(device, wide_block.whole_model(device, *sizes.deep))


def widest(device: torch.device, sizes: Sizes) -> None:
    """Print the row of the widest block."""
    _print_rows(device, wide_block.rows(device, [sizes.widest]))


def table(device: torch.device, sizes: Sizes) -> None:
    """Print the rows of the model of SmolLM2-135M's shape beside the published procedure."""
    _print_rows(device, smollm2.rows(smollm2.random(device, *sizes.small), 1, sizes.lengths[:2], again=1))


def growth(device: torch.device, sizes: Sizes) -> None:
    """Print how cost grows with width and length."""
    print_table("one block, bfloat16, 28 tokens, K = 10", scaling.widths(device, sizes.widths))
    print_table("SmolLM2-135M's shape", scaling.lengths(smollm2.random(device, *sizes.small), sizes.lengths[1:]))


def where(device: torch.device, sizes: Sizes) -> None:
    """Print where the time of two calls goes: reads from the host, kernels, functions."""
    width, layers = sizes.deep
    models = {
        "SmolLM2-135M's shape": smollm2.random(device, *sizes.small)[1],
        f"{min(layers, 4)} layers of d = {width}": bridge(shaped(width, min(layers, 4), device, torch.bfloat16)),
    }
    for name, model in models.items():
        call = partial(smollm2.coupling, model, torch.arange(28))
        call()
        with HostReads() as reads:
            call()
        print(f"\n{name}: {reads.lines.total()} reads from the host in {len(model.blocks)} layers", flush=True)
        for line, count in reads.lines.most_common(SHOWN):
            print(f"  {count:6d}  {line}")
        _kernels(call, device)
    environment = os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}  # so that a function's time includes its kernels
    command = [sys.executable, __file__, "--device", str(device), "--parts", "functions"]
    if sizes is SMALL:
        command.append("--small")
    sys.stdout.flush()
    subprocess.run(command, env=environment, check=True)


def functions(device: torch.device, sizes: Sizes) -> None:
    """Print the functions of the package by the seconds spent in them and in what they call."""
    width, layers = sizes.deep
    for model in (
        smollm2.random(device, *sizes.small)[1],
        bridge(shaped(width, min(layers, 4), device, torch.bfloat16)),
    ):
        call = partial(smollm2.coupling, model, torch.arange(28))
        call()
        profile = cProfile.Profile()
        profile.runcall(call)
        rows = pstats.Stats(profile).stats.items()  # pyright: ignore[reportAttributeAccessIssue]
        ours = [(key, value) for key, value in rows if f"{os.sep}tlcoupling{os.sep}" in key[0]]
        print(f"\nseconds with what they call, d = {model.cfg.d_model}, {len(model.blocks)} layers")
        for (path, line, function), (_, calls, _, seconds, _) in sorted(ours, key=lambda one: -one[1][3])[: 3 * SHOWN]:
            print(f"  {seconds:8.3f}  {calls:6d}  {path.rpartition('tlcoupling' + os.sep)[2]}:{line} {function}")


def _kernels(call: Callable[[], Any], device: torch.device) -> None:
    """Print the kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    started = time.perf_counter()
    with profile(activities=kinds) as profiled:
        call()
        _wait(device)
    seconds = time.perf_counter() - started

    def spent(event: Any) -> float:
        return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total

    events = sorted(profiled.key_averages(), key=spent, reverse=True)
    print(
        f"  operations by their own time: {sum(map(spent, events)) / 1e6:.3f} s in a profiled call of {seconds:.3f} s"
    )
    for event in events[:SHOWN]:
        print(f"  {spent(event) / 1e3:9.1f} ms  {event.count:6d}  {event.key[:80]}", flush=True)


def tests(device: torch.device, sizes: Sizes) -> None:
    """Run the tests marked ``device``."""
    marked = ["-m", "device", "--device", str(device), "-q", "-p", "no:cacheprovider", "--no-header", "-rfE"]
    sys.stdout.flush()
    command = [sys.executable, "-m", "pytest", *marked, "tests/test_on_device.py", "--durations=5"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=150)


PARTS = {part.__name__: part for part in (solvers, deep, widest, table, tests, where, growth)}


def _print_rows(device: torch.device, rows: Iterator[Row | str]) -> None:
    """Print rows beside the published procedure, a line each, as they come."""
    peak = measured_rates(device).matmul
    for row in rows:
        if isinstance(row, str):
            print(f"  {row}", flush=True)
            continue
        work, *numbers = cells(row, peak).items()
        print(f"{work[1]}: {', '.join(f'{name} {value}' for name, value in numbers)}", flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: torch.device) -> None:
    """Print what is measured on, and its peaks."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    rates = measured_rates(device)
    print(f"{name}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    print(
        f"float32 products {rates.matmul / 1e12:.3g} TFLOP/s, of 16 columns {rates.thin / 1e12:.3g} TFLOP/s", flush=True
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "functions"], default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=330.0, help="no part starts after these")
    options = parser.parse_args()
    started, failed = time.perf_counter(), []
    _machine(options.device)
    for name in options.parts:
        begun = time.perf_counter()
        if begun - started > options.seconds:
            print(f"\n{name}: left out, {options.seconds:.0f} s have passed")
            continue
        try:
            {**PARTS, "functions": functions}[name](options.device, SMALL if options.small else LARGE)
        except Exception:
            failed.append(name)
            traceback.print_exc(file=sys.stdout)
        print(
            f"[{name}: {time.perf_counter() - begun:.1f} s, {time.perf_counter() - started:.0f} s in all]", flush=True
        )
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"failed: {', '.join(failed) or 'nothing'}")
    return bool(failed)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    sys.exit(main())
