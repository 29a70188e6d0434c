"""The certificate of a closed form: its products, held against those of the block's own modules, pair by pair.

One backward pass with a random cotangent y at ``dest`` gives J^T y of a sublayer at every ``src`` at once, so that each
measured pair is tested by itself and nothing is extrapolated from one pair to another: an adapter on the queries shows
nowhere but where the queries have a derivative, and a soft-cap nowhere but where the scores are large. A block needs no
graph of its own: its closed form is the chain rule over its sublayers, and ``differences`` hold it against the block.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.hooked import Hook
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.autograd import autograd_column_bytes, vectors_at_once
from tlcoupling.linalg.operator import JacobianOperator
from tlcoupling.memory import free_memory

# Relative gap allowed between an analytic product and the module's own derivative along the same probe. Float32
# products of this size agree to 1e-5; HuggingFace modules cast to float32 inside, whatever the model's dtype.
TOLERANCE = 1e-4

Pair = tuple[int, int]  # src, dest


class ModuleProducts:
    """J^T y of a block's sublayers by their own modules, for one random y.

    Attributes:
        cotangent: y.
    """

    def __init__(self, trace: Trace, layer: int, pairs: Iterable[Pair] = ()) -> None:
        """Take a layer.

        Args:
            trace: a trace of the model.
            layer: block index.
            pairs: (src, dest) that will be asked for: one run of the block serves them all.
        """
        self._trace, self.layer = trace, layer
        self._pairs = frozenset(pairs)
        self.cotangent = random_vector(trace, layer, layer)
        self._attn: dict[Pair, Float[Tensor, " d_model"]] = {}
        self._mlp: dict[int, tuple[Float[Tensor, " d_model"], float]] = {}

    def attn(self, src: int, dest: int) -> Float[Tensor, " d_model"]:
        """J_attn^T y at ``src``, for y at ``dest``."""
        self._require((src, dest))
        return self._attn[src, dest]

    def mlp(self, dest: int) -> Float[Tensor, " d_model"]:
        """J_mlp^T y at ``dest``, for y at ``dest``."""
        self._require((dest, dest))
        return self._mlp[dest][0]

    def mlp_mixes(self, dest: int) -> float:
        """Return the largest length of J_mlp^T y at another position than ``dest``, relative to that at ``dest``."""
        self._require((dest, dest))
        return self._mlp[dest][1]

    def _require(self, pair: Pair) -> None:
        """Compute what a pair needs, together with all announced pairs where it is one of them."""
        if pair in self._attn:
            return
        pairs = sorted((self._pairs if pair in self._pairs else {pair}) | {(pair[1], pair[1])})
        trace, layer = self._trace, self.layer
        leaf = trace.block_input(layer).clone().requires_grad_()
        mid = trace.mlp_input(layer).clone().requires_grad_() if trace.topology == "sequential" else leaf
        kept: dict[str, Tensor] = {}
        hooks: dict[str, Hook] = {
            name: partial(kept.__setitem__, name)
            for name in ("hook_attn_out", "hook_mlp_out")
            if trace.point(layer, name) is not None
        }
        if mid is not leaf:
            hooks["hook_resid_mid"] = lambda tensor: mid
        with torch.enable_grad():  # the caller may have it off
            trace.run_block(layer, leaf, hooks)
        dests = sorted({dest for _, dest in pairs} | {src for src, _ in pairs})
        column = autograd_column_bytes(trace.model.blocks[layer], trace.model.cfg.n_heads, trace.n_tokens, 4)
        for start in range(0, len(dests), chunk := vectors_at_once(column, free_memory(leaf.device))):
            some = dests[start : start + chunk]
            row = {dest: index for index, dest in enumerate(some)}
            pulled = self._pull(kept["hook_attn_out"], leaf, some)
            wanted = [(src, dest) for src, dest in {*pairs, *((dest, dest) for dest in some)} if dest in row]
            self._attn |= {(src, dest): pulled[row[dest], src].clone() for src, dest in wanted}
            if trace.mlp_out is None:
                continue
            pulled = self._pull(kept["hook_mlp_out"], mid, some)
            for dest in some:
                lengths = pulled[row[dest]].norm(dim=-1)
                own = float(lengths[dest])
                lengths[dest] = 0.0
                other = float(lengths.max())
                self._mlp[dest] = pulled[row[dest], dest].clone(), other / own if own > 0 else float(other > 0)

    def _pull(self, output: Float[Tensor, "1 pos d"], leaf: Tensor, dests: list[int]) -> Float[Tensor, "dest pos d"]:
        """J^T y at all positions, for y at each of some positions of the output."""
        if not output.requires_grad:
            return leaf.new_zeros(len(dests), *leaf.shape[1:])
        cotangents = output.new_zeros(len(dests), *output.shape)
        cotangents[range(len(dests)), 0, dests] = self.cotangent.to(output)
        try:
            grads = torch.autograd.grad(
                output, leaf, cotangents, retain_graph=True, is_grads_batched=True, allow_unused=True
            )[0]
            return leaf.new_zeros(len(dests), *leaf.shape[1:]) if grads is None else grads[:, 0]
        except RuntimeError:  # a module whose backward has no batching rule
            options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            return torch.cat([torch.autograd.grad(output, leaf, one, **options)[0] for one in cotangents])


def random_vector(trace: Trace, layer: int, seed: int) -> Float[Tensor, " d_model"]:
    """Draw a random vector of length 1, the same for the same seed, on the device of a block."""
    vector = torch.randn(trace.d_model, generator=torch.Generator().manual_seed(seed), dtype=trace.resid.dtype)
    return (vector / vector.norm()).to(trace.block_input(layer).device)


def misses(
    operator: JacobianOperator,
    cotangent: Float[Tensor, " m"],
    truth: Float[Tensor, " n"],
    direction: Float[Tensor, " n"],
    product: Float[Tensor, " m"],
) -> float | None:
    """Return how far a closed form lies from the module's own derivative; None where they agree.

    Args:
        operator: the closed form.
        cotangent: y.
        truth: J^T y by the modules.
        direction: q, of any length.
        product: J q by the closed form. It has to be the adjoint of J^T, which shows in the one number y . J q.
    """
    adjoint = (cotangent @ product - truth @ direction).abs() / direction.norm()
    gap, size = torch.maximum((operator.rmv(cotangent) - truth).norm(), adjoint), truth.norm()
    return None if gap <= TOLERANCE * size else float(gap / size)
