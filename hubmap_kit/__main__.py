"""The verb table: `hubmap <verb>`. Heavy imports happen inside the verbs, so that `--help` answers at once."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from hubmap_kit import cli as publishing
from hubmap_kit.cli import study as experimenting
from hubmap_kit.cli.options import Device, Folds, Set, Stores
from hubmap_kit.errors import HubmapError
from hubmap_kit.processes import leave
from hubmap_kit.words import INTERRUPTED, fold_numbers

app = typer.Typer(
    name="hubmap",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Segment tissue slides: train folds, predict with views and ensembles, write a valid submission.csv.",
)


@app.callback()
def _main(
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="-v: more log lines and the traceback of an error.")
    ] = 0,
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("hubmap_kit").setLevel(logging.DEBUG if verbose else logging.INFO)


@app.command()
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


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(help="Folder for the slides and tables.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other slides.")] = 0,
    slides_per_organ: Annotated[int, typer.Option(min=1, help="Training slides of each organ.")] = 4,
    size: Annotated[int, typer.Option(min=256, help="Side of a training slide in pixels.")] = 1536,
) -> None:
    """Write synthetic slides in the competition's folder format."""
    from hubmap_kit.sample.generate import generate

    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise HubmapError(f"{out} is not an empty folder; choose a new one, nothing is overwritten")
    generate(out, seed, slides_per_organ, size)
    typer.echo(f"{out}: train.csv, train_images/, test.csv, test_images/, sample_submission.csv, test_truth.csv")


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[str, typer.Option(help="Folder with train.csv, where it has moved since the training.")] = "",
    set_: Set = [],
    device: Device = "auto",
    stores: Stores = None,
    pictures: Annotated[
        bool, typer.Option(help="Draw one held-out slide per organ; with --shift, the worst slides.")
    ] = True,
    shift: Annotated[
        str, typer.Option(metavar="hubmap", help="Measure held-out slides under shifts that imitate another source.")
    ] = "",
    shifts: Annotated[
        str,
        typer.Option(
            metavar="A,B", help="With --shift, some of pas, he, scale, contrast, blur, jpeg, hubmap; default: all."
        ),
    ] = "",
    references: Annotated[
        Path | None,
        typer.Option(
            help="With --shift, stain references named ..pas.. or ..he..; default: embedded slides.", show_default=False
        ),
    ] = None,
    views: Annotated[str, typer.Option(metavar="none|flips|d4", help="With --shift, fewer views than the run's.")] = "",
    fit: Annotated[
        bool, typer.Option("--fit", help="With --shift, fit thresholds to plain and shifted slides alike.")
    ] = False,
    on: Annotated[
        Path | None,
        typer.Option(help="Judge all folds together on a labelled folder that none has seen.", show_default=False),
    ] = None,
    organs: Annotated[str, typer.Option(metavar="A,B", help="With --on, slides of these organs only.")] = "",
) -> None:
    """Predict held-out slides again with a run's folds; fit thresholds; draw overlays.

    Or measure what a shift of source costs, imitated (--shift) or real (--on).
    """
    if organs and on is None:
        raise HubmapError("--organs goes with --on; name a labelled folder there")
    if on is not None:
        if shift or data:
            raise HubmapError("--on is an evaluation of its own; leave --shift and --data out")
        from hubmap_kit.jobs.evaluate import evaluate_on

        judged = evaluate_on(run, on, [organ for organ in organs.split(",") if organ], None, set_, device)
        typer.echo(judged.summary)
        typer.echo("written: {}, {}".format(*judged.written))
        return
    if not shift and (shifts or references or views or fit):
        raise HubmapError("--shifts, --references, --views and --fit go with --shift; add --shift hubmap")
    if shift:
        from hubmap_kit.jobs.evaluate import evaluate_shifted

        found = evaluate_shifted(run, shift, data, set_, device, shifts, str(references or ""), views, fit, pictures)
        typer.echo(found.summary)
        typer.echo(f"written: {run}/shift.csv, shift.html, shift.png" + (", thresholds.json" if fit else ""))
        return
    from hubmap_kit.jobs.train import evaluate as job
    from hubmap_kit.report.tables import oof_summary

    typer.echo(oof_summary(job(run, data, set_, device, stores, pictures)))
    typer.echo(f"written: {run}/oof.csv, thresholds.json, thresholds.png" + (", overlays/" if pictures else ""))


