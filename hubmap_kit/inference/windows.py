"""The sliding window: one pass over a slide, one stitch.

Windows are evenly spaced and never leave the slide. Their smooth weights are divided, per row and per column in advance, by the
sum of all windows' weights there; because window weights are products of a row and a column profile, those sums are products
too. So the weighted windows add up to the average by themselves: no count map, no division pass, one float plane.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from hubmap_kit.tiles.store import mirror

# (N, T, T, 3) uint8 windows -> (N, T, T) float32 probabilities
Predictor = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Axis:
    """Windows along one axis: `starts` (n,) in pixels and `weights` (n, size), which sum to 1 at every pixel of the axis."""

    starts: np.ndarray
    weights: np.ndarray


def plan_axis(length: int, size: int, overlap: float) -> Axis:
    """Place windows of `size` on an axis of `length` >= `size` pixels so that neighbours share at least `overlap` of a window.

    Example: length 110, size 64, overlap 0.5 -> three windows at 0, 23 and 46, not two at 0 and 32 and a third hanging over.
    """
    if not size <= length or not 0 <= overlap < 1:
        raise ValueError(f"length {length}, size {size}, overlap {overlap}: need size <= length and 0 <= overlap < 1")
    step = max(1, math.floor(size * (1 - overlap)))
    count = math.ceil((length - size) / step) + 1
    starts = np.array([0]) if count == 1 else np.round(np.arange(count) * (length - size) / (count - 1)).astype(np.int64)
    profile = _profile(size)
    total = np.zeros(length, np.float64)
    for start in starts:
        total[start : start + size] += profile
    weights = np.stack([profile / total[start : start + size] for start in starts])
    return Axis(starts, weights.astype(np.float32))


def _profile(size: int) -> np.ndarray:
    """A Gaussian of sigma size/4 over the window: the centre sees the most context, and no pixel has weight 0."""
    offset = (np.arange(size) - (size - 1) / 2) / (size / 4)
    return np.exp(-0.5 * offset**2)


def predict_plane(image: np.ndarray, predict: Predictor, size: int, overlap: float, batch_size: int) -> np.ndarray:
    """Probability plane (h, w) float32 of a scaled slide `image` (h, w, 3) uint8.

    A slide smaller than the window is mirrored up to it and the plane cut back. Beside the image, memory holds one float
    plane and one batch of windows.
    """
    height, width = image.shape[:2]
    pads = (0, max(0, size - height), 0, max(0, size - width))
    if any(pads):
        image = mirror(image, pads)
    rows, cols = plan_axis(image.shape[0], size, overlap), plan_axis(image.shape[1], size, overlap)
    plane = np.zeros(image.shape[:2], np.float32)
    for batch in _batches(len(rows.starts) * len(cols.starts), batch_size):
        places = [divmod(index, len(cols.starts)) for index in batch]
        windows = np.stack([_cut(image, rows.starts[r], cols.starts[c], size) for r, c in places])
        for (r, c), probability in zip(places, predict(windows), strict=True):
            weighted = probability * rows.weights[r][:, None] * cols.weights[c][None, :]
            _cut(plane, rows.starts[r], cols.starts[c], size)[...] += weighted
    return np.clip(plane, 0.0, 1.0, out=plane)[:height, :width]


def _cut(pixels: np.ndarray, row: int, col: int, size: int) -> np.ndarray:
    return pixels[row : row + size, col : col + size]


def _batches(total: int, batch_size: int) -> Iterator[range]:
    for start in range(0, total, batch_size):
        yield range(start, min(start + batch_size, total))
