"""The verbs of the model and training room: networks, weights, learning rates, searches, notebooks, and the list of
tries.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.cli import external
from hubmap_kit.cli.options import Device, Folds, Set, Stores
from hubmap_kit.errors import HubmapError
from hubmap_kit.words import fold_numbers

Config = Annotated[str, typer.Option(help="A shipped experiment or a YAML file.")]
Data = Annotated[str, typer.Option(help="Folder with train.csv and train_images/.")]
pretrained = typer.Typer(
    no_args_is_help=True, help="Pack encoder weights for machines without a network.", rich_markup_mode=None
)


def add_all(app: typer.Typer) -> None:
    """Add every verb, in the order in which they are used."""
    for verb in (models, lr_find, tune, notebook, ledger, compare, blend):
        app.command()(verb)
    app.add_typer(pretrained, name="pretrained")
    external.add_all(app)


def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Networks or experiments to describe.", show_default=False),
    ] = None,
    family: Annotated[list[str], typer.Option(help="Only networks of this family; may be repeated.")] = [],
    wide: Annotated[bool, typer.Option("--all", help="All columns, however wide.")] = False,
) -> None:
    """List the networks with weights, multiply-adds and the batch that 16 GB hold, or describe some."""
    from hubmap_kit.jobs import models as job

    typer.echo("\n\n".join(job.model_details(name) for name in names) if names else job.models_table(family, wide))


@pretrained.command()
def pack(
    names: Annotated[list[str], typer.Argument(help="Encoders, such as tu-efficientnet_b1, or experiments.")],
    out: Annotated[Path, typer.Option(help="Folder for NAME.safetensors and NAME.json.")] = Path("pretrained"),
    file: Annotated[
        Path | None, typer.Option("--from", help="Take the weights from this file instead of downloading them.")
    ] = None,
    mean: Annotated[
        str, typer.Option(metavar="R,G,B", help="With --from: the mean that the weights expect, in 0..1.")
    ] = "",
    std: Annotated[
        str, typer.Option(metavar="R,G,B", help="With --from: the standard deviation that the weights expect, in 0..1.")
    ] = "",
    licence: Annotated[str, typer.Option(help="With --from: the weights' licence.")] = "",
    source: Annotated[str, typer.Option(help="With --from: where the weights come from.")] = "",
) -> None:
    """Save weights of encoders as safetensors with their input statistics, on a machine with internet or from a
    file.
    """
    from hubmap_kit.jobs import models as job

    typer.echo(job.packed_lines(job.pack(names, out, file, mean, std, licence, source)))
    typer.echo(f"next: hubmap push pretrained --weights {out}")


def lr_find(
    out: Annotated[Path, typer.Option(help="Folder for lr_find.csv and lr_find.png; may be a run folder.")],
    config: Config = "baseline",
    data: Data = "",
    set_: Set = [],
    fold: Annotated[int, typer.Option(min=0, help="The fold whose training slides are used.")] = 0,
    steps: Annotated[int, typer.Option(min=20, help="Optimiser steps, 20 or more.")] = 100,
    device: Device = "auto",
    stores: Stores = None,
    low: Annotated[float, typer.Option(help="First learning rate.")] = 1e-7,
    high: Annotated[float, typer.Option(help="Last learning rate.")] = 10.0,
) -> None:
    """Sweep the learning rate and suggest one: a picture, a table, and the command that trains with it."""
    from hubmap_kit import experiment
    from hubmap_kit.jobs.lr_find import lr_find as job

    settings = experiment.load(config, set_, data)
    words = [
        "--config",
        config,
        *(("--data", data) if data else ()),
        *(word for change in set_ for word in ("--set", change)),
    ]
    typer.echo(job(settings, out, fold, steps, device, stores, low, high, words))


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


def notebook(
    out: Annotated[Path, typer.Option(help="The run folder; the executed copy becomes notebook.ipynb in it.")],
    config: Annotated[
        str, typer.Option(help="A shipped experiment or a YAML file; with --resume the run's own is the default.")
    ] = "",
    data: Data = "",
    set_: Set = [],
    folds: Folds = "",
    device: Device = "auto",
    stores: Stores = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, or report a finished one.")
    ] = False,
) -> None:
    """Train and report in a notebook, executed by papermill: the shipped one stays as it is, a copy is left in the
    run.
    """
    from hubmap_kit.jobs.notebook import notebook as job

    typer.echo(f"executed: {job(config, out, data, set_, fold_numbers(folds), device, stores, resume)}")


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


def blend(
    runs: Annotated[list[Path], typer.Argument(help="Run folders that share their folds.")],
    out: Annotated[
        Path, typer.Option(help="Folder for blend.json, blend.csv, index.html and planes/; the same command goes on.")
    ],
    data: Annotated[str, typer.Option(help="Folder with train.csv, where it has moved since the training.")] = "",
    set_: Set = [],
    device: Device = "auto",
    stores: Stores = None,
    side: Annotated[
        int, typer.Option(min=64, help="Longest side in pixels at which planes are kept and compared.")
    ] = 750,
    penalty: Annotated[
        float,
        typer.Option(min=0, help="Draws weights to equal ones: a run alone must be better by this / slides in Dice."),
    ] = 0.5,
) -> None:
    """Fit weights of several runs for each organ on held-out slides: a page, a table, and blend.json for predict and
    push.
    """
    from hubmap_kit.jobs.blend import blend as job

    typer.echo(job(runs, out, data, set_, device, stores, side, penalty))
    typer.echo(
        f"written: {out}/blend.json, blend.csv, index.html; next: hubmap predict --blend {out} --test test.csv, hubmap"
        f" push weights --blend {out}"
    )
