"""The list of tries in the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich import table as rich_tables
from rich.text import Text

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.files import atomic_path
from hubmap_kit.report.tries_columns import COLUMNS, Column, Row, text

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
    table = rich_tables.Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0), show_edge=False, collapse_padding=True)
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
