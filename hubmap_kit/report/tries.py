"""The list of tries: one row for each run, with its settings, its Dice and its scores, beside those that the first team
published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmap_kit.errors import HubmapError, TableError, did_you_mean
from hubmap_kit.report.tries_columns import BY_KEY, Row
from hubmap_kit.report.tries_files import sentence
from hubmap_kit.report.tries_find import find_runs, labels
from hubmap_kit.report.tries_notes import read_notes
from hubmap_kit.report.tries_read import Run, read_each
from hubmap_kit.report.tries_scores import rows_by_run, submissions
from hubmap_kit.report.tries_theirs import OURS, first_team


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
