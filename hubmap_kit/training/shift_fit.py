"""Thresholds for slides of two kinds at once: half of the weight on the slides as they are, half on the same slides
shifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hubmap_kit.training.counts import HALF, THRESHOLDS, best_threshold


@dataclass(frozen=True)
class MixtureFit:
    """One organ's thresholds before and after. Dice is the mean over plain and shifted slides, half each.

    `dice_before`, `dice_same`: at the two thresholds, on the very slides that `threshold` was fitted to.
    `crossed_plain`, `crossed`: each slide at a threshold fitted without its fold, to plain slides alone and to the
    mixture; their difference is what fitting to the mixture is worth.
    """

    organ: str
    slides: int
    before: float
    threshold: float
    dice_before: float
    dice_same: float
    crossed_plain: float
    crossed: float


def fit_mixture(
    organs: Sequence[str], folds: Sequence[int], plain: np.ndarray, shifted: np.ndarray, before: Mapping[str, float]
) -> list[MixtureFit]:
    """The threshold of every organ for the mixture, by the rule of `counts.best_threshold`, and what it is worth.

    `plain` and `shifted` (S, T) are Dice at each of counts.THRESHOLDS of the same S slides. Where an organ's slides are
    all in one fold, single slides are left out instead of folds.
    """
    named, numbers, both = np.array(organs), np.array(folds), (plain + shifted) / 2
    return [_fit_organ(str(organ), named, numbers, plain, both, before[str(organ)]) for organ in np.unique(named)]


def level_of(threshold: float) -> int:
    """The index of the nearest of counts.THRESHOLDS."""
    return int(np.argmin(np.abs(THRESHOLDS - threshold)))


def _fit_organ(
    organ: str, organs: np.ndarray, folds: np.ndarray, plain: np.ndarray, both: np.ndarray, before: float
) -> MixtureFit:
    mine = organs == organ
    threshold = best_threshold(both[mine].mean(0))
    rows = np.flatnonzero(mine)
    own = np.unique(folds[rows])
    parts = [folds == fold for fold in own] if len(own) > 1 else [np.arange(len(organs)) == row for row in rows]
    crossed = {"plain": np.zeros(len(organs)), "both": np.zeros(len(organs))}
    for left_out in parts:
        for name, curves in (("plain", plain), ("both", both)):
            judged = mine & left_out
            crossed[name][judged] = both[judged, level_of(_best_among(curves, ~left_out, mine))]
    return MixtureFit(
        organ,
        len(rows),
        before,
        threshold,
        float(both[rows, level_of(before)].mean()),
        float(both[rows, level_of(threshold)].mean()),
        float(crossed["plain"][rows].mean()),
        float(crossed["both"][rows].mean()),
    )


def _best_among(curves: np.ndarray, among: np.ndarray, mine: np.ndarray) -> float:
    """The best threshold of the organ's slides that are left; of all organs' where it has none, and 0.5 where nobody
    has.
    """
    used = among & mine if (among & mine).any() else among
    return best_threshold(curves[used].mean(0)) if used.any() else float(THRESHOLDS[HALF])
