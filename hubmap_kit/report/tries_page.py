"""The page of `hubmap ledger`: what the tries came to, how they were made, where they ran, and the curves of some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from hubmap_kit.report.html import Block, Note, Section, Table, page
from hubmap_kit.report.tries import Tries
from hubmap_kit.report.tries_columns import COLUMNS, RECORD, RESULTS, SETTINGS, Column, Row, text
from hubmap_kit.report.tries_curves import curves_drawing
from hubmap_kit.report.tries_script import sortable
from hubmap_kit.report.tries_theirs import OURS, THEIRS

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
