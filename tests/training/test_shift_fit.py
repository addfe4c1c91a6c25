"""Thresholds for plain and shifted slides alike, against a fit by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hubmap_kit.training.counts import HALF, THRESHOLDS, best_threshold, fit_mixture, level_of


def curves(centres: list[float], width: float = 0.2) -> np.ndarray:
    return 0.9 * np.exp(-(((THRESHOLDS[None] - np.array(centres)[:, None]) / width) ** 2))


def test_the_threshold_lies_between_the_two_kinds_and_is_the_best_for_both() -> None:
    organs, folds = ["kidney"] * 4 + ["lung"] * 4, [0, 1, 0, 1] * 2
    plain, shifted = curves([0.6] * 4 + [0.3] * 4), curves([0.4] * 4 + [0.3] * 4)
    kidney, lung = fit_mixture(organs, folds, plain, shifted, {"kidney": 0.6, "lung": 0.3})
    assert (kidney.organ, kidney.slides, lung.organ, lung.slides) == ("kidney", 4, "lung", 4)
    assert kidney.threshold == pytest.approx(0.5, abs=0.011)
    assert lung.threshold == pytest.approx(0.3, abs=0.011)
    by_hand = (plain[:4] + shifted[:4]).mean(0) / 2
    assert kidney.dice_same == pytest.approx(by_hand[level_of(kidney.threshold)])
    assert kidney.dice_before == pytest.approx(by_hand[level_of(0.6)])
    assert kidney.dice_same > kidney.dice_before + 0.05
    # Every slide is alike, so leaving a fold out changes nothing: the gain is what it seems.
    assert kidney.crossed == pytest.approx(kidney.dice_same)
    assert kidney.crossed_plain == pytest.approx(by_hand[level_of(0.6)], abs=0.01)


def test_cross_fitting_leaves_the_judged_fold_out() -> None:
    """Folds that contradict each other: every slide is judged at the other fold's threshold."""
    plain = shifted = curves([0.2, 0.2, 0.8, 0.8], width=0.1)
    (fit,) = fit_mixture(["spleen"] * 4, [0, 0, 1, 1], plain, shifted, {"spleen": 0.5})
    by_hand = [plain[0, level_of(best_threshold(plain[2]))], plain[2, level_of(best_threshold(plain[0]))]]
    assert fit.crossed == pytest.approx(np.mean(by_hand))
    assert fit.crossed < 0.01
    assert fit.dice_same > 0.4


def test_random_slides_against_a_fit_by_hand() -> None:
    random = np.random.default_rng(5)
    organs, folds = random.choice(["kidney", "lung", "spleen"], 40), random.integers(0, 3, 40)
    plain, shifted = (np.cumsum(random.normal(size=(40, len(THRESHOLDS))), 1) for _ in range(2))
    fits = fit_mixture(list(organs), list(folds), plain, shifted, dict.fromkeys(("kidney", "lung", "spleen"), 0.4))
    assert [fit.organ for fit in fits] == ["kidney", "lung", "spleen"]
    for fit in fits:
        expected = []
        for row in np.flatnonzero(organs == fit.organ):
            rest = [other for other in range(40) if organs[other] == fit.organ and folds[other] != folds[row]]
            threshold = best_threshold(np.mean([0.5 * plain[other] + 0.5 * shifted[other] for other in rest], axis=0))
            expected.append(0.5 * (plain[row] + shifted[row])[level_of(threshold)])
        assert fit.crossed == pytest.approx(np.mean(expected))


def test_one_fold_leaves_single_slides_out_and_a_lone_slide_follows_the_others() -> None:
    plain = curves([0.3, 0.5, 0.8])
    kidney, lung = fit_mixture(["kidney", "kidney", "lung"], [0, 0, 0], plain, plain, {"kidney": 0.5, "lung": 0.5})
    first, second = (plain[row, level_of(best_threshold(plain[1 - row]))] for row in (0, 1))
    assert kidney.crossed == pytest.approx((first + second) / 2)
    assert lung.crossed == pytest.approx(plain[2, level_of(best_threshold(plain[:2].mean(0)))])
    (alone,) = fit_mixture(["lung"], [0], plain[2:], plain[2:], {"lung": 0.5})
    assert alone.crossed == pytest.approx(plain[2, HALF])