@app.command()
def predict(
    test: Annotated[Path, typer.Option(help="test.csv, with test_images/ beside it.")],
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUNS...", help="Run folders; their probabilities are averaged.", show_default=False),
    ] = None,
    blend: Annotated[
        Path | None, typer.Option(help="A folder of 'hubmap blend': its runs, weighted by organ.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The submission to write.")] = Path("submission.csv"),
    folds: Folds = "",
    set_: Set = [],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:0,cuda:1, which share the slides.")] = "auto",
    on_error: Annotated[
        str, typer.Option(metavar="raise|degrade", help="A slide that fails: an error, or an empty mask.")
    ] = "raise",
    overlays: Annotated[Path | None, typer.Option(help="Folder for one picture per slide.")] = None,
    deadline: Annotated[
        str,
        typer.Option(metavar="HH:MM:SS", help="Be done by then, at the cost of views, folds and overlap if need be."),
    ] = "",
) -> None:
    """Segment the slides of a test table and write a checked submission.csv."""
    if on_error not in ("raise", "degrade"):
        raise HubmapError(f"--on-error is '{on_error}'; expected raise or degrade")
    if bool(runs) == (blend is not None):
        raise HubmapError(
            "predict needs run folders or --blend, and not both; name the runs, or the folder that 'hubmap blend' wrote"
        )
    numbers = fold_numbers(folds)
    from hubmap_kit.inference.blend import runs_at
    from hubmap_kit.inference.governor import parse_deadline
    from hubmap_kit.jobs.predict import predict as job

    limit = parse_deadline(deadline) if deadline else None
    done = job(
        runs_at(blend) if blend else runs or [],
        test,
        out,
        numbers,
        set_,
        device,
        on_error,
        overlays,
        deadline=limit,
        blend=blend,
    )
    for failure in done.failures:
        typer.echo(f"slide {failure.id} has an empty mask: {failure.reason}")
    report, verdict = done.report, f"its check failed: {done.doubt}" if done.doubt else "checked"
    failed = f"; {len(done.failures)} of {report.rows} slides failed" if done.failures or on_error == "degrade" else ""
    typer.echo(
        f"{done.path}: {report.rows} rows, {report.empty} empty masks, mean coverage {report.mean_coverage:.2%};"
        f" {verdict}{failed}"
    )


@app.command()
def tune_thresholds(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[str, typer.Option(help="Folder with train.csv, where it has moved since the training.")] = "",
    set_: Set = [],
    device: Device = "auto",
    stores: Stores = None,
) -> None:
    """Fit thresholds and post-processing of each organ on a run's held-out slides."""
    from hubmap_kit.jobs.tune import tune_thresholds as job

    typer.echo(job(run, data, set_, device, stores).summary)
    typer.echo(f"written: {run}/thresholds.json, postprocess.json, tune.png; 'hubmap predict' uses them")


@app.command()
def augment(
    preview: Annotated[
        str, typer.Option(metavar="NAME", help="A pipeline, a mixing or stain method; mixing, stain: all of them.")
    ],
    out: Annotated[Path, typer.Option(help="The contact sheet to write (PNG).")] = Path("augment.png"),
    data: Annotated[str, typer.Option(help="Folder with train.csv; without it an embedded slide is shown.")] = "",
    slide: Annotated[str, typer.Option(help="Id of the slide; default: the first.")] = "",
    references: Annotated[
        str, typer.Option(help="Folder of stain references; default: embedded slides in eosin and PAS.")
    ] = "",
    size: Annotated[int, typer.Option(help="Side of a picture in pixels.")] = 480,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other changes.")] = 0,
    engine: Annotated[
        str, typer.Option(help="classic, or batched: pipelines and jitter as one pass over a batch.")
    ] = "classic",
) -> None:
    """Show one slide under each transform of a pipeline, mixing or stain method, masks outlined."""
    from hubmap_kit.jobs.augment import preview as job

    typer.echo(f"{out}: {job(preview, out, data, slide, references, size, seed, engine)} pictures")


@app.command()
def mosaic(
    data: Annotated[str, typer.Option(help="Folder with train.csv and train_images/.")],
    out: Annotated[Path, typer.Option(help="Folder for images/, masks/ and mosaics.csv.")],
    count: Annotated[int, typer.Option(min=1, help="Mosaics to make.")] = 1000,
    size: Annotated[int, typer.Option(min=16, help="Side in network pixels: 256, 512 or 768 as a rule.")] = 256,
    same_organ: Annotated[bool, typer.Option(help="All four tiles of one organ.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other mosaics.")] = 0,
    config: Annotated[str, typer.Option(help="A shipped experiment or a YAML file: its scale is used.")] = "baseline",
    set_: Set = [],
    stores: Annotated[Path | None, typer.Option(help="Folder of tile stores; default: 'stores' inside --out.")] = None,
) -> None:
    """Make mosaics of four tiles as PNG pairs with a table of their sources."""
    from hubmap_kit import experiment
    from hubmap_kit.jobs.augment import mosaics

    typer.echo(
        f"{mosaics(experiment.load(config, set_, data), out, count, size, seed, same_organ, stores)}: {count} mosaics"
        f" of {size} px"
    )


