"""The verbs that prepare and run a training, from `demo` and `config` to `train` and `notebook`."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.cli.options import Config, Data, Device, Folds, Set, Stores, fold_numbers
from hubmap_kit.errors import HubmapError

pretrained = typer.Typer(
    name="pretrained",
    no_args_is_help=True,
    help="Pack encoder weights for machines without a network.",
    rich_markup_mode=None,
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    set_: Set = [],
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the embedded slides.")] = 0,
) -> None:
    """The whole journey on embedded slides: train two folds, predict, score, draw. Minutes on a CPU."""
    from hubmap_kit.jobs.demo import demo as run
    from hubmap_kit.report.tables import oof_summary, source_summary

    done = run(out, set_, device, seed)
    typer.echo(f"\n{oof_summary(done.oof)}\n\n{source_summary(done.test_scores)}\n")
    typer.echo(f"submission: {done.submission.path} ({done.submission.report.rows} rows, checked)")
    typer.echo(
        f"pictures:   {out}/overview.png, {out}/overlays/<organ>.png, {out}/run/curves.png, {out}/run/thresholds.png"
    )


def config(
    name: Annotated[str, typer.Argument(help="A shipped experiment or a YAML file.")] = "",
    set_: Set = [],
    organs: Annotated[bool, typer.Option("--organs", help="What it does with each organ, as one table.")] = False,
) -> None:
    """List the shipped experiments, or print one with the description of every key."""
    from hubmap_kit import experiment

    if not name:
        typer.echo("\n".join(f"{key:<27} {path}" for key, path in experiment.shipped().items()))
        return
    if organs:
        from hubmap_kit.report.tables import recipe_table

        typer.echo(recipe_table(experiment.load(name, set_)))
        return
    typer.echo("\n".join(experiment.described(experiment.load(name, set_))))


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


def train(
    out: Annotated[Path, typer.Option(help="The run folder.")],
    config: Annotated[
        str, typer.Option(help="A shipped experiment or a YAML file; with --resume the run's own is the default.")
    ] = "",
    data: Annotated[str, typer.Option(help="Folder with train.csv and train_images/.")] = "",
    folds: Folds = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    set_: Set = [],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:0,cuda:1: a fold on each card.")] = "auto",
    stores: Stores = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.001, help="Stop by then with everything saved; the last line says how to go on."),
    ] = None,
    auto_batch: Annotated[
        bool, typer.Option("--auto-batch", help="Begin with the largest training.batch_size that fits into the card.")
    ] = False,
) -> None:
    """Train folds into a run folder: weights, curves, out-of-fold table, thresholds."""
    from hubmap_kit import experiment

    if follower := os.environ.get("RANK", "0") not in ("", "0"):
        # One of the processes that torchrun started beside the first, which alone speaks. tqdm reads this when it is
        # imported.
        os.environ["TQDM_DISABLE"] = "1"
        logging.getLogger("hubmap_kit").setLevel(logging.ERROR)
    kept = out / "config.yaml"
    if not config and not (resume and kept.is_file()):
        raise HubmapError(f"--config is missing; name one of {experiment.offered()}, or a YAML file")
    settings = experiment.load(config or str(kept), set_, data)
    numbers = fold_numbers(folds)
    from hubmap_kit.jobs.train import auto_batched
    from hubmap_kit.jobs.train import train as run
    from hubmap_kit.report.tables import oof_summary
    from hubmap_kit.training.clock import OutOfTime, SessionClock

    if auto_batch:
        settings = auto_batched(settings, out, device)
    try:
        table = run(settings, out, numbers, resume, device, stores, SessionClock(hours * 3600) if hours else None)
    except OutOfTime as stop:
        # All is saved, which is what was asked for, so the exit code is 0: a script that goes on does so by the run,
        # not by the code.
        if not follower:
            typer.echo(f"stopped: {stop}", err=True)
        return
    if follower:
        return
    typer.echo(oof_summary(table))
    typer.echo(f"run folder: {out} (curves.png, oof.csv, thresholds.json); next: hubmap evaluate {out}")


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
