"""The history of a fold, one row an epoch: its best row, whether it is over, and which folds of a run are not
finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hubmap_kit.config import TrainingConfig
from hubmap_kit.errors import CheckpointError
from hubmap_kit.files import atomic_path
from hubmap_kit.inference.ensemble import COUNTS_FILE, MODEL_FILE

Row = dict[str, Any]
METRICS_FILE, TIMING_FILE, CHECKPOINT_FILE = "metrics.csv", "timing.csv", "last.ckpt"


def validated(rows: Iterable[Row]) -> list[Row]:
    """The rows of the epochs that were validated."""
    return [row for row in rows if "dice" in row]


def best(rows: Iterable[Row], config: TrainingConfig) -> Row | None:
    """The best validated row; the earlier one of equals, None without any."""
    found = validated(rows)
    if not found:
        return None
    return (
        min(found, key=lambda row: row["val_loss"])
        if config.monitor in ("loss", "valid_loss")
        else max(found, key=lambda row: row["dice"])
    )


def validations_since_best(rows: Iterable[Row], config: TrainingConfig) -> int:
    """How many validations came after the best one."""
    found = validated(rows)
    top = best(found, config)
    return 0 if top is None else sum(row["epoch"] > top["epoch"] for row in found)


def is_over(rows: list[Row], config: TrainingConfig) -> bool:
    """Whether these epochs are a whole training: all of them, or enough without a better one."""
    return len(rows) >= config.epochs or 0 < config.patience <= validations_since_best(rows, config)


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file that `write_rows` wrote, to the last digit.

    Raises CheckpointError when it cannot be read.
    """
    try:
        table = pd.read_csv(path, float_precision="round_trip")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged ({error}); delete that file, --resume writes it anew"
        ) from error
    return [{str(key): value for key, value in row.items() if pd.notna(value)} for row in table.to_dict("records")]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a list of rows as CSV, atomically; columns in order of first appearance, empty where a row lacks one."""
    with atomic_path(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)


def read_timing(run: Path) -> list[Row]:
    """The timing rows of all folds of a run; those that cannot be read are left out, they only serve a guess."""
    rows: list[Row] = []
    for path in sorted(run.glob(f"fold*/{TIMING_FILE}")):
        try:
            rows += pd.read_csv(path).fillna(0.0).to_dict("records")
        except (OSError, ValueError):
            continue
    return rows


def longest(timing: Sequence[Mapping[str, Any]], key: str, session: str | None = None) -> float:
    """The largest value of a column of timing rows, in seconds, of one session if it is named; 0 without any.

    Other sessions may have run on other machines, so what they measured says little about this one.
    """
    chosen = [row for row in timing if session is None or row.get("session") == session]
    return max((float(row.get(key) or 0.0) for row in chosen), default=0.0)


def fold_number(folder: Path) -> int | None:
    """The number of a fold's folder; None for another folder."""
    digits = folder.name.removeprefix("fold")
    return int(digits) if folder.name.startswith("fold") and digits.isdecimal() else None


def unfinished(run: Path, config: TrainingConfig, planned: Iterable[int] = ()) -> dict[int, str]:
    """Every begun or `planned` fold of a run that is not finished, in order: number -> a phrase such as "fold 1 after
    epoch 3 of 5".

    Weights without a checkpoint are taken as finished: a published run holds no more.
    """
    begun = {number for folder in run.glob("fold*") if (number := fold_number(folder)) is not None and folder.is_dir()}
    phrases = {number: _phrase(run / f"fold{number}", number, config) for number in sorted(begun | set(planned))}
    return {number: phrase for number, phrase in phrases.items() if phrase}


def killed_at_first(folder: Path) -> bool:
    """Whether a fold's training was killed while it saved its first epoch, so that its weights are not final."""
    return (folder / TIMING_FILE).is_file() and not any(
        (folder / name).is_file() for name in (CHECKPOINT_FILE, METRICS_FILE)
    )


def _phrase(folder: Path, number: int, config: TrainingConfig) -> str:
    weights, checkpoint = (folder / MODEL_FILE).is_file(), (folder / CHECKPOINT_FILE).is_file()
    if not weights and not checkpoint:
        return f"fold {number} is not begun"
    if killed_at_first(folder):
        return f"fold {number} after no whole epoch of {config.epochs}"
    try:
        rows = read_rows(folder / METRICS_FILE)
    except CheckpointError:
        return f"fold {number} with a {METRICS_FILE} that cannot be read" if checkpoint else ""
    if checkpoint and not is_over(rows, config):
        return f"fold {number} after epoch {len(rows)} of {config.epochs}"
    return (
        "" if (folder / COUNTS_FILE).is_file() else f"fold {number} is trained, its held-out slides are not predicted"
    )
