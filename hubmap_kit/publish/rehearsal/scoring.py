"""A submission against the masks that only the rehearsal knows.

Its decoder is its own, written from the competition's words.

The truth never was a run-length string: it is read from the pictures that were written when the slides were drawn. A
mistake in the kit's own encoding is therefore seen as a low Dice, even where every part of the kit makes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hubmap_kit.competition.checker import check_submission
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.errors import RehearsalError
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
    scores = []
    for each in hidden.slides:
        text, truth = predicted[each.id], _truth(hidden.masks / f"{each.id}.png")
        scores.append(
            Score(
                each.id, each.organ, each.source, each.fault, _dice(_painted(text, *truth.shape), truth), not text, text
            )
        )
    return scores


def _painted(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """Pairs of a start and a length; pixels are counted from 0 down the first column, then down the next, as in
    train.csv.
    """
    pixels = np.zeros(height * width, bool)
    numbers = [int(word) for word in text.split()]
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        pixels[start : start + length] = True
    return pixels.reshape(width, height).T


def _dice(one: NDArray[np.bool_], two: NDArray[np.bool_]) -> float:
    total = np.count_nonzero(one) + np.count_nonzero(two)
    return 2 * np.count_nonzero(one & two) / total if total else 1.0


def _truth(path: Path) -> NDArray[np.bool_]:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise RehearsalError(
            f"{path} cannot be read, but it holds a hidden slide's mask; leave the folder alone while a rehearsal runs"
        )
    return mask > 0


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
