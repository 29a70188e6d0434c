"""Everything at once: coupling, linearity and growth of one model on one prompt."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tlcoupling.arguments import Indices, KSpec, resolve_indices
from tlcoupling.coupling.context import ContextCoupling, context_coupling
from tlcoupling.coupling.depth import DepthCoupling, depth_coupling
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.coupling.token import TokenCoupling, token_coupling
from tlcoupling.errors import ArgumentError
from tlcoupling.forward.context import measured
from tlcoupling.forward.trace import PATTERN, Trace, trace
from tlcoupling.forward.user_hooks import FwdHooks
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.results.base import Result
from tlcoupling.trajectory.growth import Growth, growth
from tlcoupling.trajectory.linearity import Linearity, linearity

# Numbers of attention patterns (256 MB of them) up to which those of all layers are kept.
ATTENTION_LIMIT = 64_000_000


@dataclass(frozen=True, repr=False, eq=False)
class Analysis(Result):
    """All measurements of one model on one prompt.

    Attributes:
        coupling: depth-wise coupling.
        linearity: how straight the token trajectories are.
        growth: how residual norms grow.
        attention: attention patterns of ``attention_layers``; None where the model has no hook_pattern, or where they
            were not wanted.
        attention_layers: those layers: all, unless the prompt is too long for that (see ``analyze``).
        tokens: the tokens as text.
        token_coupling: token-wise coupling of the ``token_layers`` that were asked for; None without.
        context_src: what those layers carry from the first token to each later one; None without, and where K is above
            the rank of what attention carries from one token to another.
        context_dest: what those layers carry to the last token from each earlier one; None as ``context_src``.
        trace: the trace it was measured on; None in an analysis that was loaded from a file.
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
    trace: Trace | None = field(default=None, metadata={"saved": False})

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention": ("layer", "head", "dest", "src")}

    @property
    def parts(self) -> dict[str, Result]:
        """The measurements inside, by name, without those that were not made."""
        names = ("coupling", "token_coupling", "context_src", "context_dest", "linearity", "growth")
        return {name: part for name in names if (part := getattr(self, name)) is not None}

    def __repr__(self) -> str:
        """One line."""
        return f"Analysis({self.provenance.model_name}: {self.coupling!r}, {self.linearity!r}, {self.growth!r})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        heads = 0 if self.attention is None else self.attention.shape[1]
        pos = range(len(self.tokens))
        return {"layer": self.attention_layers, "head": range(heads), "dest": pos, "src": pos}

    def to_dataframe(self) -> Any:
        """All numbers of all measurements in long form, with a column ``measurement``."""
        import pandas as pd

        frames = []
        for name, part in self.parts.items():
            frame = part.to_dataframe()
            frame.insert(0, "measurement", name)
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        table["value"] = table.pop("value")
        return table


@measured
def analyze(
    model: Any,
    prompt: Any,
    *,
    k: KSpec = 10,
    tokens: Indices = -1,
    token_layers: Indices | None = None,
    sublayers: str | Sequence[str] | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    attention: bool = True,
    fwd_hooks: FwdHooks = (),
    prepend_bos: bool | None = None,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    progress: bool = False,
) -> Analysis:
    """Measure coupling, linearity and growth of a model on a prompt.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge`` of a decoder, in eval mode. It is left as it was.
        prompt: a string, token ids ``[pos]``, or a batch of one ``[1, pos]``.
        k: as in ``depth_coupling``.
        tokens: positions whose depth-wise coupling is measured; the trajectories of all tokens always are.
        token_layers: layers whose tokens are compared with each other, ``"all"``, an int or several: token-wise
            coupling, and context coupling from the first token and to the last; by default none. A layer of
            SmolLM2-135M at 28 tokens takes about four seconds on two cores, and the square of that at twice the length.
        sublayers: as in ``depth_coupling``.
        normalizer: as in ``depth_coupling``.
        bases: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        attention: whether attention patterns are kept; their size grows with the square of the prompt's length.
        fwd_hooks: hooks as in ``model.run_with_hooks``; forward pass and Jacobians see them, as in ``trace``.
        prepend_bos: as in ``trace``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        progress: show a progress bar.

    Attention patterns are kept of all layers, unless they are more than 64 million numbers (a prompt of 512 tokens at
    270 heads is): then of ``token_layers``, or of the middle layer where there are none.

    Raises:
        UnsupportedModelError, ArgumentError, HookError, NonFiniteActivationError, ResidualIdentityError: see
            ``trace`` and ``depth_coupling``.

    Example:
        >>> report = tlc.analyze(model, "When Mary and John went to the store")  # doctest: +SKIP
        >>> report.coupling.mean("excess"), report.linearity, report.growth  # doctest: +SKIP
    """
    started = time.perf_counter()
    traced = trace(model, prompt, fwd_hooks=fwd_hooks, prepend_bos=prepend_bos)
    compared = () if token_layers is None else resolve_indices("token_layers", token_layers, traced.n_layers)
    if compared and traced.n_tokens < 2:
        raise ArgumentError("token_layers", token_layers, "None: the one token of this prompt has none to compare with")
    shared: dict[str, Any] = {
        "k": k,
        "normalizer": normalizer,
        "bases": bases,
        "absolute": absolute,
        "engine": engine,
        "solver": solver,
        "progress": progress,
    }
    coupling = depth_coupling(traced, tokens=tokens, sublayers=sublayers, **shared)
    pairs: dict[str, Any] = {}
    if compared:
        pairs["token_coupling"] = token_coupling(traced, sublayers=sublayers, layers=compared, **shared)
        reach = tuple(name for name in coupling.sublayers if name != "mlp")  # an MLP reaches no other token
        for fixed in ("src", "dest") if reach else ():
            pairs[f"context_{fixed}"] = _context(traced, fixed, {**shared, "sublayers": reach, "layers": compared})
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
        trace=traced,
        **pairs,
    )


def _context(traced: Trace, fixed: Literal["src", "dest"], shared: Mapping[str, Any]) -> ContextCoupling | None:
    """Context coupling; None, with a warning, where K is above the rank of what attention carries between tokens."""
    try:
        return context_coupling(traced, fixed, **shared)
    except ArgumentError as error:
        if error.name != "k":
            raise
        warnings.warn(f"context coupling from a fixed {fixed} is left out: {error}", stacklevel=4)
        return None


def _attention_layers(traced: Trace, compared: tuple[int, ...]) -> tuple[int, ...]:
    """The layers whose attention patterns are kept."""
    numbers = traced.n_layers * traced.model.cfg.n_heads * traced.n_tokens**2
    chosen = range(traced.n_layers) if numbers <= ATTENTION_LIMIT else compared or (traced.n_layers // 2,)
    return tuple(layer for layer in chosen if traced.point(layer, PATTERN) is not None)


def _patterns(traced: Trace, layers: Sequence[int]) -> Float[Tensor, "layer head dest src"] | None:
    """The attention patterns of some layers, from running their blocks again; None of none."""
    kept: list[Tensor] = []
    with torch.no_grad():
        for layer in layers:
            traced.run_block(layer, traced.block_input(layer), {PATTERN: lambda p: kept.append(p[0].float().cpu())})
    return torch.stack(kept) if kept else None