@app.command()
def check_submission(
    submission: Annotated[Path, typer.Argument(help="The submission.csv.")],
    test: Annotated[Path, typer.Option(help="The test.csv it answers.")],
) -> None:
    """Check a submission as the scorer would: ids, order, runs inside the slides."""
    from hubmap_kit.competition.checker import check_submission as check

    report = check(submission, test)
    typer.echo(
        f"{submission}: {report.rows} rows, {report.empty} empty masks, mean coverage {report.mean_coverage:.2%}; the"
        " scorer would take it"
    )


@app.command()
def eda(
    source: Annotated[
        Path,
        typer.Argument(
            help="train.csv, train.csv.gz, or the folder with one; slides in train_images/ are used where present."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html and the CSV files.")] = Path("eda"),
    images: Annotated[
        Path | None, typer.Option(help="Folder of the slides, where it is not train_images/ beside the table.")
    ] = None,
) -> None:
    """Explore a train.csv: one self-contained page, and tables per organ, slide and unit."""
    from hubmap_kit.jobs.eda import eda as job

    done = job(source, out, images)
    typer.echo(done.summary)
    typer.echo(
        f"written: {done.page}, with the tables beside it; {done.files} of {done.slides} slide files read,"
        f" {done.oddities} oddities"
    )


@app.command()
def tiles(
    data: Annotated[Path, typer.Argument(help="Folder with train.csv and train_images/, or the table itself.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the tiles; a store goes into a folder of its own inside.", show_default=False),
    ] = None,
    config: Annotated[
        str, typer.Option(help="A set of the first team, e.g. 3000-512-r2, 2048-512-r2, resize-512, or a YAML file.")
    ] = "",
    set_: Set = [],
    jobs: Annotated[int, typer.Option(min=1, help="Processes; the files do not depend on their number.")] = 1,
    count: Annotated[
        bool, typer.Option("--count", help="Only count the tiles of every conversion; no slides are needed.")
    ] = False,
) -> None:
    """Convert slides into tiles, resized, cropped or padded, as a store, image folders or a Kaggle dataset.

    Goes on where it was killed.
    """
    from hubmap_kit.tiles import convert_config

    settings = convert_config.load(config, set_)
    if not count and out is None:
        raise HubmapError("--out is missing; name the folder for the tiles, or count them with --count")
    from hubmap_kit.jobs import tiles as job

    if out is None or count:
        typer.echo(job.count(data, settings if config or set_ else None))
        return
    typer.echo(job.summary(job.tiles(data, out, settings, jobs), settings))


experimenting.add_all(app)
publishing.add_all(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry point.

    What a user can act on becomes one line and exit code 1; -v, anywhere on the line, shows its traceback too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = [word for word in words if word in ("-v", "--verbose")]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a kernel's log may hold what a console in cp1252 cannot show
    try:
        result: Any = app([*flags, *(word for word in words if word not in flags)], standalone_mode=False)
    except HubmapError as error:
        _fail(str(error), error)
    except OSError as error:
        _fail(
            f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the free"
            " disk space",
            error,
        )
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        _fail(
            "the device ran out of memory; lower training.batch_size, inference.batch_size or tiles.size with --set",
            error,
        )
    except click.exceptions.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    if result == INTERRUPTED:
        same = "; the same command goes on"
        on = {
            "train": "; it goes on with --resume",
            "notebook": "; it goes on with --resume",
            "tiles": same,
            "tune": same,
            "blend": same,
            "external": same,
        }
        _fail("stopped" + next((on[word] for word in words[:1] if word in on), ""), None, INTERRUPTED)
    sys.exit(result if isinstance(result, int) else 0)


def _fail(sentence: str, error: BaseException | None, code: int = 1) -> None:
    if error is not None and logging.getLogger("hubmap_kit").isEnabledFor(logging.DEBUG):
        logging.getLogger("hubmap_kit").error("", exc_info=error)
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)


def command() -> None:
    """The program `hubmap`: `main`, and then the process ends at once."""
    try:
        main()
    except SystemExit as stop:
        leave(stop.code if isinstance(stop.code, int) else 1)  # `main` gives nothing but numbers


if __name__ == "__main__":
    command()
