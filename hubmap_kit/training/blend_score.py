"""What a blend is worth: exact Dice of the kept planes, every slide with weights and a threshold that were fitted
without its fold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hubmap_kit.competition.metric import dice
from hubmap_kit.training.blend_fit import Pixels, crossed, equal, fit_weights, joined, level_of, parts_of
from hubmap_kit.training.counts import HALF, THRESHOLDS, best_threshold, dice_curve, threshold_counts

Read = Callable[
    [str], tuple[np.ndarray, np.ndarray, np.ndarray]
]  # id -> planes (runs, h, w) uint8, mask and tissue (h, w) bool


@dataclass(frozen=True)
class OrganBlend:
    """One organ.

    `weights` (runs,) and `threshold` are what inference takes; `fitted` (runs,) what was fitted on all slides, which is
    left where cross-fitting gives it no gain over equal weights.

    Dice of each slide, cross-fitted: `singles` (runs, S) of every run alone, `even` (S,) of equal weights, `blend` (S,)
    of fitted weights. `thresholds` (runs,): the best of each run alone. `members` are the runs that know the organ;
    another has weight 0, and alone the Dice of empty masks.
    """

    organ: str
    ids: tuple[str, ...]
    weights: np.ndarray
    threshold: float
    fitted: np.ndarray
    singles: np.ndarray
    even: np.ndarray
    blend: np.ndarray
    thresholds: np.ndarray
    members: tuple[int, ...]

    @property
    def used(self) -> str:
        """Which weights inference takes: fitted or equal."""
        return "equal" if np.array_equal(self.weights[list(self.members)], equal(len(self.members))) else "fitted"


def blend_organ(
    organ: str, ids: Sequence[str], folds: np.ndarray, grouped: Sequence[Pixels], read: Read, strength: float
) -> OrganBlend:
    """Fit the weights of one organ on its grouped slides, and judge them on the planes that `read` gives.

    Slides whose fold is left out are judged with weights and threshold of the other folds (one of five parts, where all
    are in one fold). An organ with a single slide keeps equal weights and threshold 0.5: nothing is known without it.
    """
    parts = parts_of(folds)
    numbers = np.unique(parts)
    runs = grouped[0].runs
    even = equal(runs)
    alone = len(numbers) < 2
    others = ([each for each, part in zip(grouped, parts, strict=True) if part != number] for number in numbers)
    without = [even if alone else fit_weights(joined(each), strength) for each in others]
    fitted = even if alone else fit_weights(joined(grouped), strength)
    sets = np.stack([*np.eye(runs), even, fitted, *without])
    found = np.stack([_curves(read(slide_id), sets) for slide_id in ids], axis=1)  # (sets, slides, thresholds)
    blend = np.empty(len(ids))
    for place, number in enumerate(numbers):
        mine, curve = parts == number, found[runs + 2 + place]
        level = level_of(best_threshold(curve[~mine].mean(0))) if not alone else HALF
        blend[mine] = curve[mine, level]
    evenly = crossed(found[runs], parts)
    used = runs + 1 if blend.mean() > evenly.mean() else runs
    return OrganBlend(
        organ,
        tuple(ids),
        sets[used],
        float(THRESHOLDS[HALF]) if alone else best_threshold(found[used].mean(0)),
        fitted,
        np.stack([crossed(found[run], parts) for run in range(runs)]),
        evenly,
        blend,
        np.array([best_threshold(found[run].mean(0)) for run in range(runs)]),
        tuple(range(runs)),
    )


def among(each: OrganBlend, members: Sequence[int], runs: int, read: Read) -> OrganBlend:
    """An organ that was blended of the runs `members` alone, as one among all `runs`."""
    if len(members) == runs:
        return each
    place = list(members)

    def widened(values: np.ndarray, others: np.ndarray | float) -> np.ndarray:
        wide = np.empty((runs, *values.shape[1:]))
        wide[:] = others
        wide[place] = values
        return wide

    empty = np.array([float(not read(slide_id)[1].any()) for slide_id in each.ids])
    return replace(
        each,
        weights=widened(each.weights, 0.0),
        fitted=widened(each.fitted, 0.0),
        singles=widened(each.singles, empty),
        thresholds=widened(each.thresholds, float(THRESHOLDS[HALF])),
        members=tuple(place),
    )


def likeness(organs: Sequence[OrganBlend], read: Read) -> tuple[np.ndarray, np.ndarray]:
    """How alike the runs are: (runs, runs) mean over slides of the correlation of their planes inside tissue, and of
    the Dice between their masks, each run at its own threshold. Slides where a plane is the same everywhere have no
    correlation; of two runs that know no organ in common both are 0.
    """
    runs = len(organs[0].weights)
    correlations, overlaps = [], []
    for each in organs:
        among_all = np.ix_(each.members, each.members)
        for slide_id in each.ids:
            planes, _, tissue = read(slide_id)
            with np.errstate(invalid="ignore", divide="ignore"):
                found = np.atleast_2d(
                    np.corrcoef(planes[:, tissue] if tissue.any() else planes.reshape(len(planes), -1))
                )
            masks = [
                plane >= 255 * threshold
                for plane, threshold in zip(planes, each.thresholds[list(each.members)], strict=True)
            ]
            for kept, values in (
                (correlations, found),
                (overlaps, [[dice(one, other) for other in masks] for one in masks]),
            ):
                kept.append(np.full((runs, runs), np.nan))
                kept[-1][among_all] = values
    return _known_mean(np.stack(correlations)), _known_mean(np.stack(overlaps))


def _known_mean(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis of what is known; 0 where nothing is."""
    known = np.isfinite(values)
    return np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1)


def _curves(slide: tuple[np.ndarray, np.ndarray, np.ndarray], sets: np.ndarray) -> np.ndarray:
    """Dice (sets, T) of one slide for each row of weights (sets, runs)."""
    planes, truth, _ = slide
    known: dict[bytes, np.ndarray] = {}
    for weights in sets:
        if weights.tobytes() not in known:
            mean = np.minimum(
                np.tensordot(weights.astype(np.float32), planes.astype(np.float32), 1) / np.float32(255), np.float32(1)
            )
            known[weights.tobytes()] = dice_curve(threshold_counts(mean, truth))
    return np.stack([known[weights.tobytes()] for weights in sets])
