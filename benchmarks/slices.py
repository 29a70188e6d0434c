"""Compare slices, the atlas and the Jacobian lens with the same quantities by autograd, in one process, alternating.

    python benchmarks/slices.py
    python benchmarks/slices.py --only slice --lengths 28

- slice: the top 8 singular vectors of SmolLM2-135M between the outputs of layers 3 and 20, one vector added at all
  positions and the mean over positions read, against block power iteration with Rayleigh-Ritz through autograd (Ayyub
  2026): each iteration is k backward passes of the backward pass and k backward passes, batched. It runs for 15
  iterations, as published, and for as many as give the same vectors.
- atlas: all pairs of layers, from the last position to the last one, and one vector at all positions to the last one;
  power iteration on a few pairs, the rest by the number of blocks between.
- lens: five prompts in turn, against ``JacobianLens.fit`` of TransformerLens (from 4.3 on); 50 by proportion.
- estimate: what ``estimate_slice`` and ``estimate_atlas`` say, against CPU seconds of the calls, and their peak
  memory in a process of its own.

CPU seconds of the process stand beside wall-clock seconds: on a shared machine the ratio of CPU seconds is what holds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from measure import peak_alone, print_table
from smollm2 import trained
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import tlcoupling as tlc

SOURCE, TARGET, K = 3, 20, 8
PUBLISHED, ENOUGH = 15, 60  # iterations
Products = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = {"slice": slices, "atlas": atlas, "lens": lens, "estimate": estimates}
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--lengths", nargs="+", type=int, default=[28, 512], help="tokens of the slices")
    parser.add_argument("--prompts", type=int, default=5, help="prompts of the lens")
    options = parser.parse_args()
    _, model, prompt = trained(torch.device("cpu"))
    tlc.depth_coupling(tlc.trace(model, prompt(28)), K, layers=[0])  # lazy imports and thread pools
    print(f"{torch.get_num_threads()} threads")
    for name in options.only:
        print_table(name, parts[name](model, prompt, options))


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Wall-clock and CPU seconds of a call, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = call()
    return time.perf_counter() - wall, time.process_time() - cpu, made


def row(work: str, ours: Sequence[float], theirs: Sequence[float], agreement: str) -> dict[str, str | float]:
    """One row of a table."""
    return {
        "work": work,
        "ours s": ours[0],
        "ours CPU s": ours[1],
        "theirs s": theirs[0],
        "theirs CPU s": theirs[1],
        "CPU ratio": theirs[1] / ours[1],
        "agreement": agreement,
    }


def products(model: Any, ids: Tensor, source: int, target: int, src: slice, dest: slice) -> Products:
    """J X and J^T Y of the mean of the target's output at dest by one vector added to the source's at src.

    One graph of the whole model: rows by a backward pass each, columns by a backward pass of the backward pass.
    """
    moved = torch.zeros(model.cfg.d_model, requires_grad=True)
    kept: list[Tensor] = []

    def add(stream: Tensor, hook: Any) -> Tensor:
        return torch.cat([stream[:, : src.start or 0], stream[:, src] + moved], dim=1)

    hooks = [
        (f"blocks.{source}.hook_resid_post", add),
        (f"blocks.{target}.hook_resid_post", lambda stream, hook: kept.append(stream[0, dest].mean(0))),
    ]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused kernels have no second derivative
        model.run_with_hooks(ids[None], fwd_hooks=hooks)
        cotangent = torch.zeros_like(kept[0], requires_grad=True)
        (back,) = torch.autograd.grad(kept[0], moved, cotangent, create_graph=True)

    def grads(output: Tensor, leaf: Tensor, vectors: Tensor) -> Tensor:
        return torch.autograd.grad(output, leaf, vectors.mT, retain_graph=True, is_grads_batched=True)[0].mT

    return partial(grads, back, cotangent), partial(grads, kept[0], moved)


def power_iteration(maps: Products, width: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Block power iteration on J^T J with Rayleigh-Ritz at the end: U, s, V."""
    push, pull = maps
    v = torch.linalg.qr(torch.randn(width, K, generator=torch.Generator().manual_seed(0))).Q
    for _ in range(iterations):
        v = torch.linalg.qr(pull(push(v))).Q
    u, s, rotation = torch.linalg.svd(push(v), full_matrices=False)
    return u, s, v @ rotation.mT


def agreed(ours: Tensor, theirs: Tensor) -> float:
    """The smallest cosine between a direction of the first subspace and the second."""
    return float(torch.linalg.svdvals(ours.mT @ theirs).min())


def slices(model: Any, prompt: Callable[[int], Tensor], options: Any) -> Iterator[dict[str, str | float]]:
    """Yield rows on one slice."""
    same: dict[str, Any] = {"src": "all", "dest": "all", "src_mode": "same", "dest_mode": "same"}
    for length in options.lengths:
        ids = prompt(length)
        ends = ("resid_post", SOURCE), ("resid_post", TARGET)
        ours = timed(
            lambda ids=ids, ends=ends: tlc.truncated_svd(tlc.slice_jacobian(tlc.trace(model, ids), *ends, **same), K)
        )
        for iterations in (PUBLISHED, ENOUGH) if length < 100 else (PUBLISHED,):
            theirs = timed(
                lambda ids=ids, iterations=iterations: power_iteration(
                    products(model, ids, SOURCE, TARGET, slice(0, None), slice(0, None)), model.cfg.d_model, iterations
                )
            )
            s = float((theirs[2][1] / ours[2].s - 1).abs().max())
            cosine = agreed(ours[2].v, theirs[2][2])
            yield row(f"{length} tokens, {iterations} iterations", ours, theirs, f"s {s:.0e}, cos {cosine:.4f}")


