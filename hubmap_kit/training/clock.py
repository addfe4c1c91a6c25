"""What training asks of a session clock, and how it says that the time is up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from hubmap_kit.errors import HubmapError

SPARE = 1.3  # work may take this much longer than the longest of its kind so far


class Clock(Protocol):
    """Counts down to the moment when everything must be saved."""

    def fits(self, seconds: float) -> bool:
        """Whether work of that many seconds would end in time."""


class OutOfTime(HubmapError):
    """A training stopped itself before its session ends. Everything up to the last finished epoch is on disk.

    `where` says how far it came, such as "fold 1 after epoch 3 of 5".
    """

    def __init__(self, where: str, advice: str = "") -> None:
        super().__init__(f"the time is up: {where}" + (f"; {advice}" if advice else ""))
        self.where = where


def longest(timing: Sequence[Mapping[str, Any]], key: str) -> float:
    """The largest value of a column of timing rows, in seconds; 0 without any."""
    return max((float(row.get(key) or 0.0) for row in timing), default=0.0)


def read_timing(run: Path) -> list[dict[str, Any]]:
    """The timing rows of all folds of a run; those that cannot be read are left out, they only serve a guess."""
    rows: list[dict[str, Any]] = []
    for path in sorted(run.glob("fold*/timing.csv")):
        try:
            rows += pd.read_csv(path).fillna(0.0).to_dict("records")
        except (OSError, ValueError):
            continue
    return rows
