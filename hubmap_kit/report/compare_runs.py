"""What a comparison needs of each run, read so that a damaged file costs its part of the page and no more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from hubmap_kit.errors import CheckpointError, HubmapError
from hubmap_kit.report.tries_files import read_curves, read_environments, read_oof, read_timing, sentence
from hubmap_kit.report.tries_find import CONFIG, labels
from hubmap_kit.report.tries_read import Run, read_each

T = TypeVar("T")


@dataclass(frozen=True)
class Compared:
    """One run: its name here, its folder and settings, and its tables, which are empty or None where there are none."""

    name: str
    run: Run
    oof: pd.DataFrame | None
    curves: pd.DataFrame
    timing: pd.DataFrame
    session: dict[str, Any]


def read_compared(paths: Sequence[Path]) -> tuple[list[Compared], list[str]]:
    """The runs that can be read, in the order given and each once, and a sentence about everything that cannot."""
    unique = list({path.resolve(): path for path in paths}.values())
    problems = [
        f"{path} is no run folder (it has no {CONFIG}); it is left out"
        for path in unique
        if not (path / CONFIG).is_file()
    ]
    there = [path for path in unique if (path / CONFIG).is_file()]
    runs, unread = read_each(there, labels(there))
    problems += unread
    found = [_read(run, problems) for run in runs]
    if not found:
        raise CheckpointError(f"none of these runs can be compared: {'; '.join(problems) or 'none was named'}")
    return found, problems


def _read(run: Run, problems: list[str]) -> Compared:
    name = str(run.row["run"])

    def told(read: Callable[[Path], T], empty: T) -> T:
        try:
            return read(run.path)
        except (HubmapError, OSError) as error:
            problem = f"{name}: {sentence(error, run.path)}"
            if problem not in problems:
                problems.append(problem)
            return empty

    has_oof = (run.path / "oof.csv").is_file()
    if not has_oof:
        problems.append(f"{name} has no oof.csv yet ({run.row.get('state', 'not read')}); its Dice is left out")
    oof = told(read_oof, None) if has_oof else None
    sessions = told(read_environments, [])
    return Compared(
        name,
        run,
        oof,
        told(read_curves, pd.DataFrame()),
        told(read_timing, pd.DataFrame()),
        sessions[0] if sessions else {},
    )
