"""Steps on a mask: fill holes, open, drop small parts, shrink. All of them work on the whole mask at its full size.

A part is what hangs together over sides or corners; a hole is background that no path over sides leads out of.

Nothing is done at a reduced scale: the exact steps take less time than the network takes for a single window, while
areas near a limit and lines of few pixels would come out differently. What makes them fast is that OpenCV traces the
outlines of a smooth mask in a few milliseconds, whereas labels are a plane four times the size of the mask that has to
be gone through once more.
"""

from __future__ import annotations

import cv2
import numpy as np

# Vertical edges per pixel above which a mask is ragged (noise, not units): it has so many outlines that labels are
# faster then.
RAGGED = 0.04
LARGEST_KERNEL = 12  # above this radius two distance transforms are faster than the window of an erosion and a dilation


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """A new mask (H, W) uint8 0/1 without holes; what a part and the slide's border enclose together is no hole."""
    if _is_ragged(mask):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4, ltype=cv2.CV_32S)
        left, top, width, height = stats[:, :4].T
        inside = (left > 0) & (top > 0) & (left + width < mask.shape[1]) & (top + height < mask.shape[0])
        inside[0] = True  # label 0 is the mask itself
        return inside.astype(np.uint8).take(labels)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(np.zeros_like(mask), outlines, -1, 1, cv2.FILLED)


def drop_small(mask: np.ndarray, pixels: float) -> np.ndarray:
    """A new mask without the parts that have fewer than `pixels` pixels; the holes of a part do not count."""
    if _is_ragged(mask):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=cv2.CV_32S)
        large = stats[:, cv2.CC_STAT_AREA] >= pixels
        large[0] = False  # label 0 is the background
        return large.astype(np.uint8).take(labels)
    outlines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return np.zeros_like(mask)
    parents = tree[0][:, 3]  # -1: the outline of a part, otherwise that of a hole in the part `parents[i]`
    areas = np.array(
        [_pixels_inside(outline, hole=parent >= 0) for outline, parent in zip(outlines, parents, strict=True)]
    )
    holes = parents >= 0
    own = np.where(holes, 0, areas)
    np.subtract.at(own, parents[holes], areas[holes])
    keep = own[np.where(holes, parents, np.arange(len(parents)))] >= pixels
    return cv2.drawContours(np.zeros_like(mask), [outlines[index] for index in np.flatnonzero(keep)], -1, 1, cv2.FILLED)


def _pixels_inside(outline: np.ndarray, hole: bool) -> int:
    """The number of pixels that an outline (N, 1, 2) encloses: with itself for a part, without itself for a hole.

    Pick's theorem (1899): a polygon through N lattice points with I points inside has the area I + N / 2 - 1. It also
    holds for outlines that run over a pixel twice, as they do along lines of a single pixel.
    """
    steps = len(outline) if len(outline) > 1 else 0  # one pixel alone is a walk of no steps
    return round(cv2.contourArea(outline) + (1 - steps / 2 if hole else 1 + steps / 2))


def erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """A new mask of the pixels from which no background lies within `radius` pixels (in a disk).

    Beyond the slide's border nothing is known, and it does not count as background: a unit that is cut off there keeps
    its pixels along the border and is taken off on its other sides only.
    """
    if radius > LARGEST_KERNEL:
        return (cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > radius).view(np.uint8)
    return cv2.erode(mask, _disk(radius))


def opening(mask: np.ndarray, radius: int) -> np.ndarray:
    """A new mask of all disks of `radius` pixels that find room in it: bridges and specks that are thinner are gone.

    At the slide's border half a disk is enough, for the reason that `erode` gives.
    """
    core = erode(mask, radius)
    if radius > LARGEST_KERNEL and core.any():
        return (cv2.distanceTransform(1 - core, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= radius).view(np.uint8)
    return cv2.dilate(core, _disk(min(radius, LARGEST_KERNEL)))


def _is_ragged(mask: np.ndarray) -> bool:
    return int(np.count_nonzero(mask[1:] != mask[:-1])) > RAGGED * mask.size


def _disk(radius: int) -> np.ndarray:
    line = np.arange(-radius, radius + 1) ** 2
    return (line[:, None] + line <= radius**2).astype(np.uint8)
