r"""The analytic engine: Jacobians in closed form from the activations of one block run and the weights.

For one pair (src, dest), so that only the attention's own values need the rest of the sequence; what all pairs of a
layer share (one run of its attention, one of its MLP at the positions asked for, norms, weights) is done once:

- norm: J = diag(g) (C - x_hat x_hat^T / d) / r (``norms``);
- attention core of head h, pattern p, values v, z = sum_s p_s v_s, scores of slope f' (``attention``, ``scores``):
  dz_dest = sum_s p_s dv_s + sum_s f'_s p_s (v_s - z) (k_s . dq + q . dk_s);
- MLP: W_out diag(act'(pre)) W_in; gated: W_out (diag(act'(pre) pre_linear) W_gate + diag(act(pre)) W_in).

What a block does is read from how it behaves, not from its class: what a norm does, the rotation at a position and
the scores behind a pattern are each taken from the block's own values and checked against them. Where they do not fit,
the sublayer is ``Uncovered`` and goes to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tlcoupling.errors import StaleTraceError
from tlcoupling.forward.lifting import lifted
from tlcoupling.forward.trace import Trace
from tlcoupling.forward.weights import weight_of
from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.norms import Norm, Uncovered, write_factor
from tlcoupling.jacobian.parts import BlockMap, HeadMap
from tlcoupling.jacobian.runs import Run, run_sublayer
from tlcoupling.linalg.maps import Diagonal, Identity, Projection, Shared, Zero
from tlcoupling.linalg.operator import JacobianOperator, Sum

_ATTN_POINTS = tuple(f"attn.hook_{name}" for name in ("q", "k", "v", "rot_q", "rot_k", "cos", "sin", "pattern", "out"))
_MLP_INPUTS = ("mlp.hook_pre", "mlp.hook_pre_linear")
_MLP_OUTPUT = "mlp.hook_post"
_MLP_POINTS = (*_MLP_INPUTS, _MLP_OUTPUT, "mlp.hook_out")


class AnalyticLayer:
    """The closed forms of one block, from runs of its own sublayers."""

    def __init__(self, trace: Trace, layer: int, dests: Iterable[int] = ()) -> None:
        """Run the attention once, for its values and its certificate.

        Args:
            trace: a trace of the model.
            layer: block index.
            dests: positions whose MLP will be asked for, to be run together; others are run by themselves.

        Raises:
            StaleTraceError: the block gives another output than when the trace was taken.
        """
        self._trace, self.layer = trace, layer
        self.topology, self.d_model = trace.topology, trace.d_model
        self.block = trace.model.blocks[layer]
        stream = trace.block_input(layer)
        self.resid_pre = stream[0]
        self.mlp_input = trace.mlp_input(layer)[0]
        self.attn_run = run_sublayer(trace, layer, trace.run_attn, _ATTN_POINTS, stream)
        trace.check_current("attn", layer, self.attn_run.out)
        self._dests = tuple(sorted(set(dests)))
        self._mlp_run: tuple[tuple[int, ...], Run] | None = None  # the last one, with its positions
        self._mlp_slopes: list[Float[Tensor, "row d_mlp"]] = []  # of that run; empty where they cannot be told
        self._mlp_pulled: dict[int, Float[Tensor, " d_model"]] = {}  # by position
        self._mlp_alone = True  # until it turns out that only its block can run the MLP
        self._weights: dict[tuple[str, str], Tensor] = {}
        self._norms: dict[str, Norm | None] = {}
        self._shared: dict[str, tuple[tuple[int, ...], JacobianOperator]] = {}

    def sublayer(self, name: str, src: int, dest: int, head: int | None = None) -> JacobianOperator:
        """The Jacobian of ``block``, ``attn`` or ``mlp`` (or of one head's share of ``attn``).

        Raises:
            Uncovered: no closed form here.
        """
        if head is not None:
            return self._attn(src, dest, head)
        if name == "mlp" and src != dest:
            return Zero(self.d_model, self.resid_pre)
        if name == "attn":
            return self._share("attn", (src, dest), self._attn)
        if name == "mlp":
            return self._share("mlp", (dest,), self._mlp)
        attn = self.sublayer("attn", src, dest)
        if self.topology == "attn_only":
            return attn
        if self.topology == "sequential":
            return BlockMap(attn, self.sublayer("mlp", dest, dest), skip=src == dest)
        return attn + self.sublayer("mlp", src, dest) if src == dest else attn

    def _share(self, name: str, place: tuple[int, ...], make: Callable[..., JacobianOperator]) -> JacobianOperator:
        """A sublayer's map at a place, made once in a row: the block shares it, and so do all src of one dest."""
        if name not in self._shared or self._shared[name][0] != place:
            self._shared[name] = (place, Shared(make(*place)))
        return self._shared[name][1]

    def _attn(self, src: int, dest: int, head: int | None = None) -> JacobianOperator:
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
            weight = self._weight("attn", name)
            # HookedTransformer repeats a group's weights for each of its heads
            weight = rearrange(weight[:: weight.shape[0] // n_groups], "group d e -> (group e) d")
            groups = torch.arange(core.n_heads, device=weight.device) // (core.n_heads // n_groups)
            if head is not None:
                blocks, groups = blocks[head : head + 1], groups[head : head + 1]
            heads = HeadMap(blocks, groups, n_groups)
            branches.append((heads if norm is None else heads @ norm.derivative(pos)) @ Projection(weight))
        write = self._weight("attn", "W_O")
        if head is not None:
            write = write[head : head + 1]
        out = _scaled(self._attn_factor, rearrange(write, "head e d -> d (head e)"))
        whole = out @ Sum(branches) @ self._norm("ln1", self.resid_pre, src)
        written = self.attn_run.values.get("ln1_post")
        return whole if head is not None or written is None else self._norm("ln1_post", written, dest) @ whole

    def _mlp(self, pos: int) -> JacobianOperator:
        """J_mlp: post-norm, output projection, activation, input projections, norm."""
        run, row = self.mlp_run(pos)
        if not self._mlp_slopes:
            raise Uncovered("hook_post of the MLP is no function of hook_pre (and hook_pre_linear)")
        names = ["W_in"] if len(self._mlp_slopes) == 1 else ["W_gate", "W_in"]
        branches = [
            Diagonal(slope[row]) @ Projection(self._weight("mlp", name).mT)
            for slope, name in zip(self._mlp_slopes, names, strict=True)
        ]
        inner = branches[0] if len(branches) == 1 else Sum(branches)
        written = run.values.get("ln2_post")
        factor = write_factor(run.values.get("mlp.hook_out"), run.out, normed=written is not None)
        out = _scaled(factor, self._weight("mlp", "W_out").mT)
        reads = "ln1" if getattr(self.block, "ln2", None) is None else "ln2"
        whole = out @ inner @ self._norm(reads, self.mlp_input, pos)
        return whole if written is None else self._norm("ln2_post", written, row) @ whole

    def mlp_run(self, pos: int) -> tuple[Run, int]:
        """A run of the MLP that has a position, and its row there.

        It runs by itself on the rows asked for, or, where its module cannot, inside its block on all rows.

        Raises:
            StaleTraceError: it gives another output than when the trace was taken.
        """
        if self._mlp_run is None or pos not in self._mlp_run[0]:
            self._mlp_run = self._run_mlp(self._dests if pos in self._dests else (pos,))
            self._mlp_slopes = self._activation_slopes(self._mlp_run[1])
        rows, run = self._mlp_run
        return run, rows.index(pos)

    def mlp_pulled(self, cotangent: Float[Tensor, " d_model"], pos: int) -> Float[Tensor, " d_model"]:
        """J_mlp^T y by the real modules, for the one cotangent that certifies this layer.

        The graph of the run goes with it: it holds the MLP's lifted weights, where the model is half precision.
        """
        if pos not in self._mlp_pulled:
            run, row = self.mlp_run(pos)
            if self._mlp_pulled:
                rows, run = self._run_mlp((pos,))
                row = rows.index(pos)
            self._mlp_pulled[pos] = run.pull(cotangent, row, again=False)[row]
        return self._mlp_pulled[pos]

    def _run_mlp(self, rows: tuple[int, ...]) -> tuple[tuple[int, ...], Run]:
        """Run the MLP on the rows, or on all of them inside its block; the rows it ran on come with the run."""
        if self._mlp_alone:
            try:
                stream = self.mlp_input[None, list(rows)]
                run = run_sublayer(self._trace, self.layer, self._trace.run_mlp, _MLP_POINTS, stream)
                self._trace.check_current("mlp", self.layer, run.out, rows)
                return rows, run
            except (TypeError, ValueError, RuntimeError, AttributeError, StaleTraceError):
                # BLOOM's and MPT's MLPs add the residual stream themselves, OPT's is no module of its own
                self._mlp_alone = False
        inside = self._trace.run_mlp_in_block
        run = run_sublayer(self._trace, self.layer, inside, _MLP_POINTS, self.mlp_input[None])
        self._trace.check_current("mlp", self.layer, run.out)
        return tuple(range(len(self.mlp_input))), run

    def _weight(self, part: str, name: str) -> Tensor:
        """A weight of ``attn`` or ``mlp`` in TransformerLens's orientation, lifted to the dtype of the work."""
        if (part, name) not in self._weights:
            module = getattr(self.block, part)
            weight = weight_of(module, name)
            if weight is None:
                raise Uncovered(f"{type(module).__name__} has no {name}")
            self._weights[part, name] = weight.detach().to(self.resid_pre)
        return self._weights[part, name]

    def _norm(self, name: str, inputs: Float[Tensor, "row d_model"], row: int) -> JacobianOperator:
        """The derivative of one of the block's norms at one of its inputs; the identity where there is none."""
        if name not in self._norms:
            module = getattr(self.block, name, None)
            self._norms[name] = None
            if module is not None and not isinstance(module, torch.nn.Identity):
                with lifted(self._trace.model, module):
                    self._norms[name] = Norm.read(module, inputs, name)
        norm = self._norms[name]
        return Identity(self.d_model, inputs) if norm is None else norm.derivative(inputs[row])

    def _activation_slopes(self, run: Run) -> list[Float[Tensor, "row d_mlp"]]:
        """Slopes of hook_post on hook_pre (and on hook_pre_linear of a gated MLP) at each row of a run, by autograd.

        The activation is pointwise, so the gradient of the sum of its outputs is the diagonal of its derivative. Empty
        where that cannot be told.
        """
        inputs = [name for name in _MLP_INPUTS if name in run.values]
        if _MLP_INPUTS[0] not in inputs or _MLP_OUTPUT not in run.values:
            return []
        found = run.slopes(_MLP_OUTPUT, inputs)
        known = [slope for slope in found if slope is not None]
        return known if len(known) == len(found) else []

    @cached_property
    def _core(self) -> AttentionCore:
        for name in ("W_Q", "W_K", "W_V", "W_O"):  # without which the values of an attention mean something else
            self._weight("attn", name)
        return AttentionCore.from_values(self._trace.model, self.block.attn, self.attn_run.values)

    @cached_property
    def _attn_factor(self) -> float:
        values = self.attn_run.values
        return write_factor(values.get("attn.hook_out"), self.attn_run.out, normed="ln1_post" in values)


def _scaled(factor: float, weight: Float[Tensor, "m n"]) -> Projection:
    """Factor * W, without a copy where the factor is 1."""
    return Projection(weight if factor == 1 else factor * weight)