def atlas(model: Any, prompt: Callable[[int], Tensor], options: Any) -> Iterator[dict[str, str | float]]:
    """Yield rows on the atlas: from the last position to the last one, and one vector at all positions to the last."""
    ids, n = prompt(28), model.cfg.n_layers
    last, pairs = slice(len(ids) - 1, None), [(0, n - 1), (SOURCE, TARGET), (n // 2, n // 2 + 1)]
    whole = sum(target - source for source in range(n) for target in range(source + 1, n))
    share = whole / sum(target - source for source, target in pairs)
    for name, src, given in (("last to last", last, -1), ("one vector at all positions", slice(0, None), "all")):
        ours = timed(lambda given=given: tlc.sensitivity_atlas(tlc.trace(model, ids), K, src=given))
        print(ours[2], ours[2].summary().iloc[[0, -1]].to_string(), sep="\n")
        walls, cpus, worst = 0.0, 0.0, 1.0
        for source, target in pairs:
            wall, cpu, (_, _, v) = timed(
                lambda source=source, target=target, src=src: power_iteration(
                    products(model, ids, source, target, src, last), model.cfg.d_model, PUBLISHED
                )
            )
            walls, cpus, worst = walls + wall, cpus + cpu, min(worst, agreed(ours[2].v[source, target], v))
        label = f"{name}, {len(ours[2].pairs)} pairs; theirs from {len(pairs)}, {PUBLISHED} iterations"
        yield row(label, ours, (walls * share, cpus * share), f"smallest cos {worst:.3f}")


def lens(model: Any, prompt: Callable[[int], Tensor], options: Any) -> Iterator[dict[str, str | float]]:
    """Yield rows on the Jacobian lens: one prompt of ours, one of theirs, and so on."""
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    whole = prompt(28 + options.prompts)
    ours, theirs, gap = [0.0, 0.0], [0.0, 0.0], 0.0
    for start in range(options.prompts):
        text = model.tokenizer.decode(whole[start : start + 28])
        mine = timed(lambda text=text: tlc.jacobian_lens(model, [text]))
        other = timed(lambda text=text: JacobianLens.fit(model, [text], corpus="here", show_progress=False))
        for total, one in ((ours, mine), (theirs, other)):
            total[0], total[1] = total[0] + one[0], total[1] + one[1]
        for layer, matrix in zip(mine[2].layers, mine[2].matrices, strict=True):
            gap = max(gap, float((matrix - other[2].jacobians[layer]).norm() / matrix.norm()))
    yield row(f"{options.prompts} prompts of 28", ours, theirs, f"matrices {gap:.0e}")
    more = 50 / options.prompts
    yield row("50 prompts, by proportion", [one * more for one in ours], [one * more for one in theirs], "")


def estimates(model: Any, prompt: Callable[[int], Tensor], options: Any) -> Iterator[dict[str, str | float]]:
    """Yield rows on what estimates say and what the calls take."""
    ends = ("resid_post", SOURCE), ("resid_post", TARGET)
    same: dict[str, Any] = {"src": "all", "dest": "all", "src_mode": "same", "dest_mode": "same"}
    for length in options.lengths:
        load = partial(_traced, length)
        trace = tlc.trace(model, prompt(length))
        few = {"src": "all", "layers": range(6)}
        calls = [
            ("slice", tlc.estimate_slice(trace, *ends, k=K), partial(_top, ends=ends, options={})),
            (
                "slice, same vector",
                tlc.estimate_slice(trace, *ends, k=K, **same),
                partial(_top, ends=ends, options=same),
            ),
        ]
        if length < 100:
            calls += [
                ("atlas", tlc.estimate_atlas(trace, K), partial(tlc.sensitivity_atlas, k=K)),
                (
                    "atlas, same vector, layers 0 to 5",
                    tlc.estimate_atlas(trace, K, **few),
                    partial(tlc.sensitivity_atlas, k=K, **few),
                ),
            ]
        for name, said, call in calls:
            _, cpu, _ = timed(partial(call, trace))
            peak = peak_alone(load, call)
            yield {
                "work": f"{name}, {length} tokens",
                "estimate s": said.seconds,
                "CPU s": cpu,
                "ratio": said.seconds / cpu * torch.get_num_threads(),
                "estimate MiB": said.memory_bytes / 2**20,
                "peak MiB": peak / 2**20,
                "MiB ratio": said.memory_bytes / peak,
            }
    print("whole atlas, same vector:", tlc.estimate_atlas(tlc.trace(model, prompt(28)), K, src="all"))


def _traced(length: int) -> tlc.Trace:
    _, model, prompt = trained(torch.device("cpu"))
    return tlc.trace(model, prompt(length))


def _top(trace: tlc.Trace, ends: tuple[Any, Any], options: dict[str, Any]) -> tlc.Triplets:
    return tlc.truncated_svd(tlc.slice_jacobian(trace, *ends, **options), K)


if __name__ == "__main__":
    main()
