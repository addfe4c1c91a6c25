"""The jobs of `hubmap ledger` and `hubmap compare`: the list of runs, scores typed in, runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hubmap_kit.errors import HubmapError, TableError, did_you_mean
from hubmap_kit.files import write_text
from hubmap_kit.report.compare import compare_page, compare_summary, read_compared
from hubmap_kit.report.run_folder import Run, read_curves, sentence
from hubmap_kit.report.runs import RunList, collect_runs, render_runs, runs_page, write_runs_csv
from hubmap_kit.report.submissions import RUNS, keep_notes

DRAWN = 6  # runs whose curves are drawn when none is chosen


@dataclass(frozen=True)
class Told:
    """What a job has to say: `text` for the terminal, a sentence for everything that was not read, and the files it
    wrote.
    """

    text: str
    problems: list[str]
    written: list[Path]

    def __str__(self) -> str:
        lines = [self.text, *(f"warning: {problem}" for problem in self.problems)]
        return "\n".join([*lines, *([f"written: {', '.join(map(str, self.written))}"] if self.written else [])])


def list_runs(
    folders: Sequence[Path] = (),
    csv: Path | None = None,
    html: Path | None = None,
    theirs: bool = True,
    everything: bool = False,
    sort: str = "",
    curves: str = "",
    width: int = 120,
) -> Told:
    """List every run in `folders` (runs/ by default), ours by Dice and then the first team's, or all by the column
    `sort`.

    `everything` shows all columns, else those that fit into `width` characters. `csv` and `html` are files to write
    with all of them. `curves`: names of the runs, separated by commas, whose curves the page draws; default: the best
    few. Raises TableError for a folder that does not exist, an unknown column, an unknown run, and a name for a file
    that is a folder.
    """
    for path in (csv, html):
        _check_file(path)
    missing = (
        [f"there is no folder {RUNS}/ here; name the folders of your runs"] if not folders and not RUNS.is_dir() else []
    )
    found = collect_runs(folders or ([] if missing else [RUNS]), theirs, sort)
    metrics, unread = _curves(found, curves) if html is not None else ({}, [])
    found = RunList(found.rows, found.runs, [*missing, *found.problems, *unread])
    if csv is not None:
        write_runs_csv(csv, found.rows)
    if html is not None:
        write_text(html, runs_page(found, metrics))
    text = render_runs(found.rows, width, everything) if found.rows else "no run found"
    return Told(text, found.problems, [path for path in (csv, html) if path is not None])


def note_run(run: Path, scores: str = "", note: str | None = None, ref: str = "") -> str:
    """Keep scores of the leaderboard ('public=0.61,private=0.58'), a note or a submission's number in RUN/tries.json;
    says what it holds now.
    """
    kept = keep_notes(run, scores, note, ref)
    return f"{run}: " + (", ".join(f"{key} {value}" for key, value in kept.items()) or "nothing is kept any more")


def compare(runs: Sequence[Path], out: Path) -> Told:
    """Write a page that sets runs side by side; the first one is what the others are measured against.

    A run that cannot be read is left out with a sentence. Raises CheckpointError where none is left.
    """
    _check_file(out)
    found, problems = read_compared(runs)
    write_text(out, compare_page(found, problems))
    return Told(compare_summary(found), problems, [out])


def _check_file(path: Path | None) -> None:
    if path is not None and path.is_dir():
        raise TableError(
            f"{path} is a folder, but the name of a file to write was expected; add one, such as {path / 'runs.html'}"
        )


def _curves(found: RunList, chosen: str) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The metrics of the chosen runs, or of the first ones of the list; and what could not be read."""
    names = [word.strip() for word in chosen.split(",") if word.strip()]
    unknown = [name for name in names if name not in found.runs]
    if unknown:
        close = did_you_mean(unknown[0], found.runs)
        raise TableError(
            f"--curves names the run {unknown[0]}, which is not in the list; expected some of"
            f" {', '.join(found.runs)}{close}"
        )
    listed = [found.runs[str(row["run"])] for row in found.rows if row["run"] in found.runs]
    metrics: dict[str, pd.DataFrame] = {}
    problems: list[str] = []
    for run in [found.runs[name] for name in names] or listed:
        if not names and len(metrics) == DRAWN:
            break
        table = _metrics(run, problems)
        if len(table):
            metrics[str(run.row["run"])] = table
        elif names and not problems:
            problems.append(f"{run.row['run']} has no curve yet: none of its epochs is done")
    return metrics, problems


def _metrics(run: Run, problems: list[str]) -> pd.DataFrame:
    try:
        return read_curves(run.path)
    except (HubmapError, OSError) as error:
        problems.append(f"{run.row['run']}: {sentence(error, run.path)}")
        return pd.DataFrame()
