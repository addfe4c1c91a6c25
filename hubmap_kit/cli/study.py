"""The verbs that compare runs: `tune`, `ledger`, `compare`."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.cli.options import Config, Data, Set, Stores, fold_numbers
from hubmap_kit.errors import HubmapError


def tune(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder of the search; the same command goes on with it.")],
    data: Data = "",
    search: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=SPACE",
            help="training.lr=log:1e-4:1e-2, training.batch_size=int:2:8, training.loss=bce,bce+dice.",
        ),
    ] = [],
    space: Annotated[Path | None, typer.Option(help="The same as a YAML file, KEY: SPACE.")] = None,
    set_: Set = [],
    folds: Annotated[str, typer.Option(help="Folds whose Dice is compared, e.g. 0,2; empty: all.")] = "0",
    trials: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Trials in all, those of earlier sessions included; default 20, or as many as --hours holds.",
            show_default=False,
        ),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.001, help="Stop by then; the same command goes on.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    prune: Annotated[bool, typer.Option(help="Give up trials that are worse than most at the same epoch.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:0,cuda:1: a fold on each card.")] = "auto",
    stores: Stores = None,
) -> None:
    """Search for better settings with optuna: every trial is a run; a page, a table, and the best as an experiment."""
    from hubmap_kit.jobs.search import search as job
    from hubmap_kit.training.clock import SessionClock

    clock = SessionClock(hours * 3600) if hours else None
    trials = trials or (None if clock else 20)
    found = job(config, out, search, space, set_, data, fold_numbers(folds), trials, clock, seed, prune, device, stores)
    typer.echo(found.summary)
    typer.echo(f"written: {out}/index.html, trials.csv" + (", best.yaml" if found.best else ""))
    again = shlex.join(["hubmap", *sys.argv[1:]])
    if found.stopped:
        typer.echo(f"stopped: {found.stopped}; go on with '{again}'", err=True)
    elif found.best:
        typer.echo(
            f"next: hubmap train --config {out}/best.yaml --out runs/tuned" + (f" --data {data}" if data else "")
        )


def ledger(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs, or runs; default: runs/.", show_default=False)
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write all columns as CSV.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page: sortable tables, loss curves.")] = None,
    theirs: Annotated[
        bool, typer.Option("--theirs/--no-theirs", help="Show the 26 runs that the first team published beside ours.")
    ] = True,
    everything: Annotated[bool, typer.Option("--all", help="All columns, however wide.")] = False,
    sort: Annotated[
        str, typer.Option(metavar="COLUMN", help="Sort by a column of the CSV, e.g. lb, cv, lr; -lr turns it round.")
    ] = "",
    curves: Annotated[
        str, typer.Option(metavar="RUN,RUN", help="Runs whose curves the page draws; default: the best six.")
    ] = "",
    score: Annotated[
        str,
        typer.Option(
            metavar="public=X,private=Y", help="Keep a run's leaderboard scores; an empty value takes one away."
        ),
    ] = "",
    note: Annotated[str | None, typer.Option(help="Keep a note on a run.", show_default=False)] = None,
    ref: Annotated[
        str,
        typer.Option(
            metavar="NUMBER", help="Keep the number of a run's submission, which finds its row in submissions.csv."
        ),
    ] = "",
) -> None:
    """List all runs: settings, Dice, scores, time, beside the first team's. Or keep a run's scores and note."""
    from hubmap_kit.jobs import runs as job

    if score or ref or note is not None:
        if len(runs or []) != 1:
            raise HubmapError(
                "--score, --note and --ref are about one run; name it, as in 'hubmap ledger RUN --score public=0.61'"
            )
        typer.echo(job.note_run(runs[0], score, note, ref))  # type: ignore[index]
        return
    typer.echo(
        job.list_runs(
            runs or (), csv, html, theirs, everything, sort, curves, shutil.get_terminal_size((120, 24)).columns
        )
    )


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; the others are measured against the first.")],
    out: Annotated[Path, typer.Option(help="The page to write (HTML).")] = Path("compare.html"),
) -> None:
    """Set runs side by side: curves, settings that differ, Dice per organ with paired differences, timings."""
    from hubmap_kit.jobs import runs as job

    typer.echo(job.compare(runs, out))
