"""Running the library's own guarantees on a model of yours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from tlcoupling.arguments import Indices, resolve_indices
from tlcoupling.errors import TLCouplingError
from tlcoupling.forward.context import measured
from tlcoupling.forward.hooked import model_name_of
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.engine import JacobianEngine
from tlcoupling.linalg.operator import JacobianOperator

if TYPE_CHECKING:
    import pandas

Outcome = Literal["holds", "falls back", "refused"]

# Relative gap between products of the two engines in float32; in float64, modules that cast to float32 leave 1e-6.
AGREEMENT = 1e-3


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        what: what was checked.
        outcome: ``"holds"``; ``"falls back"``: right, but by autograd; ``"refused"``: cannot be measured.
        detail: the size of the gap, or the reason.
    """

    what: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, repr=False)
class Check:
    """What holds on a model, what falls back to autograd, and what is refused.

    Attributes:
        model_name: the model's own name.
        findings: one per thing checked.
    """

    model_name: str
    findings: tuple[Finding, ...]

    def __repr__(self) -> str:
        """One line."""
        counts = {
            name: sum(one.outcome == name for one in self.findings) for name in ("holds", "falls back", "refused")
        }
        return f"Check({self.model_name}: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ")"

    @property
    def passed(self) -> bool:
        """Whether everything can be measured."""
        return all(one.outcome != "refused" for one in self.findings)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per finding."""
        import pandas as pd

        return pd.DataFrame([vars(one) for one in self.findings])


@measured
def check(model: Any, prompt: Any = None, *, layers: Indices | None = None) -> Check:
    """Run the residual identity, the certificate and a comparison with autograd on a model.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge``.
        prompt: as in ``trace``; by default eight token ids spread over the vocabulary.
        layers: layers whose Jacobians are compared; by default the first, the middle and the last.

    Returns:
        Findings; nothing is raised for a model that cannot be measured, its reason is a finding.

    Raises:
        ArgumentError: no layer, one that is not there, or the same one twice.

    Example:
        >>> tlc.check(model).to_dataframe()  # doctest: +SKIP
    """
    name = model_name_of(model)
    try:
        traced = trace(model, _spread_tokens(model) if prompt is None else prompt)
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
    for sublayer in traced.sublayers:
        findings.append(_compare(traced, sublayer, chosen))
    return Check(name, tuple(findings))


def _spread_tokens(model: Any) -> list[int]:
    vocabulary = getattr(getattr(model, "cfg", None), "d_vocab", 0)
    return [index * max(vocabulary - 1, 0) // 8 for index in range(1, 9)]


def _compare(traced: Trace, sublayer: str, layers: Sequence[int]) -> Finding:
    """Both engines on random vectors, at the last position and between two."""
    what = f"{sublayer} Jacobians of layers {', '.join(map(str, layers))}"
    last = traced.n_tokens - 1
    pairs = {(last, last)} if sublayer == "mlp" else {(last, last), (last // 2, last)}
    auto, oracle = JacobianEngine(traced, "auto"), JacobianEngine(traced, "autograd")
    gaps: list[float] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for layer in layers:
                for src, dest in sorted(pairs):
                    found = auto.operator(layer, sublayer, src, dest)
                    gaps += _gaps(found, oracle.operator(layer, sublayer, src, dest))
        except TLCouplingError as error:
            return Finding(what, "refused", str(error))
    gap = f"{max(gaps, key=lambda gap: (math.isnan(gap), gap)):.1e} from autograd"  # NaN is the worst
    if not all(gap <= AGREEMENT for gap in gaps):
        return Finding(what, "refused", f"{gap}, allowed {AGREEMENT:.0e}: please report this model")
    reasons = [str(one.message).partition(": ")[2] for one in said if "autograd" in str(one.message)]
    if reasons:
        return Finding(what, "falls back", reasons[0])
    return Finding(what, "holds", f"closed form, certified; {gap}")


def _gaps(found: JacobianOperator, truth: JacobianOperator) -> list[float]:
    """Relative gaps of products with random vectors from both sides."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(found.shape[1], 2, generator=generator, dtype=found.dtype).to(found.device)
    return [
        float((ours - theirs).norm() / theirs.norm().clamp_min(torch.finfo(found.dtype).tiny))
        for ours, theirs in ((found.mm(vectors), truth.mm(vectors)), (found.rmm(vectors), truth.rmm(vectors)))
    ]
