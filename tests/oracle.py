"""What results are held against: Jacobians by autograd, plain formulas, and random bases.

``full_model_jacobian`` uses nothing of the library but the hooks that reach into the model.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from cases import CASES, TOKENS, Case

import tlcoupling as tlc
from tlcoupling.forward.hooked import attached

# one of each topology, and a gated, rotary, grouped-query one; what the installed TransformerLens has of them
_NAMES = {
    "bridge-gpt2",
    "bridge-pythia",
    "bridge-llama",
    "native-attention-only",
    "hooked-gated",
    "hooked-parallel",
    "hooked-attention-only",
}
REPRESENTATIVE = [case for case in CASES if case.name in _NAMES]
NORMED = [case for case in CASES if case.name in ("hooked-sandwich", "bridge-gemma2")]  # of what a sublayer writes


@functools.cache
def full_model_jacobian(case: Case, layer: int, sublayer: str, src: int, dest: int) -> torch.Tensor:
    """The design's definition, section 3, row by row through the model as it runs on its tokens."""
    model = case.model()
    points = model.hook_dict
    where = f"blocks.{layer}."
    reads = "hook_resid_mid" if sublayer == "mlp" and case.topology == "sequential" else "hook_resid_pre"
    writes = {"block": "hook_resid_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}[sublayer]
    leaves: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def read(stream: torch.Tensor) -> torch.Tensor:
        leaves.append(stream.detach().clone().requires_grad_())
        return leaves[0]

    with torch.enable_grad(), attached([(points[where + reads], read), (points[where + writes], kept.append)]):
        model(TOKENS[None])
    rows = [torch.autograd.grad(value, leaves[0], retain_graph=True)[0][0, src] for value in kept[0][0, dest]]
    jacobian = torch.stack(rows).detach()
    return (
        jacobian - torch.eye(len(jacobian), dtype=jacobian.dtype) if sublayer == "block" and src == dest else jacobian
    )


def plain_coupling(j1: torch.Tensor, j2: torch.Tensor, k: int, normalizer: str, bases: str, absolute: bool) -> float:
    """The formula of the design, section 5, from full SVDs, entry by entry."""
    _, s1, _ = torch.linalg.svd(j1)
    u2, _, vh2 = torch.linalg.svd(j2)
    left, right = (u2, vh2.mT) if bases == "uv" else (vh2.mT, u2)
    m = left[:, :k].mT @ j1 @ right[:, :k]
    total = 0.0
    for i in range(k):
        for j in range(k):
            entry = abs(float(m[i, j])) if absolute else float(m[i, j])
            total += (entry - (float(s1[i]) if i == j else 0.0)) ** 2
    divisor = math.sqrt(float((s1[:k] ** 2).sum())) if normalizer == "frobenius" else float(s1[:k].sum())
    return 1 - math.sqrt(total) / divisor


def haar(d: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Return k orthonormal columns in d dimensions, Haar-random."""
    return haar_of(torch.randn(d, k, generator=generator, dtype=torch.float64))


def haar_of(normal: torch.Tensor) -> torch.Tensor:
    """Haar-random bases of normal columns; Q alone is not, since LAPACK leaves the signs of R's diagonal to itself."""
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def head_jacobians(trace: tlc.Trace, layer: int, pos: int) -> list[torch.Tensor]:
    """Return each head's Jacobian, by autograd through the block's modules."""
    heads = range(trace.model.cfg.n_heads)
    return [tlc.residual_jacobian(trace, layer, "attn", pos, pos, head, engine="autograd").dense() for head in heads]


def graph_between(
    model: Any, tokens: torch.Tensor, entry: str, end: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation at a hook point as a leaf, and what a forward pass makes of it at a later one, or its logits."""
    kept: dict[str, torch.Tensor] = {}

    def enter(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
        kept["leaf"] = tensor.detach().clone().requires_grad_()
        return kept["leaf"]

    def leave(tensor: torch.Tensor, hook: Any) -> None:
        kept["out"] = tensor

    hooks = [(entry, enter), *(() if end is None else ((end, leave),))]
    with torch.enable_grad():
        given = model.run_with_hooks(tokens[None], return_type=None if end else "logits", fwd_hooks=hooks)
    return kept["leaf"], given if end is None else kept["out"]
