"""The map of tissue: no window that is left out holds a pixel of a known mask, white inside tissue counts as tissue."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide, read_test, read_train
from hubmap_kit.inference.windows import CELL, MARGIN_UM, plan, tissue_map, windows_with_tissue
from hubmap_kit.tiles.scaling import resize_mask
from hubmap_kit.tiles.store import decode_for

GLASS = (244, 243, 245)


def glass(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-3, 4, (height, width, 3))
    return (np.array(GLASS) + noise).astype(np.uint8)


def disc(side: int, centre: tuple[int, int], radius: int, colour: tuple[int, int, int] = (190, 140, 180)) -> np.ndarray:
    return cv2.circle(glass(side, side), centre, radius, colour, -1)


def kept(
    image: np.ndarray, size: int, overlap: float, um_per_px: float
) -> tuple[np.ndarray, list[list[tuple[slice, slice]]]]:
    """Which windows are kept, and the pixels of each."""
    rows, cols = plan(*image.shape[:2], size, overlap)
    keep = windows_with_tissue(tissue_map(image, image.shape[:2]), rows, cols, size, um_per_px)
    return keep, [[(slice(r, r + size), slice(c, c + size)) for c in cols.starts] for r in rows.starts]


def _real_slides(folder: Path) -> list[Slide]:
    slides = read_train(folder / "train.csv")
    return slides + (read_test(folder / "test.csv") if (folder / "test.csv").is_file() else [])


@pytest.mark.parametrize("zoom", [0.5, 1, 2, 4])
def test_no_window_left_out_of_a_real_slide_holds_a_pixel_of_its_mask(shared_data: Path, zoom: float) -> None:
    """At every scale that a network may see, none finer than the finest slide there is."""
    left_out = 0
    for slide in _real_slides(shared_data / "hubmap-mini"):
        um_per_px = slide.um_per_px / zoom
        if um_per_px < 0.19:
            continue
        pixels = slide_files.read(slide.path)
        shape = (round(pixels.shape[0] * zoom), round(pixels.shape[1] * zoom))
        mask = resize_mask(decode_for(slide, *pixels.shape[:2]), shape) if slide.rle else np.zeros(shape, np.uint8)
        tissue = tissue_map(pixels, shape)
        for size in (64, 128, 256):
            rows, cols = plan(*shape, size, 0.25)
            keep = windows_with_tissue(tissue, rows, cols, size, um_per_px)
            for row, col in np.argwhere(~keep):
                top, left = rows.starts[row], cols.starts[col]
                assert not mask[top : top + size, left : left + size].any(), (
                    f"slide {slide.id}, {size} px at ({top}, {left})"
                )
            left_out += int((~keep).sum())
        # And wherever windows may lie: no pixel of the mask is further from tissue than windows that are left out.
        glass_width = cv2.distanceTransform((~tissue).astype(np.uint8), cv2.DIST_C, 3) * CELL
        on_mask = resize_mask(mask, tissue.shape).astype(bool)
        assert glass_width[on_mask].max(initial=0) <= MARGIN_UM / um_per_px + CELL, f"slide {slide.id}"
    assert left_out or zoom < 1, "nothing is left out, so nothing was proved"


def test_windows_of_glass_are_left_out_and_those_of_tissue_are_not() -> None:
    image = disc(2000, (600, 500), 300)
    keep, places = kept(image, 256, 0.25, um_per_px=2.0)
    assert keep.any() and (~keep).mean() > 0.4
    for row, col in np.ndindex(keep.shape):
        colours = image[places[row][col]].reshape(-1, 3)
        if (colours == (190, 140, 180)).all(axis=1).any():
            assert keep[row, col]


@given(
    row=st.integers(0, 1500),
    col=st.integers(0, 1500),
    radius=st.integers(16, 500),
    side=st.integers(600, 1500),
    size=st.sampled_from([64, 128, 512]),
    overlap=st.floats(0, 0.5),
    um_per_px=st.floats(0.2, 6),
)
@settings(deadline=None, max_examples=40)
def test_whatever_is_tissue_is_kept_with_a_margin(
    row: int, col: int, radius: int, side: int, size: int, overlap: float, um_per_px: float
) -> None:
    image = disc(side, (col % side, row % side), radius)
    inside = (image == (190, 140, 180)).all(axis=2)
    margin = int(MARGIN_UM / um_per_px)
    rows, cols = plan(side, side, size, overlap)
    keep = windows_with_tissue(tissue_map(image, (side, side)), rows, cols, size, um_per_px)
    for (r, c), is_kept in np.ndenumerate(keep):
        top, left = max(0, rows.starts[r] - margin), max(0, cols.starts[c] - margin)
        near = inside[top : rows.starts[r] + size + margin, left : cols.starts[c] + size + margin]
        assert is_kept or not near.any()


def test_white_inside_tissue_is_tissue_and_white_that_reaches_the_border_is_not() -> None:
    ring = cv2.circle(disc(800, (400, 400), 300), (400, 400), 250, GLASS, -1)
    tissue = tissue_map(ring, (800, 800))
    assert tissue[25, 25] and not tissue[0, 0]
    opened = cv2.rectangle(ring.copy(), (380, 0), (420, 400), GLASS, -1)
    assert not tissue_map(opened, (800, 800))[25, 25]


def test_a_slide_full_of_glass_is_predicted_all_the_same() -> None:
    """It may be a pale slide, and a pale slide has its masks too."""
    keep, _ = kept(glass(700, 900), 256, 0.25, um_per_px=2.0)
    assert keep.all()


@pytest.mark.parametrize("colour", [(0, 0, 0), (190, 190, 190), (255, 215, 235)], ids=["black", "grey", "pale pink"])
def test_what_is_not_bright_and_grey_is_no_glass(colour: tuple[int, int, int]) -> None:
    image = glass(640, 640)
    image[:, :320] = colour
    tissue = tissue_map(image, (640, 640))
    assert tissue[:, :20].all() and not tissue[:, 21:].any()


@given(height=st.integers(1, 300), width=st.integers(1, 300), zoom=st.sampled_from([0.25, 0.5, 1.0, 3.0]))
@settings(deadline=None, max_examples=40)
def test_maps_have_a_cell_for_every_pixel(height: int, width: int, zoom: float) -> None:
    shape = (max(1, round(height * zoom)), max(1, round(width * zoom)))
    tissue = tissue_map(np.full((height, width, 3), 90, np.uint8), shape)
    assert tissue.shape == (-(-shape[0] // CELL), -(-shape[1] // CELL)) and tissue.all()
    rows, cols = plan(*shape, 64, 0.25)
    assert windows_with_tissue(tissue, rows, cols, 64, 0.5).all()
