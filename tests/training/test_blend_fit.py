"""Weights of runs against brute force over the simplex, and grouped pixels against the counts of all pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.training.blend import (
    Pixels,
    blend_organ,
    crossed,
    curves,
    distance,
    equal,
    fit_weights,
    greedy,
    group,
    joined,
    likeness,
    objective,
)
from hubmap_kit.training.counts import dice_curve, threshold_counts

Slide = tuple[np.ndarray, np.ndarray]  # planes (runs, h, w) uint8, truth (h, w) bool


def complementary(seed: int, side: int = 40) -> Slide:
    """Run 0 knows the left half and is unsure of the right, run 1 the other way round, run 2 draws lots."""
    random = np.random.default_rng(seed)
    truth = random.random((side, side)) < 0.3
    sure, unsure = (
        np.where(truth, 160, 70) + random.integers(-40, 41, truth.shape),
        random.integers(80, 151, truth.shape),
    )
    left = np.arange(side) < side // 2
    planes = [np.where(left, sure, unsure), np.where(left, unsure, sure), random.integers(0, 256, truth.shape)]
    return np.stack(planes).astype(np.uint8), truth


def mean_dice(slides: list[Slide], weights: np.ndarray) -> float:
    """Mean Dice at the best threshold, counted on all pixels."""
    means = [np.minimum(np.tensordot(weights, planes / 255, 1), 1).astype(np.float32) for planes, _ in slides]
    found = [dice_curve(threshold_counts(mean, truth)) for mean, (_, truth) in zip(means, slides, strict=True)]
    return float(np.mean(found, axis=0).max())


def simplex(runs: int, steps: int) -> list[np.ndarray]:
    return [
        np.array(point) / steps for point in itertools.product(range(steps + 1), repeat=runs) if sum(point) == steps
    ]


@pytest.mark.parametrize("strength", [0.0, 0.05])
def test_weights_are_as_good_as_the_best_of_a_grid(strength: float) -> None:
    slides = [complementary(seed) for seed in range(6)]
    found = fit_weights(joined([group(*slide, 10_000) for slide in slides]), strength)
    grid = {tuple(each): mean_dice(slides, each) - strength / 6 * distance(each) for each in simplex(3, 20)}
    best = max(grid, key=lambda each: grid[each])
    assert found.sum() == pytest.approx(1) and (found >= 0).all()
    assert mean_dice(slides, found) - strength / 6 * distance(found) >= grid[best] - 0.003
    assert found[2] <= 0.05 and best[2] <= 0.05 and abs(found[0] - found[1]) < 0.1


def test_identical_runs_get_equal_weights() -> None:
    parts = []
    for seed in range(4):
        planes, truth = complementary(seed)
        parts.append(group(planes[[0, 0, 0]], truth, 10_000))
    assert np.array_equal(fit_weights(joined(parts)), equal(3))


def test_a_strong_penalty_keeps_the_plain_mean_and_none_takes_the_best_run() -> None:
    random = np.random.default_rng(0)
    truth = random.random((40, 40)) < 0.3
    planes = np.stack([np.where(truth, 200, 30), random.integers(0, 256, truth.shape)]).astype(np.uint8)
    pixels = group(planes, truth, 10_000)
    assert fit_weights(pixels, 0.0)[0] > 0.6 and objective(pixels, fit_weights(pixels, 0.0), 0.0) == 1.0
    assert np.abs(fit_weights(pixels, 1e3) - 0.5).max() < 0.02


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 30), st.integers(1, 30))
def test_grouped_pixels_give_the_counts_of_all(seed: int, runs: int, height: int, width: int) -> None:
    """Exactly, where probabilities of one group are all the same."""
    random = np.random.default_rng(seed)
    planes = (random.integers(0, 64, (runs, height, width)) * 4).astype(np.uint8)
    truth = random.random((height, width)) < 0.4
    weights = np.eye(runs)[seed % runs]
    expected = dice_curve(threshold_counts(planes[seed % runs] / np.float32(255), truth))
    np.testing.assert_allclose(curves(group(planes, truth, 10_000), weights)[0], expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 200))
def test_sampled_groups_stand_for_all_pixels(seed: int, most: int) -> None:
    planes, truth = complementary(seed)
    pixels = group(planes, truth, most)
    assert len(pixels.slide) == most
    assert pixels.true.sum() + pixels.false.sum() == pytest.approx(truth.size)


def test_sampling_hardly_changes_the_mean_curve() -> None:
    """One pixel in twenty of noise is a hard case: errors of single slides come to 0.06, and cancel out over slides."""
    slides = [complementary(seed, 200) for seed in range(12)]
    few, all_of_them = (joined([group(*slide, most) for slide in slides]) for most in (2000, 10**6))
    assert len(few.slide) == 24_000 < len(all_of_them.slide) / 10
    for weights in (equal(3), np.eye(3)[0], np.array([0.5, 0.5, 0.0])):
        np.testing.assert_allclose(curves(few, weights).mean(0), curves(all_of_them, weights).mean(0), atol=0.03)


def test_the_greedy_order_begins_with_the_best_run_and_adds_up() -> None:
    parts = []
    for seed in range(6):
        planes, truth = complementary(seed)
        parts.append(group(planes[[2, 0, 1]], truth, 10_000))
    steps = greedy([joined(parts)], [np.arange(6) % 2])
    assert [step.run for step in steps][-1] == 0 and sorted(step.run for step in steps) == [0, 1, 2]
    assert steps[1].gain > 0.02 > steps[2].gain
    np.testing.assert_allclose(np.cumsum([step.gain for step in steps]), [step.dice for step in steps])


def test_crossed_dice_knows_nothing_of_its_own_part() -> None:
    """Turning one part's own slides round changes their Dice, not the threshold at which it is read."""
    random = np.random.default_rng(0)
    found, parts = random.random((8, 199)), np.repeat([0, 1], 4)
    other = found.copy()
    other[:4] = random.random((4, 199))
    np.testing.assert_array_equal(
        crossed(other, parts)[:4], [row[np.flatnonzero(found[0] == crossed(found, parts)[0])[0]] for row in other[:4]]
    )


