"""Which submissions belong to which run: the rows of every ledger.csv within reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.errors import HubmapError, TableError
from hubmap_kit.report import ledger
from hubmap_kit.report.tries_files import sentence

RUNS = Path("runs")  # where `hubmap submit` keeps its ledger when no run is named
Owners = dict[Path, list[ledger.Row]]


@dataclass(frozen=True)
class Submissions:
    """A run's submissions: the scores of the best one (by its public score), how many there are, and what became of
    them.
    """

    public: float | None = None
    private: float | None = None
    count: int = 0
    told: str = ""


def rows_by_run(runs: Sequence[Path], refs: Mapping[Path, str], folders: Sequence[Path]) -> tuple[Owners, list[str]]:
    """The ledger rows of each run, and sentences about damaged ledgers and rows whose run is not known.

    Ledgers are looked for in the runs, beside them, in `folders`, and in runs/. A row is a run's by the path that it
    names, as it was typed or seen from the ledger; by the folder's name alone where that path is gone and one run only
    has the name; by the submission's number in `refs`; or because it lies in the run's own ledger and names none.
    """
    owners: Owners = {run: [] for run in runs}
    problems = []
    listed = {folder.resolve() for folder in folders}
    for path in _ledgers(runs, folders):
        try:
            rows = ledger.read(path)
        except (HubmapError, OSError) as error:
            problems.append(sentence(error, path))
            continue
        lost = 0
        for row in rows:
            owner = _owner(row, path, runs, refs)
            if owner is not None:
                owners[owner].append(row)
            elif row["status"] != ledger.REFUSED and not _elsewhere(row, path):
                lost += 1
        if lost and path.resolve().parent in listed:  # where one run alone is listed, rows of others are no wonder
            problems.append(
                f"{path} has {lost} row{'s' * (lost > 1)} without a run that is there; 'hubmap ledger RUN --ref NUMBER'"
                " says whose one is"
            )
    return owners, problems


def submissions(rows: Sequence[ledger.Row]) -> Submissions:
    """What a run's ledger rows come to. Raises TableError for a score that is no number."""
    sent = [row for row in rows if row["status"] != ledger.REFUSED]
    if not sent:
        return Submissions()
    scores = [(_number(row, "public_score"), _number(row, "private_score")) for row in sent]
    best = max(scores, key=lambda pair: [-1.0 if score is None else score for score in pair])
    states = [row["status"].lower() for row in sent if row["status"] != "COMPLETE"]
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return Submissions(*best, len(sent), ", ".join([f"{len(sent) - len(states)} scored", *counted]))


def _ledgers(runs: Sequence[Path], folders: Sequence[Path]) -> list[Path]:
    places = [RUNS, *runs, *(run.parent for run in runs), *folders]
    found = {(place / ledger.NAME).resolve(): place / ledger.NAME for place in reversed(places)}
    return sorted(path for path in found.values() if path.is_file())


def _owner(row: ledger.Row, path: Path, runs: Sequence[Path], refs: Mapping[Path, str]) -> Path | None:
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


def _places(row: ledger.Row, path: Path) -> set[Path]:
    """Where the run that a row names may lie: from here, and from the ledger."""
    named = Path(row["run"])
    return {named.resolve(), (path.parent / named).resolve()}


def _elsewhere(row: ledger.Row, path: Path) -> bool:
    """Whether a row names a folder that is there."""
    return bool(row["run"]) and any(place.is_dir() for place in _places(row, path))


def _number(row: ledger.Row, column: str) -> float | None:
    try:
        return float(row[column]) if row[column] else None
    except ValueError as error:
        raise TableError(
            f"the ledger says {column} = '{row[column]}' of submission {row['ref']}, which is no number; mend that row"
        ) from error
