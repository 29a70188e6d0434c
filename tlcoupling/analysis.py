"""Everything at once: coupling, linearity and growth of one model on one prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from tlcoupling.coupling import DepthCoupling, depth_coupling
from tlcoupling.coupling.arguments import KSpec
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.errors import ArgumentError
from tlcoupling.jacobian.engine import EngineName, check_index
from tlcoupling.results import Result
from tlcoupling.svd.auto import SolverName
from tlcoupling.trace import PATTERN, Trace, trace
from tlcoupling.trajectory import Growth, Linearity, growth, linearity
from tlcoupling.user_hooks import FwdHooks


@dataclass(frozen=True, repr=False, eq=False)
class Analysis(Result):
    """All measurements of one model on one prompt.

    Attributes:
        coupling: depth-wise coupling.
        linearity: how straight the token trajectories are.
        growth: how residual norms grow.
        attention: attention pattern of one layer, ``[head, dest, src]``; None where the model has no
            hook_pattern, or where it was not wanted.
        attention_layer: that layer.
        tokens: the tokens as text.
        trace: the trace it was measured on; None in an analysis that was loaded from a file.
    """

    coupling: DepthCoupling
    linearity: Linearity
    growth: Growth
    attention: Float[Tensor, "head dest src"] | None
    attention_layer: int
    tokens: tuple[str, ...]
    trace: Trace | None = field(default=None, metadata={"saved": False})

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"attention": ("head", "dest", "src")}

    def __repr__(self) -> str:
        """One line."""
        return f"Analysis({self.provenance.model_name}: {self.coupling!r}, {self.linearity!r}, {self.growth!r})"

    def _coords(self) -> dict[str, Sequence[Any]]:
        heads = 0 if self.attention is None else len(self.attention)
        pos = range(len(self.tokens))
        return {"head": range(heads), "dest": pos, "src": pos}

    def to_dataframe(self) -> Any:
        """All numbers of all measurements in long form, with a column ``measurement``."""
        import pandas as pd

        parts = {"coupling": self.coupling, "linearity": self.linearity, "growth": self.growth}
        frames = []
        for name, part in parts.items():
            frame = part.to_dataframe()
            frame.insert(0, "measurement", name)
            frames.append(frame)
        table = pd.concat(frames, ignore_index=True)
        table["value"] = table.pop("value")
        return table


def analyze(
    model: Any,
    prompt: Any,
    *,
    k: KSpec = 10,
    tokens: int | Sequence[int] | Literal["all"] = -1,
    sublayers: str | Sequence[str] | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    attention: bool = True,
    attention_layer: int | None = None,
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
        sublayers: as in ``depth_coupling``.
        normalizer: as in ``depth_coupling``.
        bases: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        attention: whether an attention pattern is kept; its size grows with the square of the prompt's length.
        attention_layer: the layer whose pattern that is; by default the middle one.
        fwd_hooks: hooks as in ``model.run_with_hooks``; forward pass and Jacobians see them, as in ``trace``.
        prepend_bos: as in ``trace``.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        progress: show a progress bar.

    Raises:
        UnsupportedModelError, ArgumentError, HookError, NonFiniteActivationError, ResidualIdentityError: see
            ``trace`` and ``depth_coupling``.

    Example:
        >>> report = tlc.analyze(model, "When Mary and John went to the store")  # doctest: +SKIP
        >>> report.coupling.mean("excess"), report.linearity, report.growth  # doctest: +SKIP
    """
    started = time.perf_counter()
    traced = trace(model, prompt, fwd_hooks=fwd_hooks, prepend_bos=prepend_bos)
    layer = check_index(
        "attention_layer", traced.n_layers // 2 if attention_layer is None else attention_layer, traced.n_layers
    )
    if attention_layer is not None and not attention:
        raise ArgumentError("attention_layer", attention_layer, "None where attention=False keeps no pattern")
    coupling = depth_coupling(
        traced,
        k,
        tokens=tokens,
        sublayers=sublayers,
        normalizer=normalizer,
        bases=bases,
        absolute=absolute,
        engine=engine,
        solver=solver,
        progress=progress,
    )
    pattern = _pattern(traced, layer) if attention else None
    if pattern is None and attention_layer is not None:
        raise ArgumentError("attention_layer", attention_layer, f"None: this model has no {PATTERN}")
    straight, grown = linearity(traced), growth(traced)
    settings = {"coupling": dict(coupling.provenance.settings), "attention_layer": layer}
    return Analysis(
        provenance=traced.provenance(
            settings=settings, seconds=time.perf_counter() - started, engine=coupling.provenance.engine
        ),
        coupling=coupling,
        linearity=straight,
        growth=grown,
        attention=pattern,
        attention_layer=layer,
        tokens=traced.str_tokens,
        trace=traced,
    )


def _pattern(traced: Trace, layer: int) -> Float[Tensor, "head dest src"] | None:
    """The attention pattern of one layer, from running its block again."""
    if traced.point(layer, PATTERN) is None:
        return None
    kept: list[Tensor] = []
    traced.run_block(layer, traced.block_input(layer), {PATTERN: kept.append})
    return kept[0][0].detach().float().cpu()
