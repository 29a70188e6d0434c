r"""The analytic engine: Jacobians in closed form from the activations of one block run and the weights.

The formula is in ``formula``; here its parts are read: the derivatives of norms (``norms``), the attention core
(``attention``, ``scores``), the slopes of the activation, the weights. One pair (src, dest) is taken at a time. What
all pairs of a layer share is computed once: a run of the block (``runs``), norms and weights.

What a block does is read from how it behaves, not from its class. What a norm does, the rotation at a position and the
scores behind a pattern are each taken from the block's activations and checked against them. Where they do not fit, the
sublayer is ``Uncovered`` and goes to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from weakref import WeakValueDictionary

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tlcoupling.errors import StaleTraceError, UnsupportedModelError
from tlcoupling.forward.block import Sublayer, Uncovered, close
from tlcoupling.jacobian.attention import AttentionCore
from tlcoupling.jacobian.flow import NormFlow, attention_flow, mlp_flow
from tlcoupling.jacobian.formula import READS, attention_map, block_map, mlp_map
from tlcoupling.jacobian.mixture import Mixture
from tlcoupling.jacobian.norms import Norm
from tlcoupling.jacobian.readings import HeadNorm, Latent, head_readings
from tlcoupling.jacobian.runs import VALUES, BlockRun, Run
from tlcoupling.linalg.maps import Identity, Shared, Zero
from tlcoupling.linalg.operator import JacobianOperator

_BEFORE_ATTN, _BEFORE_MLP = "the norm before the attention", "the norm before the MLP"
_BEHIND_ATTN, _BEHIND_MLP = "the norm behind the attention", "the norm behind the MLP"
_NAMES = {"attn": "attention", "mlp": "MLP"}
# By weight: the part of the sublayer's module that applies it, as a bridge names it.
_PARTS = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_in": "in", "W_gate": "gate", "W_out": "out"}


class AnalyticLayer:
    """The closed forms of one block, from a run of its own modules.

    Attributes:
        run: the run of the block.
        layer: block index.
    """

    def __init__(self, run: BlockRun) -> None:
        """Take a layer."""
        self.run, self.trace, self.layer, self.block = run, run.trace, run.layer, run.block
        self.d_model = self.trace.d_model
        self.resid_pre = self.trace.block_input(self.layer)[0]
        self.mlp_input = self.trace.mlp_input(self.layer)[0]
        self._mixture_at: tuple[tuple[int, ...], Mixture] | None = None
        self._lifted: dict[str, Mapping[str, Tensor]] = {}  # weights, by sublayer
        self._applied: set[str] = set()  # sublayers whose activations are known to be what the weights make
        self._norms: dict[nn.Module, Norm] = {}
        self._made: WeakValueDictionary[tuple[str, tuple[int, ...]], JacobianOperator] = WeakValueDictionary()
        self._last: dict[str, JacobianOperator] = {}  # by sublayer

    @cached_property
    def _attn_run(self) -> Run:
        attn = self.block.mixer
        if attn.kind != "attn":
            raise Uncovered(f"{type(attn.module).__name__} is no attention, and has no closed form")
        return self.run.of(attn.name)

    @cached_property
    def _mlp_run(self) -> Run:
        return self.run.of("mlp")

    def sublayer(self, name: str, src: int, dest: int, head: int | None = None) -> JacobianOperator:
        """Return the Jacobian of ``block``, of the attention or of ``mlp`` (or of one head's share of the attention).

        Raises:
            Uncovered: there is no closed form, or reading the sublayer failed.
            StaleTraceError: a sublayer run again gives another output than in the trace.
            UnsupportedModelError: the attention cannot be split into heads.
        """
        with _uncovered_where_it_fails():
            return self._sublayer(name, src, dest, head)

    def parts(self, name: str, src: int, dest: int) -> list[JacobianOperator]:
        """Return the Jacobians of sublayers that one of ``sublayer`` is made of: of a block, those that src reaches.

        Raises:
            Uncovered, StaleTraceError, UnsupportedModelError: see ``sublayer``.
        """
        if name != "block":
            return [self.sublayer(name, src, dest)]
        topology = self.block.topology
        reached = topology == "sequential" or (topology == "parallel" and src == dest)
        attn = self.sublayer(self.block.mixer.name, src, dest)
        return [attn, self.sublayer("mlp", dest, dest)] if reached else [attn]

    def let_go(self) -> None:
        """Drop the attention core, which has keys and values of all positions; for further pairs it is made again."""
        vars(self).pop("_core", None)

    def flow(self, name: str) -> JacobianOperator:
        """Return the derivative of what a sublayer writes, at all positions, by the whole stream that it reads.

        Raises:
            Uncovered, StaleTraceError: see ``sublayer``; a mixture of experts has none yet.
        """
        with _uncovered_where_it_fails():
            return self._mlp_flow() if name == "mlp" else self._attention_flow()

    def _attention_flow(self) -> JacobianOperator:
        attn, run = self.block.mixer, self._attn_run
        before = self._norm_flow(attn.before, _BEFORE_ATTN, self.resid_pre)
        behind = self._norm_flow(attn.behind, _BEHIND_ATTN, run.unnormed)
        return attention_flow(self._core, self._attn_factor * self._weights(attn)["W_O"], before, behind)

    def _mlp_flow(self) -> JacobianOperator:
        mlp = self.block.mlp
        if mlp.has_experts:
            raise Uncovered("a mixture of experts has no closed form for all positions at once")
        self._mlp(0)  # the checks of one position are those of its run
        run = self._mlp_run
        before = self._norm_flow(mlp.before, _BEFORE_MLP, self.mlp_input)
        behind = self._norm_flow(mlp.behind, _BEHIND_MLP, run.unnormed)
        weights = self._weights(mlp)
        reads = [weights[name] for name in READS[len(self._mlp_slopes)]]
        write = mlp.write_factor(run.values.get(mlp.gives), run.out) * weights["W_out"]
        return mlp_flow(self._mlp_slopes, reads, write, before, behind)

    def _norm_flow(
        self, module: nn.Module | None, name: str, inputs: Float[Tensor, "pos d_model"] | None
    ) -> JacobianOperator:
        """The derivative of one of the block's norms at all positions; the identity where there is none."""
        norm = self._read_norm(module, name, inputs)
        if norm is None or inputs is None:
            return Identity(self.resid_pre.numel(), self.resid_pre)
        return NormFlow(norm, inputs)

    def _sublayer(self, name: str, src: int, dest: int, head: int | None) -> JacobianOperator:
        if head is not None:
            return self._attn(src, dest, head)
        if name == "mlp" and src != dest:
            return Zero(self.d_model, self.resid_pre)
        if name == "mlp":
            return self._share("mlp", (dest,), self._mlp)
        if name == "cross_attn":
            raise Uncovered("cross-attention has no closed form")
        if name != "block":
            return self._share("attn", (src, dest), self._attn)
        return block_map(self.block.topology, self.parts(name, src, dest), src == dest)

    def _share(self, name: str, positions: tuple[int, ...], make: Callable[..., JacobianOperator]) -> JacobianOperator:
        """Make a sublayer's map, or return it while it is the last one or somebody holds it.

        The block shares it, and so do all src of one dest.
        """
        if (made := self._made.get((name, positions))) is None:
            made = self._made[name, positions] = Shared(make(*positions))
        self._last[name] = made
        return made

    def _attn(self, src: int, dest: int, head: int | None = None) -> JacobianOperator:
        """J_attn; a head's share of the write is taken before the norm behind the attention, which mixes the heads."""
        attn, run = self.block.mixer, self._attn_run
        core = self._core
        if head is not None:
            self.block.output_of_heads(run.values.get("attn.hook_z"))  # refuses what cannot be split
        before = self._norm(attn.before, _BEFORE_ATTN, self.resid_pre, src)
        behind = self._norm(attn.behind if head is None else None, _BEHIND_ATTN, run.unnormed, dest)
        return attention_map(core, self._weights(attn)["W_O"], src, dest, before, behind, self._attn_factor, head)

    def _mlp(self, pos: int) -> JacobianOperator:
        """J_mlp at a position."""
        mlp, run = self.block.mlp, self._mlp_run
        before = self._norm(mlp.before, _BEFORE_MLP, self.mlp_input, pos)
        behind = self._norm(mlp.behind, _BEHIND_MLP, run.unnormed, pos)
        factor = mlp.write_factor(run.values.get(mlp.gives), run.out)
        if mlp.has_experts:
            where = f"of layer {self.layer} at position {self.trace.first + pos}"
            positions = tuple(self.run.dests) if pos in self.run.dests else (pos,)
            slopes, weights, mixing = self._mixture(positions).at(positions.index(pos), where)
            return mlp_map(slopes, weights, before, behind, factor, mixing)
        if not self._mlp_slopes:
            raise Uncovered("hook_post of the MLP is not a function of hook_pre (and hook_pre_linear)")
        weights, slopes = self._weights(mlp), [slope[pos] for slope in self._mlp_slopes]
        read, post = self._mlp_values
        made = dict(zip(READS[len(slopes)], read, strict=True))
        self._require_applied(mlp, run, self.mlp_input, made, post)
        return mlp_map(slopes, weights, before, behind, factor)

    @property
    def _mlp_values(self) -> tuple[list[Float[Tensor, "pos d_mlp"]], Float[Tensor, "pos d_mlp"]]:
        """What the units of the MLP read, by the weight that reads it, and what they give."""
        values = self._mlp_run.values
        *inputs, name, _ = self.block.mlp.points(*VALUES["mlp"])
        post = values[name]
        return [part for read in inputs if read in values for part in values[read].split(post.shape[-1], -1)], post

    def _mixture(self, positions: tuple[int, ...]) -> Mixture:
        """The mixture of experts at some positions; the last one is kept."""
        if self._mixture_at is None or self._mixture_at[0] != positions:
            mlp, stream = self.block.mlp, self.mlp_input[list(positions)]
            norm = self._read_norm(mlp.before, _BEFORE_MLP, self.mlp_input)
            with self.trace.lifted(self.layer, mlp.module):
                mixture = Mixture.read(mlp.module, stream if norm is None else norm(stream))
            self._mixture_at = (positions, mixture)
        return self._mixture_at[1]

    def _weights(self, sublayer: Sublayer) -> Mapping[str, Tensor]:
        """The weights of a sublayer, lifted to the dtype of the work."""
        if sublayer.name not in self._lifted:
            latent = self._latent if sublayer.kind == "attn" else None
            with self.trace.lifted(self.layer, sublayer.module):
                weights = sublayer.weights() if latent is None else {"W_O": latent.write()}
            self._lifted[sublayer.name] = {name: weight.to(self.resid_pre) for name, weight in weights.items()}
        return self._lifted[sublayer.name]

    def _require_applied(
        self,
        sublayer: Sublayer,
        run: Run,
        stream: Float[Tensor, "row d_model"],
        made: Mapping[str, Float[Tensor, "row *axes"]],
        inner: Float[Tensor, "row *axes"],
    ) -> None:
        """Check that the activations of a run are what the weights make of what they read, but for one bias.

        A weight W that reads x and gives y has (y - x W) r the same at all rows, for a random vector r. One row cannot
        tell; there the certificate's own product tests each weight.

        Args:
            sublayer: the sublayer.
            run: of it.
            stream: what it read.
            made: what each reading weight gave, by its name.
            inner: what the writing weight read.

        Raises:
            Uncovered: the module that applies a weight does something else (an adapter, a parametrisation).
        """
        if sublayer.name in self._applied:
            return
        weights = self._weights(sublayer)
        norm = self._read_norm(sublayer.before, f"the norm before the {_NAMES[sublayer.kind]}", stream)
        normed = stream if norm is None else norm(stream)
        write = "W_O" if sublayer.kind == "attn" else "W_out"
        products = {
            name: (normed, _columns(weights[name], given.shape[1:]), given.flatten(1)) for name, given in made.items()
        }
        factor = sublayer.write_factor(run.values.get(sublayer.gives), run.out)
        written = run.out if run.unnormed is None else run.unnormed
        products[write] = factor * inner.flatten(1), weights[write].flatten(0, -2), written
        for name, (read, weight, given) in products.items():
            probe = _probe(weight)
            ours, theirs = read @ (weight @ probe), given.to(weight) @ probe
            if not close(ours + (theirs - ours).mean(), theirs):
                part = sublayer.part(_PARTS[name])
                part = getattr(part, "original_component", part)
                where = sublayer.part_of.slot if part is None else f"{sublayer.part_of.slot}.{_PARTS[name]}"
                kind = type(sublayer.module if part is None else part).__name__
                raise Uncovered(f"{where} of type {kind} does not apply {name}: its output is not x {name} + b")
        self._applied.add(sublayer.name)

    def _norm(
        self, module: nn.Module | None, name: str, inputs: Float[Tensor, "row d_model"] | None, row: int
    ) -> JacobianOperator:
        """The derivative of one of the block's norms at one of its inputs; the identity where there is none."""
        norm = self._read_norm(module, name, inputs)
        if norm is None or inputs is None:
            return Identity(self.d_model, self.resid_pre)
        return norm.derivative(inputs[row])

    def _read_norm(
        self, module: nn.Module | None, name: str, inputs: Float[Tensor, "row d_model"] | None
    ) -> Norm | None:
        """One of the block's norms, read once; None where there is none."""
        if module is None or inputs is None:
            return None
        if module not in self._norms:
            with self.trace.lifted(self.layer, module):
                self._norms[module] = Norm.read(module, inputs, name)
        return self._norms[module]

    @cached_property
    def _mlp_slopes(self) -> list[Float[Tensor, "pos d_mlp"]]:
        """The slopes of hook_post on hook_pre (and on hook_pre_linear of a gated MLP).

        One tensor for each input, two for one that holds both (ModernBERT); none where a hook point or a derivative is
        missing.
        """
        values = self._mlp_run.values
        *inputs, output, _ = self.block.mlp.points(*VALUES["mlp"])
        known = [name for name in inputs if name in values]
        if inputs[0] not in known or output not in values:
            return []
        slopes, units = self.run.slopes(output, known), values[output].shape[-1]
        found = [slope for slope in slopes if slope is not None]
        return [part for slope in found for part in slope.split(units, dim=-1)] if len(found) == len(slopes) else []

    @cached_property
    def _latent(self) -> Latent | None:
        """The weights of latent attention; None where the attention is another."""
        with self.trace.lifted(self.layer, self.block.attn.module):
            latent = Latent.of(self.block.attn.module)
            return None if latent is None else latent.to(self.resid_pre)

    @cached_property
    def _core(self) -> AttentionCore:
        attn, run = self.block.attn, self._attn_run
        values, weights = dict(run.values), self._weights(attn)
        norm = self._read_norm(attn.before, _BEFORE_ATTN, self.resid_pre)
        normed = self.resid_pre if norm is None else norm(self.resid_pre)
        gates, made = None, {}
        if self._latent is None:
            if "W_GATE" in weights and values["attn.hook_q"].shape[1] > weights["W_Q"].shape[0]:
                values["attn.hook_q"] = values["attn.hook_q"][:, ::2]  # gates stand behind the queries
            made = {f"W_{name.upper()}": values[f"attn.hook_{name}"] for name in ("q", "k", "v")}
            readings = head_readings(weights, {name: given.shape[1] for name, given in made.items()})
            if "gate" in readings:
                gates = rearrange(readings["gate"](normed), "pos (head e) -> pos head e", head=len(weights["W_O"]))
        else:
            readings = self._latent.readings(lambda name, down: HeadNorm.of_latent(self.block, name, down(normed)))
            values = {name: value for name, value in values.items() if "rot" not in name}
            heads = self._latent.n_heads
            values |= {f"attn.hook_{n}": rearrange(r(normed), "p (h e) -> p h e", h=heads) for n, r in readings.items()}
        core = AttentionCore.from_values(self.block, values, readings, gates, self.trace.past(self.layer))
        self._require_applied(attn, run, self.resid_pre, made, core.z)
        return core

    @cached_property
    def _attn_factor(self) -> float:
        attn = self.block.mixer
        return attn.write_factor(self._attn_run.values.get(attn.gives), self._attn_run.out)


@contextmanager
def _uncovered_where_it_fails() -> Iterator[None]:
    """Make whatever this module does not expect of an architecture ``Uncovered``: autograd still measures it."""
    try:
        yield
    except (Uncovered, StaleTraceError, UnsupportedModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Uncovered(f"reading the sublayer failed with {type(error).__name__}: {error}") from error


def _columns(weight: Float[Tensor, "..."], axes: torch.Size) -> Float[Tensor, "d_model n"]:
    """A reading weight as a matrix; ``HookedTransformer`` repeats a group's keys and values for each of its heads."""
    if weight.ndim == 2:
        return weight
    return rearrange(weight[:: weight.shape[0] // axes[0]], "group d e -> d (group e)")


def _probe(weight: Float[Tensor, "m n"]) -> Float[Tensor, " n"]:
    """A random vector of what a weight gives, the same for the same width."""
    return torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=weight.dtype).to(weight)
