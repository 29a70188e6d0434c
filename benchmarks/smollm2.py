"""SmolLM2-135M: depth-wise coupling of blocks, K = 10, against the published procedure on the same model and prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
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
from tlcoupling.models.smollm2 import smollm2_huggingface

K = 10


def rows(device: torch.device, rounds: int, lengths: tuple[int, ...] = (28, 128)) -> Iterator[Row | str]:
    """Lines of the table, and remarks about them."""
    hf_model, tokenizer = smollm2_huggingface()
    hf_model, model = hf_model.to(device), tlc.load_model("smollm2-135m", device=str(device))
    _coupling(model, _prompt(tokenizer, 28))  # first calls pay for lazy imports and thread pools
    for length in lengths:
        ids = _prompt(tokenizer, length).to(device)
        theirs, ours = alternating(
            [partial(depth_misalignment, hf_model, ids[None], K), partial(_coupling, model, ids)], rounds, device
        )
        gap = (1 - ours[2].values[0, 0, 0] - theirs[2].cpu())[:-1, :-1].abs().max()
        yield Row(f"{length} tokens, the last one", *theirs[:2], *ours[:2], _flops(model, ids, -1))
        yield f"{length} tokens: misalignments agree to {gap:.1e} (the last block, which has the final norm, left out)"
        if length == lengths[0]:
            every = measured(partial(_coupling, model, ids, "all"), device, fresh=True)
            work = f"{length} tokens, all of them (published: one)"
            yield Row(work, *theirs[:2], every.seconds, every.peak_bytes, _flops(model, ids, "all"))
            yield _jacobian_stage(hf_model, model, ids, device)
            yield f"certificate: {_certificate_share(model, ids, device):.0%} of the call at {length} tokens"


def _prompt(tokenizer: Any, n_tokens: int) -> torch.Tensor:
    """The prompt of the examples, repeated to a length."""
    prompts = json.loads((files("tlcoupling") / "data/prompts.json").read_text())
    ids = torch.tensor(tokenizer(prompts["landmarks"])["input_ids"])
    return ids.repeat(-(-n_tokens // len(ids)))[:n_tokens]


def _coupling(model: Any, ids: torch.Tensor, tokens: Any = -1) -> tlc.DepthCoupling:
    """The whole call, with its forward pass and its certificate."""
    return tlc.depth_coupling(tlc.trace(model, ids), K, sublayers="block", tokens=tokens)


def _flops(model: Any, ids: torch.Tensor, tokens: Any) -> float:
    return tlc.estimate(model, ids, K, sublayers="block", tokens=tokens).flops


def _jacobian_stage(hf_model: Any, model: Any, ids: torch.Tensor, device: torch.device) -> Row:
    """The last token's Jacobians of all blocks alone: operators that are there become matrices."""
    trace, last = tlc.trace(model, ids), len(ids) - 1

    def operators() -> list[tlc.JacobianOperator]:
        engine = JacobianEngine(trace)
        return [engine.operator(layer, "block", last, last) for layer in range(trace.n_layers)]

    flops, found = sum(one.dense_flops for one in operators()), []
    for _ in range(5):  # operators keep the matrices of their parts: each round takes new ones
        made = operators()
        found.append(measured(partial(_dense, made), device, fresh=not found))
    ours = min(found, key=lambda one: one.seconds)
    calls = block_calls(hf_model, ids[None])
    theirs = measured(lambda: [block_jacobian(*call) for call in calls], device, fresh=True)
    work = f"{len(ids)} tokens, Jacobians of all blocks alone"
    return Row(work, theirs.seconds, theirs.peak_bytes, ours.seconds, found[0].peak_bytes, flops)


def _dense(operators: list[tlc.JacobianOperator]) -> list[torch.Tensor]:
    """All matrices, one a thread on a CPU, as the coupling makes them."""
    with Workers(torch.get_num_threads() if operators[0].device.type == "cpu" else 1) as workers:
        return workers.map(lambda one: one.dense(), operators, at_once=True)


def _certificate_share(model: Any, ids: torch.Tensor, device: torch.device) -> float:
    """Share of the whole call's time that goes without its certificate, from the fastest of several calls each."""
    with_it, without = [], []
    for _ in range(5):
        with_it.append(measured(partial(_coupling, model, ids), device).seconds)
        with _uncertified():
            without.append(measured(partial(_coupling, model, ids), device).seconds)
    return 1 - min(without) / min(with_it)


@contextmanager
def _uncertified() -> Iterator[None]:
    """Leave the certificate out: neither its derivative of the real modules nor the comparison."""
    with mock.patch.object(JacobianEngine, "_certify", lambda *arguments: None):
        yield
