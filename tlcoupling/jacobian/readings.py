"""Readings: what queries, keys, values and gates of heads are made of, as linear maps of what the attention reads.

A query is W x, or a norm of that (QK-norm), or U n(W x + b), with a latent between two weights (multi-head latent
attention, DeepSeek). A key of latent attention is the sum of two: one from the latent that it shares with the value,
and one that all heads share, which alone is rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.block import Block, Uncovered
from tlcoupling.forward.lifting import lifted
from tlcoupling.jacobian.norms import Norm
from tlcoupling.jacobian.parts import HeadMap
from tlcoupling.linalg.maps import Projection
from tlcoupling.linalg.operator import JacobianOperator, Sum


@dataclass(frozen=True)
class Reading:
    """U n(W x + b), or its sum with others.

    Attributes:
        weight: W.
        bias: b; None without.
        norm: n; None without.
        up: U; None without.
        others: what is added.
    """

    weight: Float[Tensor, "n d_model"]
    bias: Float[Tensor, " n"] | None = None
    norm: HeadNorm | None = None
    up: Float[Tensor, "m n"] | None = None
    others: Sequence[Reading] = ()

    def __call__(self, x: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos m"]:
        """What is read from x."""
        made = x @ self.weight.mT
        made = made if self.bias is None else made + self.bias
        made = made if self.norm is None else self.norm(made[:, None])[:, 0]
        made = made if self.up is None else made @ self.up.mT
        return sum((other(x) for other in self.others), made)

    def derivative(self, pos: int) -> JacobianOperator:
        """The Jacobian at a position of what the norm read."""
        made: JacobianOperator = Projection(self.weight)
        made = made if self.norm is None else self.norm.derivative(pos) @ made
        made = made if self.up is None else Projection(self.up) @ made
        return Sum([made, *(other.derivative(pos) for other in self.others)]) if self.others else made


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries or keys.

    It norms each head by itself, with one gain for all heads (Qwen 3, Gemma 3) or with a gain for each (Cohere,
    StableLM), or it norms all heads together (OLMo 2).

    Attributes:
        norms: the norm of each head, or the one norm of all heads together.
        inputs: what it norms, ``[pos, group, e]``.
        together: whether it norms all heads at once.
    """

    norms: tuple[Norm, ...]
    inputs: Float[Tensor, "pos group e"]
    together: bool = False

    @classmethod
    def read(cls, block: Block, name: str, inputs: Float[Tensor, "pos group e"]) -> HeadNorm | None:
        """Read the norm off the module of that name in the attention; None where there is none.

        Each kind of norm is tried in turn. A module that is of another kind fails, or gives another output.

        Raises:
            Uncovered: the module is of no kind that is known.
        """
        module, groups = block.attn.part(name), range(inputs.shape[1])
        if module is None:
            return None

        def of_head(group: int, axis: int) -> Callable[[Tensor], Tensor]:
            """The norm of one head, where the module takes all heads, along an axis of ``[1, ., ., e]``."""
            return lambda rows: module(torch.stack([rows] * len(groups), axis)).select(axis, group)

        kinds: tuple[Callable[[], HeadNorm], ...] = (
            lambda: cls((Norm.read(module, inputs[:, 0], name),) * len(groups), inputs),
            lambda: cls((Norm.read(module, inputs.flatten(-2), name),), inputs, together=True),
            *(
                lambda axis=axis: cls(
                    tuple(Norm.read(of_head(group, axis), inputs[:, group], name) for group in groups), inputs
                )
                for axis in (2, 1)
            ),
        )
        with lifted(block.model, module):
            for kind in kinds:
                with suppress(RuntimeError, IndexError, Uncovered):
                    return kind()
        raise Uncovered(f"{name} norms neither each head nor all of them together")

    @classmethod
    def of_latent(cls, block: Block, name: str, inputs: Float[Tensor, "pos e"]) -> HeadNorm:
        """Read the norm of a latent.

        Raises:
            Uncovered: there is none of that name, or it is of another kind.
        """
        module = getattr(getattr(block.attn.module, "original_component", None), name, None)
        if module is None:
            raise Uncovered(f"the latent attention has no {name}")
        with lifted(block.model, module):
            return cls((Norm.read(module, inputs, name),), inputs[:, None], together=True)

    def __call__(self, x: Float[Tensor, "pos group e"]) -> Float[Tensor, "pos group e"]:
        """Return the normed queries or keys."""
        if self.together:
            return self.norms[0](x.flatten(-2)).view_as(x)
        return torch.stack([norm(x[:, group]) for group, norm in enumerate(self.norms)], dim=1)

    def derivative(self, pos: int) -> JacobianOperator:
        """Return the Jacobian at one position, from all heads' coordinates to all heads' coordinates."""
        x = self.inputs[pos]
        if self.together:
            return self.norms[0].derivative(x.flatten())
        blocks = torch.stack([norm.derivative(row).dense() for norm, row in zip(self.norms, x, strict=True)])
        return HeadMap(blocks, torch.arange(len(x), device=x.device), len(x))


