"""Pictures and tiles: image and mask stay together through every conversion, and nothing is lost that was not meant to
be.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.tiles.convert_config import ConvertConfig
from hubmap_kit.tiles.grid import axis_starts
from hubmap_kit.tiles.writers import cut, plan, tile_corners, union

KINDS, PADS = ("grid", "resize", "crop", "crop+grid", "pad"), ("reflect", "white", "mean")


@st.composite
def cases(draw: st.DrawFn) -> tuple[ConvertConfig, tuple[int, int], tuple[int, int, int, int]]:
    height, width = draw(st.integers(1, 260)), draw(st.integers(1, 260))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    box = top, left, draw(st.integers(top + 1, height)), draw(st.integers(left + 1, width))
    config = ConvertConfig(
        kind=draw(st.sampled_from(KINDS)),
        size=draw(st.integers(32, 70)),
        reduce=draw(st.sampled_from([1, 2, 4])),
        format="png",
        overlap=draw(st.sampled_from([0.0, 0.25, 0.5])),
        edge=draw(st.sampled_from(["pad", "shift", "drop"])),
        canvas=draw(st.integers(280, 400)),
        keep_scale=draw(st.booleans()),
        pad=draw(st.sampled_from(PADS)),
    )
    return config, (height, width), box


@given(case=cases(), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=300)
def test_a_marker_drawn_into_image_and_mask_stays_together(case: tuple, seed: int) -> None:
    """The blue channel is the mask times 255, and both go through the same resampling, so they must agree in every
    pixel.
    """
    config, shape, box = case
    random = np.random.default_rng(seed)
    mask = (random.random(shape) < 0.5).astype(np.uint8)
    image = random.integers(0, 256, (*shape, 3), np.uint8)
    image[..., 2] = mask * 255
    picture = plan(config, *shape, box)
    assert (picture.rows, picture.cols) == (
        plan(config, *shape).rows,
        plan(config, *shape).cols,
    )  # known without pixels
    pixels, label = cut(picture, image, mask, config.pad)
    assert (
        pixels.shape == (picture.rows, picture.cols, 3)
        and label.shape == pixels.shape[:2]
        and set(np.unique(label)) <= {0, 1}
    )
    top, bottom, left, right = picture.inside(*shape)[1]
    inner = slice(top, picture.rows - bottom), slice(left, picture.cols - right)
    np.testing.assert_array_equal(label[inner], pixels[inner][..., 2] >= 128)
    if config.pad == "reflect":
        np.testing.assert_array_equal(label, pixels[..., 2] >= 128)
    else:
        assert label.sum() == label[inner].sum()  # no mask on padding
    corners = tile_corners(config, picture.rows, picture.cols)
    if config.tiled:
        assert not len(corners) or ((corners >= 0).all() and (corners.max(axis=0) + config.size <= label.shape).all())


@given(case=cases())
@settings(deadline=None, max_examples=300)
def test_a_fitted_crop_shows_all_of_the_tissue_and_a_kept_scale_is_kept(case: tuple) -> None:
    config, shape, (top, left, bottom, right) = case
    if not config.cropped:
        return
    picture = plan(config.model_copy(update={"kind": "crop"}), *shape, (top, left, bottom, right))
    assert picture.rows == picture.cols == round(config.canvas / config.reduce)
    assert picture.top <= top and picture.left <= left  # a canvas of 280 px and more holds every slide of this test
    assert picture.top + picture.height >= bottom and picture.left + picture.width >= right
    assert picture.height == picture.width == (config.canvas if config.keep_scale else max(bottom - top, right - left))


def test_a_canvas_that_is_too_small_shows_the_middle_of_the_tissue() -> None:
    picture = plan(ConvertConfig(kind="crop", canvas=200, keep_scale=True), 1000, 1000, (100, 500, 700, 900))
    assert (picture.top, picture.left, picture.rows) == (300, 600, 200)


def test_padding_colours_and_mirrors() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    mask = (image[..., 0] > 128).astype(np.uint8)
    outcome = {pad: cut(plan(ConvertConfig(kind="pad", size=64, pad=pad), 50, 40), image, mask, pad) for pad in PADS}
    np.testing.assert_array_equal(outcome["reflect"][0], np.pad(image, [(0, 14), (0, 24), (0, 0)], mode="symmetric"))
    np.testing.assert_array_equal(outcome["reflect"][1], np.pad(mask, [(0, 14), (0, 24)], mode="symmetric"))
    assert (outcome["white"][0][50:] == 255).all() and (outcome["white"][0][:, 40:] == 255).all()
    assert np.abs(outcome["mean"][0][60, 60] - image.mean((0, 1))).max() <= 0.5 + 1e-6


def test_a_resized_slide_keeps_its_proportions() -> None:
    picture = plan(ConvertConfig(kind="resize", size=512), 522, 775)
    assert picture.inside(522, 775)[1] == (0, 512 - round(522 * 512 / 775), 0, 0)


@given(length=st.integers(1, 400), size=st.integers(1, 120), overlap=st.floats(0, 0.95))
@settings(deadline=None, max_examples=300)
def test_edges(length: int, size: int, overlap: float) -> None:
    padded, shifted, dropped = (axis_starts(length, size, overlap, edge) for edge in ("pad", "shift", "drop"))
    assert len(shifted) == len(padded) and shifted[:-1] == padded[:-1]
    assert dropped == [start for start in padded if start + size <= length]
    if length >= size:
        assert shifted[-1] == length - size
    else:
        assert shifted == padded == [0] and not dropped


def test_union() -> None:
    assert union((1, 5, 9, 9), (3, 2, 4, 20)) == (1, 2, 9, 20)
    assert union(None, (1, 2, 3, 4)) == union((1, 2, 3, 4), None) == (1, 2, 3, 4) and union(None, None) is None


def test_boxes_of_tiles_are_places_on_the_slide() -> None:
    """Two tiles a side at half size on a canvas of 1024 px that begins at (100, 300)."""
    config = ConvertConfig(kind="crop+grid", size=256, reduce=2, canvas=1024, keep_scale=True)
    picture = plan(config, 2048, 2048, (100 + 212, 300 + 212, 100 + 812, 300 + 812))
    boxes = picture.boxes(tile_corners(config, picture.rows, picture.cols), 256, 256)
    assert boxes.tolist() == [
        [100, 300, 612, 812],
        [100, 812, 612, 1324],
        [612, 300, 1124, 812],
        [612, 812, 1124, 1324],
    ]
