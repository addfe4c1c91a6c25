"""Counts at all thresholds at once, against thresholding one by one; and the choice of a threshold on made-up
curves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hubmap_kit.competition.metric import dice
from hubmap_kit.training.counts import (
    HALF,
    THRESHOLDS,
    best_threshold,
    dice_curve,
    fit_thresholds,
    from_table,
    mean_curves,
    threshold_counts,
    to_table,
)

PLANES = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8), elements=st.floats(0, 1, width=32)
)


def by_hand(plane: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The plane compared with each threshold, counted one by one."""
    masks = [(plane >= np.float32(threshold)).astype(np.uint8) for threshold in THRESHOLDS]
    return np.array(
        [[(mask & truth).sum() for mask in masks], [mask.sum() for mask in masks], [truth.sum()] * len(masks)]
    )


def test_thresholds_are_the_documented_ones() -> None:
    assert len(THRESHOLDS) == 199 and THRESHOLDS[0] == 0.005 and THRESHOLDS[-1] == 0.995 and THRESHOLDS[HALF] == 0.5


@given(plane=PLANES, seed=st.integers(0, 2**32 - 1), density=st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_counts_equal_thresholding_one_by_one(plane: np.ndarray, seed: int, density: float) -> None:
    truth = (np.random.default_rng(seed).random(plane.shape) < density).astype(np.uint8)
    found = threshold_counts(plane, truth)
    assert found.shape == (3, 199) and found.dtype == np.int64
    # A plane value within rounding of a threshold may fall on either side of it; the next test looks at those.
    near = np.abs(plane * 200.0 - np.round(plane * 200.0)) < 1e-4
    if not near.any():
        np.testing.assert_array_equal(found, by_hand(plane, truth))
    else:
        assert np.abs(found - by_hand(plane, truth)).max() <= near.sum()


def test_values_on_a_threshold_count_as_the_mask_counts_them() -> None:
    """The float32 nearest to each threshold, and its neighbours: the sweep must see the masks that a submission would
    hold.
    """
    exact = THRESHOLDS.astype(np.float32)
    for plane in (exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(1))):
        truth = np.ones((1, len(plane)), np.uint8)
        np.testing.assert_array_equal(threshold_counts(plane[None], truth), by_hand(plane[None], truth))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("inside", [0, 1])
def test_the_ends_of_the_range(value: float, inside: int) -> None:
    plane, truth = np.full((4, 5), value, np.float32), np.full((4, 5), inside, np.uint8)
    np.testing.assert_array_equal(threshold_counts(plane, truth), by_hand(plane, truth))


@given(plane=PLANES, seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.0, 0.3, 1.0]))
@settings(deadline=None, max_examples=60)
def test_the_curve_is_the_competitions_dice(plane: np.ndarray, seed: int, density: float) -> None:
    plane = (np.floor(plane * 300) + 0.5) / np.float32(301)  # off every threshold
    truth = (np.random.default_rng(seed).random(plane.shape) < density).astype(np.uint8)
    expected = [dice((plane >= np.float32(threshold)).astype(np.uint8), truth) for threshold in THRESHOLDS]
    np.testing.assert_allclose(dice_curve(threshold_counts(plane, truth)), expected, atol=1e-12)


def test_an_empty_prediction_of_an_empty_truth_is_right() -> None:
    curve = dice_curve(threshold_counts(np.full((6, 6), 0.3025, np.float32), np.zeros((6, 6), np.uint8)))
    assert (curve[THRESHOLDS <= 0.3] == 0).all() and (curve[THRESHOLDS > 0.305] == 1).all()


def test_curves_of_many_slides_at_once() -> None:
    random = np.random.default_rng(0)
    planes, truths = random.random((4, 9, 9), np.float32), (random.random((4, 9, 9)) < 0.4).astype(np.uint8)
    stack = np.stack([threshold_counts(plane, truth) for plane, truth in zip(planes, truths, strict=True)])
    np.testing.assert_array_equal(dice_curve(stack), [dice_curve(each) for each in stack])
    curves = mean_curves(dice_curve(stack), np.array(["lung", "kidney", "lung", "lung"]))
    assert set(curves) == {"lung", "kidney"}
    np.testing.assert_allclose(curves["lung"], dice_curve(stack)[[0, 2, 3]].mean(0))
    assert set(fit_thresholds(curves)) == {"lung", "kidney"}