def test_what_is_told_is_fitted_without_the_fold_that_is_judged() -> None:
    """In fold 1 the runs change roles: weights of the other fold are the wrong ones there, so the told gain is none,
    and equal ones stay.
    """
    slides, grouped = {}, []
    for place in range(8):
        planes, truth = complementary(place)
        good, noise = np.where(truth, 200, 60).astype(np.uint8), planes[2]
        planes = np.stack([good, noise] if place < 4 else [noise, good])
        slides[str(place)] = (planes, truth, np.ones(truth.shape, bool))
        grouped.append(group(planes, truth, 10_000))
    found = blend_organ("kidney", list(slides), np.arange(8) // 4, grouped, slides.__getitem__, 0.05)
    assert found.blend.mean() < found.even.mean() and found.used == "equal" and np.array_equal(found.weights, equal(2))
    mixed = blend_organ(
        "kidney",
        list(slides),
        np.arange(8) % 2,
        [group(slides[str(k % 4)][0], slides[str(k % 4)][1], 10_000) for k in range(8)],
        lambda slide_id: slides[str(int(slide_id) % 4)],
        0.05,
    )
    assert mixed.used == "fitted" and mixed.weights[0] > 0.55 and mixed.blend.mean() > mixed.even.mean()


def test_likeness_against_numpy() -> None:
    planes, truth = complementary(0)
    tissue = np.zeros(truth.shape, bool)
    tissue[5:30, 5:30] = True
    found = blend_organ(
        "lung", ["a"], np.array([0]), [group(planes, truth, 10_000)], lambda _: (planes, truth, tissue), 0.5
    )
    assert found.used == "equal" and found.threshold == 0.5  # a single slide teaches nothing
    correlation, overlap = likeness([found], lambda _: (planes, truth, tissue))
    np.testing.assert_allclose(correlation, np.corrcoef(planes[:, 5:30, 5:30].reshape(3, -1)))
    np.testing.assert_allclose(np.diag(overlap), 1)
    one, two = (planes[run] >= 255 * found.thresholds[run] for run in (0, 1))
    assert overlap[0, 1] == pytest.approx(2 * (one & two).sum() / (one.sum() + two.sum()))


def test_joined_slides_keep_their_own_counts() -> None:
    parts = [group(*complementary(seed), 10_000) for seed in range(3)]
    whole: Pixels = joined(parts)
    np.testing.assert_array_equal(curves(whole, equal(3)), np.concatenate([curves(part, equal(3)) for part in parts]))
