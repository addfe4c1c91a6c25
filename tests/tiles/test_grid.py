"""The grid: every pixel covered, no tile too many, and the tile counts that the first team published."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.tiles.grid import axis_starts, box_shares, grid


@given(length=st.integers(1, 400), size=st.integers(1, 120), overlap=st.floats(0, 0.95))
@settings(deadline=None, max_examples=300)
def test_every_pixel_is_covered_and_no_tile_is_idle(length: int, size: int, overlap: float) -> None:
    starts = axis_starts(length, size, overlap)
    covered = np.zeros(length, int)
    for start in starts:
        covered[start : start + size] += 1
    assert covered.min() >= 1
    assert starts[0] == 0 and all(start < length for start in starts)
    assert len(set(np.diff(starts))) <= 1
    # Without its last tile the axis would have a gap.
    assert len(starts) == 1 or starts[-2] + size < length


@given(length=st.integers(1, 5000), size=st.integers(1, 800))
@settings(deadline=None)
def test_count_without_overlap_is_the_rounded_up_quotient(length: int, size: int) -> None:
    assert len(axis_starts(length, size)) == -(-length // size)


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
def test_neighbours_repeat_the_share_asked_for(overlap: float) -> None:
    starts = axis_starts(3000, 512, overlap)
    assert set(512 - np.diff(starts)) == {round(512 * overlap)}


def test_the_documented_example() -> None:
    assert axis_starts(1500, 512) == [0, 512, 1024]


# Published by the competition's first team: 351 slides brought to 3000 px, reduced by 2, give 1404 tiles of 768 px;
# brought to 2048 px, they give as many tiles of 512 px.
@pytest.mark.parametrize(("side", "size"), [(3000 // 2, 768), (2048 // 2, 512)])
def test_published_tile_counts(side: int, size: int) -> None:
    assert 351 * len(grid(side, side, size)) == 1404


def test_corners_run_row_by_row() -> None:
    corners = grid(100, 250, 96)
    assert corners.shape == (6, 2) and corners.dtype == np.int64
    assert corners.tolist() == [[0, 0], [0, 96], [0, 192], [96, 0], [96, 96], [96, 192]]


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(0, 8, 0.0), (8, 0, 0.0), (8, 8, 1.0), (8, 8, -0.1), (8, 8, float("nan"))]
)
def test_nonsense_is_refused(length: int, size: int, overlap: float) -> None:
    with pytest.raises(ValueError, match="need"):
        axis_starts(length, size, overlap)


@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    size=st.integers(1, 50),
    overlap=st.floats(0, 0.8),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=150)
def test_shares_equal_a_plain_loop(
    height: int, width: int, size: int, overlap: float, density: float, seed: int
) -> None:
    mask = (np.random.default_rng(seed).random((height, width)) < density).astype(np.uint8)
    corners = grid(height, width, size, overlap)
    expected = [mask[row : row + size, col : col + size].sum() / size**2 for row, col in corners]
    np.testing.assert_allclose(box_shares(mask, corners, size), expected, rtol=0, atol=1e-12)


def test_shares_of_a_full_slide_do_not_overflow_small_integers() -> None:
    mask = np.ones((700, 900), np.uint8)
    assert box_shares(mask, np.array([[0, 0], [0, 388], [188, 0]]), 512).tolist() == [1.0, 1.0, 1.0]
