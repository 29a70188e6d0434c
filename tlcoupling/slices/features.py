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
from collections.abc import Callable, Mapping, Sequence
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
from tlcoupling.slices.sites import Site, SiteSpec, name_of, target_of
from tlcoupling.slices.slice import slice_jacobian

if TYPE_CHECKING:
    import pandas

_PAIR = ("target_feature", "source_feature")
# Normalisations of SAELens that only its training code applies, and what folds them into the weights.
_UNFOLDED = {
    "expected_average_only_in": "fold_activation_norm_scaling_factor",
    "covariance_whitening": "fold_activation_whitening",
}
# What an encoder may have besides W_enc and b_enc; how it enters, the matrices do not say.
_FURTHER = ("b_dec", "threshold", "log_threshold", "b_gate", "b_mag", "r_mag")


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

    A dictionary is any object with ``encode`` and ``decode``, such as SAELens's, called with ``[1, d]`` and
    ``[1, feature]``. A normalisation that its encoder measures is kept as it is at this activation when features are
    decoded. One with the matrices ``W_enc`` ``[d, feature]`` and ``W_dec`` ``[feature, d]`` alone is
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
        ArgumentError: a dictionary of another width or without these methods, no active feature, a transcoder, a
            scale that is not folded into the weights, or as ``slice_jacobian``.
        DerivativeError: a dictionary or the model hides from autograd what it does.
        HookError, CertificateError, StaleTraceError: see ``slice_jacobian``.

    Warns:
        UserWarning: an encoder is not smooth here, so that its derivative could not be checked; or a dictionary of
            SAELens's was trained at another hook point.

    Example:
        >>> between = tlc.feature_map(trace, ("resid_pre", 4), ("resid_pre", 8), sae_4, sae_8)  # doctest: +SKIP
        >>> between.to_dataframe().head(20)  # doctest: +SKIP
    """
    started = time.perf_counter()
    require_trace(trace)
    most = check_int("most", most, 1)
    src, dest = check_index("src", src, trace.n_tokens), check_index("dest", dest, trace.n_tokens)
    places = {"source": target_of(trace, source), "target": target_of(trace, target)}
    if places["target"].readout != "stream":
        raise ArgumentError("target", target, "a hook point of a block: what lies behind them has no dictionary")
    jacobian = slice_jacobian(trace, source, target, src=src, dest=dest, engine=engine)
    for name, dictionary, place in (("earlier", earlier, places["source"]), ("later", later, places["target"])):
        _require_fitting(trace, name, dictionary, place)
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


def _require_fitting(trace: Trace, name: str, dictionary: Any, place: Site) -> None:
    """Hold a dictionary against what its configuration says of it, where it is one of SAELens's.

    Raises:
        ArgumentError: it is a transcoder, or scales activations in training code alone.
    """
    cfg = getattr(dictionary, "cfg", None)
    if getattr(cfg, "d_out", None) is not None:
        allowed = "a dictionary of one hook point: a transcoder reads one and writes another"
        raise ArgumentError(name, type(dictionary).__name__, allowed)
    scaled = getattr(cfg, "normalize_activations", None)
    if scaled in _UNFOLDED:
        allowed = f"weights that hold the scale (sae.{_UNFOLDED[scaled]}): encode leaves it out"
        raise ArgumentError(name, f"normalize_activations={scaled!r}", allowed)
    trained = getattr(getattr(cfg, "metadata", None) or cfg, "hook_name", None)
    if not isinstance(trained, str):
        return
    try:
        fits = target_of(trace, trained) == place
    except ArgumentError:
        fits = False
    if not fits:
        warnings.warn(f"{name}= was trained at {trained}, which is not the hook point that it is used at", stacklevel=4)


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
        further = [part for part in _FURTHER if isinstance(one := getattr(given, part, None), Tensor) and one.any()]
        if self._plain and further:
            allowed = "an object with encode and decode: relu(x W_enc + b_enc) would leave this out"
            raise ArgumentError(name, f"{type(given).__name__} with {', '.join(further)}", allowed)
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
        """What one unit more of each chosen feature adds to the activation, held against differences."""
        if self._plain:
            return self._given.W_dec.detach()[self.chosen].mT.to(self._like)
        acts, columns = self._graph.detach(), []
        for feature in self.chosen:
            unit = torch.zeros_like(acts)
            unit[feature] = 1.0
            columns.append(torch.func.jvp(self._decode, (acts,), (unit,))[1].detach())

        def decoded(chosen: Float[Tensor, " feature"]) -> Float[Tensor, " d"]:
            changed = acts.clone()
            changed[self.chosen] = chosen.to(acts)
            return self._decode(changed).to(self._like)

        return self._followed("decode", decoded, self.acts[self.chosen], torch.stack(columns, dim=1).to(self._like))

    def readings(self) -> Float[Tensor, "feature d"]:
        """The derivative of each chosen feature by the activation, held against differences."""
        if not self._graph.requires_grad:
            raise DerivativeError(f"the encode of {self._name}= ({type(self._given).__name__}) runs without a graph")
        rows = [torch.autograd.grad(self._graph[feature], self._leaf, retain_graph=True)[0] for feature in self.chosen]

        def encoded(activation: Float[Tensor, " d"]) -> Float[Tensor, " feature"]:
            return self._encode(activation.to(self._leaf))[self.chosen].to(self._like)

        return self._followed("encode", encoded, self._leaf.detach().to(self._like), torch.stack(rows).to(self._like))

    def _followed(
        self, part: str, run: Callable[[Tensor], Tensor], at: Float[Tensor, " n"], made: Float[Tensor, "m n"]
    ) -> Float[Tensor, "m n"]:
        """Hold the derivative of a part against differences, and return it."""

        @torch.no_grad()
        def moved(moves: Float[Tensor, "move n"]) -> Float[Tensor, "move 1 m"]:
            return (torch.stack([run(at + move) for move in moves]) - still)[:, None]

        with torch.no_grad():
            still = run(at)
        reason = Function(
            where=f"the {part} of {self._name}=",
            moved=moved,
            product=lambda direction: (made @ direction)[None],
            size=float(at.norm()) or 1.0,
            lengths=still.norm()[None],
            hooked=False,
        ).require(leaning(at))
        if reason is not None:
            warnings.warn(reason, stacklevel=5)
        return made

    def _encode(self, x: Float[Tensor, " d"]) -> Float[Tensor, " feature"]:
        if not self._plain:
            acts = self._given.encode(x[None])
            return (acts.to_dense() if acts.is_sparse else acts)[0]
        read = x @ self._given.W_enc.detach()
        bias = getattr(self._given, "b_enc", None)
        return torch.relu(read if bias is None else read + bias.detach())

    def _decode(self, acts: Float[Tensor, " feature"]) -> Float[Tensor, " d"]:
        if self._plain:
            return acts @ self._given.W_dec.detach()
        with torch.no_grad():  # a decoder may undo, once, the normalisation that its encoder measured last
            self._given.encode(self._leaf.detach()[None])
        return self._given.decode(acts[None])[0]
