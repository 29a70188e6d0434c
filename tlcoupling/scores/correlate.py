"""Do coupling, linearity and growth correlate with a score, beyond width, depth and size?

``correlate`` answers for a table of measurements. ``tables`` matches measurements with scores, ``partial_correlation``
does the arithmetic.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tlcoupling.precision import full_precision
from tlcoupling.results.base import Provenance, Result
from tlcoupling.results.intervals import check_confidence
from tlcoupling.scores.clusters import LEAST, jackknife
from tlcoupling.scores.partial_correlation import Partial, partial_correlation, r_squared_of_groups
from tlcoupling.scores.tables import Joined, Missing, join, published_points, read_table

if TYPE_CHECKING:
    import pandas

_FEW = 8  # with as many models or fewer, the rank correlation's p-value tries all their orders
GIVEN = ("null", "same width", "parameters", "depth")


@dataclass(frozen=True, repr=False, eq=False)
class Correlations(Result):
    """How each measurement correlates with a score, over models.

    Attributes:
        r: Pearson's correlation with the score, ``[predictor]``.
        p: its two-sided p-value: Student's t if each model is its own cluster, else the jackknife's over clusters
            (``clusters.jackknife``), which is NaN with fewer than 4 clusters, or where r is the same without any of
            them. Same axis.
        low: lower end of r's interval, by the jackknife over clusters; NaN as the jackknife's p. Same axis.
        high: upper end. Same axis.
        rho: Spearman's rank correlation with the score. Same axis.
        rho_p: its two-sided p-value, as ``p``; over all orders of the models where each is its own cluster and there
            are 8 or fewer. Same axis.
        n: number of models with this measurement. Same axis.
        by_null: share of the measurement's variance explained by its null, which depends on width, K and spectrum
            alone; NaN if there is no null, or a model lacks it. Same axis.
        by_width: share of its variance between models of different width, an upper bound for any function of width; NaN
            if a model's width is unknown. Same axis.
        partial: correlation with the score given the measurement's own ``null``, the exact width (within groups of the
            ``same width``), ``parameters`` (their logarithm) or ``depth``; NaN if that determines one of the two.
            ``[predictor, given]``.
        partial_p: its two-sided p-value, as ``p``. Same axes.
        r_without: r over the models of all other families. ``[predictor, family]``.
        values: the measurements, ``[predictor, model]``.
        scores: the scores, ``[model]``.
        predictors: coupling, excess and null of each sublayer and K, LSS, ED, and the rivals: ``parameters`` (their
            logarithm), ``depth`` and ``width``.
        models: the models' names.
        family: each model's family.
        families: all families.
        given: the quantities held fixed in ``partial``.
        confidence: level of the interval.
        cluster_by: what names the clusters: ``"run"``, ``"family"`` or ``"model"``; empty in results of version 0.1,
            whose p-values and intervals take all models as independent.
        cluster: each model's cluster. Only different clusters count as independent.
        where: the condition that models had to meet; empty without one.
        left_out: models that did not meet it.
    """

    r: Float[Tensor, " predictor"]
    p: Float[Tensor, " predictor"]
    low: Float[Tensor, " predictor"]
    high: Float[Tensor, " predictor"]
    rho: Float[Tensor, " predictor"]
    rho_p: Float[Tensor, " predictor"]
    n: Int[Tensor, " predictor"]
    by_null: Float[Tensor, " predictor"]
    by_width: Float[Tensor, " predictor"]
    partial: Float[Tensor, "predictor given"]
    partial_p: Float[Tensor, "predictor given"]
    r_without: Float[Tensor, "predictor family"]
    values: Float[Tensor, "predictor model"]
    scores: Float[Tensor, " model"]
    predictors: tuple[str, ...]
    models: tuple[str, ...]
    family: tuple[str, ...]
    families: tuple[str, ...]
    given: tuple[str, ...]
    confidence: float
    cluster_by: str = ""
    cluster: tuple[str, ...] = ()
    where: str = ""
    left_out: tuple[str, ...] = ()

    _axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("r", "p", "low", "high", "rho", "rho_p", "n", "by_null", "by_width"), ("predictor",)),
        **dict.fromkeys(("partial", "partial_p"), ("predictor", "given")),
        "r_without": ("predictor", "family"),
        "values": ("predictor", "model"),
        "scores": ("model",),
    }
    _derived: ClassVar[Mapping[str, tuple[str, ...]]] = {"r_squared": ("predictor",)}

    def __repr__(self) -> str:
        """One line: the three predictors with the largest R^2."""
        best = sorted(range(len(self.predictors)), key=lambda i: -float(self.r_squared[i].nan_to_num()))[:3]
        shown = ", ".join(f"{self.predictors[i]} R^2 {self.r_squared[i]:.2f}" for i in best)
        return f"Correlations({len(self.models)} models, {len(self.predictors)} predictors: {shown})"

    @property
    def r_squared(self) -> Float[Tensor, " predictor"]:
        """Return the share of the score's variance that a line explains."""
        return self.r.square()

    def of(self, predictor: str) -> dict[str, float]:
        """Return the numbers of one predictor, by name; not those over families or models.

        Raises:
            KeyError: no such predictor.
        """
        if predictor not in self.predictors:
            raise KeyError(f"{predictor!r} is not one of {', '.join(self.predictors)}")
        index = self.predictors.index(predictor)
        alone = [name for name, axes in {**self._axes, **self._derived}.items() if axes == ("predictor",)]
        numbers = {name: getattr(self, name)[index].item() for name in alone}
        for name in ("partial", "partial_p"):
            row = getattr(self, name)[index].tolist()
            numbers |= {f"{name} given {held}": value for held, value in zip(self.given, row, strict=True)}
        return numbers

    def by_model(self) -> pandas.DataFrame:
        """Return one row per model, with ``model``, ``family``, ``score`` and a column per predictor."""
        import pandas as pd

        columns = dict(zip(self.predictors, self.values.tolist(), strict=True))
        return pd.DataFrame({"model": self.models, "family": self.family, "score": self.scores.tolist(), **columns})

    def _coords(self) -> dict[str, Sequence[Any]]:
        return {
            "predictor": self.predictors,
            "given": self.given,
            "family": self.families,
            "model": self.models,
        }


