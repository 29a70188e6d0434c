"""``tlcoupling sweep`` measures many models and prompts; ``tlcoupling merge`` joins the stores of several machines."""

from __future__ import annotations

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlcoupling.cli.app import app, errors_as_one_line, refuse, say
from tlcoupling.text import counted

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from tlcoupling.sweeps.plan import Plan


class Where(str, Enum):
    """Where the cells run."""

    here = "here"
    slurm = "slurm"


@app.command()
def sweep(
    plan: Annotated[
        Path,
        typer.Argument(
            help="A TOML file of models, prompts and settings. The shortest has two lines: models = ['gpt2'] and "
            "prompts.text = 'Once upon a time'."
        ),
    ],
    store: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; created if missing.", show_default="PLAN.store, beside the plan"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cells, bytes and estimated time without measuring.")
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option(
            help="With --dry-run: TFLOP/s of matrix products on the machine that will run the plan.",
            show_default="this machine's, measured",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of processes on this machine.", show_default="only this process")
    ] = None,
    executor: Annotated[Where, typer.Option(help="Where the cells run; 'slurm' submits job arrays.")] = Where.here,
    logs: Annotated[
        Path | None,
        typer.Option(help="With --executor slurm: folder for its logs.", show_default="'slurm' in the store"),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="After the sweep, write all results of the store to this parquet file.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=39,
            help="With --table: draws of the rotation test that gives p-values; 199 take about a second a cell.",
            show_default="no p-values",
        ),
    ] = None,
) -> None:
    """Measure the cells of a plan that its store lacks. Run it again to continue. Exit code 1 if cells are missing."""
    if dry_run:
        measuring = {"--workers": workers, "--logs": logs, "--table": table, "--draws": draws}
        refuse({option: value is not None for option, value in measuring.items()}, "a dry run measures nothing")
        refuse({"--executor": executor is not Where.here}, "a dry run measures nothing")
    else:
        refuse({"--rate": rate is not None}, "give it with --dry-run")
    if executor is Where.slurm:
        refuse({"--workers": workers is not None}, "give it with --executor here")
    else:
        refuse({"--logs": logs is not None}, "give it with --executor slurm")
    refuse({"--draws": draws is not None and table is None}, "give it with --table")
    with errors_as_one_line(sweep):
        from tlcoupling.sweeps.plan import Plan

        read = Plan.read(plan)
        folder = read.default_store if store is None else store
        if dry_run:
            return _dry_run(read, folder, None if rate is None else 1e12 * rate)

        from tlcoupling.cli.sweep_tables import print_report
        from tlcoupling.sweeps.run import sweep as run
        from tlcoupling.sweeps.store import SweepStore
        from tlcoupling.sweeps.table import require_pyarrow

        if table is not None:
            require_pyarrow()
        kept = SweepStore(folder, create=True)
        with ExitStack() as stack:
            chosen: Executor | None = None
            if executor is Where.slurm:
                from tlcoupling.sweeps.executors import SlurmExecutor

                chosen = stack.enter_context(SlurmExecutor(logs or folder / "slurm"))
            report = run(read, kept, executor=chosen, workers=workers)
        print_report(report)
        if table is not None:
            say(f"table   {kept.write_table(table, draws or 0)}")
    if not report.complete:
        raise typer.Exit(1)


def _dry_run(plan: Plan, folder: Path, rate: float | None) -> None:
    """Print what the plan would measure, and the cost."""
    from tlcoupling.cli.sweep_tables import print_forecast
    from tlcoupling.sweeps.forecast import forecast

    print_forecast(forecast(plan, folder, rate))


@app.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(help="Stores of sweep results.")],
    into: Annotated[Path, typer.Option(help="The store that receives all cells; created if missing.")],
    table: Annotated[
        Path | None, typer.Option(help="After merging, write all results of that store to this parquet file.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(min=39, help="With --table: as for 'sweep'.", show_default="no p-values")
    ] = None,
) -> None:
    """Join the stores of several machines. Two results of the same cell must agree up to rounding.

    Damaged files are named and not copied; the exit code is then 1.
    """
    refuse({"--draws": draws is not None and table is None}, "give it with --table")
    skipped: list[str] = []
    with errors_as_one_line(merge):
        from tlcoupling.sweeps.store import SweepStore

        sources = [SweepStore(path) for path in stores]
        target = SweepStore(into, create=True)
        for source in sources:
            before = len(skipped)
            added = target.add(source, lambda key, reason: skipped.append(reason))
            say(f"{source.folder}: {added} of {len(source.keys())} cells are new")
            for reason in skipped[before:]:
                say(f"  skipped: {reason}")
        left = len(target.damaged())
        damaged = f", {left} damaged" if left else ""
        lenses = f", {counted(n, 'lens file')}" if (n := len(target.lens_keys())) else ""
        cells = counted(len(target.keys()), "cell")
        say(f"store   {into}: {cells}, {len(target.failed_keys())} failed{damaged}{lenses}")
        if table is not None:
            say(f"table   {target.write_table(table, draws or 0)}")
    if skipped:
        raise typer.Exit(1)
