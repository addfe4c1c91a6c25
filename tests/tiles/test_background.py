"""Tissue maps: shares against a plain pixel count, boxes, tinted glass, and real sections."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.competition import rle, slides
from hubmap_kit.competition.tables import read_train
from hubmap_kit.tiles.background import TissueMap, mask_box, tissue_map

GLASS, PALE = (
    (243, 244, 243),
    (225, 215, 222),
)  # a real core's glass, and stain that is hardly there: saturation 0 and 11


def section(
    height: int = 600, width: int = 900, glass: tuple[int, int, int] = GLASS, stain: tuple[int, int, int] = PALE
) -> np.ndarray:
    """A noisy slide of glass with one ellipse of stain; its box is (100, 200, 500, 700)."""
    mean = np.full((height, width, 3), glass, np.uint8)
    cv2.ellipse(mean, (450, 300), (250, 200), 0, 0, 360, stain, -1)
    noise = np.random.default_rng(0).normal(0, 2, mean.shape)
    return np.clip(mean + noise, 0, 255).astype(np.uint8)


@given(data=st.data(), rows=st.integers(1, 9), cols=st.integers(1, 9), unit=st.integers(1, 8), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=150)
def test_shares_equal_a_count_of_pixels(data: st.DataObject, rows: int, cols: int, unit: int, seed: int) -> None:
    cells = np.random.default_rng(seed).integers(0, 2, (rows, cols), np.uint8)
    pixels = np.pad(np.kron(cells, np.ones((unit, unit))), 50)  # beyond the slide there is no tissue
    top, left = data.draw(st.integers(-49, rows * unit + 9)), data.draw(st.integers(-49, cols * unit + 9))
    height, width = data.draw(st.integers(1, 39)), data.draw(st.integers(1, 39))
    found = TissueMap(cells, rows * unit, cols * unit).shares(np.array([[top, left, top + height, left + width]]))
    assert found[0] == pytest.approx(
        pixels[top + 50 : top + height + 50, left + 50 : left + width + 50].sum() / (height * width), abs=1e-6
    )


@pytest.mark.parametrize("glass", [GLASS, (216, 207, 221), (250, 245, 232)], ids=["grey", "lilac", "yellow"])
def test_pale_tissue_is_found_on_plain_and_tinted_glass(glass: tuple[int, int, int]) -> None:
    stain = (190, 150, 200) if glass != GLASS else PALE
    found = tissue_map(section(glass=glass, stain=stain))
    box = found.box()
    assert box is not None and np.abs(np.array(box) - (100, 200, 500, 700)).max() <= 10
    assert found.cells.mean() == pytest.approx(np.pi * 250 * 200 / (600 * 900), rel=0.03)


def test_a_speck_of_dust_does_not_stretch_the_box() -> None:
    image = section()
    image[5:20, 5:20] = (90, 60, 30)
    box = tissue_map(image).box()
    assert box is not None and box[0] > 80 and box[1] > 180


def test_glass_alone_has_no_box_and_tissue_alone_is_all_of_the_slide() -> None:
    noise = np.random.default_rng(0).normal(0, 2, (500, 500, 3))
    assert tissue_map(np.clip(GLASS + noise, 0, 255).astype(np.uint8)).box() is None
    full = tissue_map(np.clip((150, 80, 140) + noise * 10, 0, 255).astype(np.uint8))
    assert full.box() == (0, 0, 500, 500) and full.shares(np.array([[0.0, 0.0, 500.0, 500.0]]))[0] > 0.99


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (7, 5), (64, 63), (65, 2000)])
def test_slides_of_any_size_have_a_map(shape: tuple[int, int]) -> None:
    found = tissue_map(np.full((*shape, 3), (150, 80, 140), np.uint8))
    assert found.cells.all() and found.box() == (0, 0, *shape)


def test_the_box_of_a_mask() -> None:
    mask = np.zeros((20, 30), np.uint8)
    assert mask_box(mask) is None
    mask[4, 7] = mask[9, 20] = 1
    assert mask_box(mask) == (4, 7, 10, 21)


def test_real_cores_solid_units_are_tissue_and_their_corners_are_glass(shared_data: Path) -> None:
    """White pulp and glomeruli are solid; a core is a disc, so the corners of its picture show glass."""
    rows = [
        row
        for row in read_train(shared_data / "hubmap-mini/train.csv")
        if row.organ in ("spleen", "kidney") and row.um_per_px > 1
    ]
    assert len(rows) >= 7
    for row in rows:
        image = slides.read(row.path)
        found = tissue_map(image)
        cells = cv2.resize(found.cells, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        assert cells[rle.decode(row.rle or "", *image.shape[:2]) > 0].mean() > 0.75, row.id
        side = image.shape[0] // 12
        corners = [cells[:side, :side], cells[:side, -side:], cells[-side:, :side], cells[-side:, -side:]]
        assert np.mean(corners) < 0.01, row.id
