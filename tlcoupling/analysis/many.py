"""Coupling, linearity and growth over many prompts, with confidence intervals over prompts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlcoupling.arguments import Indices, KSpec, as_plain
from tlcoupling.coupling.depth import DepthCoupling, depth_coupling
from tlcoupling.coupling.metric import Bases, Normalizer
from tlcoupling.errors import ArgumentError, EveryPromptFailedError
from tlcoupling.forward.prompt import named_prompts
from tlcoupling.forward.trace import Trace, trace
from tlcoupling.jacobian.engine import EngineName
from tlcoupling.linalg.svd import SolverName
from tlcoupling.precision import full_precision
from tlcoupling.progress import ticking
from tlcoupling.results.base import Provenance, Result, engines_of_prompts
from tlcoupling.results.intervals import Interval, mean_interval
from tlcoupling.text import counted
from tlcoupling.trajectory.growth import growth
from tlcoupling.trajectory.linearity import linearity

if TYPE_CHECKING:
    import pandas

Quantity = Literal["coupling", "null", "excess", "lss", "expodistance", "rate"]

_COUPLING = ("row", "sublayer", "k")
_DEFINITION = ("normalizer", "bases", "absolute")  # settings that make coupling another number


@dataclass(frozen=True, repr=False, eq=False)
class ManyAnalyses(Result):
    """Coupling, linearity and growth of one model over many prompts: one row per prompt and token.

    Attributes:
        coupling: mean coupling over the ordered pairs of different layers, ``[row, sublayer, k]``.
        null: the mean of its null. Same axes.
        lss: line-shape score, ``[row, path]``.
        expodistance: ED, ``[row]``.
        rate: mean growth of the log-norm per layer, ``[row]``.
        prompt: each row's prompt, an index into ``names``, ``[row]``.
        pos: each row's token position, ``[row]``.
        tokens: each row's token as text.
        names: the prompts' names.
        errors: why a prompt could not be measured, by prompt; None if it was.
        sublayers: ``block``, ``attn``, ``mlp``.
        ks: number of singular vectors compared.
        paths: as in ``Linearity``.
        baseline: the same measurement of another model, such as a random one, on the same prompts.
    """

    coupling: Float[Tensor, "row sublayer k"]
    null: Float[Tensor, "row sublayer k"]
    lss: Float[Tensor, "row path"]
    expodistance: Float[Tensor, " row"]
    rate: Float[Tensor, " row"]
    prompt: Int[Tensor, " row"]
    pos: Int[Tensor, " row"]
    tokens: tuple[str, ...]
    names: tuple[str, ...]
    errors: tuple[str | None, ...]
    sublayers: tuple[str, ...]
    ks: tuple[int, ...]
    paths: tuple[str, ...]
    baseline: ManyAnalyses | None = None

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "coupling": _COUPLING,
        "null": _COUPLING,
        "lss": ("row", "path"),
        "expodistance": ("row",),
        "rate": ("row",),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"excess": _COUPLING}

    def __repr__(self) -> str:
        """One line."""
        measured = sum(error is None for error in self.errors)
        shown = ", ".join(
            f"{name} {value:.4f}" for name, value in zip(self.sublayers, self.excess[..., 0].mean(0), strict=True)
        )
        return (
            f"ManyAnalyses({measured} of {len(self.names)} prompts, {counted(len(self.tokens), 'token')}, "
            f"K={self.ks[0]}: mean excess {shown})"
        )

    @property
    def excess(self) -> Float[Tensor, "row sublayer k"]:
        """Return mean coupling minus null."""
        return self.coupling - self.null

    def interval(
        self, quantity: Quantity = "excess", confidence: float = 0.95, *, minus: ManyAnalyses | None = None
    ) -> Interval:
        """Return the mean of a quantity over prompts with its confidence interval; the mean over tokens is a prompt's.

        The prompts stand for those that they were drawn from. Tokens of one prompt are not independent, so a prompt is
        one unit, however many of its tokens were measured.

        Args:
            quantity: ``"coupling"``, ``"null"``, ``"excess"``, ``"lss"``, ``"expodistance"`` or ``"rate"``.
            confidence: level of the interval, between 0 and 1.
            minus: another model on the same prompts, such as ``self.baseline``. The interval is then that of the
                difference, self minus other, prompt by prompt.

        Returns:
            ``Interval``. Its ends are NaN with fewer than 6 prompts: no interval covers as often as it says then.

        Raises:
            ArgumentError: an argument out of range, or a ``minus`` of other prompts, tokens, sublayers, K, normaliser,
                bases or signs.

        Warns:
            UserWarning: the ends are NaN, because there are too few prompts or all are equal; or prompts without a
                value are left out. The warning gives their number.

        Example:
            >>> many.interval("excess", minus=many.baseline)  # doctest: +SKIP
        """
        allowed = (*self._axes, "excess")
        if quantity not in allowed:
            raise ArgumentError("quantity", quantity, f"one of {', '.join(allowed)}")
        axes, name = {**self._axes, **self._derived}[quantity][1:], quantity
        values = self._by_prompt(quantity)
        if minus is not None:
            if not self._has_prompts_of(minus):
                raise ArgumentError(
                    "minus",
                    minus,
                    f"the prompts, tokens, sublayers and K of {self!r}, and its {', '.join(_DEFINITION)}",
                )
            values, name = values - minus._by_prompt(quantity), f"difference in {quantity}"
        coords = {**self._coords(), "measure": (name,)}
        if not axes:
            axes, values = ("measure",), values[:, None]
        return Interval(
            provenance=self.provenance,
            **mean_interval(values, confidence, name),
            quantity=name,
            by="prompt",
            confidence=confidence,
            axes=axes,
            labels=tuple(tuple(coords[axis]) for axis in axes),
        )

    def _by_prompt(self, quantity: str) -> Float[Tensor, "prompt *axes"]:
        """Return the mean over each prompt's tokens; NaN for a prompt that could not be measured."""
        values = getattr(self, quantity).double()
        return torch.stack([values[self.prompt == index].nanmean(0) for index in range(len(self.names))])

    def _has_prompts_of(self, other: ManyAnalyses) -> bool:
        """Return whether two results can be compared prompt by prompt.

        A result does not hold the prompts, and by default their names are numbers: the measured tokens tell.
        """
        if (self.names, self.sublayers, self.ks, self.paths) != (other.names, other.sublayers, other.ks, other.paths):
            return False
        definitions = [[one.provenance.settings.get(name) for name in _DEFINITION] for one in (self, other)]
        both = set(self.prompt.tolist()) & set(other.prompt.tolist())
        rows = [[row for row in one._rows() if row[0] in both] for one in (self, other)]
        return definitions[0] == definitions[1] and rows[0] == rows[1]

    def _rows(self) -> list[tuple[int, int, str]]:
        """Return prompt, position and text of each measured token."""
        return list(zip(self.prompt.tolist(), self.pos.tolist(), self.tokens, strict=True))

    def to_dataframe(self) -> pandas.DataFrame:
        """Return the long form with each row's prompt, position and token."""
        table = super().to_dataframe()
        rows = table["row"].astype(int).tolist()
        table.insert(1, "prompt", [self.names[index] for index in self.prompt[rows].tolist()])
        table.insert(2, "pos", self.pos[rows].tolist())
        table.insert(3, "token", [self.tokens[row] for row in rows])
        return table

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {"row": range(len(self.tokens)), "sublayer": self.sublayers, "k": self.ks, "path": self.paths}


