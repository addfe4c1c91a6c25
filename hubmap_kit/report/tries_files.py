"""Reading the tables of a run folder; each complains in one sentence that names the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.errors import CheckpointError, TableError
from hubmap_kit.training.oof import read_metrics


def read_oof(run: Path) -> pd.DataFrame:
    """The out-of-fold table of a run: id, organ, data_source (text), dice (float) and fold.

    Raises TableError for a damaged one.
    """
    path = run / "oof.csv"
    table = pd.DataFrame([row for _, row in read_rows(path, ("id", "organ", "data_source", "fold", "dice"))])
    again = f"run 'hubmap evaluate {run}' to write it anew"
    if table.empty:
        raise TableError(f"{path} has a header and no rows; {again}")
    table["dice"] = pd.to_numeric(table["dice"], errors="coerce")
    if not table["dice"].between(0, 1).all():
        raise TableError(
            f"{path} has a dice of slide {table['id'][~table['dice'].between(0, 1)].iloc[0]} that is no number from 0"
            f" to 1; {again}"
        )
    if table["id"].duplicated().any():
        raise TableError(f"{path} has slide {table['id'][table['id'].duplicated()].iloc[0]} twice; {again}")
    return table


def read_curves(run: Path) -> pd.DataFrame:
    """The metrics of all folds, numbers only; empty before the first epoch is done.

    Raises CheckpointError for a damaged file.
    """
    metrics = read_metrics(run).apply(pd.to_numeric, errors="coerce")
    if metrics.empty:
        return metrics
    if not {"fold", "epoch"} <= set(metrics) or metrics[["fold", "epoch"]].isna().any(axis=None):
        raise CheckpointError(
            f"{run} has a fold<k>/metrics.csv without a fold and an epoch in every row; delete that file, --resume"
            " writes it anew"
        )
    return metrics


def read_timing(run: Path) -> pd.DataFrame:
    """The timing rows of all folds, numbers only, columns as they come; empty before the first epoch is done.

    Raises TableError.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(run.glob("fold*/timing.csv")):
        for line, row in read_rows(path, ("seconds",)):
            numbers = {key: _float(cell) for key, cell in row.items() if key != "session"}
            if not math.isfinite(numbers["seconds"]):
                raise TableError(
                    f"{path}, line {line} says seconds = '{row['seconds']}', but a number was expected; delete the"
                    " file, it is for information"
                )
            rows.append(numbers | {"session": row.get("session", "")})
    return pd.DataFrame(rows)


def read_environments(run: Path) -> list[dict[str, Any]]:
    """What the run's sessions ran on, the latest first; empty where nothing was kept.

    Raises CheckpointError for a damaged file.
    """
    path = run / "environment.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({str(error)[:80]}); delete it, the next session writes it anew"
        ) from error
    sessions = found if isinstance(found, list) else [found]
    if not all(isinstance(session, dict) for session in sessions):
        raise CheckpointError(f"{path} is no list of sessions; delete it, the next session writes it anew")
    return sessions


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def sentence(error: Exception, path: Path) -> str:
    """What to say of an error with a run's file; the system's own errors name no remedy."""
    if isinstance(error, OSError):
        return f"{error.filename or path} cannot be read ({error.strerror or error}); check its permissions"
    return str(error)
