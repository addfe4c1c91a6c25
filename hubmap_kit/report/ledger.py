"""The list of submissions: ledger.csv, one row each, in a run's folder or beside the runs.

Rows are added and completed, never removed.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.errors import TableError
from hubmap_kit.files import atomic_path

NAME = "ledger.csv"
COLUMNS = (
    "time_utc",
    "run",
    "kernel",
    "version",
    "build_id",
    "message",
    "ref",
    "status",
    "public_score",
    "private_score",
    "oof_dice",
    "weights_id",
)
_NEEDED = COLUMNS[:-1]  # ledgers of earlier releases end there
# ASKED: the request was sent and no answer has come; REFUSED: Kaggle did not take it.
ASKED, PENDING, REFUSED = "ASKED", "PENDING", "REFUSED"
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a ledger, in the order of submission; none where there is no file yet.

    Raises TableError for a damaged one.

    Columns that somebody added are kept.
    """
    if not path.exists():
        return []
    try:
        return [row for _, row in read_rows(path, _NEEDED)]
    except TableError as error:
        raise TableError(
            f"the ledger is damaged: {error}; mend it or move it away, nothing of it was changed"
        ) from error


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a row; missing columns stay empty. Raises TableError for a damaged ledger, which is left as it is."""
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise ValueError(f"a ledger has no column {unknown[0]}; expected some of {', '.join(COLUMNS)}")
    with locked(path):
        rows = read(path)
        _write(path, [*rows, {column: _text(row.get(column)) for column in COLUMNS}])


def complete(path: Path, ref: int | str, /, **values: object) -> bool:
    """Set columns of the submission `ref`, its ref among them; False where the ledger does not have it."""
    with locked(path):
        rows = read(path)
        mine = [row for row in rows if row["ref"] == str(ref)]
        for row in mine:
            row |= {column: _text(value) for column, value in values.items()}
        if mine:
            _write(path, rows)
    return bool(mine)


def pending(path: Path) -> list[Row]:
    """The rows whose score, or whose fate, is not known yet."""
    return [row for row in read(path) if row["status"] in (PENDING, ASKED)]


def oof_dice(run: Path) -> float | None:
    """The mean out-of-fold Dice of a run at its fitted thresholds, from its oof.csv; None where it has none."""
    path = run / "oof.csv"
    if not path.is_file():
        return None
    rows = read_rows(path, ("dice",))
    try:
        values = [float(row["dice"]) for _, row in rows]
    except ValueError as error:
        raise TableError(
            f"{path} has a dice that is no number ({error}); run 'hubmap evaluate {run}' to write it anew"
        ) from error
    return math.fsum(values) / len(values) if values else None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One writer at a time in the folder of `path`, so that two submissions that end together both keep their row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # a system without it: two writers at once are on their own
        yield
        return
    # A folder can be locked itself; a lock file would be left behind.
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys([*COLUMNS, *(column for row in rows for column in row)]))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _text(value: object) -> str:
    """A cell: one line, empty for None, a float with six digits."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