def test_slides_are_not_pooled() -> None:
    """The mean of two slides' Dice, not the Dice of their pixels together."""
    small, large = np.zeros((2, 2), np.float32), np.ones((100, 100), np.float32)
    counts = np.stack([threshold_counts(plane, np.ones(plane.shape, np.uint8)) for plane in (small, large)])
    assert mean_curves(dice_curve(counts), np.array(["lung", "lung"]))["lung"][HALF] == 0.5


def bump(centre: float, width: float) -> np.ndarray:
    return np.exp(-(((THRESHOLDS - centre) / width) ** 2))


@pytest.mark.parametrize("centre", [0.2, 0.5, 0.735])
def test_a_single_peak(centre: float) -> None:
    assert best_threshold(bump(centre, 0.02)) == pytest.approx(centre, abs=1e-9)


def test_a_flat_top_gives_its_middle() -> None:
    curve = np.where((THRESHOLDS > 0.3) & (THRESHOLDS < 0.6), 0.8, 0.5)
    assert best_threshold(curve) == pytest.approx(0.45, abs=0.0051)
    curve[np.isclose(THRESHOLDS, 0.31)] += 0.0005  # noise on the top must not pull the choice to its edge
    assert best_threshold(curve) == pytest.approx(0.45, abs=0.0051)


def test_a_top_is_one_piece() -> None:
    """Of two separate peaks the higher one counts alone: the middle between them may be a valley."""
    curve = 0.9 * bump(0.2, 0.02) + 0.8995 * bump(0.8, 0.02)
    assert best_threshold(curve) == pytest.approx(0.2, abs=0.0051)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        (1 - THRESHOLDS, 0.005),
        (THRESHOLDS, 0.995),
        (np.full(199, 0.7), 0.5),
        (np.zeros(199), 0.5),
        (np.ones(199), 0.5),
        (np.where(THRESHOLDS < 0.1, 0.9, 0.1), 0.05),
        (np.where(THRESHOLDS > 0.9, 0.9, 0.1), 0.95),
    ],
)
def test_peaks_at_the_ends_and_flat_curves(curve: np.ndarray, expected: float) -> None:
    assert best_threshold(curve) == pytest.approx(expected, abs=0.0051)


@given(hnp.arrays(np.float64, 199, elements=st.floats(0, 1)))
@settings(deadline=None, max_examples=100)
def test_the_choice_is_never_far_below_the_best(curve: np.ndarray) -> None:
    """The top is connected, so its middle lies within 0.001 of the peak too."""
    chosen = int(np.argmin(np.abs(THRESHOLDS - best_threshold(curve))))
    assert curve[chosen] >= curve.max() - 0.001


def test_tables_go_through_parquet_and_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids = ["10078", "62", "slide_c", "7"]
    counts = random.integers(0, 20_000_000, (4, 3, 199))
    to_table(ids, counts).to_parquet(tmp_path / "counts.parquet")
    found_ids, found = from_table(pd.read_parquet(tmp_path / "counts.parquet"))
    assert found_ids == ids and all(isinstance(name, str) for name in found_ids)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, counts)


def test_a_table_row_means_what_its_columns_say() -> None:
    plane = np.random.default_rng(1).random((11, 13), np.float32)
    truth = (plane > 0.6).astype(np.uint8)
    table = to_table(["a", "b"], np.stack([threshold_counts(plane, truth), threshold_counts(plane, 1 - truth)]))
    assert list(table.columns) == ["id", "threshold", "common", "predicted", "truth"] and len(table) == 2 * 199
    row = table[(table["id"] == "b") & np.isclose(table["threshold"], 0.35)].iloc[0]
    mask = (plane >= np.float32(0.35)).astype(np.uint8)
    assert (row["common"], row["predicted"], row["truth"]) == (
        (mask & (1 - truth)).sum(),
        mask.sum(),
        (1 - truth).sum(),
    )
