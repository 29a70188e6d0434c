r"""Mixtures of experts: y = sum_e w_e(x) E_e(x), at each row a gated MLP whose units are those of the chosen experts.

J = sum_e w_e dE_e + sum_e E_e dw_e^T. The first term is the closed form of an MLP (``formula.mlp_map``): the units of
all chosen experts stand side by side, their slopes multiplied by w_e. The second is the router's: a column and a row
for each expert. An expert that every row passes through (a shared one) has the weight 1, or that of its own gate. The
choice of experts is a step function of x: the derivative holds only as far as the choice does.

The weights are read from how the module calls its ``experts``: with each row, the indices of its experts and their
weights, or with each row times the weight (Llama 4). So softmax, sigmoid, normalised, grouped and biased routers need
no cases of their own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tlcoupling.forward.block import Uncovered, close
from tlcoupling.jacobian.formula import READS, Mixing

_SHARED = ("shared_experts", "shared_expert", "shared_mlp")
_ROUTERS = ("gate", "router")
_CORRECTIONS = ("e_score_correction_bias", "expert_bias")  # added to the scores for the choice alone
# A choice that changes within this share of the length of the router's input is worth a warning. Float32 rounding is
# 1e-7 of it.
_NARROW = 1e-4


@dataclass(frozen=True)
class Experts:
    """Experts of one shape.

    Attributes:
        read: the weights that read, ``[expert, d_model, n]``: gate and input (n = 2 d_mlp), or input alone (n = d_mlp).
        write: those that write, ``[expert, d_mlp, d_model]``.
        read_bias, write_bias: their biases; None without.
        activation: from what is read to the units.
        interleaved: whether gate and input alternate in n; they follow each other otherwise.
    """

    read: Float[Tensor, "expert d_model n"]
    write: Float[Tensor, "expert d_mlp d_model"]
    read_bias: Float[Tensor, "expert n"] | None
    write_bias: Float[Tensor, "expert d_model"] | None
    activation: Callable[[Tensor], Tensor]
    interleaved: bool = False

    @classmethod
    def stacked(cls, module: Any) -> Experts:
        """Read the experts of a mixture off the module that holds all of them.

        Raises:
            Uncovered: it has none, or holds them otherwise than in one tensor for reading and one for writing.
        """
        inner = getattr(module, "original_component", module)
        experts = getattr(inner, "experts", None)
        if experts is None:
            raise Uncovered(f"{type(module).__name__} has no W_in and no experts")
        name = "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"
        read, write = getattr(experts, name, None), getattr(experts, "down_proj", None)
        if not (isinstance(read, Tensor) and isinstance(write, Tensor) and read.ndim == write.ndim == 3):
            raise Uncovered(f"{type(experts).__name__} does not hold its experts in stacked weights")
        # Llama 4 does not say that its weights are transposed; a square one then goes the usual way
        if not getattr(experts, "is_transposed", read.shape[2] == 2 * write.shape[1]):
            read, write = read.mT, write.mT
        read_bias, write_bias = (getattr(experts, f"{each}_bias", None) for each in (name, "down_proj"))
        return cls(
            read.detach(),
            write.detach(),
            None if read_bias is None else read_bias.detach(),
            None if write_bias is None else write_bias.detach(),
            _activation(experts, read.shape[2] > write.shape[1]),
            not getattr(experts, "is_concatenated", True),
        )

    @classmethod
    def of_shared(cls, module: Any) -> Experts | None:
        """Read the expert of a mixture that each row passes through; None where there is none.

        Raises:
            Uncovered: its weights are not those of a gate, an input and an output.
        """
        mlp = _named(getattr(module, "original_component", module), _SHARED)
        if mlp is None:
            return None
        mlp = getattr(mlp, "original_component", mlp)
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if parts[1] is None or parts[2] is None or any(getattr(part, "bias", None) is not None for part in parts):
            raise Uncovered(f"{type(mlp).__name__} is not a gated MLP without biases")
        read = torch.cat([part.weight.detach() for part in parts[:2] if part is not None]).mT
        write = parts[2].weight.detach().mT
        return cls(read[None], write[None], None, None, _activation(mlp, parts[0] is not None))

    def parts(self, read: Float[Tensor, "*axes n"]) -> tuple[Tensor, ...]:
        """Split what is read into gate and input; one part without a gate."""
        if read.shape[-1] == self.write.shape[1]:
            return (read,)
        return (read[..., ::2], read[..., 1::2]) if self.interleaved else read.chunk(2, -1)

    def run(self, e: int, x: Float[Tensor, " d_model"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " d_model"]]:
        """Return the slopes of an expert's units on what is read, and what the expert gives."""
        read = x @ self.read[e].to(x)
        read = (read if self.read_bias is None else read + self.read_bias[e].to(x)).detach().requires_grad_()
        with torch.enable_grad():
            units = self.activation(read)
            (slopes,) = torch.autograd.grad(units.sum(), read)
        given = units.detach() @ self.write[e].to(x)
        return slopes, given if self.write_bias is None else given + self.write_bias[e].to(x)


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts at some rows.

    Attributes:
        inputs: x, what the module reads.
        experts: those of each row, with their index.
        weights: their w_e.
        gradients: d w_e / d x.
        inside: whether an expert reads w_e x, and its output is not weighted (Llama 4).
        margins: how far x can move before the choice may change, relative to its length; infinite where it cannot.
    """

    inputs: Float[Tensor, "row d_model"]
    experts: Sequence[Sequence[tuple[Experts, int]]]
    weights: Float[Tensor, "row expert"]
    gradients: Float[Tensor, "row expert d_model"]
    inside: bool
    margins: Float[Tensor, " row"]

    @classmethod
    def read(cls, module: Any, inputs: Float[Tensor, "row d_model"]) -> Mixture:
        """Run a mixture on some rows, and check that it is the weighted sum of the experts that it calls.

        Args:
            module: the mixture, its weights in the dtype of ``inputs``.
            inputs: what it reads.

        Raises:
            Uncovered: it is not.
        """
        inner = getattr(module, "original_component", module)
        routed, shared = Experts.stacked(inner), Experts.of_shared(inner)
        leaf = inputs.detach().clone().requires_grad_()
        calls = {"experts": inner.experts, "shared": _named(inner, _SHARED), "router": _named(inner, _ROUTERS)}
        with torch.enable_grad():
            out, seen = _record(inner, leaf, {name: part for name, part in calls.items() if part is not None})
            arguments, given = seen["experts"]
            chosen, weights = _choice(arguments, leaf)
            experts = [[(routed, e) for e in row] for row in chosen.tolist()]
            if shared is not None:
                alone = seen["shared"][1][0].reshape(leaf.shape)
                rest = out - given[0].reshape(-1, *leaf.shape).sum(0)
                weight = (rest * alone).sum(-1, keepdim=True) / alone.square().sum(-1, keepdim=True)
                constant = close(weight, torch.ones_like(weight))  # but for rounding: it has no derivative
                weights = torch.cat([weights, torch.ones_like(weight) if constant else weight], 1)
                experts = [[*row, (shared, 0)] for row in experts]
            margins = _margins(inner, seen["router"][1] if "router" in seen else (), chosen, leaf)
            gradients = torch.stack([_gradient(weights[:, e], leaf) for e in range(weights.shape[1])], 1)
        mixture = cls(inputs, experts, weights.detach(), gradients, len(arguments) == 1, margins)
        if not close(torch.stack([mixture._given(row) for row in range(len(inputs))]), out.detach()):
            raise Uncovered(f"{type(inner).__name__} is not a sum of MLPs, weighted by a router")
        return mixture

    def at(self, row: int, where: str) -> tuple[list[Tensor], dict[str, Tensor], Mixing]:
        """Return the MLP that the mixture is at one row: slopes, weights and router's term, as ``mlp_map`` takes them.

        Warns where the choice of experts is about to change.

        Args:
            row: which.
            where: what the warning says of it.
        """
        if self.margins[row] < _NARROW:
            warnings.warn(
                f"the choice of experts {where} may change where the router's input moves by {self.margins[row]:.0e} "
                "of its length: the Jacobian holds no further than that",
                stacklevel=2,
            )
        x, columns = self.inputs[row], []
        slopes, read, write = [], [], []
        for (experts, e), weight in zip(self.experts[row], self.weights[row], strict=True):
            own, given = experts.run(e, weight * x if self.inside else x)
            slopes.append([weight * slope for slope in experts.parts(own)])
            read.append(experts.parts(experts.read[e].to(x)))
            write.append(experts.write[e].to(x))
            if self.inside:  # d E(w x) / d w = dE x
                units = sum(slope * (x @ part) for slope, part in zip(experts.parts(own), read[-1], strict=True))
                given = units @ write[-1]
            columns.append(given)
        names = READS[len(read[0])]
        weights = {name: torch.cat(parts, 1) for name, parts in zip(names, zip(*read, strict=True), strict=True)}
        mixing = Mixing(torch.stack(columns, 1), self.gradients[row])
        return [torch.cat(each) for each in zip(*slopes, strict=True)], {**weights, "W_out": torch.cat(write)}, mixing

    def _given(self, row: int) -> Float[Tensor, " d_model"]:
        """What the mixture gives at a row."""
        x, out = self.inputs[row], torch.zeros_like(self.inputs[row])
        for (experts, e), weight in zip(self.experts[row], self.weights[row], strict=True):
            out += experts.run(e, weight * x)[1] if self.inside else weight * experts.run(e, x)[1]
        return out


def _named(module: Any, names: Iterable[str]) -> nn.Module | None:
    """The first part of a module that has one of some names."""
    return next((part for name in names if isinstance(part := getattr(module, name, None), nn.Module)), None)


def _activation(module: Any, gated: bool) -> Callable[[Tensor], Tensor]:
    """From what experts read to their units.

    Raises:
        Uncovered: it is under none of the usual names.
    """
    if gated and hasattr(module, "_apply_gate"):
        return module._apply_gate
    act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if act is None:
        raise Uncovered(f"{type(module).__name__} has no act_fn")

    def units(read: Tensor) -> Tensor:
        gate, linear = read.chunk(2, -1)
        return act(gate) * linear

    return units if gated else act


def _record(
    module: nn.Module, inputs: Float[Tensor, "row d_model"], parts: dict[str, nn.Module]
) -> tuple[Float[Tensor, "row d_model"], dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]]:
    """Run a module; return what it gives, and the arguments and outputs of each of its parts."""
    seen: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def record(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            # copies: Llama 4 goes on to write into what the shared expert gave
            seen[name] = (*args, *kwargs.values()), tuple(o.clone() if isinstance(o, Tensor) else o for o in outputs)

        return record

    with ExitStack() as stack:
        for name, part in parts.items():
            stack.callback(part.register_forward_hook(keep(name), with_kwargs=True).remove)
        out = module(inputs[None])
    return (out[0] if isinstance(out, tuple) else out).reshape(inputs.shape), seen


def _choice(
    arguments: Sequence[Tensor], x: Float[Tensor, "row d_model"]
) -> tuple[Int[Tensor, "row k"], Float[Tensor, "row k"]]:
    """The chosen experts and their weights, from what experts are called with.

    Raises:
        Uncovered: they are called otherwise.
    """
    if len(arguments) == 1:  # each expert with all rows, times its weight
        inputs = arguments[0].reshape(-1, *x.shape)
        weights = ((inputs * x).sum(-1) / x.square().sum(-1)).T
        chosen = weights.topk(int((weights != 0).sum(1).max())).indices
        return chosen, weights.gather(1, chosen)
    _, chosen, weights = arguments
    if not (chosen.shape == weights.shape == (len(x), chosen.shape[-1]) and not chosen.is_floating_point()):
        raise Uncovered("experts are called otherwise than with rows, indices and weights")
    return chosen, weights


def _margins(
    module: nn.Module, outputs: Sequence[Any], chosen: Int[Tensor, "row k"], x: Float[Tensor, "row d_model"]
) -> Float[Tensor, " row"]:
    """How far x can move before the last chosen expert and the first other one change places, to first order."""
    n_experts = Experts.stacked(module).read.shape[0]
    logits = [out for out in outputs if isinstance(out, Tensor) and out.shape == (len(x), n_experts)]
    if not logits or chosen.shape[1] == n_experts:
        return torch.full_like(x[:, 0], torch.inf).detach()
    named = {name.rpartition(".")[2]: tensor for name, tensor in (*module.named_buffers(), *module.named_parameters())}
    corrections = [named[name] for name in _CORRECTIONS if name in named]
    scores = logits[-1].sigmoid() + corrections[0] if corrections else logits[-1]
    inside = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
    gap = scores.where(inside, torch.inf).amin(1) - scores.where(~inside, -torch.inf).amax(1)
    return gap.detach().abs() / (_gradient(gap, x).norm(dim=1) * x.detach().norm(dim=1))


def _gradient(values: Float[Tensor, " row"], x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """The gradient of each row's value in the row; zeros where it has none."""
    if not values.requires_grad:
        return torch.zeros_like(x)
    (gradient,) = torch.autograd.grad(values.sum(), x, retain_graph=True, materialize_grads=True)
    return gradient
