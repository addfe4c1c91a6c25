"""Coarser detail: what is lost, what stays, and which organs it meets how often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.augment.changes import Resolution, coarsened
from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.config import AugmentConfig


def noise(side: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


def detail(image: np.ndarray) -> float:
    """Mean difference of neighbours along a row."""
    return float(np.abs(np.diff(image.astype(float), axis=1)).mean())


@given(factor=st.floats(0.02, 1.5))
@settings(deadline=None)
def test_detail_goes_with_the_factor_and_size_and_mean_stay(factor: float) -> None:
    image = noise()
    made = coarsened(image, factor)
    assert made.shape == image.shape
    assert made.dtype == np.uint8
    assert abs(made.mean() - image.mean()) < 6
    if factor >= 1:
        assert np.array_equal(made, image)
    elif factor <= 0.5:
        # Neighbours of an image that was made larger by linear interpolation differ by a part of a small pixel's step.
        assert detail(made) < 0.6 * detail(image)


def test_a_gradient_survives() -> None:
    ramp = np.repeat(np.arange(96, dtype=np.uint8)[None, :, None], 96, axis=0).repeat(3, axis=2)
    assert np.abs(coarsened(ramp, 0.25).astype(int) - ramp)[:, 4:-4].max() <= 1


@pytest.mark.parametrize("organ", ORGANS)
def test_each_organ_gets_the_pixel_size_of_its_hubmap_slides(organ: str) -> None:
    image, random = noise(), np.random.default_rng(1)
    made = Resolution(AugmentConfig(hubmap_scale=1))(image, organ, 0.4, random)
    factor = 0.4 / FACTS[organ].um_per_px["Hubmap"]
    assert np.array_equal(made, coarsened(image, factor))
    assert np.array_equal(made, image) == (organ == "largeintestine")  # the only one whose HuBMAP slides are finer


def test_shares_and_organs() -> None:
    image, random = noise(32), np.random.default_rng(2)
    change = Resolution(AugmentConfig(coarse_prostate=0.3))
    changed = {
        organ: np.mean([not np.array_equal(change(image, organ, 0.4, random), image) for _ in range(400)])
        for organ in ("prostate", "lung")
    }
    assert changed["lung"] == 0
    assert 0.2 < changed["prostate"] < 0.4
    assert not Resolution(AugmentConfig())
    assert change
