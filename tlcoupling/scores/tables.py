"""What ``statistics`` compares: one row per model, its measurements beside its score."""

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
# A pandas.DataFrame. What its own types say of a column or a group (a Series, an array or a frame) cannot be checked.
Frame = Any

OF_COUPLING = ("coupling", "excess", "null")
_SHAPE = {"parameters": "n_params", "depth": "n_layers", "width": "d_model"}
_WHICH = ("model", "revision", "step")
_NEEDED = "one row per model, or per cell, sublayer and K as SweepStore.table() has them: a column 'model' and "


@dataclass(frozen=True)
class Joined:
    """Models with their scores and what may go with these.

    Attributes:
        models: their names, with revision or step where there are several.
        families: of each.
        scores: of each.
        predictors: one number per model, by name; NaN where a model has none.
        nulls: the name of the null that belongs to a coupling or an excess.
    """

    models: tuple[str, ...]
    families: tuple[str, ...]
    scores: NDArray[np.float64]
    predictors: Mapping[str, NDArray[np.float64]]
    nulls: Mapping[str, str]


def published_points() -> Frame:
    """The points of the paper's figure, with a null made of width alone.

    28 models, read off the last figure of the paper's project page (coupling to about 0.0005, the average of the Open
    LLM Leaderboard, version 1, to about 0.5); widths, depths and sizes from the models' public cards. The paper's
    normaliser is the trace and K a tenth of d_model. For a flat spectrum the null is then about 1 - 1/sqrt(K):
    ||S1||_F^2 = K s^2 against (K s)^2, the other terms being small. So ``null = 1 - 1/sqrt(0.1 d_model)``.

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
    """A table of whatever kind it is given as.

    Args:
        source: a DataFrame, a ``SweepStore``, the folder of one, or a CSV or parquet file.
        argument: its name, for errors.

    Raises:
        ArgumentError: none of these, or one that cannot be read.
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
    except (OSError, ValueError, ImportError) as error:  # of CSV and parquet files that are none, too
        raise ArgumentError(
            argument, str(path), f"a store, a CSV or a parquet file that can be read ({error})"
        ) from error


def join(table: Frame, scores: Any | None, score: str | None, missing: Missing) -> Joined:
    """Bring measurements and scores together, one row per model; see ``correlate``."""
    if missing not in ("error", "drop"):
        raise ArgumentError("missing", missing, "'error' or 'drop'")
    if "model" not in table.columns:
        raise ArgumentError("table", list(table.columns), _NEEDED + "measurements")
    if scores is None:
        if "score" not in table.columns:
            raise ArgumentError("scores", None, "scores of the models, where the table has no column 'score'")
        scores = table[[name for name in (*_WHICH, "score", "family") if name in table.columns]].drop_duplicates()
    scored, which = _scores(scores, score)
    measured, nulls = _per_model(table, which)
    found = _matched(measured, scored, which, missing)
    shape = {name: found[column] for name, column in _SHAPE.items() if column in found.columns}
    if "parameters" in shape:
        shape["parameters"] = np.log10(shape["parameters"].astype(float))
    families = found["family"] if "family" in found.columns else found["model"].map(family_of)
    taken = {*which, "score", "family", *_SHAPE.values()}
    columns = {**{str(name): found[name] for name in found.columns if name not in taken}, **shape}
    predictors = {name: column.to_numpy(float, na_value=np.nan) for name, column in columns.items()}
    return Joined(
        models=tuple("@".join(str(part) for part in row) for row in found[which].itertuples(index=False)),
        families=tuple(map(str, families)),
        scores=found["score"].to_numpy(float),
        predictors={name: values for name, values in predictors.items() if np.isfinite(values).any()},
        nulls=nulls,
    )


def family_of(model: str) -> str:
    """A family by a model's name: its letters up to the first that is none, without the organisation."""
    name = model.rstrip("/").rpartition("/")[2]
    found = re.match(r"[^\W\d_]+", name)
    return (found.group() if found else name).lower()


