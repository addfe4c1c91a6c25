"""The competition's Dice against its definition on sets of pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hubmap_kit.competition import metric

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.int16, shape, elements=st.integers(0, 5))] * 2))


@settings(deadline=None)
@given(pair=PAIRS)
def test_dice_is_the_set_definition(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = ({tuple(pixel) for pixel in np.argwhere(mask)} for mask in pair)
    expected = 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0
    assert metric.dice(*pair) == pytest.approx(expected, abs=1e-12)
    assert metric.dice(pair[1].astype(bool), pair[0].astype(np.float32)) == pytest.approx(expected, abs=1e-12)


def test_empty_masks() -> None:
    empty, one = np.zeros((4, 5), np.uint8), np.eye(4, 5, dtype=np.uint8)
    assert metric.dice(empty, empty) == 1.0
    assert metric.dice(empty, one) == metric.dice(one, empty) == 0.0


def test_values_above_one_do_not_overflow() -> None:
    inside = np.full((300, 300), 255, np.uint8)
    assert metric.dice(inside, inside) == 1.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        metric.dice(np.ones((3, 4)), np.ones((4, 3)))


def test_counts_of_several_slides_at_once() -> None:
    scores = metric.dice_from_counts([0, 3, 0, 5], [0, 4, 7, 5], [0, 2, 0, 5])
    assert scores.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert metric.dice_from_counts(np.ones((2, 1)), np.ones((2, 3)), np.full((2, 3), 3)).tolist() == [[0.5] * 3] * 2


def test_counts_do_not_warn_or_overflow() -> None:
    with np.errstate(all="raise"):
        big = np.int64(4500) ** 2 * 1000
        assert metric.dice_from_counts(big, big, big) == 1.0


def test_summary_is_a_mean_over_slides_not_over_organs() -> None:
    rows = [
        {"organ": "kidney", "source": "HPA", "dice": 1.0},
        {"organ": "kidney", "source": "HPA", "dice": 0.5},
        {"organ": "lung", "source": "Hubmap", "dice": 0.0},
    ]
    summary = metric.summarise(rows)
    assert summary == {
        "all": {"dice": 0.5, "n": 3},
        "kidney": {"dice": 0.75, "n": 2},
        "lung": {"dice": 0.0, "n": 1},
        "HPA": {"dice": 0.75, "n": 2},
        "Hubmap": {"dice": 0.0, "n": 1},
    }


def test_summary_of_nothing() -> None:
    summary = metric.summarise([])
    assert list(summary) == ["all"] and summary["all"]["n"] == 0 and math.isnan(summary["all"]["dice"])
