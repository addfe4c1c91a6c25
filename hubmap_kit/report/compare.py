"""Comparing runs: the settings that differ, and the Dice of the same slides under each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from hubmap_kit import experiment
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import CheckpointError, HubmapError
from hubmap_kit.report.drawings import INK, colour, curves_drawing, drawing
from hubmap_kit.report.html import Block, Note, Picture, Section, Table, page
from hubmap_kit.report.run_columns import BY_KEY, text
from hubmap_kit.report.run_folder import (
    CONFIG,
    Run,
    labels,
    machine,
    read_curves,
    read_each,
    read_environments,
    read_oof,
    read_timing_table,
    sentence,
)
from hubmap_kit.report.tables import text_table
from hubmap_kit.report.tries_script import sortable

LEVEL = 0.95
DRAWS = 9999
ALL = "all"
UNSET = "(not set)"


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences over `slides` slides, and its bootstrap interval; no interval for a single
    slide.
    """

    mean: float
    low: float | None
    high: float | None
    slides: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + (f" [{self.low:+.4f}, {self.high:+.4f}]" if self.low is not None else "")


def pairs(first: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The slides that both out-of-fold tables have: id, organ, data_source, first, other, difference (other - first);
    the worst first.

    Equal differences are in the order of the ids, so that the table does not depend on the order of the files.
    """
    keys = ["id", "organ", "data_source"]  # another data folder may have the same ids
    both = first[[*keys, "dice"]].merge(other[[*keys, "dice"]], on=keys, suffixes=("_first", "_other"))
    both = both.rename(columns={"dice_first": "first", "dice_other": "other"})
    both["difference"] = both["other"] - both["first"]
    return both.sort_values(["difference", "id"], ignore_index=True)


def difference(values: Sequence[float] | np.ndarray | pd.Series, seed: int = 0) -> Difference:
    """Mean and percentile bootstrap interval of paired differences, at least one.

    Slides are drawn as if independent of each other.
    """
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Difference(mean, None, None, len(values))
    drawn = bootstrap(
        (values,),
        np.mean,
        n_resamples=DRAWS,
        confidence_level=LEVEL,
        method="percentile",
        random_state=seed,
        batch=1000,
    )
    return Difference(mean, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high), len(values))


def by_organ(paired: pd.DataFrame) -> dict[str, Difference]:
    """The difference of each organ, in their usual order, and of all slides; empty without a common slide."""
    groups = {organ: paired.loc[paired["organ"] == organ, "difference"] for organ in ORGANS}
    groups |= {ALL: paired["difference"]}
    return {name: difference(values) for name, values in groups.items() if len(values)}


def dice_by_organ(table: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """Mean Dice and number of slides of each organ and of all slides."""
    groups = {organ: table.loc[table["organ"] == organ, "dice"] for organ in ORGANS} | {ALL: table["dice"]}
    return {name: (float(values.mean()), len(values)) for name, values in groups.items() if len(values)}


def same_split(first: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two runs held the same slides out together, however their folds are numbered; as far as their tables
    tell.
    """
    both = first[["id", "fold"]].merge(other[["id", "fold"]], on="id", suffixes=("_first", "_other"))
    kinds = both[["fold_first", "fold_other"]].drop_duplicates()
    return kinds["fold_first"].is_unique and kinds["fold_other"].is_unique


def differing(values: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys of nested dictionaries that are not the same in all of them: dotted key -> each one's value as text."""
    flat = [dict(_flatten(each)) for each in values]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = {key: [_shown(each[key]) if key in each else UNSET for each in flat] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(_shown(each) for each in value) if isinstance(value, list | tuple) else str(value) or "(empty)"


# What a comparison needs of each run, read so that a damaged file costs its part of the page and no more.

T = TypeVar("T")


@dataclass(frozen=True)
class Compared:
    """One run: its name here, its folder and settings, and its tables, which are empty or None where there are none."""

    name: str
    run: Run
    oof: pd.DataFrame | None
    curves: pd.DataFrame
    timing: pd.DataFrame
    session: dict[str, Any]


def read_compared(paths: Sequence[Path]) -> tuple[list[Compared], list[str]]:
    """The runs that can be read, in the order given and each once, and a sentence about everything that cannot."""
    unique = list({path.resolve(): path for path in paths}.values())
    problems = [
        f"{path} is no run folder (it has no {CONFIG}); it is left out"
        for path in unique
        if not (path / CONFIG).is_file()
    ]
    there = [path for path in unique if (path / CONFIG).is_file()]
    runs, unread = read_each(there, labels(there))
    problems += unread
    found = [_read(run, problems) for run in runs]
    if not found:
        raise CheckpointError(f"none of these runs can be compared: {'; '.join(problems) or 'none was named'}")
    return found, problems


def _read(run: Run, problems: list[str]) -> Compared:
    name = str(run.row["run"])

    def told(read: Callable[[Path], T], empty: T) -> T:
        try:
            return read(run.path)
        except (HubmapError, OSError) as error:
            problem = f"{name}: {sentence(error, run.path)}"
            if problem not in problems:
                problems.append(problem)
            return empty

    has_oof = (run.path / "oof.csv").is_file()
    if not has_oof:
        problems.append(f"{name} has no oof.csv yet ({run.row.get('state', 'not read')}); its Dice is left out")
    oof = told(read_oof, None) if has_oof else None
    sessions = told(read_environments, [])
    return Compared(
        name,
        run,
        oof,
        told(read_curves, pd.DataFrame()),
        told(read_timing_table, pd.DataFrame()),
        sessions[0] if sessions else {},
    )


# The page of `hubmap compare`, and its table for the terminal.

HEAD = ("run", "model", "encoder", "state", "conversion", "size", "epochs", "parameters", "cv", "hours")
WORST = 10
PAIRED = (
    "Differences are of the same slide under two runs, other minus first, each run at its own fitted thresholds."
    " Brackets: 95 % bootstrap interval of the mean (percentile, 9999 draws of slides); slides of one donor are no"
    " independent ones, so the true interval is a little wider."
)
Differences = dict[str, dict[str, Difference]]


def compare_page(runs: Sequence[Compared], problems: Sequence[str]) -> str:
    """The HTML of a comparison."""
    sections = [Section("Runs", [_runs(runs)])]
    if problems:
        sections.insert(0, Section("Left out", [Note(problem, warn=True) for problem in problems]))
    drawn = {run.name: run.curves for run in runs if len(run.curves)}
    sections.append(Section("Curves", _curves(runs, drawn)))
    sections.append(Section("Settings that differ", _settings(runs)))
    sections.append(Section("Dice", _dice(runs)))
    sections += [
        Section(f"Slides: {run.name} against {first.name}", _slides(first, run)) for first, run in _against_first(runs)
    ]
    sections.append(Section("Time", [_time(runs)]))
    against = next((f" Differences are measured against {first.name}." for first, _ in _against_first(runs)), "")
    lead = f"{', '.join(run.name for run in runs)}.{against} A click on a column's name sorts by it."
    return sortable(page("Runs compared", lead, sections))


def compare_summary(runs: Sequence[Compared]) -> str:
    """Dice by organ and the differences, for the terminal."""
    scored = [run for run in runs if run.oof is not None]
    if not scored:
        return "no run has out-of-fold results yet"
    header, rows = _dice_rows(scored)
    return text_table(header, rows)


def _runs(runs: Sequence[Compared]) -> Table:
    columns = sorted((BY_KEY[key] for key in HEAD), key=lambda column: column.is_number)
    rows = [[text(column, run.run.row.get(column.key)) for column in columns] for run in runs]
    return Table(
        [column.title for column in columns], rows, text_columns=sum(not column.is_number for column in columns)
    )


def _curves(runs: Sequence[Compared], drawn: dict[str, pd.DataFrame]) -> list[Block]:
    if not drawn:
        return [Note("No run has finished an epoch yet.", warn=True)]
    blocks: list[Block] = [curves_drawing(drawn, folds=True)]
    losses = {run.run.settings.training.loss for run in runs}
    if len(losses) > 1:
        blocks.append(
            Note(
                f"The losses differ ({', '.join(sorted(losses))}): their values do not compare, their shapes do.",
                warn=True,
            )
        )
    return blocks


def _settings(runs: Sequence[Compared]) -> list[Block]:
    names = [run.name for run in runs]
    blocks: list[Block] = []
    for title, key, values in (
        (
            "config.yaml; keys that a run's version did not know yet have today's default",
            "key",
            [experiment.dump(run.run.settings) for run in runs],
        ),
        ("environment.json, the latest session", "fact", [_facts(run) for run in runs]),
    ):
        rows = [[name, *shown] for name, shown in differing(values).items()]
        blocks.append(
            Table([key, *names], rows, title, len(names) + 1)
            if rows
            else Note(f"{title.split(';')[0].split(',')[0]}: no difference.")
        )
    return blocks


def _facts(run: Compared) -> dict[str, object]:
    """What a session ran on, without the time that it began, which always differs."""
    return {key: value for key, value in run.session.items() if key != "time_utc"}


def _dice(runs: Sequence[Compared]) -> list[Block]:
    scored = [run for run in runs if run.oof is not None]
    if not scored:
        return [Note("No run has out-of-fold results yet.", warn=True)]
    header, rows = _dice_rows(scored)
    blocks: list[Block] = [Note(PAIRED), Table(header, rows, "Mean out-of-fold Dice, number of slides in parentheses")]
    compared = _differences(scored)
    if compared:
        blocks.append(_forest(compared, [run.name for run in scored]))
    split = [other.name for first, other in _against_first(scored) if not same_split(first.oof, other.oof)]
    if split:
        blocks.append(
            Note(
                f"Split into other folds than {scored[0].name}: {', '.join(split)}. Part of the difference is the"
                " split's.",
                warn=True,
            )
        )
    return blocks


def _dice_rows(scored: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    means = [dice_by_organ(run.oof) for run in scored]
    compared = _differences(scored)
    names = [name for name in dict.fromkeys(name for each in means for name in each) if name != ALL] + [ALL]
    rows = []
    for name in names:
        dice = [f"{each[name][0]:.4f} ({each[name][1]})" if name in each else "" for each in means]
        rows.append([name, *dice, *(str(found.get(name, "")) for found in compared.values())])
    return ["organ", *(run.name for run in scored), *(f"{name} - {scored[0].name}" for name in compared)], rows


def _against_first(runs: Sequence[Compared]) -> list[tuple[Compared, Compared]]:
    """The first run that has Dice, with each later one that has."""
    scored = [run for run in runs if run.oof is not None]
    return [(scored[0], run) for run in scored[1:]]


def _differences(scored: Sequence[Compared]) -> Differences:
    found = {other.name: by_organ(pairs(first.oof, other.oof)) for first, other in _against_first(scored)}
    return {name: each for name, each in found.items() if each}


def _forest(compared: Differences, names: Sequence[str]) -> Picture:
    """Each organ's mean difference with its interval, one colour a run."""
    organs = [*list(dict.fromkeys(organ for each in compared.values() for organ in each if organ != ALL)), ALL]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for position, (name, found) in enumerate(compared.items()):
            offset = 0.55 * ((position + 0.5) / len(compared) - 0.5)
            rows = [organs.index(organ) + offset for organ in found]
            middle = np.array([each.mean for each in found.values()])
            low = np.array([each.mean if each.low is None else each.low for each in found.values()])
            high = np.array([each.mean if each.high is None else each.high for each in found.values()])
            errors = np.maximum([middle - low, high - middle], 0)
            axes.errorbar(middle, rows, xerr=errors, fmt="o", color=colour(names.index(name)), capsize=3, label=name)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(organs)), organs)
        axes.invert_yaxis()
        axes.set_xlabel(f"difference of Dice from {names[0]} (right: better)")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    return drawing(
        draw,
        (9, 1 + 0.5 * len(organs)),
        f"Mean difference of Dice from {names[0]} with its interval, by organ and run.",
    )


def _slides(first: Compared, other: Compared) -> list[Block]:
    paired = pairs(first.oof, other.oof)
    if paired.empty:
        return [Note("They have no slide in common.", warn=True)]
    better, worse = int((paired["difference"] > 0).sum()), int((paired["difference"] < 0).sum())
    alone = f"{len(first.oof) - len(paired)} only in {first.name}, {len(other.oof) - len(paired)} only in {other.name}"
    said = Note(
        f"{len(paired)} slide{'s' * (len(paired) != 1)} in common ({alone}): {better} better, {worse} worse,"
        f" {len(paired) - better - worse} equal."
    )
    worst = paired.head(WORST)
    rest = paired.iloc[len(worst) :].tail(WORST)[::-1]
    tables = [_slide_table(worst, first, other, f"The {len(worst)} slides that lost most")]
    return [
        said,
        *tables,
        *(
            [_slide_table(rest, first, other, f"The {len(rest)} slides at the other end, the best first")]
            if len(rest)
            else []
        ),
    ]


def _slide_table(rows: pd.DataFrame, first: Compared, other: Compared, caption: str) -> Table:
    cells = [
        [
            row["id"],
            row["organ"],
            row["data_source"],
            f"{row['first']:.4f}",
            f"{row['other']:.4f}",
            f"{row['difference']:+.4f}",
        ]
        for row in rows.to_dict("records")
    ]
    return Table(["slide", "organ", "source", first.name, other.name, "difference"], cells, caption, 3)


def _time(runs: Sequence[Compared]) -> Table:
    rows = []
    for run in runs:
        found = [_median(run.timing, column, form) for column, form in _MEASURED]
        hours = f"{run.timing['seconds'].sum() / 3600:.2f}" if len(run.timing) else ""
        rows.append([run.name, machine(run.session), str(len(run.timing)), *found, hours])
    header = [
        "run",
        "machine",
        "epochs of all folds",
        "epoch, s",
        "of it validation, s",
        "tiles a second",
        "peak memory, GiB",
        "hours in all",
    ]
    return Table(header, rows, "Medians over the epochs; machines are those of the latest session.", 2)


_MEASURED = (("seconds", ".3g"), ("validation_seconds", ".3g"), ("tiles_per_second", ".3g"), ("peak_memory_gib", ".2f"))


def _median(timing: pd.DataFrame, column: str, form: str) -> str:
    values = timing[column].dropna() if column in timing else pd.Series(dtype=float)
    return format(values.median(), form) if len(values) else ""
