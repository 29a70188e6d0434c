"""Evidence: what the model itself says of a layer's Jacobians, at each pair (src, dest) that is measured.

It joins the two links of the chain of trust: closed form against the modules' own derivative (``certificate``), and
either engine's Jacobian against central differences of what is run (``differences``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from tlcoupling.forward.block import Uncovered
from tlcoupling.forward.trace import Trace
from tlcoupling.jacobian.analytic import AnalyticLayer
from tlcoupling.jacobian.certificate import TOLERANCE, ModuleProducts, Pair, misses
from tlcoupling.jacobian.differences import BlockDifferences
from tlcoupling.linalg.operator import JacobianOperator


class Evidence:
    """What the model itself says of one layer's Jacobians."""

    def __init__(
        self, trace: Trace, layer: int, hooked: bool, pairs: Iterable[Pair] = (), formed: bool = False
    ) -> None:
        """Take a layer.

        Args:
            trace: a trace of the model.
            layer: block index.
            hooked: whether hooks of the user's act in the block.
            pairs: (src, dest) that will be asked for: they share runs of the block and backward passes.
            formed: test closed forms as matrices, which their user wants.
        """
        pairs = frozenset(pairs)
        self.layer, self._topology = layer, trace.topology
        self._names = tuple(trace.writes)
        self._has_mlp = trace.mlp_out is not None
        self._pairs, self._formed = pairs, formed
        self._modules: ModuleProducts | None = None
        self._differences = BlockDifferences(trace, layer, hooked, pairs)
        self._refusals: dict[tuple[str, int, int], str | None] = {}
        self._products: dict[tuple[str, int, int], tuple[weakref.ref[JacobianOperator], Tensor]] = {}

    def refusal(self, closed: AnalyticLayer, sublayer: str, src: int, dest: int) -> str | None:
        """Return why the closed form of a pair cannot be used, None where it can.

        A block's closed form is the chain rule over its sublayers, which also says that the MLP of one position reads
        no other.
        """
        key = (sublayer, src, dest)
        if key not in self._refusals:
            try:
                self._refusals[key] = self._refusal(closed, sublayer, src, dest)
            except Uncovered as reason:
                self._refusals[key] = str(reason)
        return self._refusals[key]

    def contradiction(self, operator: JacobianOperator, sublayer: str, src: int, dest: int) -> str | None:
        """Hold a Jacobian of either engine against central differences.

        Returns:
            Why nothing can be said, None where they agree.

        Raises:
            HookError, DerivativeError: they settle elsewhere.
        """
        return self._differences.require(operator, sublayer, src, dest, self._product(operator, sublayer, src, dest))

    @property
    def moves(self) -> Float[Tensor, "move pos d_model"] | None:
        """How the differences move x^l; None where they take another run."""
        return self._differences.moves

    @property
    def gap(self) -> float:
        """The largest relative distance of a Jacobian's product from a difference that confirmed it."""
        return self._differences.gap

    def _refusal(self, closed: AnalyticLayer, sublayer: str, src: int, dest: int) -> str | None:
        sequential = self._topology == "sequential"
        modules = self._modules = self._modules or ModuleProducts(closed.run, self._pairs)
        if sublayer == "block":
            if not self._names:
                raise Uncovered("the block is not split into sublayers, of which a closed form is made")
            if self._topology == "cross":
                raise Uncovered("cross-attention has no closed form")
            refused = self.refusal(closed, self._names[0], src, dest)
            if self._has_mlp and (sequential or src == dest):
                refused = refused or self.refusal(closed, "mlp", dest, dest)
            return refused or self._mixing(modules, dest)
        if sublayer == "mlp" and src != dest:
            return self._mixing(modules, dest)
        operator = closed.sublayer(sublayer, src, dest)
        self._differences.ran = closed.run.moved
        truth, along = modules.mlp(dest) if sublayer == "mlp" else modules.attn(src, dest), None
        if self._formed:
            operator.dense()  # which its products use from now on: they read fewer numbers than the weights are
        else:
            direction = self._differences.quotient(sublayer, src, dest).direction
            along = direction, self._product(operator, sublayer, src, dest)
        gap = misses(operator, closed.run.cotangent(dest), truth, along)
        if gap is None:
            return None
        return (
            f"its closed form misses the module's own derivative by {gap:.1e} (first in layer {self.layer}, from "
            f"position {src} to {dest}; allowed: {TOLERANCE:.0e})"
        )

    def _mixing(self, modules: ModuleProducts, dest: int) -> str | None:
        """Return why the MLP cannot be taken as that of one position."""
        if not self._has_mlp or (mixing := modules.mlp_mixes(dest)) <= TOLERANCE:
            return None
        return (
            f"the MLP reads other positions than its own ({mixing:.1e} of its derivative, first in layer {self.layer} "
            f"at position {dest}; allowed: {TOLERANCE:.0e})"
        )

    def _product(self, operator: JacobianOperator, sublayer: str, src: int, dest: int) -> Float[Tensor, " d_model"]:
        """The product of a Jacobian with the direction of its difference quotient; taken once."""
        key = (sublayer, src, dest)
        if key not in self._products or self._products[key][0]() is not operator:
            direction = self._differences.quotient(*key).direction
            # an operator may hold its matrix, and a layer has as many as pairs: none is kept alive here
            self._products[key] = weakref.ref(operator), operator.mv(direction.to(operator.device))
        return self._products[key][1]
