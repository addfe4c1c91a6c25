"""Comparing runs: the settings that differ, and the Dice of the same slides under each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import bootstrap

from hubmap_kit import experiment
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import CheckpointError, HubmapError
from hubmap_kit.report.curves import curves_blocks
from hubmap_kit.report.drawings import INK, drawing, run_colour
from hubmap_kit.report.html import Block, Note, Picture, Section, Table, page, problem_sections
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
from hubmap_kit.report.runs import BY_KEY, column_table
from hubmap_kit.report.tables import text_table

LEVEL = 0.95
DRAWS = 9999
ALL = "all"
UNSET = "(not set)"
HEAD = ("run", "model", "encoder", "state", "conversion", "size", "epochs", "parameters", "cv", "hours")
WORST = 10
PAIRED = (
    "Differences are of the same slide under two runs, other minus first, each run at its own fitted thresholds."
    " Brackets: 95 % bootstrap interval of the mean (percentile, 9999 draws of slides); slides of one donor are not"
    " independent, so the true interval is a little wider."
)
MEASURED = {"seconds": ".3g", "validation_seconds": ".3g", "tiles_per_second": ".3g", "peak_memory_gib": ".2f"}


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over `slides` slides, and its bootstrap interval; no interval for a single slide."""

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
    options: dict[str, Any] = {"confidence_level": LEVEL, "method": "percentile", "random_state": seed, "batch": 1000}
    interval = bootstrap((values,), np.mean, n_resamples=DRAWS, **options).confidence_interval
    return Difference(mean, float(interval.low), float(interval.high), len(values))


def by_organ(paired: pd.DataFrame) -> dict[str, Difference]:
    """The difference of each organ, in their usual order, and of all slides; empty without a common slide."""
    return {name: difference(values) for name, values in _organ_groups(paired, "difference").items()}


def dice_by_organ(table: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """Mean Dice and number of slides of each organ and of all slides."""
    return {name: (float(values.mean()), len(values)) for name, values in _organ_groups(table, "dice").items()}


def _organ_groups(table: pd.DataFrame, column: str) -> dict[str, pd.Series]:
    groups = {organ: table.loc[table["organ"] == organ, column] for organ in ORGANS} | {ALL: table[column]}
    return {name: values for name, values in groups.items() if len(values)}


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


@dataclass(frozen=True)
class Compared:
    """One run: its name here, its folder and settings, and its tables; empty or None where there is none."""

    name: str
    run: Run
    oof: pd.DataFrame | None
    curves: pd.DataFrame
    timing: pd.DataFrame
    session: dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """A run that has out-of-fold Dice."""

    name: str
    oof: pd.DataFrame


def read_compared(paths: Sequence[Path]) -> tuple[list[Compared], list[str]]:
    """The runs that can be read, in the order given and each once, and a sentence about everything that cannot be.

    A damaged file costs its part of the page and no more. Raises CheckpointError where no run is left.
    """
    unique = list({path.resolve(): path for path in paths}.values())
    there = [path for path in unique if (path / CONFIG).is_file()]
    problems = [f"{path} is no run folder (it has no {CONFIG}); it is left out" for path in unique if path not in there]
    runs, unread = read_each(there, labels(there))
    problems += unread
    found = [_read_tables(run, problems) for run in runs]
    if not found:
        raise CheckpointError(f"none of these runs can be compared: {'; '.join(problems) or 'none was named'}")
    return found, problems


def _read_tables(run: Run, problems: list[str]) -> Compared:
    name = str(run.row["run"])

    def read_or(read: Callable[[Path], Any], empty: Any) -> Any:
        try:
            return read(run.path)
        except (HubmapError, OSError) as error:
            problem = f"{name}: {sentence(error, run.path)}"
            if problem not in problems:
                problems.append(problem)
            return empty

    oof: pd.DataFrame | None = None
    if (run.path / "oof.csv").is_file():
        oof = read_or(read_oof, None)
    else:
        problems.append(f"{name} has no oof.csv yet ({run.row.get('state', 'not read')}); its Dice is left out")
    curves, timing = read_or(read_curves, pd.DataFrame()), read_or(read_timing_table, pd.DataFrame())
    return Compared(name, run, oof, curves, timing, next(iter(read_or(read_environments, [])), {}))


class Comparison:
    """What the page and the terminal show of runs; those with Dice are measured against the first of them."""

    def __init__(self, runs: Sequence[Compared]) -> None:
        self.runs = runs
        self.scored = [Scored(run.name, run.oof) for run in runs if run.oof is not None]
        self.first, self.others = self.scored[:1], self.scored[1:]

    @cached_property
    def pairs(self) -> dict[str, pd.DataFrame]:
        """The common slides of each other run with the first one."""
        return {other.name: pairs(self.first[0].oof, other.oof) for other in self.others}

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """The differences by organ of each other run that has slides in common with the first one."""
        return {name: by_organ(paired) for name, paired in self.pairs.items() if len(paired)}

    def dice_rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of the table of Dice."""
        means = [dice_by_organ(run.oof) for run in self.scored]
        rows = []
        for name in _organs(means):
            dice = [f"{each[name][0]:.4f} ({each[name][1]})" if name in each else "" for each in means]
            rows.append([name, *dice, *(str(found.get(name, "")) for found in self.differences.values())])
        against = [f"{name} - {self.first[0].name}" for name in self.differences]
        return ["organ", *(run.name for run in self.scored), *against], rows


def _organs(found: Iterable[Mapping[str, object]]) -> list[str]:
    return [*dict.fromkeys(name for each in found for name in each if name != ALL), ALL]


def compare_page(runs: Sequence[Compared], problems: Sequence[str]) -> str:
    """The HTML of a comparison."""
    found = Comparison(runs)
    curves = {run.name: run.curves for run in runs if len(run.curves)}
    losses = {run.run.settings.training.loss for run in runs}
    nothing = [Note("No run has finished an epoch yet.", warn=True)]
    sections = [
        *problem_sections(problems),
        Section("Runs", [column_table([BY_KEY[key] for key in HEAD], [run.run.row for run in runs])]),
        Section("Curves", curves_blocks(curves, losses, folds=True) if curves else nothing),
        Section("Settings that differ", _settings(runs)),
        Section("Dice", _dice(found)),
        *(
            Section(f"Slides: {other.name} against {first.name}", _slides(first, other, found.pairs[other.name]))
            for first in found.first
            for other in found.others
        ),
        Section("Time", [_time(runs)]),
    ]
    lead = f"{', '.join(run.name for run in runs)}."
    if found.others:
        lead += f" Differences are measured against {found.first[0].name}."
    return page("Runs compared", f"{lead} Click a column's name to sort by it.", sections, sortable=True)


def compare_summary(runs: Sequence[Compared]) -> str:
    """Dice by organ and the differences, for the terminal."""
    found = Comparison(runs)
    return text_table(*found.dice_rows()) if found.scored else "no run has out-of-fold results yet"


def _settings(runs: Sequence[Compared]) -> list[Block]:
    config = [experiment.dump(run.run.settings) for run in runs]
    # The time that a session began always differs.
    facts = [{key: value for key, value in run.session.items() if key != "time_utc"} for run in runs]
    blocks: list[Block] = []
    for file, about, key, values in (
        ("config.yaml", "; keys that a run's version did not know yet have today's default", "key", config),
        ("environment.json", ", the latest session", "fact", facts),
    ):
        rows = [[name, *texts] for name, texts in differing(values).items()]
        header = [key, *(run.name for run in runs)]
        blocks.append(Table(header, rows, file + about, len(header)) if rows else Note(f"{file}: no difference."))
    return blocks


def _dice(found: Comparison) -> list[Block]:
    if not found.scored:
        return [Note("No run has out-of-fold results yet.", warn=True)]
    table = Table(*found.dice_rows(), "Mean out-of-fold Dice, number of slides in parentheses")
    blocks: list[Block] = [Note(PAIRED), table]
    if found.differences:
        blocks.append(_forest(found))
    first = found.scored[0]
    split = [other.name for other in found.others if not same_split(first.oof, other.oof)]
    if split:
        said = f"Split into other folds than {first.name}: {', '.join(split)}. Part of the difference is the split's."
        blocks.append(Note(said, warn=True))
    return blocks


def _forest(found: Comparison) -> Picture:
    """Each organ's mean difference with its interval, one colour a run."""
    compared, first = found.differences, found.scored[0].name
    organs, names = _organs(compared.values()), [run.name for run in found.scored]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for position, (name, by_name) in enumerate(compared.items()):
            offset = 0.55 * ((position + 0.5) / len(compared) - 0.5)
            middle = np.array([each.mean for each in by_name.values()])
            low = np.array([each.mean if each.low is None else each.low for each in by_name.values()])
            high = np.array([each.mean if each.high is None else each.high for each in by_name.values()])
            style: dict[str, Any] = {"color": run_colour(names.index(name)), "fmt": "o", "capsize": 3, "label": name}
            errors = np.maximum([middle - low, high - middle], 0)
            axes.errorbar(middle, [organs.index(organ) + offset for organ in by_name], xerr=errors, **style)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(organs)), organs)
        axes.invert_yaxis()
        axes.set_xlabel(f"difference of Dice from {first} (right: better)")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    alt = f"Mean difference of Dice from {first} with its interval, by organ and run."
    return drawing(draw, (9, 1 + 0.5 * len(organs)), alt)


