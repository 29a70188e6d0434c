"""Print analyses, checks and estimates as tables that fit in 80 columns; a pipe gets plain text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from tlcoupling.analysis.analyze import Analysis
from tlcoupling.analysis.checking import Check
from tlcoupling.analysis.estimate import Estimate
from tlcoupling.analysis.headline import without_sinks
from tlcoupling.analysis.summary import coupling_rows, growth_summary, linearity_rows, straightest
from tlcoupling.coupling.chance import p_value
from tlcoupling.text import counted, visible

_LONGEST_TOKEN = 24


def print_analysis(analysis: Analysis) -> None:
    """Print the headline numbers of an analysis."""
    console = Console(highlight=False)
    growth, coupling = analysis.growth, analysis.coupling
    console.print(Text(visible(analysis.provenance.model_name), style="bold"))
    console.print(
        f"{counted(len(growth.alpha), 'layer')}, d_model {coupling.d_model}, "
        f"{counted(len(analysis.tokens), 'token')}, {analysis.provenance.seconds:.1f} s"
    )
    prompt = analysis.prompt.splitlines()
    console.print(Text("\n".join(map(visible, prompt)), style="dim"))
    console.print()
    console.print(Text(analysis.headline(), style="bold"))
    if analysis.baseline is None:
        console.print(Text("Fresh weights were not measured to compare with: --baseline does.", style="dim"))
    tables = (_coupling, _determined, _overlaps, _linearity, _growth)
    for table in (*(one for make in tables if (one := make(analysis)) is not None), *_tokens(analysis)):
        # rich wraps both to the width of the table
        (title, table.title), (caption, table.caption) = (table.title, None), (table.caption, None)
        console.print()
        console.print(title)
        console.print(table)
        if caption is not None:
            console.print(caption, style="dim")


def print_estimate(estimate: Estimate) -> None:
    """Print the cost of a measurement."""
    console = Console(highlight=False)
    console.print(Text(visible(estimate.model_name), style="bold"))
    ks = ", ".join(map(str, estimate.ks))
    console.print(
        f"coupling of {estimate.n_measured} of {counted(estimate.n_tokens, 'token')}, all pairs of layers, K = {ks}\n"
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("work", "method"):
        table.add_column(name, header_style="dim")
    for name in ("GFLOP", "seconds"):
        table.add_column(name, justify="right", header_style="dim")
    for stage in estimate.stages:
        table.add_row(stage.name, stage.method, f"{stage.flops / 1e9:.1f}", f"{stage.seconds:.2f}")
    table.add_section()
    table.add_row("all", "", f"{estimate.flops / 1e9:.1f}", f"{estimate.seconds:.2f}", style="bold")
    console.print(table)
    console.print(
        f"\nSeconds are estimates from rates measured on this machine (matrix products:\n"
        f"{estimate.rates.matmul / 1e9:.0f} GFLOP/s).\n"
        f"Memory beyond the model: at most {decimal(int(estimate.memory_bytes))}, of "
        f"{decimal(int(estimate.free_bytes))} free."
    )


def print_check(check: Check) -> None:
    """Print what holds on a model, what falls back to autograd and what is refused."""
    console = Console(highlight=False)
    console.print(Text(visible(check.model_name), style="bold"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("checked", "outcome", "detail"):
        table.add_column(name, header_style="dim", overflow="fold")
    colours = {"holds": "green", "falls back": "yellow", "refused": "red"}
    for one in check.findings:
        outcome = Text(one.outcome, style=colours[one.outcome])
        table.add_row(Text(visible(one.what)), outcome, Text(visible(one.detail)))
    console.print(table)


def _coupling(analysis: Analysis) -> Table:
    coupling = analysis.coupling
    if len(coupling.positions) == 1:
        where = f"token {coupling.positions[0]} {_shown(coupling.tokens[0])}"
    else:
        where = f"mean over {len(coupling.positions)} tokens"
    fresh = [] if analysis.baseline is None else coupling_rows(analysis.baseline.coupling)
    rows, test = coupling_rows(coupling, analysis.depth_test), analysis.depth_test
    columns = ("", "K", "coupling", "null", "excess", *(["fresh"] if fresh else []), *(["95 %", "p"] if test else []))
    table = _table(f"Coupling of different layers, {where}", columns)
    for index, row in enumerate(rows):
        cells = [*map(_number, (row.coupling, row.null, row.excess, *([fresh[index].excess] if fresh else [])))]
        if test:
            interval = f"{_number(row.excess_low)} to {_number(row.excess_high)}"
            cells += [interval, "–" if row.p is None else p_value(row.p, test.draws)[2:].removeprefix("= ")]
        if row.undetermined:
            cells[0], cells[2] = f"*{cells[0]}", f"*{cells[2]}"
            table.caption = "*: uses singular vectors that are not determined (values nearly coincide)"
        _add(table, (row.sublayer, str(row.k), *cells), emphasised=4)
    return table


def _determined(analysis: Analysis) -> Table | None:
    rows = [row for row in coupling_rows(analysis.coupling) if row.undetermined]
    columns = ("", "K", "singular vectors", "excess")
    table = _table("Without singular vectors that nearly equal values leave undetermined", columns)
    for row in rows:
        _add(table, (row.sublayer, str(row.k), f"{row.undetermined} left out", _number(row.excess_determined)), 3)
    return table if rows else None


def _overlaps(analysis: Analysis) -> Table:
    columns = ("", "K", "U", "by chance", "V", "by chance")
    table = _table("Overlap of the subspaces that layers write to (U) and read from (V)", columns)
    for row in coupling_rows(analysis.coupling):
        values = (row.overlap_u, row.overlap_null_u, row.overlap_v, row.overlap_null_v)
        _add(table, (row.sublayer, str(row.k), *map(_number, values)), emphasised=-1)
    return table


def _linearity(analysis: Analysis) -> Table:
    fresh = [] if analysis.baseline is None else linearity_rows(analysis.baseline.linearity)
    table = _table(
        "Linearity: line-shape score, all tokens (1: a straight line)",
        ("path", "steps", "mean", "min", "max", "random", *(["fresh"] if fresh else [])),
    )
    for index, row in enumerate(linearity_rows(analysis.linearity)):
        values = (row.mean, row.lowest, row.highest, row.random, *([fresh[index].mean] if fresh else []))
        _add(table, (row.path, str(row.steps), *(_number(value, 3) for value in values)), emphasised=2)
    return table


def _growth(analysis: Analysis) -> Table:
    weights = {"trained": analysis} if analysis.baseline is None else {"trained": analysis, "fresh": analysis.baseline}
    table = _table(
        "Growth of the residual norm, all tokens (ED 0: the same factor in every layer)",
        ("weights", "median ED", "mean rate", "= attn", "+ mlp", "mean slope", "mean R²"),
    )
    for name, one in weights.items():
        row = growth_summary(one.growth)
        rates = (row.mean_rate, row.attn_share, row.mlp_share, row.mean_slope)
        ends = (_number(row.median_expodistance, 3), _number(row.mean_r_squared, 3))
        _add(table, (name, ends[0], *map(_number, rates), ends[1]), emphasised=1)
    return table


def _tokens(analysis: Analysis) -> list[Table]:
    most, least = straightest(analysis.linearity.path("block"), without_sinks(analysis.growth))
    names = (f"{which} straight tokens, without sinks" for which in ("Most", "Least"))
    ends = dict(zip(names, (most, least), strict=True)) if most else {}
    tables = []
    for title, positions in ends.items():
        table = _table(title, ("pos", "token", "LSS", "ED", "final norm"), left=2)
        for pos in positions:
            values = (
                _number(analysis.linearity.path("block")[pos].item(), 3),
                _number(analysis.growth.expodistance[pos].item(), 2),
                _number(analysis.growth.norms[-1, pos].item(), 1),
            )
            _add(table, (str(pos), _shown(analysis.tokens[pos]), *values), emphasised=2)
        tables.append(table)
    return tables


def _table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    """Make a plain table whose first ``left`` columns are text, aligned left."""
    table = Table(title=Text(title, style="bold"), box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=True, header_style="dim")
    return table


def _add(table: Table, cells: Sequence[str], emphasised: int) -> None:
    """Add a row of plain text, so that rich reads no markup in a token."""
    table.add_row(*(Text(cell, style="bold cyan" if i == emphasised else "") for i, cell in enumerate(cells)))


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}"  # no minus before zeros, as on the page


def _shown(token: str) -> str:
    """Quote a token; control and invisible characters are escaped."""
    quoted = repr(token)
    return quoted if len(quoted) <= _LONGEST_TOKEN else f"{quoted[: _LONGEST_TOKEN - 2]}…{quoted[-1]}"
