"""Print forecasts and reports of sweeps in the terminal."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from tlcoupling.sweeps.forecast import Forecast
from tlcoupling.sweeps.run import SweepReport
from tlcoupling.text import counted, visible

_SHOWN = 40  # models
_ERRORS = 5


def print_forecast(forecast: Forecast) -> None:
    """Print what a plan would measure, and the cost."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("model", header_style="dim", overflow="fold", max_width=20)  # a name that is cut tells nothing
    for name in ("cells", "done", "TFLOP", "files", "memory", "time"):
        table.add_column(name, justify="right", header_style="dim", no_wrap=True)
    for group in forecast.groups[:_SHOWN]:
        costs = ("?",) * 4
        if group.flops is not None:
            costs = (
                _number(group.flops / 1e12),
                decimal(int(group.file_bytes or 0)),
                decimal(int(group.memory_bytes or 0)),
                _span(group.seconds or 0.0),
            )
        name = group.model.rpartition("/")[2]
        if group.n_revisions > 1:
            name += f" x {group.n_revisions}"
        table.add_row(Text(visible(name)), str(group.n_cells), str(group.n_kept), *costs)
    hidden = len(forecast.groups) - _SHOWN
    if hidden > 0:
        table.add_row(Text(f"... and {hidden} more", style="dim"))
    table.add_section()
    total = (str(sum(group.n_cells for group in forecast.groups)), str(sum(group.n_kept for group in forecast.groups)))
    table.add_row(
        "all" if len(forecast.known) == len(forecast.groups) else "known models",
        *total,
        _number(forecast.flops / 1e12),
        decimal(int(forecast.file_bytes)),
        "",
        _span(forecast.seconds),
        style="bold",
    )
    console.print(table)
    whose = "measured on this machine" if forecast.measured else "from --rate"
    some = next((group.model for group in forecast.groups if group.flops is None), "")
    console.print(
        f"\nTimes are estimates at {forecast.rate / 1e12:.3g} TFLOP/s of matrix products\n"
        f"({whose}). Loading takes extra time.\n"
        "Memory is that of one cell, in addition to the model.\n"
        "Prompt lengths are estimated from their characters."
    )
    if some:
        missing = len(forecast.groups) - len(forecast.known)
        console.print(
            f"?: {missing} of {len(forecast.groups)} models are not on this machine,\n"
            f"such as {visible(some)}. Give their shape in the plan:\n"
            "shape = {n_layers = 32, d_model = 4096, n_heads = 32}",
            markup=False,
        )


def print_report(report: SweepReport) -> None:
    """Print the counts of a sweep, and each failed cell and damaged file with its reason."""
    console = Console(highlight=False)
    counts = f"{report.n_measured} measured in {report.seconds:.1f} s, {report.n_kept} measured before"
    if report.failed:
        counts += f", [red]{len(report.failed)} failed[/]"
    if report.unfinished:
        counts += f", [yellow]{len(report.unfinished)} unfinished[/]"
    console.print(f"{counted(report.n_cells, 'cell')}: {counts}")
    errors = Counter(report.failed.values())
    for error, count in errors.most_common(_ERRORS):
        example = next(cell for cell, text in report.failed.items() if text == error)
        console.print(Text(visible(f"  {count} x {error}"), style="red", overflow="fold"))
        console.print(Text(visible(f"      such as {example}"), style="dim"))
    if len(errors) > _ERRORS:
        folder = visible(str(report.store.folder / "failed"))
        console.print(Text(f"  and {len(errors) - _ERRORS} other errors; {folder} lists all"))
    for reason in report.reasons[:_ERRORS]:
        console.print(Text(visible(f"  {reason}"), style="yellow"))
    if report.damaged:
        console.print(f"{counted(len(report.damaged), 'damaged file')}, measured again:")
    for reason in report.damaged.values():
        console.print(Text(visible(f"  {reason}"), style="yellow", overflow="fold"))
    if not report.complete:
        console.print("Run the same command again to measure the missing cells.")
    console.print(Text(visible(f"store   {report.store.folder}")))


def _span(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    sizes = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
    size, name = next(((size, name) for size, name in sizes if seconds >= size), (1e-3, "ms"))
    return f"{_number(seconds / size)} {name}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
