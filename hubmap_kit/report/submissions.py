"""What was handed in: submissions.csv, one row a submission, in a run's folder or beside the runs.

Rows are added and completed, never removed. Scores and notes that a person typed in are in tries.json of the run.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.errors import HubmapError, TableError
from hubmap_kit.files import atomic_path, write_json
from hubmap_kit.report.run_folder import sentence

NAME, OLD_NAME = "submissions.csv", "ledger.csv"  # a file of the old name is read and continued
COLUMNS = (
    *("time_utc", "run", "kernel", "version", "build_id", "message", "ref", "status"),
    *("public_score", "private_score", "oof_dice", "weights_id"),
)
_NEEDED = COLUMNS[:-1]  # files of earlier releases end there
RUNS = Path("runs")  # where `hubmap submit` keeps its list when no run is named
NOTES = "tries.json"
SCORES = ("public", "private")
# ASKED: the request was sent and no answer has come; REFUSED: Kaggle did not take it.
ASKED, PENDING, REFUSED = "ASKED", "PENDING", "REFUSED"
Row = dict[str, str]
Owners = dict[Path, list[Row]]


def submissions_file(folder: Path) -> Path:
    """The list in a folder: its submissions.csv, unless only a ledger.csv of an earlier release is there."""
    path, old = folder / NAME, folder / OLD_NAME
    return old if old.is_file() and not path.exists() else path


def read_submissions(path: Path) -> list[Row]:
    """The rows in the order of submission, with columns that somebody added; none where there is no file yet.

    Raises TableError for a damaged file.
    """
    if not path.exists():
        return []
    try:
        return [row for _, row in read_rows(path, _NEEDED)]
    except TableError as error:
        raise TableError(
            f"the list of submissions is damaged: {error}; mend it or move it away, nothing of it was changed"
        ) from error


def add_submission(path: Path, row: Mapping[str, object]) -> None:
    """Add a row; missing columns stay empty. Raises TableError for a damaged file, which is left as it is."""
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise ValueError(f"{path.name} has no column {unknown[0]}; expected some of {', '.join(COLUMNS)}")
    with locked(path):
        rows = read_submissions(path)
        _write(path, [*rows, {column: _text(row.get(column)) for column in COLUMNS}])


def complete_submission(path: Path, ref: int | str, /, **values: object) -> bool:
    """Set columns of the submission `ref`, its ref among them; False where the file does not have it."""
    with locked(path):
        rows = read_submissions(path)
        mine = [row for row in rows if row["ref"] == str(ref)]
        for row in mine:
            row |= {column: _text(value) for column, value in values.items()}
        if mine:
            _write(path, rows)
    return bool(mine)


def pending_submissions(path: Path) -> list[Row]:
    """The rows whose score, or whose fate, is not known yet."""
    return [row for row in read_submissions(path) if row["status"] in (PENDING, ASKED)]


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


@dataclass(frozen=True)
class Submissions:
    """A run's submissions: scores of the one with the best public score, their number, and how many are scored."""

    public: float | None = None
    private: float | None = None
    count: int = 0
    summary: str = ""


def rows_by_run(runs: Sequence[Path], refs: Mapping[Path, str], folders: Sequence[Path]) -> tuple[Owners, list[str]]:
    """The rows of each run, and sentences about damaged files and rows whose run is not known.

    Files are looked for in the runs, beside them, in `folders`, and in runs/. A row belongs to the run whose submission
    number in `refs` it has; else to the path that it names, as typed or seen from the file; else to the only run with
    that folder name, where the path is gone; else, if it names no run, to the run in whose folder the file lies.
    """
    owners: Owners = {run: [] for run in runs}
    problems = []
    listed = {folder.resolve() for folder in folders}
    for path in _files(runs, folders):
        try:
            rows = read_submissions(path)
        except (HubmapError, OSError) as error:
            problems.append(sentence(error, path))
            continue
        lost = 0
        for row in rows:
            owner = _owner(row, path, runs, refs)
            if owner is not None:
                owners[owner].append(row)
            elif row["status"] != REFUSED and not _elsewhere(row, path):
                lost += 1
        if lost and path.resolve().parent in listed:  # where one run alone is listed, rows of others are no wonder
            problems.append(
                f"{path} has {lost} row{'s' * (lost > 1)} without a run that is there; 'hubmap ledger RUN --ref NUMBER'"
                " says which run a submission belongs to"
            )
    return owners, problems


