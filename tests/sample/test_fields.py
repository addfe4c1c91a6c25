"""Properties of the random fields and outlines."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from hubmap_kit.sample import fields
from hubmap_kit.sample.generate import write_tiff

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(8, 90), st.integers(8, 90))
few = settings(deadline=None, max_examples=25)


@few
@given(seeds, shapes, st.floats(0.3, 60), st.integers(1, 3))
def test_noise_is_normalised_at_every_period(seed: int, shape: tuple[int, int], period: float, octaves: int) -> None:
    noise = fields.smooth_noise(np.random.default_rng(seed), shape, period, octaves)
    assert noise.shape == shape and noise.dtype == np.float32 and np.isfinite(noise).all()
    assert abs(float(noise.mean())) < 1e-3 and abs(float(noise.std()) - 1) < 1e-2


@few
@given(seeds, shapes, st.floats(1.5, 30))
def test_packed_points_are_inside_and_dense(seed: int, shape: tuple[int, int], spacing: float) -> None:
    points = fields.hex_points(np.random.default_rng(seed), shape, spacing)
    assert fields.at(np.zeros(shape), points).shape == (len(points),)  # an index outside would raise
    assert (points >= 0).all() and (points < [shape[1], shape[0]]).all()


def test_points_rounded_up_to_the_edge_are_dropped() -> None:
    for seed in range(300):
        points = fields.hex_points(np.random.default_rng(seed), (512, 512), 3.0)
        fields.at(np.zeros((512, 512), np.uint8), points)


@few
@given(seeds, st.integers(40, 120), st.floats(1, 6), st.floats(0, 3000))
def test_placed_circles_keep_apart(seed: int, side: int, gap: float, area: float) -> None:
    room = fields.depth(np.pad(np.ones((side, side), np.uint8), 1))
    circles = fields.place(np.random.default_rng(seed), room, (3.0, 8.0), area, gap)
    assert circles
    for index, (x, y, radius) in enumerate(circles):
        assert 0 <= x < room.shape[1] and 0 <= y < room.shape[0]
        for a, b, other in circles[:index]:
            assert np.hypot(x - a, y - b) > radius + other + gap


@few
@given(seeds, st.floats(4, 20), st.floats(1, 2))
def test_blobs_have_the_area_of_their_radius(seed: int, radius: float, stretch: float) -> None:
    mask = np.zeros((120, 120), np.uint8)
    fields.fill(mask, fields.blob(np.random.default_rng(seed), (60, 60), radius, 0.05, stretch))
    assert 0.6 < mask.sum() / (np.pi * radius**2) < 1.6
    assert mask[60, 60] == 1


def test_packed_cells_end_at_their_borders() -> None:
    labels, border = fields.packed_cells(np.random.default_rng(1), (150, 200), 30, 20, 4)
    assert len(np.unique(labels)) > 15
    changed = labels[:, 1:] != labels[:, :-1]
    assert (border[:, 1:][changed] == 0).all()
    assert border.max() > 8


@few
@given(seeds, shapes)
def test_depth_is_the_exact_distance(seed: int, shape: tuple[int, int]) -> None:
    mask = np.pad((np.random.default_rng(seed).random(shape) < 0.8).astype(np.uint8), 1)
    before = cv2.getNumThreads()
    try:
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            assert np.array_equal(fields.depth(mask), ndimage.distance_transform_edt(mask).astype(np.float32))
    finally:
        cv2.setNumThreads(before)


@few
@given(seeds, st.integers(100, 220), st.floats(0.8, 1.25))
def test_tissue_leaves_glass_and_covers_the_middle(seed: int, height: int, ratio: float) -> None:
    width = round(height * ratio)
    for cut in (fields.core, fields.section):
        tissue = cut(np.random.default_rng(seed), (height, width))
        assert tissue.shape == (height, width) and tissue.min() == 0 and tissue.max() == 1
        assert tissue[height // 2, width // 2] == 1
        assert 0.3 < tissue.mean() < 0.98


def test_written_slides_read_back_in_three_readers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (3, 700), (256, 5), (257, 31), (600, 40)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = tmp_path / f"{height}x{width}.tiff"
        write_tiff(path, image)
        assert np.array_equal(tifffile.imread(path).reshape(image.shape), image)
        assert np.array_equal(np.asarray(Image.open(path)), image)
        assert np.array_equal(cv2.imread(str(path))[..., ::-1], image)
