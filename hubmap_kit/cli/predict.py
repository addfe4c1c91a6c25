"""The verbs that use trained runs: `evaluate`, `tune-thresholds`, `blend`, `predict`, `check-submission`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubmap_kit.cli.options import Device, Folds, Set, Stores, fold_numbers
from hubmap_kit.errors import HubmapError


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
        "degrade" if on_error == "degrade" else "raise",
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
