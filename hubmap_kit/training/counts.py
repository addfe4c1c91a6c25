"""Dice at every threshold at once, from two histograms of probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hubmap_kit.competition.metric import dice_from_counts
from hubmap_kit.errors import CheckpointError

LEVELS = 200
# Thresholds k / 200 = 0.005 .. 0.995; 0 would keep everything and 1 next to nothing, so both are left out.
THRESHOLDS = np.arange(1, LEVELS) / LEVELS
EDGES = (np.arange(LEVELS + 2) / LEVELS).astype(np.float32)
HALF = LEVELS // 2 - 1  # index of threshold 0.5


def threshold_counts(plane: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixel counts of one slide at each of THRESHOLDS: (3, T) int64 rows common, predicted, true.

    `plane` (H, W) float32 probabilities, `truth` (H, W) of 0/1. Two histograms, added up from the right, hold the
    counts of all thresholds at once: bin >= k means exactly plane >= k / 200 in float32.
    """
    bins = LEVELS + 1
    level = (plane * np.float32(LEVELS)).astype(np.int64)
    # The product is rounded, so a value next to an edge can land one bin off.
    level += plane >= EDGES[level + 1]
    level -= plane < EDGES[level]
    histogram = np.bincount((level + bins * (truth > 0)).ravel(), minlength=2 * bins).reshape(2, bins)
    above = np.cumsum(histogram[:, ::-1], axis=1)[:, ::-1][:, 1:LEVELS]
    return np.stack([above[1], above.sum(0), np.full(len(THRESHOLDS), histogram[1].sum())])


def dice_curve(counts: np.ndarray) -> np.ndarray:
    """Dice (..., T) at each of THRESHOLDS from counts (..., 3, T)."""
    return dice_from_counts(counts[..., 0, :], counts[..., 1, :], counts[..., 2, :])


def mean_curves(curves: np.ndarray, organs: np.ndarray) -> dict[str, np.ndarray]:
    """Mean Dice over the slides of each organ at each of THRESHOLDS; `curves` (slides, T), `organs` (slides,)."""
    return {str(organ): curves[organs == organ].mean(0) for organ in np.unique(organs)}


def best_threshold(curve: np.ndarray) -> float:
    """The threshold of the highest Dice: the middle of all thresholds within 0.001 of it around the peak.

    Curves have flat tops; the middle of the top carries over to other slides better than its noisiest point.
    """
    peak = int(np.argmax(curve))
    first, last = stretch(curve >= curve[peak] - 0.001, peak)
    return float(THRESHOLDS[(first + last) // 2])


def stretch(near: np.ndarray, peak: int) -> tuple[int, int]:
    """The first and last index of the unbroken True values of `near` (N,) around `peak`."""
    gaps = np.flatnonzero(~near)
    before, after = gaps[gaps < peak], gaps[gaps > peak]
    return int(before[-1]) + 1 if len(before) else 0, int(after[0]) - 1 if len(after) else len(near) - 1


def level_of(threshold: float, grid: np.ndarray = THRESHOLDS) -> int:
    """The index of the value of `grid` that is nearest to a threshold."""
    return int(np.argmin(np.abs(grid - threshold)))


def left_out_parts(folds: np.ndarray, mine: np.ndarray) -> list[np.ndarray]:
    """Masks (S,) bool of slides that cross-fitting leaves out together: each fold that has one of `mine` (S,) bool; or,
    where these are all in one fold, each of them alone.
    """
    own = np.unique(folds[mine])
    return (
        [folds == fold for fold in own]
        if len(own) > 1
        else [np.arange(len(folds)) == row for row in np.flatnonzero(mine)]
    )


def fit_thresholds(curves: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The best threshold of each organ from its mean curve."""
    return {organ: best_threshold(curve) for organ, curve in curves.items()}


def to_table(ids: list[str], counts: np.ndarray) -> pd.DataFrame:
    """Counts (slides, 3, T) as a long table (id, threshold, common, predicted, truth), for parquet."""
    slides, _, levels = counts.shape
    return pd.DataFrame(
        {
            "id": np.repeat(np.array(ids, dtype=object), levels),
            "threshold": np.tile(THRESHOLDS, slides),
            "common": counts[:, 0].ravel(),
            "predicted": counts[:, 1].ravel(),
            "truth": counts[:, 2].ravel(),
        }
    )


def read_counts(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids in order and counts (slides, 3, T) of a written table. Raises CheckpointError when the file is damaged."""
    try:
        return from_table(pd.read_parquet(path))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged; write it again with 'hubmap evaluate {path.parents[1]}'") from error


def from_table(table: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """The inverse of `to_table`: ids in order and counts (slides, 3, T)."""
    ids = table["id"].to_numpy()[:: len(THRESHOLDS)].astype(str).tolist()
    values = table[["common", "predicted", "truth"]].to_numpy(np.int64)
    return ids, values.reshape(len(ids), len(THRESHOLDS), 3).transpose(0, 2, 1)


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


def _fit_organ(
    organ: str, organs: np.ndarray, folds: np.ndarray, plain: np.ndarray, both: np.ndarray, before: float
) -> MixtureFit:
    mine = organs == organ
    threshold = best_threshold(both[mine].mean(0))
    crossed = {"plain": np.zeros(len(organs)), "both": np.zeros(len(organs))}
    for left_out in left_out_parts(folds, mine):
        for name, curves in (("plain", plain), ("both", both)):
            judged = mine & left_out
            crossed[name][judged] = both[judged, level_of(_best_among(curves, ~left_out, mine))]
    return MixtureFit(
        organ,
        int(mine.sum()),
        before,
        threshold,
        float(both[mine, level_of(before)].mean()),
        float(both[mine, level_of(threshold)].mean()),
        float(crossed["plain"][mine].mean()),
        float(crossed["both"][mine].mean()),
    )


def _best_among(curves: np.ndarray, among: np.ndarray, mine: np.ndarray) -> float:
    """The best threshold of the organ's slides that are left; of all organs' where it has none, and 0.5 where nobody
    has.
    """
    used = among & mine if (among & mine).any() else among
    return best_threshold(curves[used].mean(0)) if used.any() else float(THRESHOLDS[HALF])
