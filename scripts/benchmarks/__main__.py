"""The command behind scripts/bench.sh."""

from __future__ import annotations

import importlib
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import document, measure
from benchmarks.machine import machine, versions


class What(StrEnum):
    """The benchmarks; each is a module with `run(quick) -> list[Comparison]`."""

    RLE = "rle"
    WINDOWS = "windows"
    DATA = "data"
    PREDICT = "predict"
    ALL = "all"


def benchmark(
    what: Annotated[What, typer.Argument(help="what to measure")] = What.ALL,
    write: Annotated[
        Path | None, typer.Option(help="put the tables into this Markdown file too; only the sections measured change")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="small pictures, few repeats: shows that it works, the figures mean little")
    ] = False,
    slides: Annotated[
        int,
        typer.Option(
            help="with predict or data: a dry run over this many slides that records memory, instead of timing", min=0
        ),
    ] = 0,
    out: Annotated[Path, typer.Option(help="with --slides: folder for memory.csv and memory.png")] = Path(
        "build/dry-run"
    ),
) -> None:
    """Measure the kit against named rivals: one process, one thread, in turn; medians, spread and ratios."""
    warnings.filterwarnings("ignore")  # the rivals' own deprecations; ours are errors in the tests
    measure.one_thread()
    console = Console(width=150 if not Console().is_terminal else None)
    if slides:
        if what not in (What.PREDICT, What.DATA):
            raise typer.BadParameter(f"--slides goes with predict or data, not with {what}")
        module = importlib.import_module("benchmarks.dry_run")
        typer.echo((module.dry_run if what is What.PREDICT else module.dry_conversion)(slides, out))
        return
    console.print(machine(), versions(), sep="\n", highlight=False)
    for name in [each.value for each in What if each is not What.ALL] if what is What.ALL else [what.value]:
        start = time.perf_counter()
        try:
            comparisons = importlib.import_module(f"benchmarks.{name}").run(quick=quick)
        except ModuleNotFoundError as error:
            console.print(
                f"{name} is left out: it needs {error.name}, which is not installed (scripts/bench.sh installs it)\n",
                highlight=False,
            )
            continue
        show(console, name, comparisons, time.perf_counter() - start)
        if write is not None:
            document.replace(write, name, document.section(name, comparisons, quick))


def show(console: Console, name: str, comparisons: list[measure.Comparison], seconds: float) -> None:
    """Print one benchmark's table, what is missing, and how many targets were met."""
    table = Table(title=f"{name} ({seconds:.0f} s)", title_justify="left")
    for column in ("what", "who", "median", "quartiles", "unit", "ratio to ours", "target", "met"):
        table.add_column(column, justify="left" if column in ("what", "who", "unit", "met") else "right")
    for comparison in comparisons:
        for place, row in enumerate(comparison.rows):
            marks = [mark.replace("**", "") for mark in measure.cells(row, comparison.unit)]
            table.add_row(comparison.name if place == 0 else "", *marks, style="red" if row.met is False else None)
        table.add_section()
    console.print(table)
    for remark in measure.remarks(comparisons):
        console.print(remark, highlight=False)
    verdicts = [row.met for comparison in comparisons for row in comparison.rows if row.met is not None]
    console.print(f"{sum(verdicts)} of {len(verdicts)} targets met\n" if verdicts else "", highlight=False)


if __name__ == "__main__":
    typer.run(benchmark)
