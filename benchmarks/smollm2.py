"""Time depth-wise coupling of SmolLM2-135M's blocks, K = 10, against the published procedure on the same prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.resources import files
from typing import Any
from unittest import mock

import torch
from measure import Row, alternating, measured
from published import block_calls, block_jacobian, depth_misalignment

import tlcoupling as tlc
from tlcoupling.coupling.workers import Workers
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.jacobian.evidence import Evidence
from tlcoupling.models.smollm2 import smollm2_huggingface

K = 10


def rows(device: torch.device, rounds: int, lengths: tuple[int, ...] = (28, 128)) -> Iterator[Row | str]:
    """Yield rows of the table, and remarks about them."""
    hf_model, tokenizer = smollm2_huggingface()
    hf_model, model = hf_model.to(device), tlc.load_model("smollm2-135m", device=str(device))
    _coupling(model, _prompt(tokenizer, 28))  # the first call pays for lazy imports and thread pools
    for length in lengths:
        ids = _prompt(tokenizer, length).to(device)
        theirs, ours = alternating(
            [partial(depth_misalignment, hf_model, ids[None], K), partial(_coupling, model, ids)], rounds, device
        )
        gap = (1 - ours[2].values[0, 0, 0] - theirs[2].cpu())[:-1, :-1].abs().max()
        yield Row(f"{length} tokens, the last one", *theirs[:2], *ours[:2], _flops(model, ids, -1))
        yield f"{length} tokens: misalignments agree to {gap:.1e} (without the last block, which has the final norm)"
        if length == lengths[0]:
            every = measured(partial(_coupling, model, ids, "all"), device, fresh=True)
            work = f"{length} tokens, all of them (published: one)"
            yield Row(work, *theirs[:2], every.seconds, every.peak_bytes, _flops(model, ids, "all"))
            yield _jacobian_stage(hf_model, model, ids, device)
            seconds = _seconds_of_tests(model, ids, device)
            yield f"certificate and differences add {seconds:.2f} s to the call at {length} tokens"


def _prompt(tokenizer: Any, n_tokens: int) -> torch.Tensor:
    """Return the prompt of the examples, repeated to a length."""
    prompts = json.loads((files("tlcoupling") / "data/prompts.json").read_text())
    ids = torch.tensor(tokenizer(prompts["landmarks"])["input_ids"])
    return ids.repeat(-(-n_tokens // len(ids)))[:n_tokens]


def _coupling(model: Any, ids: torch.Tensor, tokens: Any = -1) -> tlc.DepthCoupling:
    """Run the whole call, with its forward pass and its certificate."""
    return tlc.depth_coupling(tlc.trace(model, ids), K, sublayers="block", tokens=tokens)


def _flops(model: Any, ids: torch.Tensor, tokens: Any) -> float:
    return tlc.estimate(model, ids, K, sublayers="block", tokens=tokens).flops


def _jacobian_stage(hf_model: Any, model: Any, ids: torch.Tensor, device: torch.device) -> Row:
    """Time only the last token's Jacobians of all blocks: existing operators are turned into matrices."""
    trace, last = tlc.trace(model, ids), len(ids) - 1

    def operators() -> list[tlc.JacobianOperator]:
        engine = JacobianEngine(trace)
        return [engine.operator(layer, "block", last, last) for layer in range(trace.n_layers)]

    flops, runs = sum(one.dense_flops for one in operators()), []
    for _ in range(5):  # operators keep the matrices of their parts, so each round uses new ones
        fresh = operators()
        runs.append(measured(partial(_dense, fresh), device, fresh=not runs))
    ours = min(runs, key=lambda one: one.seconds)
    calls = block_calls(hf_model, ids[None])
    theirs = measured(lambda: [block_jacobian(*call) for call in calls], device, fresh=True)
    work = f"{len(ids)} tokens, Jacobians of all blocks alone"
    return Row(work, theirs.seconds, theirs.peak_bytes, ours.seconds, runs[0].peak_bytes, flops)


def _dense(operators: list[tlc.JacobianOperator]) -> list[torch.Tensor]:
    """Form all matrices, one per thread on a CPU, as coupling does."""
    with Workers(torch.get_num_threads() if operators[0].device.type == "cpu" else 1) as workers:
        return workers.map(lambda one: one.dense(), operators, at_once=True)


def _seconds_of_tests(model: Any, ids: torch.Tensor, device: torch.device) -> float:
    """Return the seconds that certificate and differences add, from the fastest calls with and without them."""
    with_them, without = [], []
    for _ in range(5):
        with_them.append(measured(partial(_coupling, model, ids), device).seconds)
        with _untested():
            without.append(measured(partial(_coupling, model, ids), device).seconds)
    return min(with_them) - min(without)


@contextmanager
def _untested() -> Iterator[None]:
    """Skip the certificate and the differences."""
    with ExitStack() as stack:
        for test in ("refusal", "contradiction"):
            stack.enter_context(mock.patch.object(Evidence, test, lambda *arguments: None))
        yield
