"""The table of a store: one row per cell, sublayer and K, with a description of each column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.headline import coupling_test
from tlcoupling.analysis.summary import coupling_rows
from tlcoupling.coupling.depth import DepthCoupling
from tlcoupling.errors import ArgumentError, ResultFileError, StoreError
from tlcoupling.results.atomic import replacing
from tlcoupling.sweeps.cells import Cell, ModelFacts

if TYPE_CHECKING:
    import pandas
    import pyarrow

_OUTDATED = "measured by an incompatible version of tlcoupling; a sweep measures it again"
_ONE_ROW = ("model", "revision", "step", "settings", "prompt_id", "sublayer", "k", "k_asked")
_MEAN = "mean over the ordered pairs of different layers and over the measured tokens"
COLUMNS: dict[str, tuple[str, str]] = {
    "key": ("string", "the cell's key; its file is cells/KEY.safetensors"),
    "model": ("string", "the model's name in the plan"),
    "revision": ("string", "the model's revision; missing for the default one"),
    "step": ("int64", "training step, if known"),
    "weights": ("string", "digest of a local model's files, or a hub's name; missing for live training weights"),
    "load": ("string", "loader arguments that change numbers (dtype, hooked), as JSON"),
    "random_seed": ("int64", "seed of random weights (tlc.random_baseline); missing for the model itself"),
    "prompt_id": ("string", "12 hexadecimal digits of the prompt's digest"),
    "prompt": ("string", "the prompt's text, or its token ids as a JSON list"),
    "n_tokens": ("int64", "length of the prompt"),
    "n_measured": ("int64", "number of tokens measured"),
    "d_model": ("int64", "the model's width"),
    "n_layers": ("int64", "the model's depth"),
    "n_heads": ("int64", "attention heads of a layer"),
    "n_params": ("int64", "parameters of the model"),
    "settings": ("string", "the measurement's settings, as JSON"),
    "k": ("int64", "number of singular vectors compared"),
    "k_asked": ("string", "k as written in the plan: a number, or a fraction of d_model"),
    "sublayer": ("string", "block, attn, mixer or mlp"),
    "layer_kinds": ("string", "what each layer is made of, as a JSON list; missing where all layers are alike"),
    "coupling": ("double", f"coupling c_K, {_MEAN}"),
    "null": ("double", f"coupling expected for independent random bases, {_MEAN}"),
    "null_std": ("double", f"standard deviation of the null for a single pair, {_MEAN}"),
    "excess": ("double", "coupling - null"),
    "excess_same_kind": ("double", "mean of the excess over pairs of layers of one kind; missing as layer_kinds is"),
    "excess_other_kind": ("double", "mean of the excess over pairs of layers of different kinds; missing likewise"),
    "excess_determined": (
        "double",
        "mean of the excess over the pairs whose singular vectors are determined (see undetermined); missing if there "
        "is none",
    ),
    "p": (
        "double",
        "two-sided p-value of the excess (the rotation test of coupling.test); missing unless draws are asked for, and "
        "for several measured tokens, which are several tests",
    ),
    "excess_low": ("double", "lower end of the 95 % interval of the excess, from the same test"),
    "excess_high": ("double", "upper end"),
    "overlap_u": ("double", f"overlap of the subspaces written to, {_MEAN}"),
    "overlap_v": ("double", f"overlap of the subspaces read from, {_MEAN}"),
    "overlap_null_u": ("double", f"overlap_u of random subspaces: K over the effective width, {_MEAN}"),
    "overlap_null_v": ("double", "overlap_v of random subspaces, likewise: a norm makes the effective width smaller"),
    "undetermined": (
        "int64",
        "pairs of singular vectors, of the K of each layer and measured token, that nearly equal singular values leave "
        "undetermined",
    ),
    "lss": ("double", "line-shape score of the sublayer's path, mean over the measured tokens"),
    "straightness": ("double", "distance over length of that path, mean over the measured tokens"),
    "ed": ("double", "expodistance of the block's path, median over the measured tokens"),
    "cv": ("double", "its square root, median over the measured tokens"),
    "rate": ("double", "growth of the log-norm per layer, mean over the measured tokens"),
    "r_squared": ("double", "R^2 of a line through the log-norm over layers, mean over the measured tokens"),
    "status": ("string", "measured; or without numbers (see error): failed, damaged (its file), outdated"),
    "error": ("string", "why the cell failed, or has no numbers here"),
    "verified": ("bool", "true if its file matched its checksum; false if the file is of before there were checksums"),
    "seconds": ("double", "wall-clock time of the measurement"),
    "commit": ("string", "commit of the hub's repository of the model, if known"),
    "versions": ("string", "versions of the packages that affect the numbers, as JSON"),
}


def require_pyarrow() -> Any:
    """Import pyarrow on first use, and return it: it is in the extra ``sweeps``.

    Raises:
        StoreError: it is not installed, or cannot be imported.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise StoreError(f"the table needs pyarrow: pip install pyarrow ({error})") from error
    return pyarrow


