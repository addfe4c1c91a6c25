"""Tissue and glass, coarsely: a low-resolution saturation map of a slide, and its integral image for the share of every
tile.

Glass is grey and stain is coloured, so saturation (HSV) parts them. Real sections are pale: on HPA cores glass has a
saturation of 0 to 4 of 255 and stained tissue often no more than 10, so the threshold that notebooks share, 40, would
lose most of them. Here Otsu's threshold of the slide's own map decides, held between two bounds: a slide that is all
tissue has no second mode, and strong spots of stain are no reason to lose the pale rest. The bounds stand on the
saturation of the slide's brightest cells, because some scanners tint the glass. What is dark is tissue whatever its
colour (carbon in a lung is grey).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

CELL = 8  # slide pixels along the side of a cell, fewer where the slide is small
LEAST_CELLS = 64  # along the shorter side of a small slide
PALEST, STRONGEST = 4, 9  # bounds of the saturation threshold above the glass's own saturation, of 255
BRIGHT = 8  # cells this close to the brightest ones of a slide show its glass, where it has any
MOST_TINT = 24  # glass is not more colourful than this; without glass, the brightest cells are tissue
DARK = 190  # of 255: glass is brighter than this in every channel
SPECK = 0.01  # parts smaller than this share of the largest one are dust or ink and do not stretch the tissue's box

Box = tuple[int, int, int, int]  # top, left, bottom, right in slide pixels


@dataclass(frozen=True)
class TissueMap:
    """`cells` (rows, cols) uint8, 1 where there is tissue, of a slide of `height` x `width` pixels."""

    cells: np.ndarray
    height: int
    width: int

    def box(self) -> Box | None:
        """The smallest box around the tissue, specks left out; None where there is none."""
        count, labels, stats, _ = cv2.connectedComponentsWithStats(self.cells, connectivity=8)
        if count < 2:
            return None
        areas = stats[:, cv2.CC_STAT_AREA].copy()
        areas[0] = 0
        rows, cols = np.nonzero((areas >= SPECK * areas.max())[labels] & (labels > 0))
        down, across = self.height / self.cells.shape[0], self.width / self.cells.shape[1]
        return (
            int(rows.min() * down),
            int(cols.min() * across),
            _up((rows.max() + 1) * down, self.height),
            _up((cols.max() + 1) * across, self.width),
        )

    def shares(self, boxes: np.ndarray) -> np.ndarray:
        """Share (0..1) of tissue in each box; what lies beyond the slide counts as background.

        `boxes` (n, 4) float: top, left, bottom, right in slide pixels, of any place. Boxes that cut cells take their
        share of them.
        """
        integral = cv2.integral(self.cells)
        top, left, bottom, right = np.asarray(boxes, float).T
        down, across = self.cells.shape[0] / self.height, self.cells.shape[1] / self.width
        upper, lower, first, last = top * down, bottom * down, left * across, right * across
        inside = (
            _at(integral, lower, last)
            - _at(integral, upper, last)
            - _at(integral, lower, first)
            + _at(integral, upper, first)
        )
        return np.clip(inside / ((lower - upper) * (last - first)), 0.0, 1.0).round(
            9
        )  # the sums of a full tile are not exact


def tissue_map(image: np.ndarray) -> TissueMap:
    """The tissue of a slide (H, W, 3) uint8 RGB."""
    height, width = image.shape[:2]
    cell = max(1, min(CELL, min(height, width) // LEAST_CELLS))
    # Two rows speak for each cell: reading all of a slide's memory would take as long as everything else here.
    small = cv2.resize(
        image[:: max(1, cell // 2)], (max(1, width // cell), max(1, height // cell)), interpolation=cv2.INTER_AREA
    )
    saturation = cv2.cvtColor(small, cv2.COLOR_RGB2HSV)[..., 1]
    otsu, _ = cv2.threshold(saturation, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    red, green, blue = cv2.split(small)
    darkest = cv2.min(cv2.min(red, green), blue)
    tint = min(float(np.median(np.asarray(saturation)[darkest >= _brightest(darkest) - BRIGHT])), MOST_TINT)
    tissue = (saturation > np.clip(otsu, tint + PALEST, tint + STRONGEST)) | (darkest < DARK)
    return TissueMap(tissue.astype(np.uint8), height, width)


def _brightest(plane: np.ndarray) -> int:
    """The value that 99 of 100 cells do not exceed."""
    counts = np.cumsum(np.bincount(plane.ravel(), minlength=256))
    return int(np.searchsorted(counts, 0.99 * counts[-1]))


def mask_box(mask: np.ndarray) -> Box | None:
    """The smallest box around a mask (H, W) of 0/1; None where it is empty."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(rows[0]), int(cols[0]), int(rows[-1]) + 1, int(cols[-1]) + 1) if len(rows) else None


def _up(value: float, most: int) -> int:
    return min(most, int(np.ceil(value)))


def _at(integral: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The integral image between its grid points: exact for cells of constant value."""
    rows, cols = np.clip(rows, 0, integral.shape[0] - 1), np.clip(cols, 0, integral.shape[1] - 1)
    top, left = (
        np.minimum(np.floor(axis).astype(np.int64), side - 2)
        for axis, side in zip((rows, cols), integral.shape, strict=True)
    )
    down, across = rows - top, cols - left
    above = integral[top, left] * (1 - across) + integral[top, left + 1] * across
    below = integral[top + 1, left] * (1 - across) + integral[top + 1, left + 1] * across
    return above * (1 - down) + below * down
