"""Thresholds: which one an organ gets, and which pixels reach it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from hubmap_kit.config import InferenceConfig
from hubmap_kit.inference.postprocess import threshold_for, to_mask


@pytest.mark.parametrize(
    ("organ", "expected"),
    [("lung", 0.11), ("kidney", 0.33), ("spleen", 0.44)],
    ids=["the config's own before the fitted one", "the fitted one before the default", "the default"],
)
def test_order_of_thresholds(organ: str, expected: float) -> None:
    config = InferenceConfig(threshold=0.44, thresholds={"lung": 0.11})
    assert threshold_for(organ, {"lung": 0.22, "kidney": 0.33}, config) == expected


def test_without_anything_fitted() -> None:
    assert threshold_for("lung", {}, InferenceConfig()) == InferenceConfig().threshold


@given(threshold=st.floats(0.01, 0.99), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_mask_holds_exactly_the_pixels_that_reach_it(threshold: float, seed: int) -> None:
    plane = np.random.default_rng(seed).random((13, 17), np.float32)
    mask = to_mask(plane, threshold)
    assert mask.dtype == np.uint8 and mask.shape == plane.shape
    assert mask.tolist() == [[int(value >= np.float32(threshold)) for value in row] for row in plane]


def test_the_threshold_itself_is_inside() -> None:
    assert to_mask(np.float32([[0.5, np.nextafter(np.float32(0.5), np.float32(0))]]), 0.5).tolist() == [[1, 0]]