def head_readings(weights: Mapping[str, Tensor], heads: Mapping[str, int]) -> dict[str, Reading]:
    """What queries, keys and values, and gates of heads where there are any, are made of in usual attention.

    Args:
        weights: as ``Sublayer.weights`` gives them.
        heads: number of heads of W_Q, W_K and W_V. ``HookedTransformer`` repeats a group's weights for each of its
            heads.
    """
    readings = {}
    for name in ("q", "k", "v", "gate"):
        if (weight := weights.get(f"W_{name.upper()}")) is not None:
            step = weight.shape[0] // heads.get(f"W_{name.upper()}", weight.shape[0])
            readings[name] = Reading(rearrange(weight[::step], "head d e -> (head e) d"))
    return readings


@dataclass(frozen=True)
class Latent:
    """The weights of multi-head latent attention, by HuggingFace's names, with their biases.

    Attributes:
        weights: by name.
        n_heads: number of heads.
        rope, nope, v: sizes of the rotated and the other part of a query or key, and of a value.
    """

    weights: Mapping[str, Tensor]
    n_heads: int
    rope: int
    nope: int
    v: int

    @classmethod
    def of(cls, module: Any) -> Latent | None:
        """Read them; None where the attention is not latent attention."""
        inner = getattr(module, "original_component", module)
        if not hasattr(inner, "kv_a_proj_with_mqa"):
            return None
        weights = {}
        for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            part = getattr(inner, name, None)
            if part is not None:
                weights[name] = part.weight.detach()
                if getattr(part, "bias", None) is not None:
                    weights[f"{name}_bias"] = part.bias.detach()
        rope, nope, v = inner.qk_rope_head_dim, inner.qk_nope_head_dim, inner.v_head_dim
        return cls(weights, weights["o_proj"].shape[1] // v, rope, nope, v)

    def to(self, like: Tensor) -> Latent:
        """The same in another dtype, on another device."""
        return Latent({n: w.to(like) for n, w in self.weights.items()}, self.n_heads, self.rope, self.nope, self.v)

    def write(self) -> Float[Tensor, "head e d_model"]:
        """W_O."""
        return rearrange(self.weights["o_proj"], "d (head e) -> head e d", head=self.n_heads)

    def readings(self, norm_of: Callable[[str, Reading], HeadNorm]) -> dict[str, Reading]:
        """What queries, keys and values are made of; in queries and keys, the rotated part comes first.

        Args:
            norm_of: the norm of a latent, from its name in the module and what makes its input.
        """
        weights, heads = self.weights, self.n_heads

        def chain(first: str, norm: str, rows: slice, up: Tensor) -> Reading:
            bias = weights.get(f"{first}_bias")
            down = Reading(weights[first][rows], None if bias is None else bias[rows])
            return Reading(down.weight, down.bias, norm_of(norm, down), up)

        keys, values = rearrange(weights["kv_b_proj"], "(head e) latent -> head e latent", head=heads).split(
            [self.nope, self.v], dim=1
        )
        size = keys.shape[2]
        shared = torch.eye(self.rope, dtype=keys.dtype, device=keys.device)
        shared = repeat(torch.cat([shared, shared.new_zeros(self.nope, self.rope)]), "e r -> (head e) r", head=heads)
        rotated = Reading(weights["kv_a_proj_with_mqa"][size:], _tail(weights, "kv_a_proj_with_mqa", size), up=shared)
        kv = ("kv_a_proj_with_mqa", "kv_a_layernorm", slice(size))
        padded = torch.cat([keys.new_zeros(heads, self.rope, size), keys], 1).flatten(0, 1)
        of_key, of_value = chain(*kv, padded), chain(*kv, values.flatten(0, 1))
        if "q_proj" in weights:
            query = Reading(self._rotated_first(weights["q_proj"]))
        else:
            query = chain("q_a_proj", "q_a_layernorm", slice(None), self._rotated_first(weights["q_b_proj"]))
        return {"q": query, "k": Reading(of_key.weight, of_key.bias, of_key.norm, padded, (rotated,)), "v": of_value}

    def _rotated_first(self, weight: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """The rows of a weight that makes queries, those of the rotated part of each head first."""
        other, rotated = rearrange(weight, "(head e) m -> head e m", head=self.n_heads).split([self.nope, self.rope], 1)
        return torch.cat([rotated, other], 1).flatten(0, 1)


def _tail(weights: Mapping[str, Tensor], name: str, start: int) -> Tensor | None:
    bias = weights.get(f"{name}_bias")
    return None if bias is None else bias[start:]