@full_precision()
def analyze_many(
    model: Any,
    prompts: Mapping[str, Any] | Sequence[Any] | Tensor,
    *,
    k: KSpec = 10,
    tokens: Indices = -1,
    sublayers: str | Sequence[str] | None = None,
    normalizer: Normalizer = "frobenius",
    bases: Bases = "uv",
    absolute: bool = True,
    prepend_bos: bool | None = None,
    attention_mask: Mapping[str, Any] | Sequence[Any] | Tensor | None = None,
    engine: EngineName = "auto",
    solver: SolverName = "auto",
    baseline: Any | None = None,
    progress: bool | None = None,
) -> ManyAnalyses:
    """Measure a model on many prompts, for intervals over prompts.

    A prompt that cannot be measured gives a warning and an error in the result; the others are kept.

    Args:
        model: a ``HookedTransformer`` or ``TransformerBridge`` of a decoder, in eval mode. It is not changed.
        prompts: prompts as in ``trace``, of any lengths; a mapping from names to prompts; or a padded batch: token ids
            ``[prompt, pos]``, or what a tokenizer returns for several texts. Each row is measured as its prompt.
        k: as in ``depth_coupling``.
        tokens: the positions measured in each prompt: one, several, or ``"all"``.
        sublayers: as in ``depth_coupling``.
        normalizer: as in ``depth_coupling``.
        bases: as in ``depth_coupling``.
        absolute: as in ``depth_coupling``.
        prepend_bos: as in ``trace``.
        attention_mask: a mask for each prompt, as in ``trace``: a list, or a mapping of the prompts' names.
        engine: as in ``depth_coupling``.
        solver: as in ``depth_coupling``.
        baseline: a model to measure in the same call, such as ``tlc.random_baseline(model)``.
        progress: show a progress bar over prompts; by default as in ``analyze``.

    Raises:
        ArgumentError: no prompts, a single string, or another number of masks.
        EveryPromptFailedError: no prompt could be measured; the first one's error is its cause.

    Warns:
        UserWarning: a prompt could not be measured.

    Example:
        >>> many = tlc.analyze_many(model, prompts, baseline=tlc.random_baseline(model))  # doctest: +SKIP
        >>> many.interval("excess"), many.baseline.interval("excess")  # doctest: +SKIP
    """
    started = time.perf_counter()
    named, tokens = named_prompts(prompts, attention_mask), as_plain(tokens)
    settings = {"normalizer": normalizer, "bases": bases, "absolute": absolute, "engine": engine, "solver": solver}
    rows: list[dict[str, Any]] = []
    errors: list[str | None] = []
    engines: dict[str, Mapping[str, str]] = {}
    first: Exception | None = None
    last: tuple[Trace, DepthCoupling] | None = None
    for index, (name, prompt) in enumerate(ticking(named.items(), "prompts", progress)):
        try:
            traced = trace(model, prompt, prepend_bos=prepend_bos)
            measured = depth_coupling(traced, k, tokens=tokens, sublayers=sublayers, **settings)
            rows.append({"prompt": index, **_row(traced, measured)})
            engines[str(name)] = measured.provenance.engine
            last = traced, measured
            errors.append(None)
        except Exception as error:  # of any type: one bad prompt must not lose the others
            first = first or error
            errors.append(f"{type(error).__name__}: {error}")
            warnings.warn(f"prompt {name!r} could not be measured: {errors[-1]}", stacklevel=3)
    if last is None:
        raise EveryPromptFailedError(
            f"none of {len(named)} prompts could be measured; the first: {errors[0]}"
        ) from first
    traced, measured = last
    other = None
    if baseline is not None:
        other = analyze_many(
            baseline,
            named,
            k=k,
            tokens=tokens,
            sublayers=sublayers,
            prepend_bos=prepend_bos,
            progress=progress,
            **settings,
        )
    provenance = Provenance(
        model_name=traced.model_name,
        weight_processing=traced.weight_processing,
        settings={**measured.provenance.settings, "tokens": tokens},
        engine=engines_of_prompts(engines),
        seconds=time.perf_counter() - started,
    )
    counts = torch.tensor([len(row["tokens"]) for row in rows])
    return ManyAnalyses(
        provenance=provenance,
        **{
            name: torch.cat([row[name] for row in rows]) for name in ("coupling", "null", "lss", "expodistance", "rate")
        },
        prompt=torch.tensor([row["prompt"] for row in rows]).repeat_interleave(counts),
        pos=torch.cat([row["pos"] for row in rows]),
        tokens=tuple(text for row in rows for text in row["tokens"]),
        names=tuple(str(name) for name in named),
        errors=tuple(errors),
        sublayers=measured.sublayers,
        ks=measured.ks,
        paths=linearity(traced).paths,
        baseline=other,
    )


def _row(traced: Trace, measured: DepthCoupling) -> dict[str, Any]:
    """Return one prompt's numbers, token by token."""
    straight, grown, positions = linearity(traced), growth(traced), list(measured.positions)
    return {
        "coupling": measured.mean().movedim(1, 0),
        "null": measured.mean("null").movedim(1, 0),
        "lss": straight.lss[:, positions].mT,
        "expodistance": grown.expodistance[positions],
        "rate": grown.rate[positions],
        "pos": torch.tensor(positions),
        "tokens": measured.tokens,
    }
