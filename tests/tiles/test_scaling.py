"""Scale: both policies against arithmetic, and the resampling against plain block means."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.competition.organs import FACTS
from hubmap_kit.config import ScaleConfig
from hubmap_kit.tiles.scaling import finest_um, resize_image, resize_mask, resize_plane, scaled_shape


def physical(um_per_px: float, max_zoom: float = 4.0) -> ScaleConfig:
    return ScaleConfig(policy="physical", um_per_px=um_per_px, max_zoom=max_zoom)


def block_mean(values: np.ndarray, factor: int) -> np.ndarray:
    height, width = values.shape[:2]
    return values.reshape(height // factor, factor, width // factor, factor, *values.shape[2:]).mean((1, 3))


@pytest.mark.parametrize("reduce", [1, 2, 4])
@given(height=st.integers(1, 5000), width=st.integers(1, 5000), um_per_px=st.floats(0.2, 7))
@settings(deadline=None)
def test_reduce_divides_whatever_the_pixel_size(reduce: int, height: int, width: int, um_per_px: float) -> None:
    found = scaled_shape(height, width, um_per_px, ScaleConfig(reduce=reduce))
    for old, new in zip((height, width), found, strict=True):
        assert new >= 1 and abs(new - old / reduce) <= max(0.5, 1 - old / reduce)


@given(target=st.floats(0.3, 8))
@settings(deadline=None)
def test_physical_brings_every_source_to_one_scale(target: float) -> None:
    """A piece of tissue 1.2 mm wide has the same number of network pixels from every scanner."""
    sizes = {(organ, source): size for organ, facts in FACTS.items() for source, size in facts.um_per_px.items()}
    assert len(set(sizes.values())) > 4
    for um_per_px in sizes.values():
        side = round(1200 / um_per_px)
        rows, cols = scaled_shape(side, side, um_per_px, physical(target, max_zoom=100))
        assert rows == cols
        assert abs(rows - side * um_per_px / target) <= 0.5 + 1e-9
        assert side * um_per_px / rows == pytest.approx(target, rel=0.6 / rows)


def test_enlarging_is_clamped() -> None:
    # The coarsest slides of the competition: prostate of HuBMAP, 160 px of 6.263 um. 0.8 um would ask for a zoom of
    # 7.8.
    assert scaled_shape(160, 160, 6.263, physical(0.8)) == (640, 640)
    assert scaled_shape(160, 160, 6.263, physical(0.8, max_zoom=1)) == (160, 160)
    assert scaled_shape(160, 160, 6.263, physical(0.8, max_zoom=100)) == (1253, 1253)  # 1002.08 um / 0.8 um = 1252.6
    assert scaled_shape(160, 160, 6.263, physical(6.263)) == (160, 160)


def test_shrinking_is_never_clamped_and_never_empty() -> None:
    assert scaled_shape(4500, 4500, 0.229, physical(2.29)) == (450, 450)
    assert scaled_shape(1, 3, 0.2, physical(8.0)) == (1, 1)
    assert scaled_shape(1, 1, 0.4, ScaleConfig(reduce=4)) == (1, 1)


@pytest.mark.parametrize("factor", [2, 4])
def test_shrunk_images_are_block_means(factor: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
    small = resize_image(image, (48 // factor, 80 // factor))
    assert small.dtype == np.uint8
    assert np.abs(small - block_mean(image.astype(float), factor)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("factor", [2, 4])
def test_shrunk_masks_keep_pixels_that_are_half_inside(factor: int) -> None:
    mask = (np.random.default_rng(1).random((96, 160)) < 0.5).astype(np.uint8)
    share = block_mean(mask.astype(float), factor)
    assert (share == 0.5).any() and (share < 0.5).any() and (share > 0.5).any()
    np.testing.assert_array_equal(resize_mask(mask, share.shape), (share >= 0.5).astype(np.uint8))


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    rows=st.integers(1, 90),
    cols=st.integers(1, 90),
    seed=st.integers(0, 999),
)
@settings(deadline=None)
def test_resampling_keeps_types_ranges_and_plain_pictures(
    height: int, width: int, rows: int, cols: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    mask = resize_mask((random.random((height, width)) < 0.5).astype(np.uint8), (rows, cols))
    assert mask.shape == (rows, cols) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
    plane = resize_plane(random.random((height, width), np.float32), (rows, cols))
    assert plane.shape == (rows, cols) and plane.dtype == np.float32
    assert plane.min() >= -1e-5 and plane.max() <= 1 + 1e-5  # thousands of float32 pixels may be summed into one
    image = resize_image(np.full((height, width, 3), (10, 120, 250), np.uint8), (rows, cols))
    assert image.shape == (rows, cols, 3) and (image == (10, 120, 250)).all()
    assert resize_mask(np.ones((height, width), np.uint8), (rows, cols)).all()
    np.testing.assert_allclose(resize_plane(np.full((height, width), 0.3, np.float32), (rows, cols)), 0.3, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (256, 256), (50, 60), (201, 180)])
def test_there_and_back_stays_in_place(shape: tuple[int, int]) -> None:
    """The centre of mass of a disc must not wander by a fraction of a pixel: masks would be shifted against their
    slide.
    """
    rows, cols = np.mgrid[:128, :128]
    disc = ((rows - 40) ** 2 + (cols - 77) ** 2 < 24**2).astype(np.float32)
    back = resize_plane(resize_plane(disc, shape), (128, 128))
    centre = [(back * axis).sum() / back.sum() for axis in (rows, cols)]
    assert centre == pytest.approx([40, 77], abs=0.15)


def test_nothing_is_resampled_without_need() -> None:
    image = np.random.default_rng(2).integers(0, 256, (30, 20, 3), np.uint8)
    assert resize_image(image, (30, 20)) is image


@given(
    height=st.integers(1, 6000), width=st.integers(1, 6000), um_per_px=st.floats(0.1, 10), side=st.integers(64, 2000)
)
def test_fit_brings_the_longer_side_to_the_same_length_whatever_the_slide(
    height: int, width: int, um_per_px: float, side: int
) -> None:
    rows, cols = scaled_shape(height, width, um_per_px, ScaleConfig(policy="fit", fit=side))
    assert max(rows, cols) == side
    assert abs(rows * width - cols * height) <= max(height, width) or min(rows, cols) == 1


def test_an_organ_with_choices_of_its_own_has_them() -> None:
    scale = ScaleConfig(
        policy="physical",
        um_per_px=0.8,
        organs={"prostate": {"policy": "fit", "fit": 768}, "lung": {"policy": "reduce", "reduce": 4}},
    )
    assert scaled_shape(160, 160, 6.263, scale, "prostate") == (768, 768)
    assert scaled_shape(3000, 3000, 0.4, scale, "lung") == (750, 750)
    assert scaled_shape(3000, 3000, 0.4, scale, "kidney") == (1500, 1500)
    assert finest_um(scale, "kidney") == 0.8
    assert finest_um(scale, "lung") == pytest.approx(4 * 0.229)
