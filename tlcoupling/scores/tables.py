"""Match measurements with scores: one row per model."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tlcoupling.errors import ArgumentError
from tlcoupling.sweeps.table import require_one_kind

Missing = Literal["error", "drop"]
# A pandas.DataFrame; pandas' own types are too loose to check (a column may be a Series, an array or a frame).
Frame = Any

OF_COUPLING = ("coupling", "excess", "null")
_SHAPE = {"parameters": "n_params", "depth": "n_layers", "width": "d_model"}
_WHICH = ("model", "revision", "step")
CLUSTERS = ("run", "family", "model")  # the first of these columns that a table has names the clusters
_NEEDED = "one row per model, or per cell, sublayer and K as in SweepStore.table(): a column 'model' and "


@dataclass(frozen=True)
class Joined:
    """Models with their scores and predictors.

    Attributes:
        models: their names, with revision or step if there are several.
        families: each model's family.
        clusters: each model's cluster; only different clusters are independent.
        cluster_by: what names the clusters: ``"run"``, ``"family"`` or ``"model"``.
        left_out: models that did not meet the condition.
        scores: each model's score.
        predictors: one number per model, by name; NaN if a model has none.
        nulls: the name of the null of each coupling or excess.
    """

    models: tuple[str, ...]
    families: tuple[str, ...]
    clusters: tuple[str, ...]
    cluster_by: str
    left_out: tuple[str, ...]
    scores: NDArray[np.float64]
    predictors: Mapping[str, NDArray[np.float64]]
    nulls: Mapping[str, str]


def published_points() -> Frame:
    """Return the points of the paper's figure, with a null computed from width alone.

    28 models, read from the last figure of the paper's project page: coupling to about 0.0005, Open LLM Leaderboard
    (version 1) average to about 0.5. Widths, depths and sizes are from the models' public cards. The paper uses the
    trace normaliser and K = 0.1 d_model. For a flat spectrum ||S1||_F^2 = K s^2 and (tr S1)^2 = (K s)^2, and the other
    terms are small, so the null is about 1 - 1/sqrt(K): ``null = 1 - 1/sqrt(0.1 d_model)``.

    Returns:
        A table with ``model``, ``coupling``, ``null``, ``excess``, ``score``, ``d_model``, ``n_layers``, ``n_params``.
    """
    pd = _pandas()

    with resources.as_file(resources.files("tlcoupling") / "data" / "published_coupling.csv") as path:
        table = pd.read_csv(path)
    table["null"] = 1 - 1 / np.sqrt(0.1 * table["d_model"])
    table["excess"] = table["coupling"] - table["null"]
    table["n_params"] = table.pop("params_billion") * 1e9
    return table.rename(columns={"leaderboard_score": "score"})


def read_table(source: Any, argument: str) -> Frame:
    """Read a table from any supported source.

    Args:
        source: a DataFrame, a ``SweepStore``, the folder of one, or a CSV or parquet file.
        argument: the argument's name in errors.

    Raises:
        ArgumentError: another source, or one that cannot be read.
        StoreError, ResultFileError: a damaged store.
    """
    pd = _pandas()

    if isinstance(source, pd.DataFrame):
        return source
    if hasattr(source, "table"):
        return source.table()
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError(argument, source, "a DataFrame, a SweepStore, or the path of a store, a CSV or a parquet")
    path = Path(source)
    if path.is_dir():
        from tlcoupling.sweeps.store import SweepStore

        return SweepStore(path).table()
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError, ImportError) as error:  # also for invalid CSV and parquet files
        raise ArgumentError(
            argument, str(path), f"a store, a CSV or a parquet file that can be read ({error})"
        ) from error


def join(table: Frame, scores: Any | None, score: str | None, missing: Missing, where: str | None = None) -> Joined:
    """Match measurements and scores, one row per model; see ``correlate``."""
    if missing not in ("error", "drop"):
        raise ArgumentError("missing", missing, "'error' or 'drop'")
    if "model" not in table.columns:
        raise ArgumentError("table", list(table.columns), _NEEDED + "measurements")
    if scores is None:
        if "score" not in table.columns:
            raise ArgumentError("scores", None, "scores of the models, if the table has no column 'score'")
        scores = table[[name for name in (*_WHICH, "score", *CLUSTERS[:2]) if name in table.columns]].drop_duplicates()
    scored, which = _scores(scores, score)
    measured, nulls = _per_model(table, which)
    matched, left_out = _restricted(_matched(measured, scored, which, missing), where, which)
    shape = {name: matched[column] for name, column in _SHAPE.items() if column in matched.columns}
    if "parameters" in shape:
        shape["parameters"] = np.log10(shape["parameters"].astype(float))
    families = matched["family"] if "family" in matched.columns else matched["model"].map(family_of)
    cluster_by = _cluster_column(matched)
    taken = {*which, "score", *CLUSTERS, *_SHAPE.values()}
    columns = {**{str(name): matched[name] for name in matched.columns if name not in taken}, **shape}
    predictors = {name: column.to_numpy(float, na_value=np.nan) for name, column in columns.items()}
    return Joined(
        models=tuple(_names(matched[which])),
        families=tuple(map(str, families)),
        clusters=tuple(map(str, matched[cluster_by])),
        cluster_by=cluster_by,
        left_out=left_out,
        scores=matched["score"].to_numpy(float),
        predictors={name: values for name, values in predictors.items() if np.isfinite(values).any()},
        nulls=nulls,
    )


def _cluster_column(models: Frame) -> str:
    """Return the column that names the clusters: the first of ``CLUSTERS`` that has a value for every model.

    Warns:
        UserWarning: an earlier one has values for some models alone.
    """
    for name in CLUSTERS[:-1]:
        missing = int(models[name].isna().sum()) if name in models.columns else len(models)
        if not missing:
            return name
        if missing < len(models):
            warnings.warn(
                f"column {name!r} has no value for {missing} of {len(models)} models, so it names no clusters: rows of "
                f"one {name} may count as independent. Fill it, or leave it out",
                stacklevel=4,
            )
    return CLUSTERS[-1]


def family_of(model: str) -> str:
    """Return the family in a model's name: its leading letters in lower case, without the organisation."""
    name = model.rstrip("/").rpartition("/")[2]
    letters = re.match(r"[^\W\d_]+", name)
    return (letters.group() if letters else name).lower()


