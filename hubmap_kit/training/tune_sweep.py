"""One out-of-fold slide at every threshold and with every candidate of post-processing, while its plane is in
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hubmap_kit.competition import rle
from hubmap_kit.config import PostprocessChoices
from hubmap_kit.inference.postprocess import after_steps, rescue
from hubmap_kit.processes import threads
from hubmap_kit.training.counts import THRESHOLDS, dice_curve, threshold_counts


def _candidate(
    fill_holes: bool = False, opening: int = 0, min_area: float = 0.0, shrink: int = 0
) -> PostprocessChoices:
    return PostprocessChoices(fill_holes=fill_holes, opening=opening, min_area=min_area, shrink=shrink)


# From the simplest to the boldest; of candidates that are as good as each other the first one is taken. They are few on
# purpose: an organ has 18 to 99 training slides, and the best of hundreds of combinations on so few slides is the
# luckiest, not the best. Lengths fit slides of about 3000 pixels, where a shrink of 10 pixels was worth a place in the
# competition's first twelve.
CANDIDATES: tuple[PostprocessChoices, ...] = (
    _candidate(),
    _candidate(fill_holes=True),
    _candidate(min_area=0.0005),
    _candidate(fill_holes=True, min_area=0.0005),
    _candidate(fill_holes=True, min_area=0.002),
    _candidate(fill_holes=True, min_area=0.005),
    _candidate(fill_holes=True, opening=3),
    _candidate(fill_holes=True, opening=3, min_area=0.0005),
    _candidate(fill_holes=True, opening=8, min_area=0.002),
    _candidate(shrink=4),
    _candidate(fill_holes=True, min_area=0.0005, shrink=4),
    _candidate(fill_holes=True, min_area=0.0005, shrink=10),
)
# Thresholds for the candidates that do something, all of them among THRESHOLDS; Dice changes little from one to the
# next.
LEVELS = np.array([0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8])


@dataclass(frozen=True)
class SlideScores:
    """Dice of one slide for each candidate: (THRESHOLDS,) for the first, (LEVELS,) for the others.

    `bare`: empty masks stay empty. Thresholds are fitted on these: with a rescue in them the best threshold may be one
    that no slide reaches, which leaves the work to the rescue. `final`: empty masks are rescued, as they will be.
    """

    bare: tuple[np.ndarray, ...]
    final: tuple[np.ndarray, ...]


def grid_of(candidate: int) -> np.ndarray:
    """The thresholds that a candidate is swept over."""
    return LEVELS if candidate else THRESHOLDS


def score_slide(
    plane: np.ndarray,
    truth: np.ndarray,
    text: str | None,
    rescued: bool,
    candidates: Sequence[PostprocessChoices] = CANDIDATES,
) -> SlideScores:
    """Score a probability plane (H, W) against the slide's mask `truth` (H, W).

    `text` is train.csv's own run-length string, where the slide's file has the size that the table states; masks are
    scored on runs, by the very functions that predict and score a submission. Without any step the counts of all
    thresholds come from two histograms, which gives the same Dice. `rescued`: empty masks are rescued in `final`.
    """
    counts = threshold_counts(plane, truth)
    first = dice_curve(counts)
    runs = rle.parse(text) if text is not None else rle.runs_of(truth)

    def dice(job: tuple[int, float]) -> tuple[float, float]:
        choices, threshold = candidates[job[0]], job[1]
        mask = after_steps(plane, threshold, choices)
        bare = rle.dice(rle.runs_of(mask), runs)
        return bare, bare if mask.any() or not rescued else rle.dice(
            rle.runs_of(rescue(plane, threshold, choices)), runs
        )

    empty = np.flatnonzero(counts[1] == 0) if rescued else np.empty(0, np.int64)
    jobs = [(0, float(THRESHOLDS[index])) for index in empty]
    jobs += [(number, float(level)) for number in range(1, len(candidates)) for level in LEVELS]
    with threads(4) as pool:  # OpenCV and NumPy work outside Python's lock
        found = np.array(list(pool.map(dice, jobs)))
    first_final = first.copy()
    first_final[empty] = found[: len(empty), 1]
    others = found[len(empty) :].reshape(len(candidates) - 1, len(LEVELS), 2)
    return SlideScores((first, *others[..., 0]), (first_final, *others[..., 1]))
