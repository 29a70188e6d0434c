"""Check the library's guarantees on a given model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from tlcoupling.arguments import Indices, resolve_indices
from tlcoupling.errors import TLCouplingError
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import model_name_of
from tlcoupling.forward.split import POSITIONWISE
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.linalg.operator import JacobianOperator

if TYPE_CHECKING:
    import pandas

Outcome = Literal["holds", "falls back", "refused"]

# Relative gap between products of the two engines in float32. In float64, modules that cast to float32 leave 1e-6.
AGREEMENT = 1e-3


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        what: the checked property.
        outcome: ``"holds"``; ``"falls back"``: correct, but by autograd; ``"refused"``: cannot be measured.
        detail: the size of the gap, or the reason.
    """

    what: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, repr=False)
class Check:
    """What holds for a model, what falls back to autograd, and what is refused.

    Attributes:
        model_name: the model's own name.
        findings: one per checked property.
    """

    model_name: str
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        """One line."""
        counts = (f"{sum(one.outcome == name for one in self.findings)} {name}" for name in get_args(Outcome))
        return f"Check({self.model_name}: {', '.join(counts)})"

    @property
    def passed(self) -> bool:
        """Return whether everything can be measured."""
        return all(one.outcome != "refused" for one in self.findings)

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per finding."""
        import pandas as pd

        return pd.DataFrame([vars(one) for one in self.findings])


@measured
def check(model: Any, prompt: Any = None, *, layers: Indices | None = None, attention_mask: Any | None = None) -> Check:
    """Run the residual identity, the differences, the certificate and a comparison with autograd on a model.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        prompt: as in ``trace``; by default eight token ids spread over the vocabulary, or as many as fit the context.
        layers: layers whose Jacobians are compared; by default the first, the middle and the last.
        attention_mask: as in ``trace``.

    Returns:
        The findings. A model that cannot be measured raises no error: the reason is a finding.

    Raises:
        ArgumentError: no layer, an unknown layer, or a repeated one.

    Example:
        >>> tlc.check(model).to_dataframe()  # doctest: +SKIP
    """
    name = model_name_of(model)
    try:
        traced = trace(model, _spread_tokens(model) if prompt is None else prompt, attention_mask=attention_mask)
    except TLCouplingError as error:
        return Check(name, (Finding("forward pass and residual identity", "refused", str(error)),))
    findings = [
        Finding(
            "residual identity",
            "holds",
            f"{traced.n_layers} {traced.topology} blocks, largest gap {traced.identity_gap:.1e} of the norm",
        )
    ]
    last = traced.n_layers - 1
    chosen = resolve_indices("layers", sorted({0, last // 2, last}) if layers is None else layers, traced.n_layers)
    findings.append(_differences(traced, chosen))
    for sublayer in traced.sublayers:
        findings.append(_compare(traced, sublayer, chosen))
    return Check(name, tuple(findings))


def _spread_tokens(model: Any) -> list[int]:
    """Return token ids from all over the vocabulary, at most eight and no more than the context holds."""
    cfg = getattr(model, "cfg", None)
    vocabulary, context = getattr(cfg, "d_vocab", 0), getattr(cfg, "n_ctx", None)
    count = min(8, context or 8)
    return [index * max(vocabulary - 1, 0) // count for index in range(1, count + 1)]


def _pairs(traced: Trace, sublayer: str) -> list[tuple[int, int]]:
    """The last position, and, where a sublayer reads others, one from the middle to it."""
    last = traced.n_tokens - 1
    return sorted({(last, last)} if sublayer in POSITIONWISE else {(last, last), (last // 2, last)})


def _differences(traced: Trace, layers: Sequence[int]) -> Finding:
    """Hold autograd against central differences of what is run."""
    what = f"central differences of layers {', '.join(map(str, layers))}"
    engine = JacobianEngine(traced, "autograd", _pairs(traced, "block"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for layer in layers:
                for sublayer in traced.sublayers:
                    for src, dest in _pairs(traced, sublayer):
                        engine.operator(layer, sublayer, src, dest)
        except TLCouplingError as error:
            return Finding(what, "refused", str(error))
    unsettled = [str(one.message) for one in caught if "differences" in str(one.message)]
    if unsettled:
        return Finding(what, "refused", unsettled[0])
    return Finding(what, "holds", f"autograd's derivative is the function's own, to {engine.difference_gap:.1e}")


def _compare(traced: Trace, sublayer: str, layers: Sequence[int]) -> Finding:
    """Compare both engines on random vectors, at the last position and between two positions."""
    what = f"{sublayer} Jacobians of layers {', '.join(map(str, layers))}"
    pairs = _pairs(traced, sublayer)
    auto, oracle = (JacobianEngine(traced, name, pairs) for name in ("auto", "autograd"))
    gaps: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for layer in layers:
                for src, dest in pairs:
                    ours = auto.operator(layer, sublayer, src, dest)
                    gaps += _gaps(ours, oracle.operator(layer, sublayer, src, dest))
        except TLCouplingError as error:
            return Finding(what, "refused", str(error))
    gap = f"{max(gaps, key=lambda gap: (math.isnan(gap), gap)):.1e} from autograd"  # NaN is the worst
    if not all(gap <= AGREEMENT for gap in gaps):
        return Finding(what, "refused", f"{gap}, allowed {AGREEMENT:.0e}: please report this model")
    reasons = [str(one.message).partition(": ")[2] for one in caught if "autograd" in str(one.message)]
    if reasons:
        return Finding(what, "falls back", reasons[0])
    return Finding(what, "holds", f"closed form, certified; {gap}")


def _gaps(measured: JacobianOperator, truth: JacobianOperator) -> list[float]:
    """Return relative gaps of products with random vectors from both sides."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(measured.shape[1], 2, generator=generator, dtype=measured.dtype).to(measured.device)
    products = (measured.mm(vectors), truth.mm(vectors)), (measured.rmm(vectors), truth.rmm(vectors))
    floor = torch.finfo(measured.dtype).tiny
    return [float((ours - theirs).norm() / theirs.norm().clamp_min(floor)) for ours, theirs in products]
