"""Recipes on the same small budget, judged on what they were not trained on. Called by scripts/generalising.sh.

Each trial is a run folder in OUT, trained and judged with the command line. A trial that is claimed by another process,
or done, is passed over; what a process left unfinished is begun anew once its mark (OUT/NAME.claimed) is deleted.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace as replace_in
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from benchmarks.document import replace
from generalising_trials import STUDIES, Paths, Trial, prepare

from hubmap_kit.augment.shift import PLAIN, SHIFTS
from hubmap_kit.errors import HubmapError
from hubmap_kit.files import write_text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "generalising.md"
BATTERY = [shift for shift in SHIFTS if shift != PLAIN]
Row = list[str]


def main(
    study: Annotated[str, typer.Argument(help="One of the studies, or all.")],
    data: Annotated[Path, typer.Option(help="Folder with glas, hubmap-mini, stain-references and weights.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs.")] = Path("runs/generalising"),
    table: Annotated[bool, typer.Option("--table", help="Train nothing; tell what is there.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Write the tables into docs/generalising.md.")] = False,
) -> None:
    """Train and judge the trials of a study that are missing, and print its table."""
    if study not in (*STUDIES, "all"):
        raise HubmapError(f"there is no study '{study}'; expected {', '.join(STUDIES)} or all")
    paths = Paths(data.resolve(), out.resolve())
    paths.out.mkdir(parents=True, exist_ok=True)
    for name in STUDIES if study == "all" else [study]:
        trials = STUDIES[name](paths)
        if not table:
            for trial in trials:
                _run(trial, paths)
        if name == "spleen":
            typer.echo("\n".join(f"pictures: {paths.out / trial.name / 'pictures'}" for trial in trials))
            continue
        text = _table(name, [trial for trial in trials if trial.is_done(paths)], paths)
        typer.echo(f"\n{text}")
        if write:
            replace(PAGE, name, f"{text}\n")


def _run(trial: Trial, paths: Paths) -> None:
    """Train and judge a trial, unless somebody has."""
    try:
        (paths.out / f"{trial.key}.claimed").touch(exist_ok=False)
    except FileExistsError:
        return
    prepare(trial, paths)
    typer.echo(f"{trial.name}: {trial.title}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    before = used.ru_utime + used.ru_stime
    with (paths.out / f"{trial.key}.log").open("w") as log:
        trained = 0.0
        for place, words in enumerate(trial.commands(paths)):
            if subprocess.run(
                [sys.executable, "-m", "hubmap_kit", *words], stdout=log, stderr=log, check=False
            ).returncode:
                raise HubmapError(f"{trial.name} failed; {log.name} says why")
            if place == 0 and not (
                trial.trained or trial.copy_of
            ):  # of the processes that have ended; each trial has its share of what they took
                used = resource.getrusage(resource.RUSAGE_CHILDREN)
                trained = used.ru_utime + used.ru_stime - before
    if not (trial.trained or trial.copy_of):
        write_text(paths.out / f"{trial.name}.minutes", f"{trained / 60:.2f}\n")


def _table(name: str, trials: list[Trial], paths: Paths) -> str:
    if name in ("ingredients", "seeds"):
        rows, head = _shifted(trials, paths, groups=name == "seeds"), ["recipe", PLAIN, *BATTERY, "mean of the shifts"]
    else:
        together = [replace_in(trial, title="all folds") for trial in trials] if name == "folds" else []
        rows, head = (
            _plain([*trials, *together], paths),
            ["recipe", "runs", "Dice", "at 0.5", "CPU minutes of training"],
        )
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shifted(trials: list[Trial], paths: Paths, groups: bool) -> list[Row]:
    """Mean Dice of the held-out slides under each shift; of several runs of one recipe, mean and standard deviation."""
    found: dict[str, list[pd.Series]] = {}
    for trial in trials:
        means = pd.read_csv(paths.out / trial.name / "shift.csv").groupby("shift")["dice"].mean()
        means["mean of the shifts"] = means[BATTERY].mean()
        found.setdefault(trial.title, []).append(means[[PLAIN, *BATTERY, "mean of the shifts"]])
    rows = []
    for title, runs in found.items():
        frame = pd.DataFrame(runs)
        spread = [f" ± {value:.3f}" if groups else "" for value in frame.std(ddof=1)]
        rows.append([title, *(f"{mean:.3f}{more}" for mean, more in zip(frame.mean(), spread, strict=True))])
    return rows


def _plain(trials: list[Trial], paths: Paths) -> list[Row]:
    """Dice of unseen slides, over the runs of a recipe mean and standard deviation, and what training took."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for trial in trials:
        table = pd.read_csv(trial.result(paths))
        found.setdefault(trial.title, []).append((table["dice"].mean(), table["dice@0.5"].mean(), trial.minutes(paths)))
    rows = []
    for title, runs in found.items():
        frame = pd.DataFrame(runs)
        spread = [f" ± {value:.4f}" if len(frame) > 1 else "" for value in frame.std(ddof=1)[:2]]
        minutes = "" if frame[2].isna().any() else f"{frame[2].sum():.1f}"
        rows.append(
            [
                title,
                f"{len(frame)}",
                *(f"{mean:.4f}{more}" for mean, more in zip(frame.mean()[:2], spread, strict=True)),
                minutes,
            ]
        )
    return rows


if __name__ == "__main__":
    try:
        typer.run(main)
    except HubmapError as error:
        sys.exit(f"error: {error}")