def schema() -> pyarrow.Schema:
    """Return the parquet schema, with a description of each column."""
    pa = require_pyarrow()
    kinds = {"string": pa.string(), "int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}
    return pa.schema(
        [pa.field(name, kinds[kind], metadata={"description": text}) for name, (kind, text) in COLUMNS.items()]
    )


def to_arrow(rows: Iterable[Mapping[str, Any]]) -> pyarrow.Table:
    """Return rows as a pyarrow table. Half characters (lone surrogates), which UTF-8 lacks, are escaped."""
    encoded = [{name: _encodable(value) for name, value in row.items()} for row in rows]
    return require_pyarrow().Table.from_pylist(encoded, schema=schema())


def _encodable(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def frame(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """Return rows as a DataFrame; integers and booleans that may be missing are ``Int64`` and ``boolean``."""
    import pandas as pd

    pa = require_pyarrow()
    return to_arrow(rows).to_pandas(types_mapper={pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}.get)


def write_parquet(rows: Iterable[Mapping[str, Any]], path: Path) -> Path:
    """Write rows to one parquet file, whole or not at all; return its path.

    Raises:
        ResultFileError: the file cannot be written.
        StoreError: pyarrow is not installed.
    """
    table = to_arrow(rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            require_pyarrow().parquet.write_table(table, temporary)
    except OSError as error:
        raise ResultFileError(f"cannot write the table to {str(path)!r}: {error}") from error
    return path


def row_of_damage(key: str, error: str) -> dict[str, Any]:
    """Return the row of a cell whose result file, or failure record, cannot be read."""
    return {"key": key, "status": "damaged", "error": error}


def row_of_outdated(cell: Cell, key: str) -> dict[str, Any]:
    """Return the row of a cell that another version of tlcoupling measured, under the key that it had there."""
    return {**cell_columns(cell), "key": key, "status": "outdated", "error": _OUTDATED}


def row_of_failure(cell: Cell, error: str, seconds: float) -> dict[str, Any]:
    """Return the row of a cell that could not be measured."""
    return {**cell_columns(cell), "status": "failed", "error": error, "seconds": seconds}


def cell_columns(cell: Cell) -> dict[str, Any]:
    """Return the columns that identify a row's cell."""
    record = cell.to_json()
    prompt = record["prompt"]
    return {
        "key": cell.key,
        **{name: record[name] for name in ("model", "revision", "step", "weights", "random_seed")},
        "load": json.dumps(record["load"], sort_keys=True),
        "prompt_id": cell.prompt_id,
        "prompt": prompt if isinstance(prompt, str) else json.dumps(prompt),
        "settings": json.dumps(record["settings"], sort_keys=True),
    }


def rows_of_cell(cell: Cell, analysis: Analysis, facts: ModelFacts, draws: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rows of one measured cell.

    Args:
        cell: the cell.
        analysis: its result.
        facts: sizes of its model.
        draws: draws of the rotation test, which takes about a second of 200 draws; 0 leaves p-values out.
    """
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
        "verified": analysis.provenance.verified,
        "seconds": analysis.provenance.seconds,
        "versions": json.dumps(dict(analysis.provenance.versions), sort_keys=True),
    }
    test = coupling_test(coupling, draws) if draws else None
    asked = [str(k) for k in cell.settings.k for _ in coupling.sublayers]
    for row, k, kinds in zip(coupling_rows(coupling, test), asked, _kind_columns(coupling), strict=True):
        path = straight.paths.index(row.sublayer)
        yield {
            **shared,
            **asdict(row),
            **kinds,
            "k_asked": k,
            "lss": straight.lss[path, at].nanmean().item(),
            "straightness": straight.straightness[path, at].nanmean().item(),
        }


def _kind_columns(coupling: DepthCoupling) -> Iterator[dict[str, Any]]:
    """Yield the columns that tell kinds of layers apart, in the order of ``coupling_rows``; none where all are one."""
    of_layers = coupling.provenance.settings.get("layer_kinds")
    if of_layers is None:
        yield from ({} for _ in coupling.ks for _ in coupling.sublayers)
        return
    kinds = [of_layers[layer] for layer in coupling.layers]
    same = torch.tensor([[one == other for other in kinds] for one in kinds])
    apart = ~torch.eye(len(kinds), dtype=torch.bool)
    means = [coupling.excess[..., pairs].double().mean(-1).nanmean(1) for pairs in (same & apart, ~same)]
    for column in range(len(coupling.ks)):
        for row in range(len(coupling.sublayers)):
            within, between = (mean[row, column].item() for mean in means)
            yield {
                "layer_kinds": json.dumps(kinds),
                "excess_same_kind": within,
                "excess_other_kind": between,
            }


def require_one_kind(table: Any, by: Sequence[str]) -> None:
    """Raise an error if rows must not be averaged together. Missing columns are not checked.

    Args:
        table: a DataFrame of measured rows.
        by: the columns that identify what is averaged, such as model and step.

    Raises:
        ArgumentError: several settings; one model with several weights or loader arguments; a repeated measurement.
    """
    if "settings" in table.columns and table["settings"].nunique() > 1:
        raise ArgumentError("table", f"{table['settings'].nunique()} different settings", _one_of("settings"))
    for name in ("weights", "load"):
        if name in table.columns:
            several = table.groupby(list(by), dropna=False, sort=False)[name].nunique(dropna=False)
            if (several > 1).any():
                differing = f"{several.max()} different {name} of {_named(several.idxmax())}"
                raise ArgumentError("table", differing, _one_of(name))
    same = [name for name in _ONE_ROW if name in table.columns]
    if "prompt_id" in same and (twice := table[table.duplicated(same)])[same].size:
        repeated = f"{len(twice)} rows twice, such as {_named(tuple(twice.iloc[0][list(by)]))}"
        raise ArgumentError("table", repeated, "each measurement once")


def _one_of(column: str) -> str:
    return f"measurements of one kind: choose the rows with one value of the column {column!r} and give these"


def _named(model: Any) -> str:
    return "@".join(map(str, model)) if isinstance(model, tuple) else str(model)
