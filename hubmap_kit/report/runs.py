"""The list of runs: one row a run, with settings, Dice and scores, beside the runs that the first team published."""

from __future__ import annotations

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

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import HubmapError, TableError, did_you_mean
from hubmap_kit.files import atomic_path
from hubmap_kit.report.curves import curves_blocks
from hubmap_kit.report.html import Note, Section, Table, page, problem_sections
from hubmap_kit.report.run_folder import OURS, Row, Run, Value, find_runs, labels, read_each, sentence
from hubmap_kit.report.submissions import read_notes, rows_by_run, submissions

THEIRS = "theirs"
RESULTS, SETTINGS, RECORD = "results", "settings", "record"
SCORE = "score"  # two decimals, as people quote scores, up to five, as Kaggle gives them


@dataclass(frozen=True)
class Column:
    """One column of the list.

    `form`: format of a number, empty for text. `down`: sorting starts with the largest value. In the terminal the
    column is headed `short` (or its title) and at most `widest` characters wide.
    """

    key: str
    title: str
    group: str
    form: str = ""
    short: str = ""
    widest: int = 24
    down: bool = False

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers."""
        return bool(self.form)

    @property
    def head(self) -> str:
        """Its name in the terminal."""
        return self.short or self.title


_SHORT_ORGANS = {"kidney": "kidn", "prostate": "pros", "largeintestine": "lint", "spleen": "sple", "lung": "lung"}
COLUMNS: tuple[Column, ...] = (
    Column("run", "run", RESULTS, widest=22),
    Column("whose", "whose", RESULTS),
    Column("model", "model", RESULTS, widest=12),
    Column("encoder", "encoder", RESULTS, widest=20),
    Column("state", "state", RECORD, widest=40),
    Column("measured", "Dice is", RECORD, widest=40),
    Column("cv", "Dice", RESULTS, ".4f", short="Dice", down=True),
    *(Column(organ, organ, RESULTS, ".3f", short=_SHORT_ORGANS.get(organ, ""), down=True) for organ in ORGANS),
    Column("lb", "LB", RESULTS, SCORE, down=True),
    Column("public", "public", RECORD, SCORE, down=True),
    Column("private", "private", RESULTS, SCORE, short="priv", down=True),
    Column("submissions", "submissions", RECORD, "d", down=True),
    Column("hours", "hours", RESULTS, ".2f", down=True),
    Column("parameters", "M parameters", RESULTS, ".2f", short="par,M", down=True),
    Column("conversion", "conversion", SETTINGS, short="scale", widest=14),
    Column("augment", "augmentation", SETTINGS, widest=14),
    Column("engine", "engine", SETTINGS),
    Column("mixing", "mixing", SETTINGS),
    Column("stain", "stain", SETTINGS),
    Column("loss", "loss", SETTINGS, widest=14),
    Column("optimizer", "optimiser", SETTINGS, short="optim"),
    Column("schedule", "schedule", SETTINGS),
    Column("classes", "classes", SETTINGS),
    Column("auxiliary", "auxiliary losses", SETTINGS),
    Column("start", "encoder's start", SETTINGS),
    Column("size", "tile", SETTINGS, "d", short="px"),
    Column("overlap", "overlap", SETTINGS, "g"),
    Column("lr", "lr", SETTINGS, "g"),
    Column("epochs", "epochs", SETTINGS, "d", short="ep"),
    Column("iterations", "iterations", SETTINGS, "d"),
    Column("batch", "batch", SETTINGS, "d", short="bs"),
    Column("accumulate", "accumulate", SETTINGS, "d"),
    Column("seed", "seed", SETTINGS, "d"),
    Column("done", "folds", RESULTS),
    Column("begun", "begun", RECORD),
    Column("machine", "machine", RECORD, widest=20),
    Column("thresholds", "thresholds", RECORD, widest=30),
    Column("submitted", "submitted", RECORD),
    Column("git", "commit", RECORD, widest=9),
    Column("build", "build", RECORD, widest=12),
    Column("note", "note", SETTINGS, widest=40),
    Column("path", "folder", RECORD, widest=40),
    Column("epoch_s", "epoch, s", RECORD, ".3g"),
)
BY_KEY: Mapping[str, Column] = {column.key: column for column in COLUMNS}
# What a narrow terminal keeps, the most important first; the organs come together or not at all.
WANTED = (
    *("run", "model", "encoder", "cv", "lb", "whose", "size", "organs", "done", "epochs", "lr", "hours", "batch"),
    *("parameters", "conversion", "private", "loss", "augment", "machine", "optimizer"),
)
GAP = 1


def cell_text(column: Column, value: Value) -> str:
    """A value as it is shown; empty where it is not known."""
    if value is None or value == "":
        return ""
    if not column.is_number or isinstance(value, str):
        return str(value)
    if column.form == SCORE:
        whole, digits = f"{value:.5f}".split(".")
        return f"{whole}.{digits[:2]}{digits[2:].rstrip('0')}"
    return format(int(value), "d") if column.form == "d" else format(value, column.form)


def first_team() -> list[Row]:
    """The 26 runs that the first team published, 13 with MMSegmentation and 13 with fastai, as they gave them."""
    rows = read_rows(Path(__file__).with_name("first_team.csv"), ("run", "cv", "lb"))
    return [{"whose": THEIRS, **{key: _parsed(BY_KEY[key], cell) for key, cell in row.items()}} for _, row in rows]


def _parsed(column: Column, cell: str) -> Value:
    if not cell or not column.is_number:
        return cell or None
    return int(cell) if column.form == "d" else float(cell)


@dataclass(frozen=True)
class RunList:
    """The rows in the order shown, our runs by name, and a sentence for everything that could not be read."""

    rows: list[Row]
    runs: dict[str, Run]
    problems: list[str]


def collect_runs(folders: Sequence[Path], theirs: bool = True, sort: str = "") -> RunList:
    """Every run in `folders`, and with `theirs` the first team's.

    Raises TableError for a folder that does not exist and an unknown column to sort by.
    """
    key = sort.removeprefix("-")
    if key and key not in BY_KEY:
        raise TableError(f"--sort {key} is no column; expected one of {', '.join(BY_KEY)}{did_you_mean(key, BY_KEY)}")
    paths, problems = find_runs(folders)
    runs, unread = read_each(paths, labels(paths))
    problems += unread
    notes = {run.path: _notes(run, problems) for run in runs}
    refs = {path: kept.get("ref", "") for path, kept in notes.items()}
    owners, unclear = rows_by_run([run.path for run in runs], refs, folders)
    problems += unclear
    for run in runs:
        run.row.update(_scores(run, owners[run.path], notes[run.path], problems))
    rows = [run.row for run in runs] + (first_team() if theirs else [])
    rows = _sorted_by(rows, BY_KEY[key], turned=sort.startswith("-")) if key else sorted(rows, key=_rank)
    return RunList(rows, {str(run.row["run"]): run for run in runs}, problems)


def _notes(run: Run, problems: list[str]) -> dict[str, Any]:
    try:
        return read_notes(run.path)
    except (HubmapError, OSError) as error:
        problems.append(f"{run.row['run']}: {sentence(error, run.path)}")
        return {}


def _scores(run: Run, rows: Sequence[dict[str, str]], notes: dict[str, Any], problems: list[str]) -> Row:
    """Scores that a person typed in come before those of the list of submissions."""
    found: Row = {"note": notes.get("note", "")}
    try:
        sent = submissions(rows)
        found |= {"public": sent.public, "private": sent.private}
        found |= {"submissions": sent.count or None, "submitted": sent.summary}
    except TableError as error:
        problems.append(f"{run.row['run']}: {error}")
    found |= {name: notes[name] for name in ("public", "private") if name in notes}
    return found | {"lb": found["public"] if found.get("public") is not None else found.get("private")}


def _rank(row: Row) -> tuple[bool, float, float]:
    """Our runs first, by Dice, then theirs by leaderboard."""
    cv, lb = -float(row.get("cv") or 0), -float(row.get("lb") or 0)
    return (False, cv, lb) if row["whose"] == OURS else (True, lb, cv)


def _sorted_by(rows: list[Row], column: Column, turned: bool) -> list[Row]:
    """Rows without a value come last in either direction."""

    def value(row: Row) -> Any:
        return row[column.key] if column.is_number else str(row[column.key]).lower()

    known = [row for row in rows if row.get(column.key) not in (None, "")]
    known.sort(key=value, reverse=column.down != turned)
    return known + [row for row in rows if row.get(column.key) in (None, "")]


def render_runs(rows: Sequence[Row], width: int, everything: bool = False) -> str:
    """The list as text: the most important columns that fit into `width`, or with `everything` all that hold
    anything.
    """
    columns = [column for column in COLUMNS if any(_line(column, row) for row in rows)]
    if len({row["whose"] for row in rows}) == 1:
        columns = [column for column in columns if column.key != "whose"]
    widths = {column.key: _width(column, rows, everything) for column in columns}
    if everything:
        width = sum(widths.values()) + GAP * len(widths)
    else:
        columns = _fitting(columns, widths, width)
    table = rich_tables.Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0), show_edge=False, collapse_padding=True
    )
    for column in columns:
        table.add_column(
            Text(column.title if everything else column.head),
            justify="right" if column.is_number else "left",
            no_wrap=True,
            overflow="ellipsis",
            min_width=widths[column.key],
            max_width=widths[column.key] if column is not columns[-1] else None,
        )
    for row in rows:
        table.add_row(*(Text(_line(column, row)) for column in columns))
    out = io.StringIO()
    Console(file=out, width=max(width, 20), color_system=None, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def _line(column: Column, row: Row) -> str:
    return " ".join(cell_text(column, row.get(column.key)).split())


def _width(column: Column, rows: Sequence[Row], everything: bool) -> int:
    head = cell_len(column.title if everything else column.head)
    longest = max([head, *(cell_len(_line(column, row)) for row in rows)])
    return longest if everything else max(head, min(column.widest, longest))


def _fitting(columns: Sequence[Column], widths: dict[str, int], width: int) -> list[Column]:
    """The wanted columns that fit, in their usual order; the first one is always there."""
    chosen: set[str] = set()
    used = 0
    for wanted in WANTED:
        keys = widths.keys() & (ORGANS if wanted == "organs" else {wanted})
        wide = sum(widths[key] + GAP for key in keys)
        if not chosen or used + wide - GAP <= width:
            chosen |= keys
            used += wide
    return [column for column in columns if column.key in chosen]


def write_runs_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write every column of every row, numbers in full; a value that is not known is an empty cell."""
    table = pd.DataFrame(rows, columns=[column.key for column in COLUMNS], dtype=object)
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def column_table(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A table for a page, columns of text before those of numbers."""
    columns = sorted(columns, key=lambda column: column.is_number)
    cells = [[cell_text(column, row.get(column.key)) for column in columns] for row in rows]
    texts = sum(not column.is_number for column in columns)
    return Table([column.title for column in columns], cells, text_columns=texts)


ABOUT_RESULTS = (
    "Dice is the mean over held-out slides, each predicted by the fold that did not see it, at thresholds that were"
    " fitted on the same slides. LB is the score of the leaderboard: our public one, or the private one where there"
    " is no other."
)
ABOUT_THEIRS = (
    "Rows in italics are the first team's, as published. Their Dice is MMSegmentation's mDice; on which slides it"
    " was taken, and whether the background counts in it, is not said, so it does not compare with ours. Which"
    " leaderboard their scores are from is not said either."
)
ABOUT_RECORD = (
    "Hours are those of all epochs with their validation, over all folds and sessions; the prediction of the"
    " held-out slides comes on top."
)


def runs_page(found: RunList, curves: Mapping[str, pd.DataFrame]) -> str:
    """The HTML of the list; `curves` is run -> metrics of the runs that are drawn."""
    ours, theirs = ([row for row in found.rows if row["whose"] == whose] for whose in (OURS, THEIRS))
    notes = [Note(ABOUT_RESULTS), *([Note(ABOUT_THEIRS)] if theirs else [])]
    sections = [
        *problem_sections(found.problems),
        Section("Results", [*notes, _group_table(found.rows, RESULTS)]),
    ]
    if curves:
        losses = {str(row["loss"]) for row in ours if row["run"] in curves}
        sections.append(Section("Curves", curves_blocks(curves, losses)))
    sections.append(Section("Settings and notes", [_group_table(found.rows, SETTINGS)]))
    if ours:
        sections.append(Section("Record", [Note(ABOUT_RECORD), _group_table(ours, RECORD)]))
    lead = f"{len(ours)} run{'s' * (len(ours) != 1)}"
    if theirs:
        lead += f" of ours and {len(theirs)} published by the first team"
    return page("Runs", f"{lead}. Click a column's name to sort by it.", sections, sortable=True)


def _group_table(rows: Sequence[Row], group: str) -> Table:
    """The columns of a group that hold anything."""
    named = [column for column in COLUMNS if column.group == group or column.key in ("run", "whose")]
    return column_table([each for each in named if any(row.get(each.key) not in (None, "") for row in rows)], rows)
