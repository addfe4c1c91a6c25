"""The grid of tiles on a slide, with padding at the right and bottom edges."""

from __future__ import annotations

import math

import numpy as np


def axis_starts(length: int, size: int, overlap: float = 0.0) -> list[int]:
    """Starts of the tiles along one axis, in pixels; the last tile may reach over the edge and is padded when it is read.

    `overlap` is the share (0 <= overlap < 1) of a tile that its neighbour repeats.
    Example: length 1500, size 512, overlap 0 -> [0, 512, 1024]; the third tile ends at 1536.
    """
    if length < 1 or size < 1 or not 0 <= overlap < 1:
        raise ValueError(f"length {length}, size {size}, overlap {overlap}: need length and size of at least 1 and 0 <= overlap < 1")
    step = max(1, round(size * (1 - overlap)))
    count = 1 if length <= size else math.ceil((length - size) / step) + 1
    return [index * step for index in range(count)]


def grid(height: int, width: int, size: int, overlap: float = 0.0) -> np.ndarray:
    """Top-left corners (row, col) of all tiles of a slide, row by row; shape (tiles, 2), int64."""
    rows, cols = axis_starts(height, size, overlap), axis_starts(width, size, overlap)
    return np.array([(row, col) for row in rows for col in cols], dtype=np.int64)


def box_shares(mask: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """Share (0..1) of each tile that the mask covers; what lies beyond the slide's edge counts as outside the mask.

    `mask` (H, W) of 0/1, `corners` (tiles, 2). One pass over the mask builds an integral image, then each tile costs four reads.
    """
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1), np.int64)
    np.cumsum(np.cumsum(mask, axis=0, dtype=np.int64), axis=1, out=integral[1:, 1:])
    top, left = np.minimum(corners[:, 0], height), np.minimum(corners[:, 1], width)
    bottom, right = np.minimum(corners[:, 0] + size, height), np.minimum(corners[:, 1] + size, width)
    inside = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
    return inside / float(size * size)