def _scores(scores: Any, score: str | None) -> tuple[Frame, list[str]]:
    """A table of ``model`` (and revision or step), ``score`` and perhaps ``family``; and what names a model in it."""
    pd = _pandas()

    if isinstance(scores, Mapping):
        scores = pd.DataFrame({"model": list(scores), "score": list(scores.values())})
    given = read_table(scores, "scores")
    columns = list(given.columns)
    if "model" not in columns:
        raise ArgumentError("scores", columns, "a table with a column 'model' and one of scores")
    if score is None:
        others = [name for name in columns if name not in (*_WHICH, "family")]
        numeric = [name for name in others if pd.api.types.is_numeric_dtype(given[name])]
        score = "score" if "score" in columns else (numeric or others or [None])[0]
        if score is None or (score != "score" and len(numeric or others) > 1):
            raise ArgumentError(
                "score", None, f"the name of the column of scores, one of {', '.join(numeric or others)}"
            )
    elif score not in columns:
        raise ArgumentError("score", score, f"one of the columns {', '.join(columns)}{_nearest(score, columns)}")
    which = [name for name in _WHICH if name in columns and given[name].notna().any()]
    kept = given[[*which, *(["family"] if "family" in columns else [])]].copy()
    try:
        kept["score"] = pd.to_numeric(given[score]).astype(float)
    except (ValueError, TypeError) as error:
        raise ArgumentError("score", score, f"a column of numbers ({error})") from error
    twice = kept[which].astype(str)[kept.duplicated(which)]
    if len(twice):
        raise ArgumentError("scores", "@".join(twice.iloc[0]), "one score per model; this one has several")
    return kept, which


def _per_model(table: Frame, which: list[str]) -> tuple[Frame, dict[str, str]]:
    """Means over prompts: one row per model, one column per measurement, sublayer and K."""
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
    columns, nulls = (
        [rows[list(dict.fromkeys([*which, *_of_models(rows)]))].groupby(which, dropna=False, sort=False).first()],
        {},
    )
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
    """The rows of each sublayer and K, with their names; all rows where the table does not tell these apart."""
    by = [name for name in ("sublayer", "k_asked") if name in rows.columns and rows[name].notna().any()]
    if not by:
        return [([], rows)]
    return [([key[0], *(f"K={k}" for k in key[1:])], part) for key, part in rows.groupby(by, sort=False)]


def _of_models(rows: Frame) -> list[str]:
    return [name for name in (*_SHAPE.values(), "family") if name in rows.columns]


def _require_comparable(rows: Frame, which: list[str]) -> None:
    """Refuse to average over what the scores do not tell apart, and say where prompts differ."""
    for name in _WHICH[1:]:
        if name not in which and name in rows.columns:
            several = rows.groupby(which, dropna=False, sort=False)[name].nunique(dropna=False)
            if (several > 1).any():
                raise ArgumentError(
                    "scores",
                    which,
                    f"a column {name!r} besides: {several.idxmax()!r} is measured at {several.max()} of them",
                )
    require_one_kind(rows, which)
    if (
        "prompt_id" in rows.columns
        and rows.groupby(which, dropna=False, sort=False)["prompt_id"].agg(frozenset).nunique() > 1
    ):
        warnings.warn(
            "not all models are measured on the same prompts, and their means are over different ones", stacklevel=2
        )


def _matched(measured: Frame, scored: Frame, which: list[str], missing: Missing) -> Frame:
    """Measured models beside their scores.

    Raises:
        ArgumentError: a model that has no score, and ``missing`` is ``"error"``; fewer than three that have one.
    """
    family = [name for name in ("family",) if name in measured.columns and name in scored.columns]
    found = measured.drop(columns=family).merge(scored, on=which, how="left", indicator=True)
    unknown = found["_merge"] == "left_only"
    names = ["@".join(map(str, row)) for row in found.loc[unknown, which].itertuples(index=False)]
    known = ["@".join(map(str, row)) for row in scored[which].itertuples(index=False)]
    if names and missing == "error":
        taken = {"@".join(map(str, row)) for row in measured[which].itertuples(index=False)}
        free = [name for name in known if name not in taken]  # what is measured under that very name is no misspelling
        shown = "; ".join(f"{name!r}{_nearest(name, free)}" for name in names[:5])
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ArgumentError(
            "scores",
            f"{len(known)} models",
            f"a score for every measured model; there is none for {shown}{more} "
            "(missing='drop', on the command line --drop-missing, leaves them out)",
        )
    blank = ~unknown & ~np.isfinite(found["score"])
    if blank.any():
        which_blank = ", ".join("@".join(map(str, row)) for row in found.loc[blank, which].itertuples(index=False))
        warnings.warn(
            f"{int(blank.sum())} models have no number as a score and are left out: {which_blank}", stacklevel=2
        )
    kept = found[~unknown & ~blank].drop(columns="_merge")
    if len(kept) < 3:
        raise ArgumentError(
            "scores", f"{len(kept)} measured models with a score", "three or more: two always lie on a line"
        )
    if kept["score"].nunique() == 1:
        raise ArgumentError("scores", kept["score"].iloc[0], "scores that differ; this one is every model's")
    return kept


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest: {near[0]!r})" if near else ""


def _pandas() -> Any:
    """The library, imported where it is used."""
    import pandas

    return pandas
