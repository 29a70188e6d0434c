"""Coupling, linearity and growth of one model on one prompt, in one call."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tlcoupling.analysis.headline import Finding, coupling_test, findings, sentence, without_sinks
from tlcoupling.analysis.measures import MEASURES, measures_of, resolve_measures
from tlcoupling.analysis.shared import SharedDirections, shared_directions
from tlcoupling.arguments import Indices, KSpec, resolve_basis_layers, resolve_indices
from tlcoupling.coupling.chance import CouplingTest
from tlcoupling.coupling.context import ContextCoupling, Fixed, wanted_of_context
from tlcoupling.coupling.depth import DepthCoupling, depth_coupling
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.coupling.options import Options
from tlcoupling.coupling.result import Wanted, WithinLayers, measure
from tlcoupling.coupling.token import TokenCoupling, wanted_of_tokens
from tlcoupling.dynamics.depth_profile import DepthProfile
from tlcoupling.dynamics.geometry import EigenGeometry
from tlcoupling.dynamics.lyapunov import LyapunovSpectrum
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.inputs import picture_of
from tlcoupling.forward.split import POSITIONWISE
from tlcoupling.forward.trace import PATTERN, Trace, trace
from tlcoupling.forward.user_hooks import FwdHooks
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.models.baseline import baseline_model
from tlcoupling.results.base import Result
from tlcoupling.text import counted
from tlcoupling.trajectory.growth import Growth, growth
from tlcoupling.trajectory.linearity import Linearity, linearity

if TYPE_CHECKING:
    import pandas

# Largest number of attention pattern entries (256 MB) up to which all layers' patterns are kept.
ATTENTION_LIMIT = 64_000_000


@dataclass(frozen=True, repr=False, eq=False)
class Analysis(Result):
    """All measurements of one model on one prompt.

    Attributes:
        coupling: depth-wise coupling.
        linearity: how straight the token trajectories are.
        growth: how residual norms grow.
        attention: attention patterns of ``attention_layers``; None if the model has no hook_pattern, or on request.
        attention_layers: all layers, or fewer for long prompts (see ``analyze``).
        tokens: the tokens as text.
        token_coupling: token-wise coupling of ``token_layers``; None without them.
        context_src: context coupling of ``token_layers`` from the first token to later ones; None without layers, or if
            K exceeds the rank of attention between two tokens.
        context_dest: context coupling of ``token_layers`` from earlier tokens to the last; None as ``context_src``.
        baseline: the same measurement of another model, such as fresh weights; None without one.
        shared: what pairs of blocks share at the last token measured, and the tokens of their bases; None unless asked
            for.
        picture: the image whose patches the tokens are, for the page; None of text and sound.
        geometry: eigenvalues, normality, symmetry and rank at the last token measured; None unless asked for.
        lyapunov: Lyapunov exponents at the last token measured; None unless asked for.
        profile: what each layer does to the stream and to the loss; None unless asked for.
        trace: the measured trace; None in an analysis loaded from a file.
    """

    coupling: DepthCoupling
    linearity: Linearity
    growth: Growth
    attention: Float[Tensor, "layer head dest src"] | None
    attention_layers: tuple[int, ...]
    tokens: tuple[str, ...]
    token_coupling: TokenCoupling | None = None
    context_src: ContextCoupling | None = None
    context_dest: ContextCoupling | None = None
    baseline: Analysis | None = None
    shared: SharedDirections | None = None
    picture: UInt8[Tensor, "row column channel"] | None = None
    geometry: EigenGeometry | None = None
    lyapunov: LyapunovSpectrum | None = None
    profile: DepthProfile | None = None
    trace: Trace | None = field(default=None, metadata={"saved": False})

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention": ("layer", "head", "dest", "src")}

    @property
    def parts(self) -> dict[str, Result]:
        """Return the measurements by name, without those that are None."""
        names = ("coupling", "token_coupling", "context_src", "context_dest", "linearity", "growth", *MEASURES)
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    @property
    def prompt(self) -> str:
        """Return the prompt as text, decoded whole where that is known; of images and sound, the positions."""
        if self.provenance.tokens and max(self.provenance.tokens) < 0:
            return f"no text, but {counted(len(self.tokens), 'position')}: {self.tokens[0]} … {self.tokens[-1]}"
        return self.provenance.text or "".join(self.tokens)

    def __repr__(self) -> str:
        """One line: the headline, without the test that takes a second."""
        return f"Analysis({self.provenance.model_name}: {sentence(self._findings(False))})"

    def headline(self, *, include_sinks: bool = False) -> str:
        """Return the findings in a sentence, by the rules of ``tlcoupling.analysis.headline``.

        At one measured token, the p-value of the blocks' coupling comes from ``coupling.test(draws=199)``.

        Args:
            include_sinks: whether sinks (``Growth.sinks``) count in means over tokens; they are left out by default.
        """
        return sentence(self._findings(include_sinks, self._p()))

    def summary(self, *, include_sinks: bool = False) -> pandas.DataFrame:
        """Return the headline's numbers, one row per finding.

        The columns: ``finding``; ``value``, its ``chance`` level and ``error`` by the rules of
        ``tlcoupling.analysis.headline``; ``found``, whether it differs from chance; ``with_sinks``, the same number of
        all tokens; ``fresh``, of fresh weights and the tokens of ``value``, NaN if they were not measured;
        ``fresh_chance``, the chance level of ``fresh``: each model has its own; ``text``, the clause of the headline.

        Args:
            include_sinks: whether sinks count in ``value`` too.
        """
        import pandas as pd

        rows = self._findings(include_sinks, self._p())
        fresh = self._fresh_findings(include_sinks)
        others = {
            "with_sinks": {one.name: one.value for one in self._findings(True)},
            "fresh": {one.name: one.value for one in fresh},
            "fresh_chance": {one.name: one.chance for one in fresh},
        }
        table = pd.DataFrame([vars(one) for one in rows]).rename(columns={"name": "finding"})
        for at, (column, known) in enumerate(others.items(), 5):
            table.insert(at, column, [known.get(one.name, float("nan")) for one in rows])
        return table

    @cached_property
    def depth_test(self) -> CouplingTest | None:
        """Return ``coupling.test(draws=199)``, which takes about a second; None for several tokens or one layer."""
        return coupling_test(self.coupling)

    def _p(self) -> float:
        """Return the p-value of the first sublayer and K; NaN without a test."""
        return math.nan if self.depth_test is None else float(self.depth_test.p[0, 0, 0, 0])

    def _findings(self, include_sinks: bool, p: float = math.nan) -> list[Finding]:
        fresh = None if self.baseline is None else self.baseline.growth
        return findings(*self._measured(), fresh=fresh, kept=self._kept(include_sinks), p=p)

    def _fresh_findings(self, include_sinks: bool) -> list[Finding]:
        """Return the findings of the baseline over the tokens that count in this one."""
        if self.baseline is None:
            return []
        return findings(*self.baseline._measured(), kept=self._kept(include_sinks))

    def _measured(self) -> tuple[DepthCoupling, Linearity, Growth]:
        return self.coupling, self.linearity, self.growth

    def _kept(self, include_sinks: bool) -> Tensor:
        """Return which tokens count in means."""
        return torch.ones_like(self.growth.sinks) if include_sinks else without_sinks(self.growth)

    def _coords(self) -> dict[str, Sequence[Any]]:
        heads = 0 if self.attention is None else self.attention.shape[1]
        pos = range(len(self.tokens))
        return {"layer": self.attention_layers, "head": range(heads), "dest": pos, "src": pos}

    def to_dataframe(self) -> Any:
        """Return all numbers of all measurements in long form, with a column ``measurement``."""
        import pandas as pd

        frames = []
        for name, part in self.parts.items():
            frame = part.to_dataframe()
            frame.insert(0, "measurement", name)
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        table["value"] = table.pop("value")
        return table

    def to_xarray(self) -> Any:
        """Return the same numbers as an ``xarray.DataTree``: one dataset for each measurement, and ``attention``.

        Raises:
            ImportError: xarray is not installed (``pip install xarray``).
        """
        datasets = {"attention": super().to_xarray(), **{name: part.to_xarray() for name, part in self.parts.items()}}
        if self.baseline is not None:
            datasets["baseline"] = self.baseline.to_xarray()
        from xarray import DataTree

        return DataTree.from_dict(datasets, name=self.provenance.model_name.rpartition("/")[2])


@measured
def analyze(
    model: Any,
    prompt: Any,
    *,
    k: KSpec = 10,
    tokens: Indices = -1,
    token_layers: Indices | None = None,
    basis_layers: Indices | None = None,
    sublayers: str | Sequence[str] | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    attention: bool = True,
    fwd_hooks: FwdHooks = (),
    prepend_bos: bool | None = None,
    attention_mask: Any | None = None,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    baseline: Any | None = None,
    shared: bool = False,
    measures: str | Sequence[str] = (),
    progress: bool | None = None,
) -> Analysis:
    """Measure coupling, linearity and growth of a model on a prompt.

    Attention patterns of all layers are kept up to 64 million entries (a prompt of 512 tokens at 270 heads has more).
    Beyond that, those of ``token_layers`` are kept, or of the middle layer if there are none.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge`` of a decoder, in eval mode. It is not changed.
        prompt: a string, token ids ``[pos]``, or a batch of one ``[1, pos]``.
        k: as in ``depth_coupling``.
        tokens: positions for depth-wise coupling. Trajectories are always measured for all tokens.
        token_layers: layers for token-wise coupling, and for context coupling from the first token and to the last:
            ``"all"``, an int or several; by default none. A layer of SmolLM2-135M at 28 tokens takes about four seconds
            on one core; the time grows with the square of the length.
        basis_layers: for coupling of tokens across layers: the layer that gives the bases, one for each of
            ``token_layers`` or one for all; by default those themselves.
        sublayers: as in ``depth_coupling``.
        normalizer: as in ``depth_coupling``.
        bases: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        attention: whether to keep attention patterns; their size grows with the square of the prompt's length.
        fwd_hooks: hooks as in ``model.run_with_hooks``; they act on forward pass and Jacobians, as in ``trace``.
        prepend_bos: as in ``trace``.
        attention_mask: as in ``trace``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        baseline: a model that is measured on the same tokens in the same way, to stand beside this one: ``"fresh"`` for
            fresh weights of the same architecture (``random_baseline``), or any model with the same tokens. It takes as
            long again. Hooks do not act on it.
        shared: whether to keep, for pairs of blocks at the last of ``tokens``, the matrices U2^T J1 V2 and the tokens
            that the singular vectors write and read: of at most 32 layers, evenly spaced, and of ten vectors each, at
            the first K. For SmolLM2-135M it takes about three seconds on one core.
        measures: what to measure beside these: ``"all"``, or some of ``"geometry"`` (``eigen_geometry``) and
            ``"lyapunov"`` (``lyapunov_spectrum``), both at the last of ``tokens``, and ``"profile"`` (``depth_profile``
            of this prompt). The first two decompose each Jacobian in float64; the profile runs the model for each layer
            and sublayer.
        progress: show a progress bar; by default on a terminal or in a notebook, after two seconds.

    Raises:
        UnsupportedModelError, ArgumentError, HookError, NonFiniteActivationError, ResidualIdentityError: see
            ``trace`` and ``depth_coupling``.

    Example:
        >>> report = tlc.analyze(model, "When Mary and John went to the store")  # doctest: +SKIP
        >>> report.coupling.mean("excess"), report.linearity, report.growth  # doctest: +SKIP
    """
    started = time.perf_counter()
    more = resolve_measures(measures, hooked=bool(fwd_hooks))
    traced = trace(model, prompt, fwd_hooks=fwd_hooks, prepend_bos=prepend_bos, attention_mask=attention_mask)
    compared = () if token_layers is None else resolve_indices("token_layers", token_layers, traced.n_layers)
    if basis_layers is not None and not compared:
        raise ArgumentError("basis_layers", basis_layers, "None where no token_layers are compared")
    others = resolve_basis_layers(basis_layers, compared, traced.n_layers)
    if compared and traced.n_tokens < 2:
        raise ArgumentError("token_layers", token_layers, "None: this prompt has a single token, nothing to compare")
    options: dict[str, Any] = {
        "k": k,
        "normalizer": normalizer,
        "bases": bases,
        "absolute": absolute,
        "engine": engine,
        "solver": solver,
        "progress": progress,
    }
    coupling = depth_coupling(traced, tokens=tokens, sublayers=sublayers, **options)
    across = {**options, "sublayers": coupling.sublayers, "basis_layers": others}
    pairs = couplings_of_tokens(traced, compared, across) if compared else {}
    other = None
    if baseline is not None:
        baseline = baseline_model(baseline, traced.model)
        same = {"tokens": tokens, "token_layers": token_layers, "basis_layers": basis_layers, "sublayers": sublayers}
        other = analyze_baseline(baseline, traced, **same, **options)
    common = shared_directions(traced, coupling) if shared else None
    how = {"prepend_bos": prepend_bos, "attention_mask": attention_mask, "progress": progress}
    beside = measures_of(more, traced, prompt, coupling, baseline=baseline, **how)
    attention_layers = _attention_layers(traced, compared) if attention else ()
    straight, grown = linearity(traced), growth(traced)
    settings = {"coupling": dict(coupling.provenance.settings), "token_layers": list(compared)}
    return Analysis(
        provenance=traced.provenance(
            settings=settings, seconds=time.perf_counter() - started, engine=coupling.provenance.engine
        ),
        coupling=coupling,
        linearity=straight,
        growth=grown,
        attention=_patterns(traced, attention_layers),
        attention_layers=attention_layers,
        tokens=traced.str_tokens,
        baseline=other,
        shared=common,
        picture=picture_of(traced.model, prompt),
        trace=traced,
        **pairs,
        **beside,
    )


def analyze_baseline(baseline: Any, traced: Trace, **options: Any) -> Analysis:
    """Measure the model that stands beside another one, on the same tokens.

    Args:
        baseline: as in ``analyze``.
        traced: the trace of the other model.
        options: those of ``analyze``.
    """
    fresh = baseline_model(baseline, traced.model)
    return replace(analyze(fresh, traced.tokens, **options, attention=False), trace=None)  # a trace keeps its model


def couplings_of_tokens(traced: Trace, layers: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the coupling of tokens in some layers, by its name in an ``Analysis``.

    Args:
        traced: the trace.
        layers: the layers.
        settings: ``sublayers``, ``basis_layers``, and perhaps ``progress``, as in ``token_coupling``; the rest is that
            of ``Options``.
    """
    rest = dict(settings)
    sublayers, others, progress = (rest.pop(name, None) for name in ("sublayers", "basis_layers", "progress"))
    options = Options.resolve(traced.d_model, **rest)
    where = {"layers": layers, "basis_layers": others}
    wanted: dict[str, Wanted[WithinLayers]] = {"token_coupling": wanted_of_tokens(traced, sublayers, **where)}
    if reach := tuple(name for name in sublayers if name not in POSITIONWISE):
        for fixed in get_args(Fixed):
            wanted[f"context_{fixed}"] = wanted_of_context(traced, fixed, sublayers=reach, **where)
    try:
        return dict(zip(wanted, measure(traced, [*wanted.values()], options, progress), strict=True))
    except ArgumentError as error:
        if error.name != "k":
            raise
    return {name: _if_ranks_allow(name, traced, one, options, progress) for name, one in wanted.items()}