def _scores(scores: Any, score: str | None) -> tuple[Frame, list[str]]:
    """Return a table of ``model``, ``score``, perhaps ``run`` and ``family``, and the columns that identify a model."""
    pd = _pandas()

    if isinstance(scores, Mapping):
        scores = pd.DataFrame({"model": list(scores), "score": list(scores.values())})
    given = read_table(scores, "scores")
    columns = list(given.columns)
    if "model" not in columns:
        raise ArgumentError("scores", columns, "a table with a column 'model' and one of scores")
    if score is None:
        others = [name for name in columns if name not in (*_WHICH, *CLUSTERS)]
        numeric = [name for name in others if pd.api.types.is_numeric_dtype(given[name])]
        score = "score" if "score" in columns else (numeric or others or [None])[0]
        if score is None or (score != "score" and len(numeric or others) > 1):
            raise ArgumentError(
                "score", None, f"the name of the column of scores, one of {', '.join(numeric or others)}"
            )
    elif score not in columns:
        raise ArgumentError("score", score, f"one of the columns {', '.join(columns)}{_nearest(score, columns)}")
    which = [name for name in _WHICH if name in columns and given[name].notna().any()]
    kept = given[[*which, *(name for name in CLUSTERS[:2] if name in columns)]].copy()
    try:
        kept["score"] = pd.to_numeric(given[score]).astype(float)
    except (ValueError, TypeError) as error:
        raise ArgumentError("score", score, f"a column of numbers ({error})") from error
    twice = kept[which].astype(str)[kept.duplicated(which)]
    if len(twice):
        raise ArgumentError("scores", "@".join(twice.iloc[0]), "one score per model; this one has several")
    return kept, which


def _per_model(table: Frame, which: list[str]) -> tuple[Frame, dict[str, str]]:
    """Return means over prompts (one row per model, one column per measurement, sublayer and K), and nulls by name."""
    if absent := [name for name in which if name not in table.columns]:
        raise ArgumentError("scores", which, f"columns that the table of measurements has too; it has no {absent[0]!r}")
    rows = table
    if "status" in rows.columns:
        rows = rows[rows["status"] == "measured"]
    if "random_seed" in rows.columns:
        rows = rows[rows["random_seed"].isna()]
    if rows.empty:
        raise ArgumentError("table", f"{len(table)} rows", "measurements of trained models; there is none")
    _require_comparable(rows, which)
    of_models = [name for name in (*_SHAPE.values(), *CLUSTERS[:2]) if name in rows.columns]
    columns, nulls = [rows[[*which, *of_models]].groupby(which, dropna=False, sort=False).first()], {}
    for labels, part in _parts(rows):
        grouped = part.groupby(which, dropna=False, sort=False)
        for quantity in OF_COUPLING:
            if quantity in part.columns:
                columns.append(grouped[quantity].mean().rename(" ".join([quantity, *labels])))
        nulls |= {" ".join([name, *labels]): " ".join(["null", *labels]) for name in ("coupling", "excess")}
        if "lss" in part.columns:
            columns.append(grouped["lss"].mean().rename(" ".join(["LSS", *labels[:1]])))
    if "ed" in rows.columns:
        columns.append(rows.groupby(which, dropna=False, sort=False)["ed"].mean().rename("ED"))
    pd = _pandas()

    whole = pd.concat(columns, axis=1)
    return whole.loc[:, ~whole.columns.duplicated()].reset_index(), nulls


