r"""Between features: what the features of one dictionary do to those of a later one, to first order.

A feature i of a dictionary at the source adds its direction D_i to the stream there; a feature j of a dictionary at the
target reads the stream there with the derivative R_j of its encoder. With J the slice between the two,
d f_j / d f_i = R_j J D_i. Only features that are active are compared: where a feature is off, a ReLU has no slope.

Beside it stands what a random direction does. For a random one r of the length of D_i in d dimensions, the root mean
square of R_j J r is ||J^T R_j|| ||D_i|| / sqrt(d).

Source: Farnik et al., "Jacobian Sparse Autoencoders", ICML 2025.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tlcoupling.arguments import check_index, check_int
from tlcoupling.errors import ArgumentError, DerivativeError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import Trace, require_trace
from tlcoupling.jacobian.differences import Function, leaning
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.results.base import Result
from tlcoupling.slices.flows import site_value
from tlcoupling.slices.sites import SiteSpec, name_of, target_of
from tlcoupling.slices.slice import slice_jacobian

if TYPE_CHECKING:
    import pandas

_PAIR = ("target_feature", "source_feature")


@dataclass(frozen=True, repr=False, eq=False)
class FeatureMap(Result):
    r"""Which active feature of a dictionary moves which active feature of a later one.

    Attributes:
        values: d f_j / d f_i, ``[target_feature, source_feature]``.
        null: the root mean square of the same for a random direction as long as that of feature i. Same axes.
        source_acts: f_i, ``[source_feature]``.
        target_acts: f_j, ``[target_feature]``.
        source_features, target_features: their numbers in the dictionaries, the most active first.
        active: number of active features of each dictionary, of which these are some.
        source, target: the sites, as text.
        src, dest: the positions.
    """

    values: Float[Tensor, "target_feature source_feature"]
    null: Float[Tensor, "target_feature source_feature"]
    source_acts: Float[Tensor, " source_feature"]
    target_acts: Float[Tensor, " target_feature"]
    source_features: tuple[int, ...]
    target_features: tuple[int, ...]
    active: tuple[int, int]
    source: str
    target: str
    src: int
    dest: int

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "values": _PAIR,
        "null": _PAIR,
        "source_acts": ("source_feature",),
        "target_acts": ("target_feature",),
    }

    def __repr__(self) -> str:
        """One line."""
        sizes = " of ".join(str(len(each)) for each in (self.source_features, self.target_features))
        return f"FeatureMap({self.source} -> {self.target}: {sizes.replace(' of ', ' x ')} features)"

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"source_feature": self.source_features, "target_feature": self.target_features}

    def to_dataframe(self) -> pandas.DataFrame:
        """Return one row per pair of features that are connected, the largest effects first.

        Columns: ``source_feature``, ``target_feature``, ``derivative``, ``null``, ``source_act``, ``target_act``, and
        ``effect``: derivative times source_act, what the target feature would lose without the source feature if it
        went on as steeply as here. Pairs whose derivative is zero are left out.
        """
        import pandas as pd

        rows, columns = self.values.nonzero(as_tuple=True)
        values, acts = self.values[rows, columns].double(), self.source_acts[columns].double()
        table = pd.DataFrame(
            {
                "source_feature": [self.source_features[at] for at in columns.tolist()],
                "target_feature": [self.target_features[at] for at in rows.tolist()],
                "derivative": values.numpy(),
                "null": self.null[rows, columns].double().numpy(),
                "source_act": acts.numpy(),
                "target_act": self.target_acts[rows].double().numpy(),
                "effect": (values * acts).numpy(),
            }
        )
        return table.sort_values("effect", key=abs, ascending=False, ignore_index=True)


@measured
def feature_map(
    trace: Trace,
    source: SiteSpec,
    target: SiteSpec,
    earlier: Any,
    later: Any,
    *,
    src: int = -1,
    dest: int = -1,
    most: int = 64,
    engine: EngineName = "auto",
) -> FeatureMap:
    """Measure which active features of one dictionary move which active features of a later one.

    A dictionary is any object with ``encode`` and ``decode`` (SAELens's have them), called with ``[1, d]`` and
    ``[1, feature]``. One with the matrices ``W_enc`` ``[d, feature]`` and ``W_dec`` ``[feature, d]`` alone is
    relu(x W_enc + b_enc), with ``b_enc`` where it has one.

    Args:
        trace: a trace of the model.
        source: the hook point that the earlier dictionary describes, as in ``slice_jacobian``.
        target: the one that the later dictionary describes; no logits.
        earlier: the dictionary at the source.
        later: the dictionary at the target.
        src: position of the source.
        dest: position of the target.
        most: largest number of features of each dictionary; the most active ones are taken.
        engine: as in ``slice_jacobian``.

    Raises:
        ArgumentError: a dictionary of another width or without these methods, no active feature, or as
            ``slice_jacobian``.
        DerivativeError: a dictionary or the model hides from autograd what it does.
        HookError, CertificateError, StaleTraceError: see ``slice_jacobian``.

    Warns:
        UserWarning: an encoder is not smooth here, so that its derivative could not be checked.

    Example:
        >>> between = tlc.feature_map(trace, ("resid_pre", 4), ("resid_pre", 8), sae_4, sae_8)  # doctest: +SKIP
        >>> between.to_dataframe().head(20)  # doctest: +SKIP
    """
    started = time.perf_counter()
    require_trace(trace)
    most = check_int("most", most, 1)
    src, dest = check_index("src", src, trace.n_tokens), check_index("dest", dest, trace.n_tokens)
    places = {"source": target_of(trace, source), "target": target_of(trace, target)}
    if places["target"].readout == "logits":
        raise ArgumentError("target", target, "a hook point of a block: logits have no dictionary")
    jacobian = slice_jacobian(trace, source, target, src=src, dest=dest, engine=engine)
    first = _Dictionary("earlier", earlier, site_value(trace, places["source"])[src], most)
    last = _Dictionary("later", later, site_value(trace, places["target"])[dest], most)
    directions, readings = first.directions(), last.readings()
    pulled = jacobian.rmm(readings.mT).mT
    lengths = pulled.norm(dim=1)[:, None] * directions.norm(dim=0)
    settings = {"src": src, "dest": dest, "most": most, "engine": engine}
    engines = {"block": ", ".join(sorted(set(jacobian.engine.values())))}
    return FeatureMap(
        provenance=trace.provenance(settings=settings, seconds=time.perf_counter() - started, engine=engines),
        values=(pulled @ directions).cpu(),
        null=(lengths / len(directions) ** 0.5).cpu(),
        source_acts=first.acts[first.chosen].cpu(),
        target_acts=last.acts[last.chosen].cpu(),
        source_features=tuple(first.chosen),
        target_features=tuple(last.chosen),
        active=(first.active, last.active),
        source=name_of(trace, source),
        target=name_of(trace, target),
        src=src,
        dest=dest,
    )


class _Dictionary:
    """A dictionary at one activation.

    Attributes:
        acts: its features there, ``[feature]``.
        active: how many of them are not zero.
        chosen: the most active of these.
    """

    def __init__(self, name: str, given: Any, activation: Float[Tensor, " d"], most: int) -> None:
        self._name, self._given, self._like = name, given, activation
        width = len(activation)
        self._plain = not all(callable(getattr(given, method, None)) for method in ("encode", "decode"))
        weights = [getattr(given, part, None) for part in ("W_enc", "W_dec")]
        if self._plain and not all(isinstance(weight, Tensor) and weight.ndim == 2 for weight in weights):
            raise ArgumentError(name, type(given).__name__, "an object with encode and decode, or with W_enc and W_dec")
        parameters = (
            given.parameters() if isinstance(given, nn.Module) else (w for w in weights if isinstance(w, Tensor))
        )
        own = next(iter(parameters), activation)
        self._leaf = activation.detach().to(own.device, own.dtype).requires_grad_()
        try:
            with torch.enable_grad():
                self._graph = self._encode(self._leaf)
            rebuilt = self._decode(self._graph.detach())
        except (RuntimeError, TypeError, ValueError) as error:
            raise ArgumentError(name, f"{type(given).__name__} ({error})", self._fits(width)) from error
        if rebuilt.shape != (width,) or self._graph.ndim != 1:
            raise ArgumentError(name, f"{type(given).__name__} of width {tuple(rebuilt.shape)}", self._fits(width))
        self.acts = self._graph.detach().to(activation)
        on = self.acts.nonzero()[:, 0]
        self.active = len(on)
        if not self.active:
            raise ArgumentError(name, type(given).__name__, "a dictionary with an active feature at this position")
        self.chosen: list[int] = on[self.acts[on].abs().argsort(descending=True)][:most].tolist()

    @staticmethod
    def _fits(width: int) -> str:
        return f"a dictionary of width {width}, that of its hook point"

    def directions(self) -> Float[Tensor, "d feature"]:
        """What one unit more of each chosen feature adds to the activation."""
        if self._plain:
            return self._given.W_dec.detach()[self.chosen].mT.to(self._like)
        acts, columns = self._graph.detach(), []
        for feature in self.chosen:
            unit = torch.zeros_like(acts)
            unit[feature] = 1.0
            columns.append(torch.func.jvp(self._decode, (acts,), (unit,))[1])
        return torch.stack(columns, dim=1).detach().to(self._like)

    def readings(self) -> Float[Tensor, "feature d"]:
        """The derivative of each chosen feature by the activation, held against differences."""
        if not self._graph.requires_grad:
            raise DerivativeError(f"the encode of {self._name}= ({type(self._given).__name__}) runs without a graph")
        rows = [torch.autograd.grad(self._graph[feature], self._leaf, retain_graph=True)[0] for feature in self.chosen]
        made, still = torch.stack(rows).to(self._like), self.acts[self.chosen]

        @torch.no_grad()
        def moved(moves: Float[Tensor, "move d"]) -> Float[Tensor, "move 1 feature"]:
            at = [self._encode(self._leaf + move.to(self._leaf))[self.chosen].to(still) for move in moves]
            return (torch.stack(at) - still)[:, None]

        reason = Function(
            where=f"the encode of {self._name}=",
            moved=moved,
            product=lambda direction: (made @ direction)[None],
            size=float(self._like.norm()) or 1.0,
            lengths=still.norm()[None],
            hooked=False,
        ).require(leaning(self._like))
        if reason is not None:
            warnings.warn(reason, stacklevel=4)
        return made

    def _encode(self, x: Float[Tensor, " d"]) -> Float[Tensor, " feature"]:
        if not self._plain:
            return self._given.encode(x[None])[0]
        read = x @ self._given.W_enc.detach()
        bias = getattr(self._given, "b_enc", None)
        return torch.relu(read if bias is None else read + bias.detach())

    def _decode(self, acts: Float[Tensor, " feature"]) -> Float[Tensor, " d"]:
        return acts @ self._given.W_dec.detach() if self._plain else self._given.decode(acts[None])[0]