@full_precision()
def correlate(
    table: Any | None = None,
    scores: Any | None = None,
    *,
    score: str | None = None,
    where: str | None = None,
    confidence: float = 0.95,
    missing: Missing = "error",
) -> Correlations:
    """Correlate coupling, excess, LSS and ED of models with their scores, and show what width alone explains.

    Measurements are averaged over a model's prompts. Models with random weights and failed cells are left out.

    Rows of one cluster are not independent. A column ``run`` of the table or the scores names the cluster, else a
    column ``family``, else the model's name (so all checkpoints of a model are one cluster). P-values and intervals
    are over clusters, which a warning says.

    Args:
        table: a ``SweepStore`` or its folder, a DataFrame, or a CSV or parquet file: the table of a store, or one row
            per model with ``model``, any of ``coupling``, ``null``, ``excess``, ``lss``, ``ed``, and of ``d_model``,
            ``n_layers``, ``n_params``, ``family``. None: the paper's published points (``tables.published_points``).
        scores: names and scores, or a table (DataFrame, CSV, parquet) with ``model`` and scores. If a model is measured
            at several revisions or steps, also ``revision`` or ``step``. ``run`` or ``family``, if rows of one are not
            independent. None takes the column ``score`` of ``table``.
        score: the column of the scores; by default ``score``, or the only numeric column.
        where: a condition on the score and the measurements, such as ``"score > 50 and d_model >= 1024"`` (as in
            ``pandas.DataFrame.query``; names with spaces in backticks). Models that do not meet it are left out, and
            ``left_out`` names them.
        confidence: level of the intervals, between 0 and 1.
        missing: what to do with a measured model without a score: ``"error"`` or ``"drop"``.

    Raises:
        ArgumentError: tables that do not match, a measured model without a score (the error names the nearest one),
            fewer than three models, scores that are all equal, a ``where`` that is not a condition on these columns.

    Warns:
        UserWarning: several rows of a cluster; fewer than 4 clusters, which have no intervals (nor p-values, where a
            cluster has several rows); a column ``run`` or ``family`` with values for some models alone, which names no
            clusters.
        UserWarning: scores that are not numbers, a measurement that is the same for all models, models measured on
            different prompts, models of unknown width, size or null.

    Example:
        >>> correlations = tlc.correlate()  # the paper's own points  # doctest: +SKIP
        >>> correlations.of("coupling")["r_squared"], correlations.of("coupling")["by_null"]  # doctest: +SKIP
        (0.80, 0.93)
    """
    started = time.perf_counter()
    check_confidence(confidence)
    source = published_points() if table is None else read_table(table, "table")
    joined = join(source, scores, score, missing, where)
    _warn_of_clusters(joined)
    families = tuple(dict.fromkeys(joined.families))
    rows = [_row(name, joined, families, confidence) for name in joined.predictors]
    columns = {name: torch.tensor(np.array([row[name] for row in rows])) for name in rows[0]}
    return Correlations(
        provenance=Provenance(
            model_name=f"{len(joined.models)} models",
            settings={"score": score, "where": where, "missing": missing},
            seconds=time.perf_counter() - started,
        ),
        **columns,
        values=torch.from_numpy(np.stack(list(joined.predictors.values()))),
        scores=torch.tensor(joined.scores),
        predictors=tuple(joined.predictors),
        models=joined.models,
        family=joined.families,
        families=families,
        given=GIVEN,
        confidence=confidence,
        cluster_by=joined.cluster_by,
        cluster=joined.clusters,
        where=where or "",
        left_out=joined.left_out,
    )


