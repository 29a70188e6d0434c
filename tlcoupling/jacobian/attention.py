r"""The attention core in closed form: from queries, keys and values to z, for one pair (src, dest) at a time.

Head h at dest, with pattern p, values v, z = sum_s p_s v_s, and scores f(q . k_s) of slopes f'_s:
dz = sum_s p_s dv_s + sum_s f'_s p_s (v_s - z) (k_s . dq + q . dk_s). Without a soft-cap f'_s = c, the scale of the
scores; with f(x) = a tanh(c x / a), f'_s = c (1 - tanh^2(c q . k_s / a)). A bias of the positions alone (ALiBi) has no
derivative. Between projection and core, queries and keys may be normalised (QK-norm) and rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.block import Block, Uncovered, close
from tlcoupling.forward.lifting import lifted
from tlcoupling.jacobian.norms import Norm
from tlcoupling.jacobian.parts import HeadMap
from tlcoupling.jacobian.scores import Scores
from tlcoupling.linalg.operator import JacobianOperator


@dataclass(frozen=True)
class AttentionCore:
    """The attention core of a block.

    Attributes:
        pattern: ``[head, dest, src]``.
        values: v, one per head (groups expanded), ``[src, head, e]``.
        queries, keys: as the scores see them, one per head, ``[pos, head, e]``.
        scores: f, from q . k to the scores.
        rotary: the rotation of queries and keys; None without rotary positions.
        q_norm, k_norm: the norms of queries and keys; None without QK-norm.
        n_groups: number of key and value heads.
    """

    pattern: Float[Tensor, "head dest src"]
    values: Float[Tensor, "src head e"]
    queries: Float[Tensor, "pos head e"]
    keys: Float[Tensor, "pos head e"]
    scores: Scores
    rotary: Rotary | None
    q_norm: HeadNorm | None
    k_norm: HeadNorm | None
    n_groups: int

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.pattern.shape[0]

    @classmethod
    def from_values(cls, block: Block, values: Mapping[str, Tensor]) -> AttentionCore:
        """Read the core of a block's attention off its activations, and check that they fit it.

        Args:
            block: the block.
            values: activations by short hook name, without batch axis.

        Raises:
            Uncovered: a hook point is missing, or the pattern is not a softmax of a known function of q . k.
        """
        for name in ("q", "k", "v", "pattern"):
            if f"attn.hook_{name}" not in values:
                raise Uncovered(f"the attention has no hook_{name}")
        q, k, v = (values[f"attn.hook_{name}"] for name in ("q", "k", "v"))
        _require_fit(values["attn.hook_pattern"], q, k, v)
        q_norm, k_norm = (HeadNorm.read(block, f"{name}_norm", x) for name, x in (("q", q), ("k", k)))
        attn = block.attn.module
        q, k = (x if norm is None else norm(x) for norm, x in ((q_norm, q), (k_norm, k)))
        reason = Uncovered("the attention encodes positions in an unknown form")
        for rotary in Rotary.candidates(attn, values):
            queries, keys = (q, k) if rotary is None else (rotary.apply(q), rotary.apply(k))
            try:
                for name, ours in (("rot_q", queries), ("rot_k", keys)):
                    theirs = values.get(f"attn.hook_{name}")
                    if theirs is not None and not close(ours, theirs):
                        raise Uncovered(f"hook_{name} is not the rotation of the query or key before it")
                pattern = values["attn.hook_pattern"].to(q)
                heads = pattern.shape[0]
                keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
                products = einsum(queries, keys, "dest head e, src head e -> head dest src")
                scores = Scores.fit(products, pattern, attn, block.model.cfg, q.shape[-1])
            except Uncovered as error:
                reason = error
                continue
            expanded = v.repeat_interleave(heads // v.shape[1], dim=1)
            return cls(pattern, expanded, queries, keys, scores, rotary, q_norm, k_norm, k.shape[1])
        raise reason

    def blocks(self, src: int, dest: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return d z_dest by q at dest, by k at src and by v at src for each head, each ``[head, e, e]``.

        q and k are taken before the rotation and after a QK-norm.
        """
        p, v = self.pattern[:, dest], self.values
        z = einsum(p, v, "head src, src head e -> head e")
        products = einsum(self.queries[dest], self.keys, "head e, src head e -> head src")
        weighted = einsum(p * self.scores.slope(products), v - z, "head src, src head e -> src head e")
        by_q = einsum(weighted, self.keys, "src head e, src head f -> head e f")
        by_k = einsum(weighted[src], self.queries[dest], "head e, head f -> head e f")
        if self.rotary is not None:
            by_q, by_k = by_q @ self.rotary.matrix(dest), by_k @ self.rotary.matrix(src)
        eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        by_v = self.pattern[:, dest, src, None, None] * eye
        return by_q, by_k, by_v


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


