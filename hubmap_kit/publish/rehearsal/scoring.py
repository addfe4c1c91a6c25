"""A submission against the masks that only the rehearsal knows, read as the scorer reads it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.competition import rle
from hubmap_kit.competition.checker import check_submission
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.publish.rehearsal.hidden import UNREADABLE, HiddenSet


@dataclass(frozen=True)
class Score:
    """One hidden slide: its Dice, and whether its row is empty or its file cannot be read."""

    id: str
    organ: str
    source: str
    fault: str
    dice: float
    empty: bool
    rle: str

    @property
    def unreadable(self) -> bool:
        """No kernel can do better than an empty mask here."""
        return self.fault in UNREADABLE


def score(submission: Path, hidden: HiddenSet) -> list[Score]:
    """Check the file against the hidden table (ids, order, runs inside the slides), then compare it with the masks.

    Raises SubmissionError where the scorer would refuse it.
    """
    with _quiet():
        check_submission(submission, hidden.folder / "test.csv")
    predicted = {row["id"]: row["rle"] for _, row in read_rows(submission, ("id", "rle"))}
    return [
        Score(each.id, each.organ, each.source, each.fault, rle.dice(predicted[each.id], hidden.truth[each.id]), not predicted[each.id], predicted[each.id])
        for each in hidden.slides
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """The readers' warnings are about faults that the rehearsal made itself."""
    logger = logging.getLogger("hubmap_kit.competition")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
