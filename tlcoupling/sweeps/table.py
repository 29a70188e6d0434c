"""The table of a store: one row per cell, sublayer and K, with a schema that says what each column is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.summary import coupling_rows
from tlcoupling.errors import ArgumentError, ResultFileError
from tlcoupling.results.atomic import replacing
from tlcoupling.sweeps.cells import Cell, ModelFacts

if TYPE_CHECKING:
    import pandas
    import pyarrow

_OUTDATED = "measured in the way of another version of tlcoupling; a sweep measures it anew"
_ONE_ROW = ("model", "revision", "step", "settings", "prompt_id", "sublayer", "k", "k_asked")
_MEAN = "mean over the ordered pairs of different layers, and over the tokens measured"
COLUMNS: dict[str, tuple[str, str]] = {
    "key": ("string", "the cell's key; its file is cells/KEY.safetensors"),
    "model": ("string", "the model's name in the plan"),
    "revision": ("string", "of the model; missing for the default one"),
    "step": ("int64", "training step, where it is known"),
    "weights": ("string", "which weights: digest of a folder's files, or a hub's name; missing for a training run"),
    "load": ("string", "what the model was loaded with (dtype, hooked), as JSON"),
    "random_seed": ("int64", "of fresh weights (tlc.random_baseline); missing for the model itself"),
    "prompt_id": ("string", "12 hexadecimal digits of the prompt's digest"),
    "prompt": ("string", "the prompt's text, or its token ids as a JSON list"),
    "n_tokens": ("int64", "length of the prompt"),
    "n_measured": ("int64", "tokens measured"),
    "d_model": ("int64", "the model's width"),
    "n_layers": ("int64", "the model's depth"),
    "n_heads": ("int64", "attention heads of a layer"),
    "n_params": ("int64", "parameters of the model"),
    "settings": ("string", "how it was measured, as JSON"),
    "k": ("int64", "number of singular vectors compared"),
    "k_asked": ("string", "the same as the plan has it: a number, or a fraction of d_model"),
    "sublayer": ("string", "block, attn or mlp"),
    "coupling": ("double", f"coupling c_K, {_MEAN}"),
    "null": ("double", f"what independent random bases would give, {_MEAN}"),
    "null_std": ("double", f"standard deviation of that for a single pair, {_MEAN}"),
    "excess": ("double", "coupling - null"),
    "overlap_u": ("double", f"overlap of the spaces written to, {_MEAN}"),
    "overlap_v": ("double", f"overlap of the spaces read from, {_MEAN}"),
    "overlap_null": ("double", "chance of either, K / d_model"),
    "lss": ("double", "line-shape score of the sublayer's path, mean over the tokens measured"),
    "straightness": ("double", "distance over length of that path, mean over the tokens measured"),
    "ed": ("double", "expodistance of the block's path, median over the tokens measured"),
    "cv": ("double", "its root, median over the tokens measured"),
    "rate": ("double", "growth of the log-norm per layer, mean over the tokens measured"),
    "r_squared": ("double", "of the log-norm's line over layers, mean over the tokens measured"),
    "status": ("string", "measured; or without numbers (see error): failed, damaged (its file), outdated"),
    "error": ("string", "why it failed, or has no numbers here"),
    "seconds": ("double", "wall-clock time of the measurement"),
    "commit": ("string", "of the hub's repository that the model came from, where it is known"),
    "versions": ("string", "of the packages that the numbers depend on, as JSON"),
}


def schema() -> pyarrow.Schema:
    """The columns as parquet has them, each with its description."""
    import pyarrow as pa

    kinds = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64()}
    return pa.schema(
        [pa.field(name, kinds[kind], metadata={"description": text}) for name, (kind, text) in COLUMNS.items()]
    )


def to_arrow(rows: Iterable[Mapping[str, Any]]) -> pyarrow.Table:
    """Rows as a table."""
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=schema())


def frame(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """The same for pandas; whole numbers that may be missing are ``Int64``."""
    import pandas as pd
    import pyarrow as pa

    return to_arrow(rows).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)


def write_parquet(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write rows to one parquet file, whole or not at all; return its path.

    Raises:
        ResultFileError: the file cannot be written.
    """
    import pyarrow.parquet as pq

    table = to_arrow(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            pq.write_table(table, partial)
    except OSError as error:
        raise ResultFileError(f"cannot write the table to {str(path)!r}: {error}") from error
    return path


def row_of_damage(key: str, error: str) -> dict[str, Any]:
    """Return the row of a cell whose result file cannot be read."""
    return {"key": key, "status": "damaged", "error": error}


def row_of_outdated(cell: Cell, key: str) -> dict[str, Any]:
    """Return the row of a cell that another version of tlcoupling measured, under the key that it had there."""
    return {**cell_columns(cell), "key": key, "status": "outdated", "error": _OUTDATED}


def row_of_failure(cell: Cell, error: str, seconds: float) -> dict[str, Any]:
    """The row of a cell that could not be measured."""
    return {**cell_columns(cell), "status": "failed", "error": error, "seconds": seconds}


def cell_columns(cell: Cell) -> dict[str, Any]:
    """The columns that say which cell a row is of."""
    found = cell.to_json()
    prompt = found["prompt"]
    return {
        "key": cell.key,
        **{name: found[name] for name in ("model", "revision", "step", "weights", "random_seed")},
        "load": json.dumps(found["load"], sort_keys=True),
        "prompt_id": cell.prompt_id,
        "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt),
        "settings": json.dumps(found["settings"], sort_keys=True),
    }


def rows_of_cell(cell: Cell, analysis: Analysis, facts: ModelFacts) -> Iterator[dict[str, Any]]:
    """The rows of one measured cell."""
    coupling, straight, growth = analysis.coupling, analysis.linearity, analysis.growth
    at = list(coupling.positions)
    shared = {
        **cell_columns(cell),
        "n_tokens": len(analysis.tokens),
        "n_measured": len(at),
        **vars(facts),
        "ed": growth.expodistance[at].nanquantile(0.5).item(),
        "cv": growth.cv[at].nanquantile(0.5).item(),
        "rate": growth.rate[at].nanmean().item(),
        "r_squared": growth.r_squared[at].nanmean().item(),
        "status": "measured",
        "seconds": analysis.provenance.seconds,
        "versions": json.dumps(dict(analysis.provenance.versions), sort_keys=True),
    }
    asked = [str(k) for k in cell.settings.k for _ in coupling.sublayers]
    for row, k in zip(coupling_rows(coupling), asked, strict=True):
        path = straight.paths.index(row.sublayer)
        yield {
            **shared,
            **asdict(row),
            "k_asked": k,
            "lss": straight.lss[path, at].nanmean().item(),
            "straightness": straight.straightness[path, at].nanmean().item(),
        }


def require_one_kind(table: Any, by: Sequence[str]) -> None:
    """Refuse measurements that no mean may be taken over; columns that the table lacks are not looked at.

    Args:
        table: a DataFrame of measured rows.
        by: the columns that tell apart what is averaged, such as model and step.

    Raises:
        ArgumentError: several settings; one model of several weights or ways of loading; a measurement that is there
            twice.
    """
    if "settings" in table.columns and table["settings"].nunique() > 1:
        raise ArgumentError("table", f"{table['settings'].nunique()} different settings", _one_of("settings"))
    for name in ("weights", "load"):
        if name in table.columns:
            several = table.groupby(list(by), dropna=False, sort=False)[name].nunique(dropna=False)
            if (several > 1).any():
                found = f"{several.max()} different {name} of {_named(several.idxmax())}"
                raise ArgumentError("table", found, _one_of(name))
    same = [name for name in _ONE_ROW if name in table.columns]
    if "prompt_id" in same and (twice := table[table.duplicated(same)])[same].size:
        found = f"{len(twice)} rows twice, such as {_named(tuple(twice.iloc[0][list(by)]))}"
        raise ArgumentError("table", found, "each measurement once")


def _one_of(column: str) -> str:
    return f"measurements of one kind: choose the rows with one value of the column {column!r} and give these"


def _named(model: Any) -> str:
    return "@".join(map(str, model)) if isinstance(model, tuple) else str(model)
