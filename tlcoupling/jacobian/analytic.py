r"""The analytic engine: Jacobians in closed form from the activations of one block run and the weights.

For one pair (src, dest), so that only the attention's own values need the rest of the sequence:

- norm: J = diag(g) (C - x_hat x_hat^T / d) / r;
- attention core of head h, pattern p, values v, z = sum_s p_s v_s, scale c:
  dz_dest = sum_s p_s dv_s + c sum_s p_s (v_s - z) (k_s . dq + q . dk_s);
- MLP: W_out diag(act'(pre)) W_in; gated: W_out (diag(act'(pre) pre_linear) W_gate + diag(act(pre)) W_in).

What a block does is read from how it behaves, not from its class: whether a norm centres and with which gain, the
rotation at a position and the scale of the scores are each taken from the block's own values and checked against them.
Where they do not fit, the sublayer is ``Uncovered`` and goes to autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlcoupling.hooked import Hook, attached, lifted
from tlcoupling.jacobian.maps import (
    BlockMap,
    Diagonal,
    HeadMap,
    Identity,
    LinearMap,
    NormMap,
    Projection,
    Shared,
    Sum,
    Zero,
)
from tlcoupling.trace import Trace

_NORM_POINTS = ("ln1.hook_scale", "ln2.hook_scale")
_ATTN_POINTS = tuple(f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "cos", "sin", "pattern"))
_MLP_INPUTS = ("mlp.hook_pre", "mlp.hook_pre_linear")
_MLP_OUTPUT = "mlp.hook_post"
# How far a block's own float32 values may lie from the formula that is to describe them, relative to the largest.
_FIT = 1e-4


class Uncovered(Exception):
    """The closed form does not describe this sublayer; the message says what does not fit."""


@dataclass(frozen=True)
class Run:
    """One run of a sublayer's own modules.

    Attributes:
        values: recorded activations by short hook name, without batch axis.
        out: what the sublayer wrote, ``[pos, d_model]``.
        direction: a direction at one position of its input, ``[d_model]``.
        tangent: the derivative of ``out`` along it; None where a module has no forward-mode derivative.
    """

    values: Mapping[str, Tensor]
    out: Float[Tensor, "pos d_model"]
    direction: Float[Tensor, " d_model"]
    tangent: Float[Tensor, "pos d_model"] | None


def run_sublayer(
    trace: Trace,
    layer: int,
    sublayer: str,
    stream: Float[Tensor, "1 pos d_model"],
    pos: int,
    direction: Float[Tensor, " d_model"],
) -> Run:
    """Run ``attn`` on the whole sequence, or ``mlp`` on any rows, in forward mode along a direction at one position."""
    run, points = (trace.run_attn, _ATTN_POINTS) if sublayer == "attn" else (trace.run_mlp, (*_MLP_INPUTS, _MLP_OUTPUT))
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: kept.__setitem__(name, forward_ad.unpack_dual(tensor).primal[0].clone())

    hooks = {name: keep(name) for name in (*_NORM_POINTS, *points) if trace.point(layer, name) is not None}
    moved = torch.zeros_like(stream)
    moved[0, pos] = direction
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        forward_ad.dual_level(),
        warnings.catch_warnings(),
    ):
        # the first forward-mode derivative loads torch's decompositions, which warn of themselves
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        try:
            out, tangent = forward_ad.unpack_dual(run(layer, forward_ad.make_dual(stream, moved), hooks))
            tangent = torch.zeros_like(out) if tangent is None else tangent
            return Run(kept, out[0].clone(), direction, tangent[0].clone())
        except (NotImplementedError, RuntimeError):  # no forward-mode rule: the caller takes another way
            kept.clear()
            return Run(kept, run(layer, stream, hooks)[0].clone(), direction, None)


class AnalyticLayer:
    """The closed forms of one block, from runs of its own sublayers."""

    def __init__(self, trace: Trace, layer: int, src: int) -> None:
        """Run the attention once, along a random direction at ``src``, for its values and its certificate.

        Raises:
            StaleTraceError: the block gives another output than when the trace was taken.
        """
        self._trace, self.layer, self.src = trace, layer, src
        self.topology, self.d_model = trace.topology, trace.d_model
        self.block = trace.model.blocks[layer]
        stream = trace.block_input(layer)
        self.resid_pre = stream[0]
        self.mlp_input = trace.mlp_input(layer)[0]
        generator = torch.Generator().manual_seed(layer)
        self.probe = torch.randn(self.d_model, generator=generator, dtype=stream.dtype).to(stream.device)
        self.attn_run = run_sublayer(trace, layer, "attn", stream, src, self.probe)
        trace.check_current("attn", layer, self.attn_run.out)
        self._mlp_run: tuple[int, Run] | None = None  # of the last position
        self._pair: tuple[int, int] | None = None
        self._shared: dict[str, LinearMap] = {}

    def sublayer(self, name: str, src: int, dest: int, head: int | None = None) -> LinearMap:
        """The Jacobian of ``block``, ``attn`` or ``mlp`` (or of one head's share of ``attn``).

        Raises:
            Uncovered: no closed form here.
        """
        if head is not None:
            return self._attn(src, dest, head)
        if name == "mlp" and src != dest:
            return Zero(self.d_model, self.resid_pre)
        if self._pair != (src, dest):
            self._pair, self._shared = (src, dest), {}
        if name == "attn":
            return self._share("attn", lambda: self._attn(src, dest))
        if name == "mlp":
            return self._share("mlp", lambda: self._mlp(dest))
        attn = self.sublayer("attn", src, dest)
        if self.topology == "attn_only":
            return attn
        if self.topology == "sequential":
            return BlockMap(attn, self._share("mlp", lambda: self._mlp(dest)), skip=src == dest)
        return attn + self.sublayer("mlp", src, dest) if src == dest else attn

    def _share(self, name: str, make: Callable[[], LinearMap]) -> LinearMap:
        """A sublayer's map at the current pair, made once: the block and the sublayer share its matrix."""
        if name not in self._shared:
            self._shared[name] = Shared(make())
        return self._shared[name]

    def _attn(self, src: int, dest: int, head: int | None = None) -> LinearMap:
        """J_attn: output projection, attention core, q, k and v projections, norm."""
        self._refuse_post_norm("ln1_post")
        core = self._core
        q_blocks, k_blocks, v_blocks = core.blocks(src, dest)
        terms = [(k_blocks, "W_K"), (v_blocks, "W_V")]
        if src == dest:
            terms.append((q_blocks, "W_Q"))
        branches = []
        for blocks, name in terms:
            weight = rearrange(self._weight(self.block.attn, name), "group d e -> group e d")
            n_groups = weight.shape[0]
            groups = torch.arange(core.n_heads, device=weight.device) // (core.n_heads // n_groups)
            if head is not None:
                blocks, groups = blocks[head : head + 1], groups[head : head + 1]
            projection = Projection(weight.reshape(-1, self.d_model))
            branches.append(HeadMap(blocks, groups, n_groups) @ projection)
        write = self._weight(self.block.attn, "W_O")
        if head is not None:
            write = write[head : head + 1]
        out = Projection(rearrange(write, "head e d -> d (head e)"))
        return out @ Sum(branches) @ self._norm("ln1", self.attn_run.values, self.resid_pre[src], src)

    def _mlp(self, pos: int) -> LinearMap:
        """J_mlp: output projection, activation, input projections, norm."""
        self._refuse_post_norm("ln2_post")
        run = self.mlp_run(pos)
        slopes = self._activation_slopes(run)
        names = ["W_in"] if len(slopes) == 1 else ["W_gate", "W_in"]
        branches = [
            Diagonal(slope) @ Projection(self._weight(self.block.mlp, name).mT)
            for slope, name in zip(slopes, names, strict=True)
        ]
        inner = branches[0] if len(branches) == 1 else Sum(branches)
        out = Projection(self._weight(self.block.mlp, "W_out").mT)
        reads = "ln1" if getattr(self.block, "ln2", None) is None else "ln2"
        return out @ inner @ self._norm(reads, run.values, self.mlp_input[pos], 0)

    def mlp_run(self, pos: int) -> Run:
        """Run the MLP on one row, along what the probe at that position becomes at the MLP's input.

        Raises:
            Uncovered: the MLP cannot be run by itself.
        """
        if self._mlp_run is not None and self._mlp_run[0] == pos:
            return self._mlp_run[1]
        direction = self.probe
        if self.topology == "sequential" and self.attn_run.tangent is not None:
            reached = self.attn_run.tangent[pos]
            direction = self.probe + reached if pos == self.src else reached
        row = self.mlp_input[None, pos : pos + 1]
        try:
            run = run_sublayer(self._trace, self.layer, "mlp", row, 0, direction)
        except TypeError as error:
            raise Uncovered(f"the MLP cannot be run by itself ({error})") from error
        self._trace.check_current("mlp", self.layer, run.out, pos)
        self._mlp_run = (pos, run)
        return run

    def _weight(self, module: Any, name: str) -> Tensor:
        """A weight in TransformerLens's orientation, lifted to the dtype of the work."""
        weight = getattr(module, name, None)
        if weight is None:
            raise Uncovered(f"{type(module).__name__} has no {name}")
        return weight.detach().to(self.resid_pre)

    def _refuse_post_norm(self, name: str) -> None:
        if getattr(self.block, name, None) is not None:
            raise Uncovered(f"{name}: norms behind a sublayer are left to autograd")

    def _norm(self, name: str, values: Mapping[str, Tensor], stream: Float[Tensor, " d_model"], pos: int) -> LinearMap:
        """The derivative of a block's norm at one position; the identity where there is none."""
        point = f"{name}.hook_scale"
        if point not in values:
            if isinstance(getattr(self.block, name, None), torch.nn.Identity):
                return Identity(self.d_model, stream)
            raise Uncovered(f"{name} has no hook_scale")
        gain, centered, eps = self._norm_behaviour(name)
        scale = values[point][pos, 0].to(stream)
        inner = stream - stream.mean() if centered else stream
        if not _close(scale.square(), inner.square().mean() + eps):
            raise Uncovered(f"{name} is neither a LayerNorm nor an RMSNorm of the stream")
        return NormMap(inner / scale, scale, gain, centered)

    def _norm_behaviour(self, name: str) -> tuple[Float[Tensor, " d_model"], bool, Float[Tensor, ""]]:
        """Gain, centring and epsilon of a norm, from what it makes of an input, its opposite and a shift of it.

        So a folded gain, one stored as 1 + w (Gemma) and any other convention need no case of their own.
        """
        signs = torch.ones(self.d_model, dtype=self.resid_pre.dtype, device=self.resid_pre.device)
        signs[::2] = -1.0
        kept: list[Tensor] = []
        point = self._trace.point(self.layer, f"{name}.hook_scale")
        with torch.no_grad(), lifted(self._trace.model, self.block), attached([(point, kept.append)]):
            out = getattr(self.block, name)(torch.stack([signs, -signs, signs + 3.0])[None])[0]
        centered = _close(out[2], out[0])
        inner = signs - signs.mean() if centered else signs
        scale = kept[0][0, 0, 0].to(signs)
        gain = (out[0] - out[1]) * scale / (2 * inner)
        return gain, centered, scale.square() - inner.square().mean()

    def _activation_slopes(self, run: Run) -> list[Float[Tensor, " d_mlp"]]:
        """Slopes of hook_post on hook_pre (and on hook_pre_linear of a gated MLP) of a run on one row, by autograd.

        The activation is pointwise, so the gradient of the sum of its outputs is the diagonal of its derivative. The
        MLP itself is run, with its pre-activations put in place as leaves.
        """
        leaves = {name: run.values[name][None].clone().requires_grad_() for name in _MLP_INPUTS if name in run.values}
        if _MLP_INPUTS[0] not in leaves or _MLP_OUTPUT not in run.values:
            raise Uncovered("the MLP has no hook_pre and hook_post")
        kept: list[Tensor] = []
        hooks: list[tuple[Any, Hook]] = [(self._trace.point(self.layer, _MLP_OUTPUT), kept.append)]
        for name, leaf in leaves.items():
            hooks.append((self._trace.point(self.layer, name), lambda tensor, leaf=leaf: leaf))
        stand_in = torch.zeros_like(self.resid_pre[None, :1])
        with torch.enable_grad(), lifted(self._trace.model, self.block), attached(hooks):
            self.block.mlp(stand_in)
            grads = torch.autograd.grad(kept[0].sum(), list(leaves.values()), allow_unused=True)
        if any(grad is None for grad in grads) or not _close(kept[0][0], run.values[_MLP_OUTPUT]):
            raise Uncovered("hook_post of the MLP is no function of hook_pre and hook_pre_linear alone")
        return [grad[0, 0] for grad in grads]

    @cached_property
    def _core(self) -> AttentionCore:
        return AttentionCore.from_values(self.block.attn, self.attn_run.values)


@dataclass(frozen=True)
class AttentionCore:
    """The attention core of a block: from queries, keys and values to z.

    Attributes:
        pattern: ``[head, dest, src]``.
        values: v, one per head (groups expanded), ``[src, head, e]``.
        queries, keys: after rotation, ``[pos, head, e]``.
        scale: c, the factor of q . k in the scores.
        rotary: the rotation between q and queries, k and keys; None without rotary positions.
    """

    pattern: Float[Tensor, "head dest src"]
    values: Float[Tensor, "src head e"]
    queries: Float[Tensor, "pos head e"]
    keys: Float[Tensor, "pos head e"]
    scale: Float[Tensor, ""]
    rotary: Rotary | None

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.pattern.shape[0]

    @classmethod
    def from_values(cls, attn: Any, values: Mapping[str, Tensor]) -> AttentionCore:
        """Read the core off a block's values, and check that they fit it.

        Raises:
            Uncovered: a hook point is missing, or the pattern is no softmax of a multiple of q . k.
        """
        for name in ("q", "k", "v", "pattern"):
            if f"attn.hook_{name}" not in values:
                raise Uncovered(f"the attention has no hook_{name}")
        q, k, v, pattern = (values[f"attn.hook_{name}"] for name in ("q", "k", "v", "pattern"))
        rotary = Rotary.from_values(attn, values)
        queries, keys = (q, k) if rotary is None else (rotary.apply(q), rotary.apply(k))
        for name, ours in (("rot_q", queries), ("rot_k", keys)):
            theirs = values.get(f"attn.hook_{name}")
            if theirs is not None and not _close(ours, theirs):
                raise Uncovered(f"hook_{name} is not the rotation of the query or key before it")
        heads = pattern.shape[0]
        keys = keys.repeat_interleave(heads // keys.shape[1], dim=1)
        v = v.repeat_interleave(heads // v.shape[1], dim=1)
        products = einsum(queries, keys, "dest head e, src head e -> head dest src")
        scale = _score_scale(products, pattern.to(products), q.shape[-1])
        return cls(pattern.to(q), v, queries, keys, scale, rotary)

    def blocks(self, src: int, dest: int) -> tuple[Tensor, Tensor, Tensor]:
        """dz_dest per head with respect to its q at dest, its k at src and its v at src, each ``[head, e, e]``."""
        p = self.pattern[:, dest, : dest + 1]
        v = self.values[: dest + 1]
        z = einsum(p, v, "head src, src head e -> head e")
        weighted = self.scale * einsum(p, v - z, "head src, src head e -> src head e")
        by_q = einsum(weighted, self.keys[: dest + 1], "src head e, src head f -> head e f")
        by_k = einsum(weighted[src], self.queries[dest], "head e, head f -> head e f")
        if self.rotary is not None:
            by_q, by_k = by_q @ self.rotary.matrix(dest), by_k @ self.rotary.matrix(src)
        eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        by_v = self.pattern[:, dest, src, None, None] * eye
        return by_q, by_k, by_v


def _score_scale(
    products: Float[Tensor, "head dest src"], pattern: Float[Tensor, "head dest src"], d_head: int
) -> Float[Tensor, ""]:
    """The factor c with which pattern = softmax(c q . k), by least squares on the log-pattern less its mean per row.

    Rounding leaves c a relative error that grows as attention gets more even; a c that is 1 / sqrt(d_head) to that error
    is taken as such.

    Raises:
        Uncovered: there is none.
    """
    seen = pattern > 0
    count = seen.sum(-1, keepdim=True)

    def centered(rows: Tensor) -> Tensor:
        rows = rows.where(seen, 0.0)
        return (rows - rows.sum(-1, keepdim=True) / count).where(seen, 0.0)

    x, y = centered(products), centered(pattern.log())
    usual = products.new_tensor(d_head**-0.5)
    scale = (x * y).sum() / x.square().sum()
    if not (scale - usual).abs() > 1e-2 * usual:  # also where a single position leaves it open
        scale = usual
    if not _close((scale * products).where(seen, -torch.inf).softmax(-1), pattern):
        raise Uncovered(
            "the attention pattern is no softmax of a multiple of q . k (a bias, a soft-cap or a norm between)"
        )
    return scale


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
    def from_values(cls, attn: Any, values: Mapping[str, Tensor]) -> Rotary | None:
        """Read the angles off the block: its hooked cosines and sines, or its buffers; None if it has neither."""
        q = values["attn.hook_q"]
        length, size = q.shape[0], q.shape[-1]
        if "attn.hook_cos" in values:
            cos, sin = values["attn.hook_cos"].to(q), values["attn.hook_sin"].to(q)
            eye = torch.eye(cos.shape[-1], dtype=q.dtype, device=q.device)
            first, second = eye.chunk(2, dim=-1)
            turn = torch.cat([-second, first], dim=-1).mT  # HuggingFace's rotate_half of each basis vector
        elif hasattr(attn, "rotary_cos"):
            cos, sin = attn.rotary_cos[:length].to(q), attn.rotary_sin[:length].to(q)
            eye = torch.eye(cos.shape[-1], dtype=q.dtype, device=q.device)
            turn = attn.rotate_every_two(eye).mT
        elif getattr(attn, "rotary", None) is not None:  # TransformerLens's native models
            cos, sin = attn.rotary.cos_cached[:length].to(q), attn.rotary.sin_cached[:length].to(q)
            eye = torch.eye(cos.shape[-1], dtype=q.dtype, device=q.device)
            turn = attn.rotary._rotate_half(eye).mT
        else:
            return None
        turned = cos.shape[-1]
        all_cos, all_sin = q.new_ones(length, size), q.new_zeros(length, size)
        all_cos[:, :turned], all_sin[:, :turned] = cos, sin
        quarter_turn = q.new_zeros(size, size)
        quarter_turn[:turned, :turned] = turn
        return cls(all_cos, all_sin, quarter_turn)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors agree to ``_FIT`` of the larger's largest entry."""
    scale = torch.maximum(ours.abs().max(), theirs.abs().max())
    return bool((ours - theirs.to(ours)).abs().max() <= _FIT * scale)
