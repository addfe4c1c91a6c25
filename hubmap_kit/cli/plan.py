"""`hubmap plan`: what a training costs in GPU memory and hours, and in which sessions and weeks it fits."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubmap_kit.cli.options import fold_numbers
from hubmap_kit.errors import PublishError, finding

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from hubmap_kit.config import Experiment
    from hubmap_kit.publish.plan import Budget, Part, Session

GPUS = {"t4x2": 2, "p100": 1, "cpu": 1}


def plan(
    config: Annotated[str, typer.Option(help="A shipped experiment or a YAML file.")],
    folds: Annotated[str, typer.Option(help="Fold numbers, e.g. 0,2; empty: all.")] = "",
    set_: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = [],
    run: Annotated[
        list[Path], typer.Option(help="A run folder whose timing is taken, where it fits; may be repeated.")
    ] = [],
    slides: Annotated[int, typer.Option(min=1, help="Training slides.")] = 351,
    accelerator: Annotated[str, typer.Option(help="t4x2, p100 (retired) or cpu.")] = "t4x2",
    hours: Annotated[float, typer.Option(min=0.1, max=11.75, help="Hours of a session at most.")] = 11.5,
    stored: Annotated[bool, typer.Option("--stored", help="A finished tile store will be attached.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Do not ask Kaggle for the quota; assume a full week.")
    ] = False,
    fit_weeks: Annotated[
        int,
        typer.Option(
            "--fit-weeks",
            metavar="N",
            min=0,
            max=52,
            help="Say how many epochs or iterations N weeks of quota hold; 0: do not.",
        ),
    ] = 0,
) -> None:
    """Memory and hours of a training on Kaggle, laid out over sessions and the weekly GPU quota; every figure says
    whether it was measured.
    """
    from datetime import datetime

    from hubmap_kit import experiment
    from hubmap_kit.competition.folds import check_folds
    from hubmap_kit.publish.plan import Job, Terms, lay_out, memory_lines
    from hubmap_kit.publish.speed import estimate

    if accelerator not in GPUS:
        raise PublishError(f"--accelerator is '{accelerator}'; expected {', '.join(GPUS)}")
    settings = experiment.load(config, set_)
    count = settings.data.n_folds
    numbers = tuple(check_folds(fold_numbers(folds), range(count), source=f"data.n_folds is {count}, which gives"))
    speed = estimate(settings, accelerator, run, slides, stored)
    budget, note = (None, "no GPU, no quota") if accelerator == "cpu" else _budget(offline)
    now = datetime.now(UTC)

    def sessions_of(changed: Experiment, quota: Budget | None) -> list[Session]:
        found = estimate(changed, accelerator, run, slides, stored)
        job = Job(numbers, changed.training.epochs, found.epoch_s / 3600, found.last_s / 3600)
        return lay_out(job, quota, Terms(hours, found.overhead_s / 3600, GPUS[accelerator]), now)

    memory = [] if budget is None else memory_lines(settings, accelerator)
    sessions, fitting = _fitted(settings, budget, fit_weeks, now, sessions_of)
    length = f"{settings.training.iterations} iterations in " if settings.training.iterations else ""
    epochs = f"{settings.training.epochs} epochs of {speed.epoch_s:.0f} s"
    typer.echo(f"{settings.name}: {len(numbers)} folds x {length}{epochs} on {accelerator}; {note}\n")
    typer.echo("".join(f"{line}\n" for line in memory))
    if sessions:
        typer.echo(_table(sessions, GPUS[accelerator]) + "\n")
    typer.echo("\n".join([*fitting, *speed.notes, *_early_stop(settings)]))
    if not sessions:
        return
    typer.echo(f"\n{_summary(sessions, budget)}")
    typer.echo(_commands(sessions, config, folds, set_, accelerator))


def _fitted(
    settings: Experiment,
    budget: Budget | None,
    weeks: int,
    now: datetime,
    sessions_of: Callable[[Experiment, Budget | None], list[Session]],
) -> tuple[list[Session], list[str]]:
    """The sessions of a training, and what so many weeks hold.

    A training that cannot be planned is an error, unless weeks are asked for.
    """
    from hubmap_kit.publish.plan import WEEK, Budget, held

    if not weeks:
        return sessions_of(settings, budget), []
    if budget is None:
        raise PublishError(
            "--fit-weeks is about the quota of GPUs, and --accelerator cpu has none; leave one of them out"
        )
    full = Budget(budget.weekly_h, budget.weekly_h, now + WEEK)
    lines = [held(settings, lambda changed: sessions_of(changed, full), weeks, now, budget.weekly_h)]
    try:
        return sessions_of(settings, budget), lines
    except PublishError as error:
        return [], [f"as it is, it cannot be planned: {error}", *lines]


def _budget(offline: bool) -> tuple[Budget, str]:
    """The quota that Kaggle tells, or the usual one where it cannot be asked, and a sentence on it."""
    from hubmap_kit.publish.plan import assumed_budget, budget_sentence, read_budget

    why = "--offline"
    if not offline:
        from hubmap_kit.publish.client import Kaggle

        try:
            with Kaggle() as client:
                budget = read_budget(client)
            return budget, budget_sentence(budget)
        except PublishError as error:
            why = finding(error)
    budget = assumed_budget(why=why)
    return budget, budget_sentence(budget)


def _table(sessions: list[Session], gpus: int) -> str:
    from hubmap_kit.publish.plan import utc_words
    from hubmap_kit.report.tables import text_table

    rows = []
    for number, session in enumerate(sessions, 1):
        cells = ["; ".join(_part(part) for part in session.parts if part.gpu == gpu) for gpu in range(gpus)]
        start = "now" if number == 1 and not session.waits else f"from {utc_words(session.starts)}"
        rows.append(
            [
                f"{number}",
                start + (" (new week)" if session.waits else ""),
                *cells,
                f"{session.hours:.1f}",
                f"{session.limit_h:g}",
            ]
        )
    return text_table(
        ["session", "starts", *(f"epochs on device {gpu}" for gpu in range(gpus)), "hours", "--hours"], rows
    )


def _part(part: Part) -> str:
    epochs = f"{part.first}-{part.last}" if part.last >= part.first else ""
    return f"fold {part.fold}: {' + '.join(filter(None, [epochs, 'oof' if part.finishes else '']))}"


def _early_stop(settings: Experiment) -> list[str]:
    patience = settings.training.patience
    return [f"ASSUMPTION: no fold stops early, although training.patience is {patience}"] if patience else []


def _summary(sessions: list[Session], budget: Budget | None) -> str:
    from hubmap_kit.publish.plan import gpu_hours, utc_words

    count = f"{len(sessions)} session{'s' if len(sessions) > 1 else ''}"
    if budget is None:
        return f"{gpu_hours(sessions):.1f} hours in {count}"
    later = [session for session in sessions if session.starts >= budget.refresh]
    soon = gpu_hours(sessions) - gpu_hours(later)
    text = (
        f"{gpu_hours(sessions):.1f} hours of quota in {count}; {soon:.1f} of them fit what is left of this week"
        f" ({budget.left_h:.1f} h)"
    )
    return f"{text}, {gpu_hours(later):.1f} wait until {utc_words(budget.refresh)}" if later else text


def _commands(sessions: list[Session], config: str, folds: str, overrides: list[str], accelerator: str) -> str:
    import shlex

    words = ["hubmap", "kernels", "--run", "train", "--config", config, *(["--folds", folds] if folds else [])]
    words += [word for text in overrides for word in ("--set", text)] + (
        ["--accelerator", accelerator] if accelerator != "t4x2" else []
    )
    text = f"session 1: {shlex.join([*words, '--hours', f'{sessions[0].limit_h:g}', '--follow'])}"
    return text + ("\nafter it:  the same with --resume and the session's --hours" if len(sessions) > 1 else "")