def _parts(rows: Frame) -> list[tuple[list[str], Frame]]:
    """Return the rows of each sublayer and K, with their names; all rows together without these columns."""
    by = [name for name in ("sublayer", "k_asked") if name in rows.columns and rows[name].notna().any()]
    if not by:
        return [([], rows)]
    return [([key[0], *(f"K={k}" for k in key[1:])], part) for key, part in rows.groupby(by, sort=False)]


def _require_comparable(rows: Frame, which: list[str]) -> None:
    """Raise an error if rows of one score must not be averaged; warn if prompts differ between models."""
    for name in _WHICH[1:]:
        if name not in which and name in rows.columns:
            several = rows.groupby(which, dropna=False, sort=False)[name].nunique(dropna=False)
            if (several > 1).any():
                raise ArgumentError(
                    "scores",
                    which,
                    f"a column {name!r} as well: {several.idxmax()!r} is measured at {several.max()} of them",
                )
    require_one_kind(rows, which)
    if (
        "prompt_id" in rows.columns
        and rows.groupby(which, dropna=False, sort=False)["prompt_id"].agg(frozenset).nunique() > 1
    ):
        warnings.warn(
            "models are measured on different prompts, so their means are not over the same ones", stacklevel=2
        )


def _matched(measured: Frame, scored: Frame, which: list[str], missing: Missing) -> Frame:
    """Return measured models with their scores.

    Raises:
        ArgumentError: a model without a score, if ``missing`` is ``"error"``.
    """
    twice = [name for name in CLUSTERS[:2] if name in measured.columns and name in scored.columns]
    merged = measured.drop(columns=twice).merge(scored, on=which, how="left", indicator=True)
    unknown = merged["_merge"] == "left_only"
    names, known = _names(merged.loc[unknown, which]), _names(scored[which])
    if names and missing == "error":
        taken = _names(measured[which])
        free = [name for name in known if name not in taken]  # a name that is measured itself is not a misspelling
        shown = "; ".join(f"{name!r}{_nearest(name, free)}" for name in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ArgumentError(
            "scores",
            f"{len(known)} models",
            f"a score for every measured model; there is none for {shown}{more} "
            "(missing='drop', on the command line --drop-missing, leaves them out)",
        )
    blank = ~unknown & ~np.isfinite(merged["score"])
    if blank.any():
        left_out = ", ".join(_names(merged.loc[blank, which]))
        warnings.warn(f"{int(blank.sum())} models have no numeric score and are left out: {left_out}", stacklevel=2)
    return merged[~unknown & ~blank].drop(columns="_merge")


def _restricted(matched: Frame, where: str | None, which: list[str]) -> tuple[Frame, tuple[str, ...]]:
    """Return the models that meet a condition, and the names of the others.

    Raises:
        ArgumentError: it is not a condition on the columns; fewer than three models are left, or all scores are equal.
    """
    kept, left_out = matched, ()
    if where is not None:
        allowed = f"a condition on the columns {', '.join(map(repr, matched.columns))}"
        try:
            met = matched.eval(where, engine="python", local_dict={}, global_dict={})
        except Exception as error:  # pandas raises many kinds, those of Python's parser among them
            raise ArgumentError("where", where, f"{allowed} ({error})") from error
        if getattr(met, "dtype", None) not in (np.dtype(bool), _pandas().BooleanDtype()) or len(met) != len(matched):
            raise ArgumentError("where", where, allowed)
        met = met.fillna(False).astype(bool)  # a missing number meets no condition
        kept, left_out = matched[met], tuple(_names(matched.loc[~met, which]))
    if len(kept) < 3:
        raise ArgumentError(
            "scores", f"{len(kept)} measured models with a score", "three or more: two always lie on a line"
        )
    if kept["score"].nunique() == 1:
        raise ArgumentError("scores", kept["score"].iloc[0], "scores that differ; all models have this one")
    return kept, left_out


def _names(models: Frame) -> list[str]:
    """Return one name per row of the columns that identify a model, such as ``gpt2@step100``."""
    return ["@".join(map(str, row)) for row in models.itertuples(index=False)]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest: {near[0]!r})" if near else ""


def _pandas() -> Any:
    """Import pandas on first use: it is slow to load."""
    import pandas

    return pandas
