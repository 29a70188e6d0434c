r"""The attention core in closed form: from queries, keys and values to z, for one pair (src, dest) at a time.

Head h at dest, with pattern p, values v, z = sum_s p_s v_s, and scores f(q . k_s) of slopes f'_s:
dz = sum_s p_s dv_s + sum_s f'_s p_s (v_s - z) (k_s . dq + q . dk_s). Without a soft-cap f'_s = c, the scale of the
scores; with f(x) = a tanh(c x / a), f'_s = c (1 - tanh^2(c q . k_s / a)). A bias of the positions alone (ALiBi) has no
derivative, and an attention sink (gpt-oss) only makes the rows of p sum to less than 1. Between projection and core,
queries and keys may be normalised (QK-norm) and rotated. Behind it, z may be multiplied by the sigmoid of a gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.block import Block, Uncovered, close
from tlcoupling.forward.window import Past
from tlcoupling.jacobian.readings import HeadNorm, Reading
from tlcoupling.jacobian.scores import Scores


@dataclass(frozen=True)
class AttentionCore:
    """The attention core of a block.

    Positions count from the first one that the block ran on; ``past`` more lie before it.

    Attributes:
        pattern: ``[head, dest, src]``, with all positions as src.
        values: v, one per head (groups expanded), at all positions, ``[src, head, f]``.
        queries: as the scores see them, ``[pos, head, e]``.
        keys: as the scores see them, one per head, at all positions, ``[src, head, e]``.
        scores: f, from q . k to the scores.
        rotary: the rotation of queries and keys; None without rotary positions.
        gates: g, where a head's z is multiplied by sigmoid(g); None without gates.
        readings: what ``q``, ``k``, ``v`` and ``gate`` are made of, by these names.
        past: number of positions before the first one.
    """

    pattern: Float[Tensor, "head dest src"]
    values: Float[Tensor, "src head f"]
    queries: Float[Tensor, "pos head e"]
    keys: Float[Tensor, "src head e"]
    scores: Scores
    rotary: Rotary | None
    gates: Float[Tensor, "pos head f"] | None
    readings: Mapping[str, Reading]
    past: int = 0

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.pattern.shape[0]

    @property
    def z(self) -> Float[Tensor, "pos head f"]:
        """What the output projection reads."""
        z = einsum(self.pattern, self.values, "head dest src, src head f -> dest head f")
        return z if self.gates is None else z * self.gates.sigmoid()

    @classmethod
    def from_values(
        cls,
        block: Block,
        values: Mapping[str, Tensor],
        readings: Mapping[str, Reading],
        gates: Tensor | None = None,
        past: Past | None = None,
    ) -> AttentionCore:
        """Read the core of a block's attention off its activations, and check that they fit it.

        Args:
            block: the block.
            values: activations by short hook name, without batch axis.
            readings: what queries, keys, values and gates are made of, but for a QK-norm.
            gates: g; None without gates.
            past: keys and values of the positions before the first one.

        Raises:
            Uncovered: a hook point is missing, or the pattern is not a softmax of a known function of q . k.
        """
        for name in ("q", "k", "v", "pattern"):
            if f"attn.hook_{name}" not in values:
                raise Uncovered(f"the attention has no hook_{name}")
        q, k, v = (values[f"attn.hook_{name}"] for name in ("q", "k", "v"))
        earlier = [rearrange(x, "1 group pos e -> pos group e") for x in (past.keys, past.values)] if past else []
        count = len(earlier[0]) if earlier else 0
        _require_fit(values["attn.hook_pattern"], q, k, v, count)
        # Llama 4 has one norm for both, behind the rotation: without gains, the two can be exchanged
        names = ("qk_norm", "qk_norm") if block.attn.part("qk_norm") is not None else ("q_norm", "k_norm")
        q_norm, k_norm = (HeadNorm.read(block, name, x) for name, x in zip(names, (q, k), strict=True))
        attn = block.attn.module
        q, k = (x if norm is None else norm(x) for norm, x in ((q_norm, q), (k_norm, k)))
        normed = {name: norm for name, norm in (("q", q_norm), ("k", k_norm)) if norm is not None}
        readings = {**readings, **{name: replace(readings[name], norm=norm) for name, norm in normed.items()}}
        reason = Uncovered("the attention encodes positions in an unknown form")
        for rotary in Rotary.candidates(attn, values):
            queries, keys = (q, k) if rotary is None else (rotary.apply(q), rotary.apply(k))
            try:
                for name, ours in (("rot_q", queries), ("rot_k", keys)):
                    theirs = values.get(f"attn.hook_{name}")
                    if theirs is not None and not _multiples(ours, theirs):
                        raise Uncovered(f"hook_{name} is not the rotation of the query or key before it")
                pattern = values["attn.hook_pattern"].to(q)
                heads = pattern.shape[0]
                keys = torch.cat([*earlier[:1], keys]).repeat_interleave(heads // keys.shape[1], dim=1)
                products = einsum(queries, keys, "dest head e, src head e -> head dest src")
                scores = Scores.fit(products, pattern, attn, block.model.cfg, q.shape[-1])
            except Uncovered as error:
                reason = error
                continue
            expanded = torch.cat([*earlier[1:], v]).repeat_interleave(heads // v.shape[1], dim=1)
            return cls(pattern, expanded, queries, keys, scores, rotary, gates, readings, count)
        raise reason

    def blocks(self, src: int, dest: int) -> dict[str, Float[Tensor, "head f e"]]:
        """Return d z_dest by k and v at src, and by q and gate at dest where src = dest, for each head.

        q and k are taken before the rotation and after a QK-norm.
        """
        at = self.past + src
        p, v = self.pattern[:, dest], self.values
        z = einsum(p, v, "head src, src head f -> head f")
        products = einsum(self.queries[dest], self.keys, "head e, src head e -> head src")
        weighted = einsum(p * self.scores.at(dest).slope(products), v - z, "head src, src head f -> src head f")
        blocks = {"k": einsum(weighted[at], self.queries[dest], "head f, head e -> head f e")}
        if src == dest:
            blocks["q"] = einsum(weighted, self.keys, "src head f, src head e -> head f e")
        if self.rotary is not None:
            blocks = {name: block @ self.rotary.matrix(src) for name, block in blocks.items()}
        eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        blocks["v"] = self.pattern[:, dest, at, None, None] * eye
        if self.gates is not None:
            opened = self.gates[dest].sigmoid()
            blocks = {name: opened[..., None] * block for name, block in blocks.items()}
            if src == dest:
                blocks["gate"] = (z * opened * (1 - opened)).diag_embed()
        return blocks


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

    def apply(self, x: Float[Tensor, "*batch pos head e"]) -> Float[Tensor, "*batch pos head e"]:
        """Rotate each position's vectors."""
        return x * self.cos[:, None] + (x @ self.quarter_turn.mT) * self.sin[:, None]

    def pull(self, y: Float[Tensor, "*batch pos head e"]) -> Float[Tensor, "*batch pos head e"]:
        """The transpose of ``apply``."""
        return y * self.cos[:, None] + (y * self.sin[:, None]) @ self.quarter_turn

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
            first = cos.shape[-1] // 2
            cos_of_pair, sin_of_pair = (table[:, :first].repeat_interleave(2, -1) for table in (cos, sin))
            yield cls._padded(cos_of_pair, sin_of_pair, adjacent, size)
            if 2 * cos.shape[-1] <= size:  # one angle for each plane (gpt-oss, DeepSeek V2)
                halves, adjacent = _quarter_turns(cos.repeat(1, 2))
                yield cls._padded(cos.repeat(1, 2), sin.repeat(1, 2), halves, size)
                yield cls._padded(cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1), adjacent, size)
            yield None  # some layers are given a rotation that they do not use (Llama 4, Afmoe)
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


