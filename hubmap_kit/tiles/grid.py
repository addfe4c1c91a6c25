"""The grid of tiles on a slide, with three ways to treat the right and bottom edges."""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np

Edge = Literal["pad", "drop", "shift"]


def axis_starts(length: int, size: int, overlap: float = 0.0, edge: Edge = "pad") -> list[int]:
    """Starts of the tiles along one axis, in pixels.

    `overlap` is the share (0 <= overlap < 1) of a tile that its neighbour repeats. What the last whole tile leaves over
    gets a tile that reaches over the edge (`pad`), one that is moved back until it ends at the edge (`shift`), or none
    (`drop`). An axis shorter than a tile has one start, with `drop` none. Example: length 1500, size 512, overlap 0 ->
    [0, 512, 1024] with pad, [0, 512, 988] with shift, [0, 512] with drop.
    """
    if length < 1 or size < 1 or not 0 <= overlap < 1:
        raise ValueError(
            f"length {length}, size {size}, overlap {overlap}: need length and size of at least 1 and 0 <= overlap < 1"
        )
    step = max(1, round(size * (1 - overlap)))
    if length < size:
        return [] if edge == "drop" else [0]
    rounded = math.floor if edge == "drop" else math.ceil
    starts = [index * step for index in range(rounded((length - size) / step) + 1)]
    if edge == "shift":
        starts[-1] = length - size
    return starts


def grid(height: int, width: int, size: int, overlap: float = 0.0, edge: Edge = "pad") -> np.ndarray:
    """Top-left corners (row, col) of all tiles of a slide, row by row; shape (tiles, 2), int64."""
    rows, cols = axis_starts(height, size, overlap, edge), axis_starts(width, size, overlap, edge)
    return np.array([(row, col) for row in rows for col in cols], dtype=np.int64).reshape(-1, 2)


def box_shares(mask: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """Share (0..1) of each tile that the mask covers; what lies beyond the slide's edge counts as outside the mask.

    `mask` (H, W) of 0/1, `corners` (tiles, 2). One pass over the mask builds an integral image, then each tile costs
    four reads.
    """
    height, width = mask.shape
    integral = cv2.integral(
        np.ascontiguousarray(mask, np.uint8)
    )  # int32: enough for the 500 million pixels that a slide may have
    top, left = np.minimum(corners[:, 0], height), np.minimum(corners[:, 1], width)
    bottom, right = np.minimum(corners[:, 0] + size, height), np.minimum(corners[:, 1] + size, width)
    inside = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
    return inside / float(size * size)