def submissions(rows: Sequence[Row]) -> Submissions:
    """The summary of a run's rows. Raises TableError for a score that is no number."""
    sent = [row for row in rows if row["status"] != REFUSED]
    if not sent:
        return Submissions()
    scores = [(_number(row, "public_score"), _number(row, "private_score")) for row in sent]
    best = max(scores, key=lambda pair: [-1.0 if score is None else score for score in pair])
    states = [row["status"].lower() for row in sent if row["status"] != "COMPLETE"]
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return Submissions(*best, len(sent), ", ".join([f"{len(sent) - len(states)} scored", *counted]))


def _files(runs: Sequence[Path], folders: Sequence[Path]) -> list[Path]:
    places = [RUNS, *runs, *(run.parent for run in runs), *folders]
    paths = [place / name for place in reversed(places) for name in (NAME, OLD_NAME)]
    found = {path.resolve(): path for path in paths}
    return sorted(path for path in found.values() if path.is_file())


def _owner(row: Row, path: Path, runs: Sequence[Path], refs: Mapping[Path, str]) -> Path | None:
    by_ref = [run for run in runs if refs.get(run) and refs[run] == row["ref"]]
    if by_ref:
        return by_ref[0]
    here = next((run for run in runs if run.resolve() == path.parent.resolve()), None)
    if not row["run"]:
        return here
    named, places = Path(row["run"]), _places(row, path)
    exact = [run for run in runs if run.resolve() in places]
    if exact:
        return exact[0]
    if _elsewhere(row, path):
        return None
    same = [run for run in runs if run.resolve().name == named.name]
    return same[0] if len(same) == 1 else here


def _places(row: Row, path: Path) -> set[Path]:
    """Where the run that a row names may lie: from here, and from the file."""
    named = Path(row["run"])
    return {named.resolve(), (path.parent / named).resolve()}


def _elsewhere(row: Row, path: Path) -> bool:
    """Whether a row names a folder that is there."""
    return bool(row["run"]) and any(place.is_dir() for place in _places(row, path))


def _number(row: Row, column: str) -> float | None:
    try:
        return float(row[column]) if row[column] else None
    except ValueError as error:
        raise TableError(
            f"the list of submissions says {column} = '{row[column]}' of submission {row['ref']}, which is no number;"
            " mend that row"
        ) from error


def read_notes(run: Path) -> dict[str, Any]:
    """What is kept of a run; empty where nothing was typed in. Raises TableError for a damaged file."""
    path = run / NOTES
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise TableError(
            f"{path} is damaged ({str(error)[:80]}); mend it, or delete it and type its scores in again"
        ) from error
    wrong = _wrong(found)
    if wrong:
        raise TableError(f"{path} {wrong}; mend it, or delete it and type its scores in again")
    return found


def keep_notes(run: Path, scores: str = "", note: str | None = None, ref: str = "") -> dict[str, Any]:
    """Set what is given, keep the rest, and return all of it.

    `scores` is 'public=0.61,private=0.58' or one of the two; an empty value takes a score away, an empty note the note.
    `ref` is the number of the submission at Kaggle, which finds its row in a submissions.csv that does not name the
    run. Raises TableError for scores of another form, a folder that is no run, and a damaged tries.json, which is left
    as it is.
    """
    changes: dict[str, Any] = dict(parse_scores(scores))
    if note is not None:
        changes["note"] = " ".join(note.split()) or None
    if ref:
        changes["ref"] = ref.strip()
    if not (run / "config.yaml").is_file():
        raise TableError(f"{run} is no run folder (it has no config.yaml); name the run that the score belongs to")
    with locked(run / NOTES):
        kept = {key: value for key, value in {**read_notes(run), **changes}.items() if value is not None}
        write_json(run / NOTES, kept)
    return kept


def parse_scores(words: str) -> dict[str, float | None]:
    """Scores by their name; None for one that is to be taken away. Raises TableError for anything else."""
    found: dict[str, float | None] = {}
    for word in filter(None, (part.strip() for part in words.split(","))):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or name not in SCORES or name in found:
            raise TableError(f"--score has '{word}'; expected public=0.61,private=0.58 or one of the two")
        found[name] = _score(word, value) if value else None
    return found


def _score(word: str, value: str) -> float:
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        raise TableError(f"--score has '{word}'; a score of the leaderboard is a number from 0 to 1")
    return score


def _wrong(found: Any) -> str:
    """What is wrong with the content of a file, or nothing."""
    if not isinstance(found, dict):
        return f"holds a {type(found).__name__}, but names and values were expected"
    for name in SCORES:
        value = found.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
            return f"says {name} = {value!r}, but a number from 0 to 1 was expected"
    texts = [name for name in ("note", "ref") if not isinstance(found.get(name, ""), str)]
    return f"says {texts[0]} = {found[texts[0]]!r}, but text was expected" if texts else ""
