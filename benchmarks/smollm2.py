"""Time depth-wise coupling of SmolLM2-135M's blocks, K = 10, against the published procedure on the same prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.resources import files
from typing import Any
from unittest import mock

import torch
from llamas import VOCABULARY, bridge, shaped
from measure import Row, alternating, measured
from published import block_jacobians, depth_misalignment
from torch import Tensor

import tlcoupling as tlc
from tlcoupling.jacobian.evidence import Evidence
from tlcoupling.models.smollm2 import smollm2_huggingface

K, WIDTH, LAYERS = 10, 576, 30
GOALS, GOAL_OF_ALL, GOAL_OF_CHECKS = {28: 0.46, 128: 0.55}, 13.0, 0.12  # seconds on two CPU cores
Models = tuple[Any, Any, Callable[[int], Tensor]]  # HuggingFace's, TransformerLens's, and a prompt of some length


def trained(device: torch.device) -> Models:
    """Return SmolLM2-135M and the prompt of the examples, repeated to a length."""
    hf_model, tokenizer = smollm2_huggingface()
    prompts = json.loads((files("tlcoupling") / "data/prompts.json").read_text())
    ids = torch.tensor(tokenizer(prompts["landmarks"])["input_ids"])
    model = tlc.load_model("smollm2-135m", device=str(device))
    return hf_model.to(device), model, lambda length: ids.repeat(-(-length // len(ids)))[:length].to(device)


def random(device: torch.device, width: int = WIDTH, layers: int = LAYERS) -> Models:
    """Return a model of SmolLM2-135M's shape with random weights, and random prompts."""

    def prompt(length: int) -> Tensor:
        return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(0)).to(device)

    return shaped(width, layers, device), bridge(shaped(width, layers, device)), prompt


def rows(models: Models, rounds: int, lengths: Sequence[int] = (28, 128), again: int = 3) -> Iterator[Row | str]:
    """Yield rows of the table, and remarks about them; ``rounds`` and ``again`` are those of ``alternating``."""
    hf_model, model, prompt = models
    device = next(hf_model.parameters()).device
    coupling(model, prompt(lengths[0]))  # the first call pays for lazy imports and thread pools
    for length in lengths:
        ids = prompt(length)
        theirs, ours = alternating(
            [partial(depth_misalignment, hf_model, ids[None], K), partial(coupling, model, ids)], rounds, device, again
        )
        gap = (1 - ours[2].values[0, 0, 0] - theirs[2].cpu())[:-1, :-1].abs().max()
        goal = GOALS.get(length)
        yield Row(f"{length} tokens, the last one", *theirs[:2], *ours[:2], flops(model, ids, -1), goal)
        yield f"{length} tokens: misalignments agree to {gap:.1e} (without the last block, which has the final norm)"
        if length == lengths[0]:
            calls = [partial(first_jacobian, hf_model, ids[None], batched) for batched in (True, False)]
            batched, alone = (one[0] for one in alternating(calls, rounds, device, again))
            yield f"{length} tokens, one block, published: {batched:.3g} s batched, {alone:.3g} s one product at a time"
            every = measured(partial(coupling, model, ids, "all"), device, fresh=True)
            work = f"{length} tokens, all of them (published: one)"
            yield Row(work, *theirs[:2], every.seconds, every.peak_bytes, flops(model, ids, "all"), GOAL_OF_ALL)
            yield (
                f"{length} tokens, the last one: certificate and differences add {checks(model, ids, device):.2f} s "
                f"(goal: {GOAL_OF_CHECKS} s)"
            )


def checks(model: Any, ids: Tensor, device: torch.device) -> float:
    """Return the seconds that certificate and differences add to the call, fastest against fastest."""
    traced = tlc.trace(model, ids)
    with_them = partial(tlc.depth_coupling, traced, K, sublayers="block")

    def without() -> None:
        with ExitStack() as stack:
            for name in ("refusal", "contradiction", "moves"):
                stack.enter_context(mock.patch.object(Evidence, name, None if name == "moves" else _nothing))
            with_them()

    # in many short rounds, for both need a quiet moment
    (seconds, *_), (alone, *_) = alternating([with_them, without], 10, device, again=1)
    return seconds - alone


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Find nothing wrong."""


def first_jacobian(hf_model: Any, ids: Tensor, batched: bool) -> Tensor:
    """Take the first block's Jacobian by the published procedure."""
    return next(block_jacobians(hf_model, ids, batched))


def coupling(model: Any, ids: Tensor, tokens: Any = -1) -> tlc.DepthCoupling:
    """Run the whole call, with its forward pass and its certificate."""
    return tlc.depth_coupling(tlc.trace(model, ids), K, sublayers="block", tokens=tokens)


def flops(model: Any, ids: Tensor, tokens: Any) -> float:
    """Count the floating-point operations of the call."""
    return tlc.estimate(model, ids, K, sublayers="block", tokens=tokens).flops
