"""Weights of runs for their mean, from out-of-fold planes.

Dice of a thresholded plane is a staircase: its gradient is zero almost everywhere. So the step at the threshold is
softened to a sigmoid of width SOFTNESS, and weights and threshold are fitted together on mean Dice with exact
gradients. SciPy's SLSQP does it: it knows bounds and the one constraint (weights sum to 1) and its cost grows with the
number of runs, where a search over the simplex grows much faster. What it finds is then judged by the true Dice, swept
over all thresholds.

A penalty draws weights towards equal ones: a run alone has to be better than the mean of all by `strength` / slides in
mean Dice. Few slides say little, and the mean of all is hard to beat.

Pixels that all runs see nearly alike are one row of `Pixels`, with their mean probabilities and how many of them are in
the truth. Where a slide has too many rows, the rare ones are sampled. So memory is bounded, whatever the number and
size of slides. What is told of a blend is counted on all pixels instead (`blend_score`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from hubmap_kit.competition.metric import dice
from hubmap_kit.training.counts import HALF, LEVELS, THRESHOLDS, best_threshold, dice_curve, level_of, threshold_counts

ROWS = 3_000_000  # of all slides together: about 150 MB with four runs
SOFTNESS = 0.05
STRENGTH = 0.5
NOTHING = 0.01  # a weight below this is none, which spares its network's work
# id -> planes (runs, h, w) uint8, mask and tissue (h, w) bool
Read = Callable[[str], tuple[np.ndarray, np.ndarray, np.ndarray]]
LEVELS_OF_GROUPS = 64  # pixels are alike when all runs' probabilities agree on these


@dataclass(frozen=True)
class Pixels:
    """Grouped pixels of several slides: probabilities (U, runs) float32, `true` and `false` counts of pixels (U,),
    `slide` (U,) number.
    """

    probabilities: np.ndarray
    true: np.ndarray
    false: np.ndarray
    slide: np.ndarray
    slides: int

    @property
    def runs(self) -> int:
        """How many runs."""
        return self.probabilities.shape[1]


def group(planes: np.ndarray, truth: np.ndarray, most: int) -> Pixels:
    """Group one slide's pixels: `planes` (runs, h, w) uint8 probabilities of 0..255, `truth` (h, w) of 0/1; at most
    `most` >= 2 rows.
    """
    flat = planes.reshape(len(planes), -1)
    code = np.zeros(flat.shape[1], np.int64)
    for plane in flat:
        code = code * LEVELS_OF_GROUPS + plane // (256 // LEVELS_OF_GROUPS)
    kinds, place, counts = np.unique(code, return_inverse=True, return_counts=True)
    means = np.stack([np.bincount(place, plane, len(kinds)) / counts for plane in flat], axis=1).astype(
        np.float32
    ) / np.float32(255)
    true = np.bincount(place, truth.reshape(-1) > 0, len(kinds))
    false = counts - true
    if len(kinds) > most:
        kept, factor = _sampled(counts, most)
        means, true, false = means[kept], true[kept] * factor, false[kept] * factor
    return Pixels(means, true.astype(float), false.astype(float), np.zeros(len(means), np.int32), 1)


def _sampled(counts: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """`most` places of `counts`, and how many times each counts: the largest as they are, the others by every so many
    of their pixels.

    They lie in the order of their probabilities, so the sample is spread evenly over these, and nothing in it is
    random.
    """
    order = np.argsort(-counts, kind="stable")
    sure, others = order[: most - most // 2], np.sort(order[most - most // 2 :])
    ends = np.cumsum(counts[others])
    each = ends[-1] / (most // 2)  # pixels that a sampled place stands for
    drawn = others[np.searchsorted(ends, (np.arange(most // 2) + 0.5) * each, side="right")]
    return np.concatenate([sure, drawn]), np.concatenate([np.ones(len(sure)), each / counts[drawn]])


def joined(parts: Sequence[Pixels]) -> Pixels:
    """Several slides as one, numbered in their order."""
    first = np.cumsum([0, *(part.slides for part in parts)])
    return Pixels(
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.true for part in parts]),
        np.concatenate([part.false for part in parts]),
        np.concatenate([part.slide + start for part, start in zip(parts, first, strict=False)]),
        int(first[-1]),
    )


def curves(pixels: Pixels, weights: np.ndarray) -> np.ndarray:
    """Dice (slides, T) of the weighted mean at each of THRESHOLDS."""
    bins = LEVELS + 1
    # Rounding must not take a pixel below the threshold that it equals.
    level = np.minimum((pixels.probabilities @ weights.astype(np.float32) * LEVELS + 1e-3).astype(np.int64), LEVELS)
    place = level + bins * pixels.slide
    true, false = (
        np.bincount(place, count, bins * pixels.slides).reshape(-1, bins) for count in (pixels.true, pixels.false)
    )
    common = np.cumsum(true[:, ::-1], axis=1)[:, ::-1][:, 1:LEVELS]
    predicted = common + np.cumsum(false[:, ::-1], axis=1)[:, ::-1][:, 1:LEVELS]
    return dice_curve(np.stack([common, predicted, np.broadcast_to(true.sum(1, keepdims=True), common.shape)], axis=1))


def equal(runs: int) -> np.ndarray:
    """The weights of a plain mean."""
    return np.full(runs, 1.0 / runs)


def distance(weights: np.ndarray) -> float:
    """How far weights are from equal ones: 0, up to 1 for a run alone."""
    runs = len(weights)
    return float(((weights - 1 / runs) ** 2).sum() / (1 - 1 / runs)) if runs > 1 else 0.0


def objective(pixels: Pixels, weights: np.ndarray, strength: float = STRENGTH) -> float:
    """What is maximised: mean Dice at its best threshold, less the penalty."""
    return float(curves(pixels, weights).mean(0).max()) - strength / pixels.slides * distance(weights)


def fit_weights(pixels: Pixels, strength: float = STRENGTH) -> np.ndarray:
    """The weights (runs,) of the slides of one organ; equal ones where nothing is better by the objective."""
    even = equal(pixels.runs)
    if pixels.runs == 1:
        return even
    single = np.eye(pixels.runs)[int(np.argmax([objective(pixels, one, strength) for one in np.eye(pixels.runs)]))]
    found = [
        even,
        *(_tidy(_descend(pixels, start, strength)) for start in (even, 0.3 * even + 0.7 * single)),
        _tidy(single),
    ]
    return max(
        found, key=lambda weights: objective(pixels, weights, strength)
    )  # the first of equals, which is the plain mean


def _descend(pixels: Pixels, start: np.ndarray, strength: float) -> np.ndarray:
    runs = pixels.runs
    total = np.bincount(pixels.slide, pixels.true, pixels.slides)
    scale = strength / pixels.slides / (1 - 1 / runs)

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the softened mean Dice, plus the penalty, and its gradient by weights and threshold."""
        weights, threshold = point[:-1], point[-1]
        inside = expit((pixels.probabilities @ weights.astype(np.float32) - threshold) / SOFTNESS)
        common, predicted = (
            np.bincount(pixels.slide, inside * count, pixels.slides)
            for count in (pixels.true, pixels.true + pixels.false)
        )
        below = predicted + total + 1e-6
        by_common, by_predicted = 2 / below, -2 * common / below**2
        slope = inside * (1 - inside) / SOFTNESS
        slope *= by_common[pixels.slide] * pixels.true + by_predicted[pixels.slide] * (pixels.true + pixels.false)
        gradient = np.append(slope @ pixels.probabilities, -slope.sum()) / pixels.slides
        gradient[:-1] -= 2 * scale * (weights - 1 / runs)
        return -float((2 * common / below).mean()) + scale * float(((weights - 1 / runs) ** 2).sum()), -gradient

    bounds = [(0.0, 1.0)] * runs + [(float(THRESHOLDS[0]), float(THRESHOLDS[-1]))]
    sums = {"type": "eq", "fun": lambda point: point[:-1].sum() - 1, "jac": lambda point: np.append(np.ones(runs), 0.0)}
    threshold = best_threshold(curves(pixels, start).mean(0))
    options = {"maxiter": 60, "ftol": 1e-6}
    return minimize(
        loss, np.append(start, threshold), jac=True, bounds=bounds, constraints=[sums], method="SLSQP", options=options
    ).x[:-1]