def _if_ranks_allow(
    name: str, traced: Trace, wanted: Wanted[WithinLayers], options: Options, progress: bool | None
) -> WithinLayers | None:
    """Measure one of them; None, with a warning, if K exceeds the rank of attention between two tokens."""
    try:
        return measure(traced, [wanted], options, progress)[0]
    except ArgumentError as error:
        if error.name != "k" or name == "token_coupling":
            raise
        fixed = wanted.labels["fixed"]
        warnings.warn(f"context coupling from a fixed {fixed} is left out: {error}", stacklevel=5)
        return None


def _attention_layers(traced: Trace, compared: tuple[int, ...]) -> tuple[int, ...]:
    """Return the layers whose attention patterns are kept."""
    numbers = traced.n_layers * traced.model.cfg.n_heads * traced.n_tokens**2
    chosen = range(traced.n_layers) if numbers <= ATTENTION_LIMIT else compared or (traced.n_layers // 2,)
    return tuple(layer for layer in chosen if traced.point(layer, PATTERN) is not None)


def _patterns(traced: Trace, layers: Sequence[int]) -> Float[Tensor, "layer head dest src"] | None:
    """Return the attention patterns of some layers by running their blocks again; None for no layers."""
    patterns: list[Tensor] = []
    with torch.no_grad():
        for layer in layers:
            traced.run_block(layer, traced.block_input(layer), {PATTERN: lambda p: patterns.append(p[0].float().cpu())})
    return torch.stack(patterns) if patterns else None
