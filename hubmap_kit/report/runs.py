"""The list of tries: one row for each run, with its settings, its Dice and its scores, beside those that the first team
published.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich import table as rich_tables
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import HubmapError, TableError, did_you_mean
from hubmap_kit.files import atomic_path
from hubmap_kit.report.drawings import curves_drawing
from hubmap_kit.report.html import Block, Note, Section, Table, page
from hubmap_kit.report.run_columns import (
    BY_KEY,
    COLUMNS,
    OURS,
    RECORD,
    RESULTS,
    SETTINGS,
    THEIRS,
    Column,
    Row,
    first_team,
    text,
)
from hubmap_kit.report.run_folder import Run, find_runs, labels, read_each, sentence
from hubmap_kit.report.submissions import read_notes, rows_by_run, submissions
from hubmap_kit.report.tries_script import sortable


@dataclass(frozen=True)
class Tries:
    """The rows in the order shown, the runs that ours are of, by name, and a sentence for everything that could not be
    read.
    """

    rows: list[Row]
    runs: dict[str, Run]
    problems: list[str]


def collect(folders: Sequence[Path], theirs: bool = True, sort: str = "") -> Tries:
    """Every run in `folders`, and the first team's rows with `theirs`.

    Raises TableError for a folder that does not exist and an unknown column to sort by.
    """
    order = _order(sort)
    paths, problems = find_runs(folders)
    runs, unread = read_each(paths, labels(paths))
    problems += unread
    notes = {run.path: _notes(run, problems) for run in runs}
    owners, unclear = rows_by_run(
        [run.path for run in runs], {path: kept.get("ref", "") for path, kept in notes.items()}, folders
    )
    problems += unclear
    for run in runs:
        run.row.update(_scores(run, owners[run.path], notes[run.path], problems))
    rows = [run.row for run in runs] + (first_team() if theirs else [])
    return Tries(_sorted(rows, *order), {str(run.row["run"]): run for run in runs}, problems)


def _notes(run: Run, problems: list[str]) -> dict[str, Any]:
    try:
        return read_notes(run.path)
    except (HubmapError, OSError) as error:
        problems.append(f"{run.row['run']}: {sentence(error, run.path)}")
        return {}


def _scores(run: Run, rows: Sequence[dict[str, str]], notes: dict[str, Any], problems: list[str]) -> Row:
    """What a person typed in comes before what the ledger says."""
    found: Row = {"note": notes.get("note", "")}
    try:
        sent = submissions(rows)
        found |= {
            "public": sent.public,
            "private": sent.private,
            "submissions": sent.count or None,
            "submitted": sent.told,
        }
    except TableError as error:
        problems.append(f"{run.row['run']}: {error}")
    found |= {name: notes[name] for name in ("public", "private") if name in notes}
    return found | {"lb": found["public"] if found.get("public") is not None else found.get("private")}


def _order(sort: str) -> tuple[str, bool]:
    """Column and direction of `--sort`; a minus before the column turns it round."""
    key = sort.removeprefix("-")
    if key and key not in BY_KEY:
        raise TableError(f"--sort {key} is no column; expected one of {', '.join(BY_KEY)}{did_you_mean(key, BY_KEY)}")
    return key, bool(key) and BY_KEY[key].down != sort.startswith("-")


def _sorted(rows: list[Row], key: str, down: bool) -> list[Row]:
    """Rows without a value come last, whatever the direction.

    Without a key ours come first, by Dice, then theirs by leaderboard.
    """
    if not key:

        def rank(row: Row) -> tuple[bool, float, float]:
            cv, lb = -float(row.get("cv") or 0), -float(row.get("lb") or 0)
            return (row["whose"] != OURS, *((cv, lb) if row["whose"] == OURS else (lb, cv)))

        return sorted(rows, key=rank)
    known = [row for row in rows if row.get(key) not in (None, "")]
    known.sort(key=lambda row: row[key] if BY_KEY[key].is_number else str(row[key]).lower(), reverse=down)
    return known + [row for row in rows if row.get(key) in (None, "")]


# The list of tries in the terminal and as CSV.

# What stays when the terminal is narrow, the most wanted first; the organs come together or not at all.
WANTED: tuple[tuple[str, ...], ...] = (
    ("run",),
    ("model",),
    ("encoder",),
    ("cv",),
    ("lb",),
    ("whose",),
    ("size",),
    ORGANS,
    ("done",),
    ("epochs",),
    ("lr",),
    ("hours",),
    ("batch",),
    ("parameters",),
    ("conversion",),
    ("private",),
    ("loss",),
    ("augment",),
    ("machine",),
    ("optimizer",),
)
GAP = 1


def render(rows: Sequence[Row], width: int, everything: bool = False) -> str:
    """The list as text: the most wanted columns that fit into `width`, or all that hold anything, each as wide as it
    must be.
    """
    columns = [column for column in COLUMNS if any(_cell(column, row) for row in rows) and not _idle(column, rows)]
    widths = {column.key: _width(column, rows, everything) for column in columns}
    if everything:
        width = sum(widths.values()) + GAP * len(widths)
    else:
        columns = _fitting(columns, widths, width)
    table = rich_tables.Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0), show_edge=False, collapse_padding=True
    )
    for place, column in enumerate(columns):
        side = "right" if column.is_number else "left"
        last = place + 1 == len(columns)
        table.add_column(
            Text(column.title if everything else column.head),
            justify=side,
            no_wrap=True,
            overflow="ellipsis",
            min_width=widths[column.key],
            max_width=widths[column.key] if not last else None,
        )
    for row in rows:
        table.add_row(*(Text(_cell(column, row)) for column in columns))
    out = io.StringIO()
    Console(file=out, width=max(width, 20), color_system=None, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write every column of every row, numbers in full; a value that is not known is an empty cell."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow([column.key for column in COLUMNS])
        writer.writerows(
            [["" if row.get(column.key) is None else row[column.key] for column in COLUMNS] for row in rows]
        )


def _cell(column: Column, row: Row) -> str:
    return " ".join(text(column, row.get(column.key)).split())


def _idle(column: Column, rows: Sequence[Row]) -> bool:
    """Whose a row is says nothing where all are ours."""
    return column.key == "whose" and len({row["whose"] for row in rows}) == 1


def _width(column: Column, rows: Sequence[Row], everything: bool) -> int:
    head = cell_len(column.title if everything else column.head)
    longest = max([head, *(cell_len(_cell(column, row)) for row in rows)])
    return longest if everything else max(head, min(column.widest, longest))


def _fitting(columns: Sequence[Column], widths: dict[str, int], width: int) -> list[Column]:
    """The wanted columns that fit, in their usual order; the first one is always there."""
    present, chosen, used = {column.key for column in columns}, set(), 0
    for group in WANTED:
        keys = present.intersection(group)
        wide = sum(widths[key] + GAP for key in keys)
        if not chosen or used + wide - GAP <= width:
            chosen |= keys
            used += wide
    return [column for column in columns if column.key in chosen]


# The page of `hubmap ledger`: what the tries came to, how they were made, where they ran, and the curves of some.

WAYS = {
    "results": (
        "Dice is the mean over held-out slides, each predicted by the fold that did not see it, at thresholds that were"
        " fitted on the same slides. LB is the score of the leaderboard: our public one, or the private one where there"
        " is no other."
    ),
    "theirs": (
        "Rows in italics are the first team's, as published. Their Dice is MMSegmentation's mDice; on which slides it"
        " was taken, and whether the background counts in it, is not said, so it does not compare with ours. Which"
        " leaderboard their scores are from is not said either."
    ),
    "record": (
        "Hours are those of all epochs with their validation, over all folds and sessions; the prediction of the"
        " held-out slides comes on top."
    ),
}


def tries_page(found: Tries, curves: Mapping[str, pd.DataFrame]) -> str:
    """The HTML of the list; `curves` is run -> metrics of the runs that are drawn."""
    ours = [row for row in found.rows if row["whose"] == OURS]
    theirs = [row for row in found.rows if row["whose"] == THEIRS]
    results = [Note(WAYS["results"]), *([Note(WAYS["theirs"])] if theirs else []), _table(found.rows, RESULTS)]
    sections = [Section("Results", results)]
    if found.problems:
        sections.insert(0, Section("Left out", [Note(problem, warn=True) for problem in found.problems]))
    if curves:
        sections.append(Section("Curves", _curves(curves, ours)))
    sections.append(Section("Settings and notes", [_table(found.rows, SETTINGS)]))
    if ours:
        sections.append(Section("Record", [Note(WAYS["record"]), _table(ours, RECORD)]))
    runs = f"{len(ours)} run{'s' * (len(ours) != 1)}"
    lead = (
        runs
        + (f" of ours and {len(theirs)} published tries of the first team" if theirs else "")
        + ". A click on a column's name sorts by it."
    )
    return sortable(page("Tries", lead, sections))


def _table(rows: Sequence[Row], group: str) -> Table:
    """The columns of a group that hold anything: texts first, then numbers."""
    named = [column for column in COLUMNS if column.group == group or column.key in ("run", "whose")]
    columns = sorted((column for column in named if _holds(column, rows)), key=lambda column: column.is_number)
    cells = [[text(column, row.get(column.key)) for column in columns] for row in rows]
    return Table(
        [column.title for column in columns], cells, text_columns=sum(not column.is_number for column in columns)
    )


def _holds(column: Column, rows: Sequence[Row]) -> bool:
    return any(row.get(column.key) not in (None, "") for row in rows)


def _curves(curves: Mapping[str, pd.DataFrame], ours: Sequence[Row]) -> list[Block]:
    losses = {str(row["loss"]) for row in ours if row["run"] in curves}
    blocks: list[Block] = [curves_drawing(curves)]
    if len(losses) > 1:
        blocks.append(
            Note(
                f"These runs have different losses ({', '.join(sorted(losses))}): their values do not compare, their"
                " shapes do.",
                warn=True,
            )
        )
    return blocks
