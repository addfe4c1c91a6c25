"""Where a slide shows tissue, coarsely: windows that hold nothing but glass need no network.

A wrong skip costs a mask, a window too many costs a moment, so every doubt counts as tissue: glass must be bright and
grey down to its darkest spot, reach the slide's border (an alveolus is as white as glass, but has tissue around it),
and a skipped window must lie far from all tissue: the border of a slide, or a tear, opens alveoli and glands to the
glass outside.
"""

from __future__ import annotations

import cv2
import numpy as np

from hubmap_kit.inference.windows import Axis

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
