"""Thresholds and post-processing by organ, fitted on out-of-fold slides so that they carry over to slides that were not
there.

The plain rule takes the best threshold of an organ's mean curve. With a handful of slides that is the best by luck. The
rule here adds to every organ's slides PRIOR more that look like the mean of the other organs: what an organ's slides
say clearly stays, and what they hardly say follows the others. Mean Dice of out-of-fold slides, each at a threshold
that was fitted without that slide / without its fold, for two trainings on 26 real slides (3 to 7 an organ) and one on
10 synthetic ones (2 an organ):

    rule                                              real, 20 epochs   real, 4 epochs   synthetic
    plain                                               0.507 / 0.493    0.397 / 0.391   0.107 / 0.107
    PRIOR = 1                                           0.519 / 0.510    0.401 / 0.387   0.157 / 0.107
    PRIOR = 3                                           0.510 / 0.503    0.398 / 0.393   0.231 / 0.107
    PRIOR = 6                                           0.501 / 0.493    0.393 / 0.390   0.231 / 0.107
    one threshold for all organs                        0.458 / 0.484    0.374 / 0.374   0.231 / 0.107

The middle of all thresholds within one standard error, which is the usual cure, gave 0.494 / 0.423 on the first: with
so few slides the error is so large that the band is most of the axis. 3 is never below plain here; the differences are
small and the slides few, so every organ keeps its plain threshold where cross-fitting says so. With 18 slides and more
of an organ, as in the competition, the prior hardly counts. A low threshold can be right: spleen, best at 0.04 on the
first, is best there without the fold that is judged as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hubmap_kit.competition import rle
from hubmap_kit.config import PostprocessChoices
from hubmap_kit.inference.postprocess import after_steps, rescue
from hubmap_kit.processes import threads
from hubmap_kit.training.counts import (
    HALF,
    THRESHOLDS,
    best_threshold,
    dice_curve,
    left_out_parts,
    level_of,
    stretch,
    threshold_counts,
)

PRIOR = 3.0
FEWEST = 5  # slides below which a standard error is a guess, so that no step of post-processing is taken
FEWEST_OF_SOURCE = 8  # slides of each source below which sources share their organ's threshold
# From the simplest to the boldest; of candidates that are as good as each other the first one is taken. They are few on
# purpose: an organ has 18 to 99 training slides, and the best of hundreds of combinations on so few slides is the
# luckiest, not the best. Lengths fit slides of about 3000 pixels, where a shrink of 10 pixels was worth a place in the
# competition's first twelve.
CANDIDATES = tuple(
    PostprocessChoices.model_validate(changes)
    for changes in (
        {},
        {"fill_holes": True},
        {"min_area": 0.0005},
        {"fill_holes": True, "min_area": 0.0005},
        {"fill_holes": True, "min_area": 0.002},
        {"fill_holes": True, "min_area": 0.005},
        {"fill_holes": True, "opening": 3},
        {"fill_holes": True, "opening": 3, "min_area": 0.0005},
        {"fill_holes": True, "opening": 8, "min_area": 0.002},
        {"shrink": 4},
        {"fill_holes": True, "min_area": 0.0005, "shrink": 4},
        {"fill_holes": True, "min_area": 0.0005, "shrink": 10},
    )
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


@dataclass(frozen=True)
class Choice:
    """What was fitted for an organ: the number of a candidate, the threshold, and the thresholds of sources with their
    own.
    """

    candidate: int
    threshold: float
    sources: dict[str, float]


@dataclass(frozen=True)
class OrganResult:
    """One organ's row.

    Dice is the mean over its slides: `*_same` fitted on these very slides, `*_crossed` fitted without the fold that is
    judged. `plain_*`: the best threshold and nothing after it.
    """

    organ: str
    slides: int
    rule: str  # of RULES
    choice: Choice
    plain_threshold: float
    plain_same: float
    plain_crossed: float
    same: float
    crossed: float
    band: tuple[float, float]


class Scores:
    """The scores of all out-of-fold slides, one a row: organ, source, fold, and the curves (S, thresholds) of every
    candidate, without (`bare`) and with (`final`) a rescue of empty masks.
    """

    def __init__(
        self, organs: Sequence[str], sources: Sequence[str], folds: Sequence[int], slides: Sequence[SlideScores]
    ) -> None:
        self.organs, self.sources, self.folds = np.array(organs), np.array(sources), np.array(folds)
        self.bare = [np.stack(curves) for curves in zip(*(slide.bare for slide in slides), strict=True)]
        self.final = [np.stack(curves) for curves in zip(*(slide.final for slide in slides), strict=True)]

    def __len__(self) -> int:
        return len(self.organs)

    def at(self, row: int, choice: Choice) -> float:
        """Dice of a slide with a choice."""
        threshold = choice.sources.get(str(self.sources[row]), choice.threshold)
        return float(self.final[choice.candidate][row, level_of(threshold, grid_of(choice.candidate))])


def tune(scores: Scores) -> list[OrganResult]:
    """The choice of every organ, with what it is worth.

    Three rules are cross-fitted: the plain threshold with a rescue of empty masks, the robust threshold with it, and
    the robust threshold with steps after it. The robust threshold is taken where it is worth no less than the plain
    one, steps where they are worth more. So in cross-fitting no organ is worse than with plain thresholds. On the very
    slides that were fitted a robust threshold may be a little below the best one; that is its price.
    """
    return [_tune_organ(scores, str(organ)) for organ in np.unique(scores.organs)]


def _tune_organ(scores: Scores, organ: str) -> OrganResult:
    everywhere = np.ones(len(scores), bool)
    rows = np.flatnonzero(scores.organs == organ)
    plain_crossed, crossed = _cross_fit(scores, organ, rows)
    rule = "plain" if crossed["robust"] < crossed["plain"] else "robust"
    with_steps = fit_organ(scores, organ, everywhere)
    rule = "steps" if with_steps.candidate and crossed["steps"] > crossed[rule] else rule
    choice, before = RULES[rule](scores, organ, everywhere), _plain(scores, organ, everywhere)
    return OrganResult(
        organ,
        len(rows),
        rule,
        choice,
        before.threshold,
        float(scores.bare[0][rows, level_of(before.threshold)].mean()),
        plain_crossed,
        float(np.mean([scores.at(row, choice) for row in rows])),
        crossed[rule],
        band(grid_of(choice.candidate), scores.bare[choice.candidate][rows]),
    )


def _cross_fit(scores: Scores, organ: str, rows: np.ndarray) -> tuple[float, dict[str, float]]:
    """Mean Dice over the slides `rows` of an organ, each with what was fitted without its fold: plain, without a
    rescue, and each rule.

    Where an organ's slides are all in one fold, single slides are left out instead.
    """
    plain: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in RULES}
    for left_out in left_out_parts(scores.folds, scores.organs == organ):
        fitted = {name: rule(scores, organ, ~left_out) for name, rule in RULES.items()}
        for row in rows[left_out[rows]]:
            plain.append(float(scores.bare[0][row, level_of(fitted["plain"].threshold)]))
            for name, choice in fitted.items():
                found[name].append(scores.at(row, choice))
    return float(np.mean(plain)), {name: float(np.mean(dice)) for name, dice in found.items()}


def _plain(scores: Scores, organ: str, among: np.ndarray) -> Choice:
    """The best threshold of an organ's mean curve over the slides `among` (S,) bool; over all organs where it has none
    there.
    """
    mine = among & (scores.organs == organ)
    used = mine if mine.any() else among
    return Choice(0, best_threshold(scores.bare[0][used].mean(0)) if used.any() else float(THRESHOLDS[HALF]), {})


def fit_organ(scores: Scores, organ: str, among: np.ndarray, steps: bool = True) -> Choice:
    """The candidate (the first without `steps`) and the thresholds of an organ from the slides `among` (S,) bool.

    Every candidate takes its own robust threshold. The simplest candidate wins that is no more than one standard error,
    taken over the slides' differences, below the best.
    """
    mine = among & (scores.organs == organ)
    found = [
        _robust(curves, scores.organs, mine, among, grid_of(number))
        for number, curves in enumerate(scores.bare if steps else scores.bare[:1])
    ]
    chosen = 0
    if steps and mine.sum() >= FEWEST:
        dice = np.stack([curves[mine, level_of(found[n], grid_of(n))] for n, curves in enumerate(scores.bare)])
        behind = dice[int(dice.mean(1).argmax())] - dice
        chosen = int(np.argmax(behind.mean(1) <= standard_error(behind)))
    return Choice(chosen, found[chosen], _sources(scores, mine, chosen, found[chosen]))


RULES: dict[str, Callable[[Scores, str, np.ndarray], Choice]] = {
    "plain": _plain,
    "robust": partial(fit_organ, steps=False),
    "steps": fit_organ,
}


def _robust(curves: np.ndarray, organs: np.ndarray, mine: np.ndarray, among: np.ndarray, grid: np.ndarray) -> float:
    """The threshold of an organ's mean curve, drawn towards the mean curve of the other organs by PRIOR slides'
    weight.
    """
    others = [curves[among & (organs == organ)].mean(0) for organ in np.unique(organs[among & ~mine])]
    own = curves[mine].sum(0)
    if not mine.any() and not others:
        return float(grid[level_of(0.5, grid)])
    total, weight = (own + PRIOR * np.mean(others, axis=0), mine.sum() + PRIOR) if others else (own, mine.sum())
    return _best(total / weight, grid)


def _sources(scores: Scores, mine: np.ndarray, candidate: int, threshold: float) -> dict[str, float]:
    """The thresholds of an organ's sources, each drawn towards the organ's curve; none unless two sources have enough
    slides.
    """
    names = [
        str(name)
        for name in np.unique(scores.sources[mine])
        if (scores.sources[mine] == name).sum() >= FEWEST_OF_SOURCE
    ]
    if len(names) < 2:
        return {}
    grid, curves = grid_of(candidate), scores.bare[candidate]
    prior = curves[mine].mean(0)
    found = {}
    for name in names:
        rows = mine & (scores.sources == name)
        own = _best((curves[rows].sum(0) + PRIOR * prior) / (rows.sum() + PRIOR), grid)
        gain = curves[rows, level_of(own, grid)] - curves[rows, level_of(threshold, grid)]
        if gain.mean() > standard_error(gain):
            found[name] = own
    return found


def _best(curve: np.ndarray, grid: np.ndarray) -> float:
    """The middle of the top of a curve over `grid`, as a value of the grid."""
    return float(grid[level_of(best_threshold(np.interp(THRESHOLDS, grid, curve)), grid)])


def band(grid: np.ndarray, curves: np.ndarray) -> tuple[float, float]:
    """The thresholds around the peak of the mean of `curves` (n, len(grid)) that are within one standard error of
    it.
    """
    peak = int(curves.mean(0).argmax())
    behind = (curves[:, [peak]] - curves).T
    near = behind.mean(1) <= standard_error(behind)
    first, last = stretch(near, peak)
    return float(grid[first]), float(grid[last])


def standard_error(values: np.ndarray) -> np.ndarray:
    """The standard error of the mean over the last axis; 0 for a single value."""
    count = values.shape[-1]
    return values.std(-1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(values.shape[:-1])