def _require_fit(pattern: Tensor, q: Tensor, k: Tensor, v: Tensor, past: int) -> None:
    """Check the shapes of a pattern ``[head, dest, src]`` and of queries, keys and values ``[pos, head, e]``.

    The pattern has ``past`` more positions as src.

    Raises:
        Uncovered: a shape does not fit, such as one with heads before positions.
    """
    shapes = [tuple(x.shape) for x in (pattern, q, k, v)]
    if [len(shape) for shape in shapes] == [3, 3, 3, 3]:
        heads, n_dest, n_src = pattern.shape
        groups = k.shape[1]
        fits = q.shape[:2] == (n_dest, heads) and k.shape[:2] == v.shape[:2] == (n_src - past, groups)
        if fits and heads % groups == 0 and q.shape[2] == k.shape[2]:
            return
    raise Uncovered(f"hook_pattern, hook_q, hook_k and hook_v have shapes {shapes}, which do not fit each other")


def _multiples(ours: Float[Tensor, "pos head e"], theirs: Float[Tensor, "pos head e"]) -> bool:
    """Whether the vectors of each position are those of ours times a number, which the scores then hold (Ministral)."""
    if ours.shape != theirs.shape:
        return False
    factors = (ours * theirs.to(ours)).sum((1, 2)) / ours.square().sum((1, 2))
    return close(factors[:, None, None] * ours, theirs)


def _quarter_turns(like: Float[Tensor, "pos n"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Quarter turns of n coordinates: in planes (i, i + n/2), and in planes (2i, 2i + 1)."""
    n = like.shape[-1]
    halves, adjacent = like.new_zeros(n, n), like.new_zeros(n, n)
    first = torch.arange(n // 2, device=like.device)
    for turn, i, j in ((halves, first, first + n // 2), (adjacent, 2 * first, 2 * first + 1)):
        turn[i, j], turn[j, i] = -1.0, 1.0
    return halves, adjacent