@dataclass(frozen=True)
class Rotary:
    """Rotary positions: at each position, x -> cos * x + sin * (P x) with P a quarter turn in each plane.

    Attributes:
        cos, sin: ``[pos, e]``; 1 and 0 in the coordinates that are not rotated.
        quarter_turn: P, ``[e, e]``.
    """

    cos: Float[Tensor, "pos e"]
    sin: Float[Tensor, "pos e"]
    quarter_turn: Float[Tensor, "e e"]

    def apply(self, x: Float[Tensor, "pos head e"]) -> Float[Tensor, "pos head e"]:
        """Rotate each position's vectors."""
        return x * self.cos[:, None] + (x @ self.quarter_turn.mT) * self.sin[:, None]

    def matrix(self, pos: int) -> Float[Tensor, "e e"]:
        """The rotation at one position."""
        return self.cos[pos].diag() + self.sin[pos][:, None] * self.quarter_turn

    @classmethod
    def candidates(cls, attn: Any, values: Mapping[str, Tensor]) -> Iterator[Rotary | None]:
        """Yield the rotations that a block may use, from its hooked cosines and sines or its buffers; None for none.

        A plane is spanned by coordinates (i, i + n/2) or (2i, 2i + 1), and a table of angles may be ordered for either.
        """
        q = values["attn.hook_q"]
        length, size = q.shape[0], q.shape[-1]
        inner = getattr(attn, "original_component", None)
        if "attn.hook_cos" in values:
            cos, sin = values["attn.hook_cos"].to(q), values["attn.hook_sin"].to(q)
            halves, adjacent = _quarter_turns(cos)
            yield cls._padded(cos, sin, halves, size)
            yield cls._padded(cos, sin, adjacent, size)
            cos, sin = (table[:, : cos.shape[-1] // 2].repeat_interleave(2, -1) for table in (cos, sin))
            yield cls._padded(cos, sin, adjacent, size)
        elif hasattr(attn, "rotary_cos"):
            cos, sin = attn.rotary_cos[:length].to(q), attn.rotary_sin[:length].to(q)
            eye = torch.eye(cos.shape[-1], dtype=q.dtype, device=q.device)
            yield cls._padded(cos, sin, attn.rotate_every_two(eye).mT, size)
        elif getattr(attn, "rotary", None) is not None:  # TransformerLens's native models
            cos, sin = attn.rotary.cos_cached[:length].to(q), attn.rotary.sin_cached[:length].to(q)
            eye = torch.eye(cos.shape[-1], dtype=q.dtype, device=q.device)
            yield cls._padded(cos, sin, attn.rotary._rotate_half(eye).mT, size)
        elif isinstance(table := getattr(inner, "embed_positions", None), Tensor):  # GPT-J
            sin, cos = (part.repeat_interleave(2, -1) for part in table[:length].to(q).chunk(2, -1))
            yield cls._padded(cos, sin, _quarter_turns(cos)[1], size)
        else:
            yield None

    @classmethod
    def _padded(
        cls, cos: Float[Tensor, "pos n"], sin: Float[Tensor, "pos n"], turn: Float[Tensor, "n n"], size: int
    ) -> Rotary:
        """A rotation of the first n of a head's coordinates."""
        length, turned = cos.shape
        all_cos, all_sin = cos.new_ones(length, size), cos.new_zeros(length, size)
        all_cos[:, :turned], all_sin[:, :turned] = cos, sin
        quarter_turn = cos.new_zeros(size, size)
        quarter_turn[:turned, :turned] = turn
        return cls(all_cos, all_sin, quarter_turn)


def _require_fit(pattern: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check the shapes of a pattern ``[head, dest, src]`` and of queries, keys and values ``[pos, head, e]``.

    Raises:
        Uncovered: a shape does not fit, such as one with heads before positions.
    """
    shapes = [tuple(x.shape) for x in (pattern, q, k, v)]
    if [len(shape) for shape in shapes] == [3, 3, 3, 3]:
        heads, n_dest, n_src = pattern.shape
        groups = k.shape[1]
        fits = q.shape[:2] == (n_dest, heads) and k.shape[0] == v.shape[0] == n_src and groups == v.shape[1]
        if fits and heads % groups == 0 and q.shape[2] == k.shape[2]:
            return
    raise Uncovered(f"hook_pattern, hook_q, hook_k and hook_v have shapes {shapes}, which do not fit each other")


def _quarter_turns(like: Float[Tensor, "pos n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Quarter turns of n coordinates: in planes (i, i + n/2), and in planes (2i, 2i + 1)."""
    n = like.shape[-1]
    halves, adjacent = like.new_zeros(n, n), like.new_zeros(n, n)
    first = torch.arange(n // 2, device=like.device)
    for turn, i, j in ((halves, first, first + n // 2), (adjacent, 2 * first, 2 * first + 1)):
        turn[i, j], turn[j, i] = -1.0, 1.0
    return halves, adjacent
