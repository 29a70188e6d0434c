r"""The analytic engine: Jacobians in closed form from the activations of one block run and the weights.

For one pair (src, dest), so that only the attention's own values need the rest of the sequence:

- norm: J = diag(g) (C - x_hat x_hat^T / d) / r (``norms``);
- attention core of head h, pattern p, values v, z = sum_s p_s v_s, scores of slope f' (``attention``, ``scores``):
  dz_dest = sum_s p_s dv_s + sum_s f'_s p_s (v_s - z) (k_s . dq + q . dk_s);
- MLP: W_out diag(act'(pre)) W_in; gated: W_out (diag(act'(pre) pre_linear) W_gate + diag(act(pre)) W_in).

What a block does is read from how it behaves, not from its class: what a norm does, the rotation at a position and
the scores behind a pattern are each taken from the block's own values and checked against them. Where they do not fit,
the sublayer is ``Uncovered`` and goes to autograd.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from tlcoupling.errors import StaleTraceError
from tlcoupling.hooked import Hook, lifted
from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.maps import BlockMap, Diagonal, HeadMap, Identity, LinearMap, Projection, Shared, Sum, Zero
from tlcoupling.jacobian.norms import Norm, Uncovered, close, write_factor
from tlcoupling.trace import Trace

_ATTN_POINTS = tuple(f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "cos", "sin", "pattern", "out"))
_MLP_INPUTS = ("mlp.hook_pre", "mlp.hook_pre_linear")
_MLP_OUTPUT = "mlp.hook_post"
_MLP_POINTS = (*_MLP_INPUTS, _MLP_OUTPUT, "mlp.hook_out")
_POST_NORMS = ("ln1_post", "ln2_post")

# How a trace runs a sublayer: layer, stream, hooks.
_Runner = Callable[[int, Tensor, Mapping[str, Hook]], Tensor]


@dataclass(frozen=True)
class Run:
    """One run of a sublayer's own modules.

    Attributes:
        values: recorded activations by short hook name, and what a post-norm read by its name, without batch axis.
        out: what the sublayer wrote, ``[pos, d_model]``.
        pos: the row of ``out`` that was asked for.
        direction: a direction at that row of its input, ``[d_model]``.
        tangent: the derivative of ``out`` along it; None where a module has no forward-mode derivative.
    """

    values: Mapping[str, Tensor]
    out: Float[Tensor, "pos d_model"]
    pos: int
    direction: Float[Tensor, " d_model"]
    tangent: Float[Tensor, "pos d_model"] | None


def run_sublayer(
    trace: Trace,
    layer: int,
    run: _Runner,
    points: Iterable[str],
    stream: Float[Tensor, "1 pos d_model"],
    pos: int,
    direction: Float[Tensor, " d_model"],
) -> Run:
    """Run a sublayer in forward mode along a direction at one position, and record its values."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda tensor: kept.__setitem__(name, forward_ad.unpack_dual(tensor).primal[0].clone())

    hooks = {name: keep(name) for name in points if trace.point(layer, name) is not None}
    moved = torch.zeros_like(stream)
    moved[0, pos] = direction
    with ExitStack() as stack:
        for name in _POST_NORMS:
            if isinstance(module := getattr(trace.model.blocks[layer], name, None), torch.nn.Module):
                stack.callback(module.register_forward_pre_hook(_on_input(keep(name))).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(forward_ad.dual_level())
        stack.enter_context(warnings.catch_warnings())
        # the first forward-mode derivative loads torch's decompositions, which warn of themselves
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        try:
            out, tangent = forward_ad.unpack_dual(run(layer, forward_ad.make_dual(stream, moved), hooks))
            tangent = torch.zeros_like(out) if tangent is None else tangent
            return Run(kept, out[0].clone(), pos, direction, tangent[0].clone())
        except (NotImplementedError, RuntimeError):  # no forward-mode rule: the caller takes another way
            kept.clear()
            return Run(kept, run(layer, stream, hooks)[0].clone(), pos, direction, None)


def _on_input(function: Callable[[Tensor], None]) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """As a pre-hook of a module."""
    return lambda module, args: function(args[0])


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
        self.attn_run = run_sublayer(trace, layer, trace.run_attn, _ATTN_POINTS, stream, src, self.probe)
        trace.check_current("attn", layer, self.attn_run.out)
        self._mlp_run: tuple[int, Run] | None = None  # of the last position
        self._mlp_alone = True  # until it turns out that only its block can run the MLP
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
        """J_attn: post-norm, output projection, attention core, QK-norm, q, k and v projections, norm.

        A head's share of the write is taken before the post-norm, which mixes the heads.
        """
        core = self._core
        q_blocks, k_blocks, v_blocks = core.blocks(src, dest)
        terms = [(k_blocks, "W_K", core.n_groups, core.k_norm, src), (v_blocks, "W_V", core.n_groups, None, src)]
        if src == dest:
            terms.append((q_blocks, "W_Q", core.n_heads, core.q_norm, dest))
        branches = []
        for blocks, name, n_groups, norm, pos in terms:
            weight = self._weight(self.block.attn, name)
            # HookedTransformer repeats a group's weights for each of its heads
            weight = rearrange(weight[:: weight.shape[0] // n_groups], "group d e -> (group e) d")
            groups = torch.arange(core.n_heads, device=weight.device) // (core.n_heads // n_groups)
            if head is not None:
                blocks, groups = blocks[head : head + 1], groups[head : head + 1]
            heads = HeadMap(blocks, groups, n_groups)
            branches.append((heads if norm is None else heads @ norm.derivative(pos)) @ Projection(weight))
        write = self._weight(self.block.attn, "W_O")
        if head is not None:
            write = write[head : head + 1]
        factor = write_factor(self.attn_run.values.get("attn.hook_out"), self.attn_run.out)
        out = Projection(factor * rearrange(write, "head e d -> d (head e)"))
        whole = out @ Sum(branches) @ self._norm("ln1", self.resid_pre[src])
        written = self.attn_run.values.get("ln1_post")
        return whole if head is not None or written is None else self._norm("ln1_post", written[dest]) @ whole

    def _mlp(self, pos: int) -> LinearMap:
        """J_mlp: post-norm, output projection, activation, input projections, norm."""
        run = self.mlp_run(pos)
        slopes = self._activation_slopes(run, pos)
        names = ["W_in"] if len(slopes) == 1 else ["W_gate", "W_in"]
        branches = [
            Diagonal(slope) @ Projection(self._weight(self.block.mlp, name).mT)
            for slope, name in zip(slopes, names, strict=True)
        ]
        inner = branches[0] if len(branches) == 1 else Sum(branches)
        factor = write_factor(run.values.get("mlp.hook_out"), run.out)
        out = Projection(factor * self._weight(self.block.mlp, "W_out").mT)
        reads = "ln1" if getattr(self.block, "ln2", None) is None else "ln2"
        whole = out @ inner @ self._norm(reads, self.mlp_input[pos])
        written = run.values.get("ln2_post")
        return whole if written is None else self._norm("ln2_post", written[run.pos]) @ whole

    def mlp_run(self, pos: int) -> Run:
        """Run the MLP at one position, along what the probe becomes at the MLP's input there.

        It runs by itself on that one row, or, where its module cannot, inside its block on all rows.

        Raises:
            StaleTraceError: it gives another output than when the trace was taken.
        """
        if self._mlp_run is not None and self._mlp_run[0] == pos:
            return self._mlp_run[1]
        direction = self.probe
        if self.topology == "sequential" and self.attn_run.tangent is not None:
            reached = self.attn_run.tangent[pos]
            direction = self.probe + reached if pos == self.src else reached
        run = None
        if self._mlp_alone:
            try:
                run = run_sublayer(
                    self._trace, self.layer, self._trace.run_mlp, _MLP_POINTS, *self._mlp_rows(pos), direction
                )
                self._trace.check_current("mlp", self.layer, run.out, pos)
            except (TypeError, ValueError, RuntimeError, AttributeError, StaleTraceError):
                # BLOOM's and MPT's MLPs add the residual stream themselves, OPT's is no module of its own
                self._mlp_alone, run = False, None
        if run is None:
            run_mlp = self._trace.run_mlp_in_block
            run = run_sublayer(self._trace, self.layer, run_mlp, _MLP_POINTS, *self._mlp_rows(pos), direction)
            self._trace.check_current("mlp", self.layer, run.out)
        self._mlp_run = (pos, run)
        return run

    def _mlp_rows(self, pos: int) -> tuple[Float[Tensor, "1 row d_model"], int]:
        """What the MLP is run on, and the row of it that is the position."""
        return (self.mlp_input[None, pos : pos + 1], 0) if self._mlp_alone else (self.mlp_input[None], pos)

    def _weight(self, module: Any, name: str) -> Tensor:
        """A weight in TransformerLens's orientation, lifted to the dtype of the work."""
        weight = getattr(module, name, None)
        if weight is None:
            raise Uncovered(f"{type(module).__name__} has no {name}")
        return weight.detach().to(self.resid_pre)

    def _norm(self, name: str, x: Float[Tensor, " d_model"]) -> LinearMap:
        """The derivative of one of the block's norms at x; the identity where there is none."""
        module = getattr(self.block, name, None)
        if module is None or isinstance(module, torch.nn.Identity):
            return Identity(self.d_model, x)
        with lifted(self._trace.model, module):
            return Norm.read(module, x[None], name).derivative(x)

    def _activation_slopes(self, run: Run, pos: int) -> list[Float[Tensor, " d_mlp"]]:
        """Slopes of hook_post on hook_pre (and on hook_pre_linear of a gated MLP) at one position, by autograd.

        The activation is pointwise, so the gradient of the sum of its outputs is the diagonal of its derivative. The
        MLP itself is run, with its pre-activations put in place as leaves.
        """
        leaves = {name: run.values[name][None].clone().requires_grad_() for name in _MLP_INPUTS if name in run.values}
        if _MLP_INPUTS[0] not in leaves or _MLP_OUTPUT not in run.values:
            raise Uncovered("the MLP has no hook_pre and hook_post")
        kept: list[Tensor] = []
        hooks: dict[str, Hook] = {name: lambda tensor, leaf=leaf: leaf for name, leaf in leaves.items()}
        hooks[_MLP_OUTPUT] = kept.append
        again = self._trace.run_mlp if self._mlp_alone else self._trace.run_mlp_in_block
        with torch.enable_grad():
            again(self.layer, self._mlp_rows(pos)[0], hooks)
            out = kept[0][0, run.pos].sum()
            grads = torch.autograd.grad(out, list(leaves.values()), allow_unused=True) if out.requires_grad else [None]
        if any(grad is None for grad in grads) or not close(kept[0][0], run.values[_MLP_OUTPUT]):
            raise Uncovered("hook_post of the MLP is no function of hook_pre and hook_pre_linear alone")
        return [grad[0, run.pos] for grad in grads if grad is not None]

    @cached_property
    def _core(self) -> AttentionCore:
        return AttentionCore.from_values(self.block.attn, self._trace.model.cfg, self.attn_run.values)