def _slides(first: Scored, other: Scored, paired: pd.DataFrame) -> list[Block]:
    if paired.empty:
        return [Note("They have no slide in common.", warn=True)]
    common, better, worse = len(paired), (paired["difference"] > 0).sum(), (paired["difference"] < 0).sum()
    alone = f"{len(first.oof) - common} only in {first.name}, {len(other.oof) - common} only in {other.name}"
    said = (
        f"{common} slide{'s' * (common != 1)} in common ({alone}): {better} better, {worse} worse,"
        f" {common - better - worse} equal."
    )
    worst = paired.head(WORST)
    best = paired.iloc[len(worst) :].tail(WORST)[::-1]
    header = ["slide", "organ", "source", first.name, other.name, "difference"]
    blocks: list[Block] = [Note(said)]
    for rows, caption in (
        (worst, f"The {len(worst)} slides that lost most"),
        (best, f"The {len(best)} slides at the other end, the best first"),
    ):
        cells = [
            [slide, organ, source, f"{one:.4f}", f"{two:.4f}", f"{gain:+.4f}"]
            for slide, organ, source, one, two, gain in rows.itertuples(index=False)
        ]
        blocks += [Table(header, cells, caption, 3)] if cells else []
    return blocks


def _time(runs: Sequence[Compared]) -> Table:
    rows = []
    for run in runs:
        timing = run.timing.reindex(columns=list(MEASURED)).median()
        medians = [
            format(timing[name], form) if timing[name] == timing[name] else "" for name, form in MEASURED.items()
        ]
        hours = f"{run.timing['seconds'].sum() / 3600:.2f}" if len(run.timing) else ""
        rows.append([run.name, machine(run.session), str(len(run.timing)), *medians, hours])
    header = [
        *("run", "machine", "epochs of all folds", "epoch, s", "of it validation, s"),
        *("tiles a second", "peak memory, GiB", "hours in all"),
    ]
    return Table(header, rows, "Medians over the epochs; machines are those of the latest session.", 2)
