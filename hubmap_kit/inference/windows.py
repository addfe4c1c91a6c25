"""The sliding window: one pass over a slide, one stitch.

Windows are evenly spaced and never leave the slide. Their smooth weights are divided, per row and per column in
advance, by the sum of all windows' weights there; because window weights are products of a row and a column profile,
those sums are products too. So the weighted windows add up to the average by themselves: no count map, no division
pass, one float plane.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from hubmap_kit.inference.on_device import extended

STRIDE = 32  # of the encoders' coarsest features: sides that are no multiple of it do not come back as they were
# (N, 3, T, T) uint8 windows -> (N, T, T) float32 probabilities, on the same device
Predictor = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Axis:
    """Windows along one axis: `starts` (n,) in pixels and `weights` (n, size), which sum to 1 at every pixel of the
    axis.
    """

    starts: np.ndarray
    weights: np.ndarray


def plan_axis(length: int, size: int, overlap: float) -> Axis:
    """Place windows of `size` on an axis of `length` >= `size` pixels so that neighbours share at least `overlap` of a
    window.

    Example: length 110, size 64, overlap 0.5 -> three windows at 0, 23 and 46, not two at 0 and 32 and a third hanging
    over.
    """
    if not size <= length or not 0 <= overlap < 1:
        raise ValueError(f"length {length}, size {size}, overlap {overlap}: need size <= length and 0 <= overlap < 1")
    step = max(1, math.floor(size * (1 - overlap)))
    count = math.ceil((length - size) / step) + 1
    starts = (
        np.array([0]) if count == 1 else np.round(np.arange(count) * (length - size) / (count - 1)).astype(np.int64)
    )
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


def plan(height: int, width: int, size: int, overlap: float) -> tuple[Axis, Axis]:
    """The rows and the columns of windows of a slide of any size; one smaller than the window counts as mirrored up to
    it.
    """
    return plan_axis(max(height, size), size, overlap), plan_axis(max(width, size), size, overlap)


@torch.inference_mode()
def stitch(
    image: torch.Tensor, predict: Predictor, size: int, overlap: float, batch_size: int, keep: np.ndarray | None = None
) -> torch.Tensor:
    """Probability plane (h, w) float32 of a scaled slide `image` (h, w, 3) uint8, on the image's device.

    A slide smaller than the window is mirrored up to it and the plane cut back. `keep` says which windows (rows,
    columns of `plan`) are predicted; the others add 0. Beside the image, memory holds one float plane and one batch of
    windows.
    """
    height, width = image.shape[:2]
    image = extended(image, max(height, size), max(width, size))
    rows, cols = plan(height, width, size, overlap)
    kept = np.ones((len(rows.starts), len(cols.starts)), bool) if keep is None else keep
    places = [(int(row), int(col)) for row, col in np.argwhere(kept)]
    down, across = (torch.from_numpy(axis.weights).to(image.device) for axis in (rows, cols))
    # numpy asks the system for large pages, torch does not: on a CPU, filling fresh memory is five times faster.
    plane = (
        torch.zeros(image.shape[:2], device=image.device)
        if image.is_cuda
        else torch.from_numpy(np.empty(image.shape[:2], np.float32)).zero_()
    )
    weighted = torch.empty(size, size, device=image.device)
    # On a GPU every batch has one shape, for which cuDNN looks for the fastest kernels once; a CPU predicts no window
    # for nothing.
    batch_size = batch_size if image.is_cuda else min(batch_size, max(1, len(places)))
    windows = torch.zeros(batch_size, 3, size, size, dtype=torch.uint8, device=image.device)
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        for window, (row, col) in zip(windows, batch, strict=False):
            _copy_planes(_cut(image, rows.starts[row], cols.starts[col], size), window)
        probabilities = predict(windows if image.is_cuda else windows[: len(batch)])
        for probability, (row, col) in zip(probabilities, batch, strict=False):
            torch.mul(probability, down[row][:, None], out=weighted)
            _cut(plane, rows.starts[row], cols.starts[col], size).addcmul_(weighted, across[col][None, :])
    return plane.clamp_(0, 1)[:height, :width]


@torch.inference_mode()
def whole_plane(image: torch.Tensor, predict: Predictor) -> torch.Tensor:
    """Probability plane (h, w) float32 of a scaled slide (h, w, 3) uint8 in one piece, mirrored up to a multiple of
    STRIDE.
    """
    height, width = image.shape[:2]
    tall, wide = (-(-length // STRIDE) * STRIDE for length in (height, width))
    return predict(extended(image, tall, wide).permute(2, 0, 1).contiguous()[None])[0, :height, :width].contiguous()


def sample(image: torch.Tensor, size: int) -> torch.Tensor:
    """The window (1, size, size, 3) uint8 in the middle of a scaled slide (h, w, 3)."""
    image = extended(image, *(max(length, size) for length in image.shape[:2]))
    top, left = ((length - size) // 2 for length in image.shape[:2])
    return _cut(image, top, left, size).contiguous()[None]


def _cut(pixels: torch.Tensor, row: int, col: int, size: int) -> torch.Tensor:
    return pixels[row : row + size, col : col + size]


def _copy_planes(cut: torch.Tensor, planes: torch.Tensor) -> None:
    """Copy a cut (T, T, 3) into channel planes (3, T, T)."""
    if cut.is_cuda:
        planes.copy_(cut.permute(2, 0, 1))
    else:
        cv2.split(cut.numpy(), list(planes.numpy()))  # ten times faster than torch's strided copy


# Where a slide shows tissue, coarsely: windows that hold nothing but glass need no network.

CELL = 16  # network pixels along the side of a cell of the map
SPOTS = 4  # along a cell's side: samples whose darkest and most colourful speak for the cell
DARKEST = 200  # glass: every channel at least this bright, of 255
COLOUR = 24  # and no further apart than this
# On real slides with known masks, no pixel of a mask lies further out on the glass than 80 micrometres (a gland that is
# torn open).
MARGIN_UM = 100.0


def tissue_map(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Map of cells (rows, cols) bool: True where there is tissue, or something between tissue.

    `image` (H, W, 3) uint8 is the slide at any scale, `shape` its height and width in network pixels.
    """
    rows, cols = (max(1, -(-length // CELL)) for length in shape)
    spots = cv2.resize(image, (cols * SPOTS, rows * SPOTS), interpolation=cv2.INTER_LINEAR)
    red, green, blue = cv2.split(spots)
    darkest, brightest = cv2.min(cv2.min(red, green), blue), cv2.max(cv2.max(red, green), blue)
    glass = ((darkest >= DARKEST) & (brightest - darkest <= COLOUR)).view(np.uint8) * np.uint8(255)
    cells = (cv2.resize(glass, (cols, rows), interpolation=cv2.INTER_AREA) == 255).astype(np.uint8)
    # A rim of glass joins all that reaches the border; what it does not reach lies between tissue.
    rimmed = np.pad(cells, 1, constant_values=1)
    cv2.floodFill(rimmed, None, (0, 0), 2, flags=4)
    return rimmed[1:-1, 1:-1] != 2


def windows_with_tissue(tissue: np.ndarray, rows: Axis, cols: Axis, size: int, um_per_px: float) -> np.ndarray:
    """Which windows (rows, columns) of a plan hold tissue or lie near it, bool; all, where the whole slide looks like
    glass.

    A pale slide is better predicted than dropped. `um_per_px` is the width of a network pixel in micrometres.
    """
    if not tissue.any():
        return np.ones((len(rows.starts), len(cols.starts)), bool)
    margin = MARGIN_UM / um_per_px
    down, across = ([_near(int(start), size, margin) for start in axis.starts] for axis in (rows, cols))
    return np.array([[bool(tissue[row, col].any()) for col in across] for row in down])


def _near(start: int, size: int, margin: float) -> slice:
    """Cells of a window and its margin, and one more to each side: cells of a slide that is no multiple of them are a
    little smaller.
    """
    return slice(max(0, int(start - margin) // CELL - 1), int(start + size + margin) // CELL + 2)