def _warn_of_clusters(joined: Joined) -> None:
    """Warn where rows are not independent, and where too few clusters are left."""
    rows, count, by = len(joined.models), len(set(joined.clusters)), joined.cluster_by
    if count < rows:
        warnings.warn(
            f"{rows} rows are of {count} clusters (column {by!r}), and rows of one are not independent: p-values and "
            "intervals are over clusters",
            stacklevel=4,
        )
    if count < LEAST:
        lost = "intervals" if count == rows else "p-values and intervals"  # Student's p-values need three models
        warnings.warn(
            f"{count} independent clusters (column {by!r}) are too few for {lost}, which are NaN: {LEAST} or more are "
            "needed",
            stacklevel=4,
        )


def _row(name: str, joined: Joined, families: Sequence[str], confidence: float) -> dict[str, Any]:
    """Return one predictor's numbers by field name."""
    from scipy.stats import spearmanr

    present = np.isfinite(joined.predictors[name])
    x, y = joined.predictors[name][present], joined.scores[present]
    clusters = [one for one, here in zip(joined.clusters, present, strict=True) if here]
    independent = len(set(clusters)) == len(clusters)
    row: dict[str, Any] = {"n": int(present.sum())}
    whole = partial_correlation(x, y)
    row |= {"r": whole.r, "p": np.nan, "low": np.nan, "high": np.nan, "rho": np.nan, "rho_p": np.nan}
    if np.isfinite(whole.r) and np.ptp(y) > 0:
        over_clusters = jackknife(lambda rows: partial_correlation(x[rows], y[rows]).r, clusters, confidence)
        row |= over_clusters._asdict()
        row["rho"], row["rho_p"] = spearmanr(x, y)
        if independent and len(x) <= _FEW:
            row["rho_p"] = _p_over_orders(x, y)
    else:
        warnings.warn(f"{name} or the score is the same for all models that have it: no correlation", stacklevel=4)
    given = {held: _given(held, name, joined, present) for held in GIVEN}
    partial = [_held_fixed(x, y, held, values) for held, values in given.items()]
    row["partial"], row["partial_p"] = [one.r for one in partial], [one.p for one in partial]
    if independent:
        row["p"] = whole.p  # exact for normal rows
    else:
        row["rho_p"] = _p_over_clusters(lambda rows: float(np.asarray(spearmanr(x[rows], y[rows]))[0]), clusters)
        row["partial_p"] = [
            _p_over_clusters(lambda rows, held=held, values=values: _held_fixed(x, y, held, values, rows).r, clusters)
            for held, values in given.items()
        ]
    null, widths = given["null"], x if name == "width" else given["same width"]
    row["by_null"] = np.nan if null is None else partial_correlation(x, null).r ** 2
    row["by_width"] = np.nan if widths is None else r_squared_of_groups(x, widths.tolist())
    of = np.array(joined.families)[present]
    row["r_without"] = [partial_correlation(x[of != one], y[of != one]).r for one in families]
    return row


def _p_over_orders(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the share of all orders of y whose rank correlation with x is as far from zero.

    Student's t gives p = 0 for any perfect order: of four models, of which one order in twelve is perfect by chance.
    """
    from scipy.stats import rankdata

    first, second = (rankdata(values) - (len(x) + 1) / 2 for values in (x, y))
    sums = np.abs(second[np.array(list(permutations(range(len(x)))))] @ first)
    # ranks are multiples of 1/2, so that their sums differ by 1/4 or not at all
    return float(np.mean(sums >= abs(second @ first) - 1e-9))


def _p_over_clusters(correlation: Callable[[NDArray[np.bool_]], float], clusters: Sequence[str]) -> float:
    return jackknife(correlation, clusters, 0.95).p


def _given(held: str, name: str, joined: Joined, present: NDArray[np.bool_]) -> NDArray[np.float64] | None:
    """Return the values to hold fixed, for the models that have a predictor.

    None if they do not exist for this predictor or are the predictor itself. Also None, with a warning, if they are
    unknown for one of these models.
    """
    source = {"null": joined.nulls.get(name), "same width": "width"}.get(held, held)
    values = None if source in (None, name) else joined.predictors.get(str(source))
    if values is None or np.isfinite(values[present]).all():
        return None if values is None else values[present]
    warnings.warn(
        f"{source} is unknown for some models with {name}: the correlation given {source} and the share that it "
        "explains are NaN",
        stacklevel=5,
    )
    return None


def _held_fixed(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    held: str,
    values: NDArray[np.float64] | None,
    rows: NDArray[np.bool_] | slice = slice(None),
) -> Partial:
    """Return the partial correlation over some rows; NaN if there is nothing to hold fixed."""
    if values is None:
        return Partial(np.nan, np.nan, 0)
    if held == "same width":
        return partial_correlation(x[rows], y[rows], within=values[rows].tolist())
    return partial_correlation(x[rows], y[rows], [values[rows]])