def _tidy(weights: np.ndarray) -> np.ndarray:
    """Weights on the simplex, nothing below NOTHING, and exactly equal where they nearly are."""
    weights = np.where(np.nan_to_num(weights) < NOTHING, 0.0, weights)
    if not weights.sum() > 0 or np.abs(weights - 1 / len(weights)).max() < NOTHING:
        return equal(len(weights))
    return weights / weights.sum()


@dataclass(frozen=True)
class Step:
    """A step of the greedy selection: the run that was added (its number), cross-fitted Dice with it, and what it
    added.
    """

    run: int
    dice: float
    gain: float


def greedy(
    organs: Sequence[Pixels], parts: Sequence[np.ndarray], members: Sequence[Sequence[int]] | None = None
) -> list[Step]:
    """Add one run after the other to a plain mean, each time the one that leaves the highest mean Dice over all slides.

    `organs` holds the slides of each organ, `parts` the part (such as the fold) of each of their slides: a slide is
    judged at the threshold that its organ's other parts want. `members` are the runs that know each organ, in the order
    of its columns; None: all. Only those count for it, and with none of them its masks are empty.
    """
    knowing = members or [range(each.runs) for each in organs]
    chosen: list[int] = []
    steps: list[Step] = []
    runs = 1 + max(max(each) for each in knowing)
    while len(chosen) < runs:
        scores = {}
        for run in (run for run in range(runs) if run not in chosen):
            taken = [np.isin(each, [*chosen, run]) for each in knowing]
            found = [
                crossed(_plain_mean(each, mine), part) for each, mine, part in zip(organs, taken, parts, strict=True)
            ]
            scores[run] = float(np.mean(np.concatenate(found)))
        best = max(scores, key=lambda run: scores[run])
        steps.append(Step(best, scores[best], scores[best] - (steps[-1].dice if steps else 0.0)))
        chosen.append(best)
    return steps


def _plain_mean(pixels: Pixels, taken: np.ndarray) -> np.ndarray:
    """Curves (slides, T) of the plain mean of the columns `taken` (runs,) bool; without any no pixel reaches a
    threshold.
    """
    return curves(pixels, taken / max(taken.sum(), 1))


def parts_of(folds: np.ndarray) -> np.ndarray:
    """The part that each slide of an organ is left out with: its fold, or, where all are in one fold, one of five by
    its place.
    """
    return folds if len(np.unique(folds)) > 1 else np.arange(len(folds)) % 5


def crossed(found: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Dice (slides,) from curves (slides, T), each at the threshold that is best for the other `parts`; at 0.5 without
    others.
    """
    dice = np.empty(len(found))
    for part in np.unique(parts):
        mine = parts == part
        threshold = best_threshold(found[~mine].mean(0)) if (~mine).any() else 0.5
        dice[mine] = found[mine, level_of(threshold)]
    return dice


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
    correlations: list[np.ndarray] = []
    overlaps: list[np.ndarray] = []
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
            dices = np.array([[dice(one, other) for other in masks] for one in masks])
            for kept, values in ((correlations, found), (overlaps, dices)):
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
