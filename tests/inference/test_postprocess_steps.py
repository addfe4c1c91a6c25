"""The steps on a mask against scipy.ndimage, on smooth masks (traced) and on ragged ones (labelled)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hubmap_kit.inference import postprocess

CORNERS = np.ones((3, 3))


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Masks of all kinds: noise of any density, smooth blobs, lines and rings; also with a side of one pixel."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(1, 48), st.integers(1, 48)))
    noise = random.random(shape)
    blur = draw(st.sampled_from([0.0, 0.0, 0.8, 1.5, 3.0]))
    mask = (
        noise < draw(st.floats(0, 1)) if not blur else (ndimage.gaussian_filter(noise, blur) > np.quantile(noise, 0.5))
    )
    if draw(st.booleans()):
        mask = mask ^ ndimage.binary_erosion(mask)  # outlines of one pixel, with holes and parts inside them
    return mask.astype(np.uint8)


def disk(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return y**2 + x**2 <= radius**2


def without_small(mask: np.ndarray, pixels: float) -> np.ndarray:
    labels, count = ndimage.label(mask, CORNERS)
    areas = ndimage.sum_labels(mask, labels, range(count + 1))
    return np.isin(labels, [label for label in range(1, count + 1) if areas[label] >= pixels])


@pytest.fixture(params=["as chosen", "outlines", "labels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways must be right on every mask, whichever is faster."""
    if request.param != "as chosen":
        monkeypatch.setattr(postprocess, "RAGGED", -1.0 if request.param == "labels" else 2.0)


def check(mask: np.ndarray, found: np.ndarray, wanted: np.ndarray, before: bytes) -> None:
    assert found.dtype == np.uint8 and found.shape == mask.shape
    np.testing.assert_array_equal(found, wanted)
    assert mask.tobytes() == before, "the mask that was given was changed"


@pytest.mark.usefixtures("way")
def test_fill_holes_is_scipys() -> None:
    @given(mask=masks())
    @settings(deadline=None, max_examples=150)
    def holds(mask: np.ndarray) -> None:
        check(mask, postprocess.fill_holes(mask), ndimage.binary_fill_holes(mask), mask.tobytes())

    holds()


@pytest.mark.usefixtures("way")
def test_drop_small_is_scipys() -> None:
    @given(mask=masks(), pixels=st.one_of(st.integers(1, 40), st.floats(0.1, 40)))
    @settings(deadline=None, max_examples=150)
    def holds(mask: np.ndarray, pixels: float) -> None:
        check(mask, postprocess.drop_small(mask, pixels), without_small(mask, pixels), mask.tobytes())

    holds()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("pixels", [11, 12, 13])
def test_a_part_is_measured_to_the_pixel(pixels: int) -> None:
    """A part of exactly 12 pixels around a hole with a part in it: neither the hole nor what lies in it counts."""
    mask = np.zeros((40, 40), np.uint8)
    mask[10:14, 10:14], mask[11:13, 11:13] = 1, 0  # a ring of 12
    mask[20:35, 20:35], mask[22:33, 22:33], mask[25:30, 25:30] = 1, 0, 1  # a wide ring around a square of 25
    kept = postprocess.drop_small(mask, pixels)
    assert kept[10:14, 10:14].sum() == (12 if pixels <= 12 else 0)
    assert kept[25:30, 25:30].all() and not kept[22:25, 22:33].any()
    np.testing.assert_array_equal(postprocess.drop_small(mask, 26)[25:30, 25:30], 0)


@given(mask=masks(), radius=st.integers(0, 15))
@settings(deadline=None, max_examples=150)
def test_erosion_and_opening_are_scipys(mask: np.ndarray, radius: int) -> None:
    core = ndimage.binary_erosion(mask, disk(radius), border_value=1)
    check(mask, postprocess.erode(mask, radius), core, mask.tobytes())
    check(mask, postprocess.opening(mask, radius), ndimage.binary_dilation(core, disk(radius)), mask.tobytes())


@pytest.mark.parametrize("radius", [postprocess.LARGEST_KERNEL, postprocess.LARGEST_KERNEL + 1, 30])
def test_large_disks(radius: int) -> None:
    mask = (ndimage.gaussian_filter(np.random.default_rng(radius).random((300, 220)), 16) > 0.5).astype(np.uint8)
    core = ndimage.binary_erosion(mask, disk(radius), border_value=1)
    np.testing.assert_array_equal(postprocess.erode(mask, radius), core)
    np.testing.assert_array_equal(postprocess.opening(mask, radius), ndimage.binary_dilation(core, disk(radius)))


@pytest.mark.parametrize("radius", [3, 14])
@pytest.mark.parametrize("value", [0, 1])
def test_empty_and_full_masks_stay_as_they_are(radius: int, value: int) -> None:
    mask = np.full((50, 40), value, np.uint8)
    for found in (
        postprocess.fill_holes(mask),
        postprocess.drop_small(mask, 5),
        postprocess.erode(mask, radius),
        postprocess.opening(mask, radius),
    ):
        np.testing.assert_array_equal(found, mask)


def test_a_unit_that_the_border_cuts_is_not_shrunk_there() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[:12, 10:30] = 1
    wanted = np.zeros_like(mask)
    wanted[:9, 13:27] = 1
    found = postprocess.erode(mask, 3)
    np.testing.assert_array_equal(found[:6], wanted[:6])
    assert found[0, 13:27].all() and not found[9:].any()
