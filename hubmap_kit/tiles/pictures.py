"""Where a conversion's pictures and tiles lie on a slide, and cutting them: image and mask always by the same
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from hubmap_kit.config import ScaleConfig
from hubmap_kit.tiles.background import Box
from hubmap_kit.tiles.convert_config import ConvertConfig
from hubmap_kit.tiles.grid import grid
from hubmap_kit.tiles.scaling import resize_image, resize_mask, scaled_shape

WHITE = 255


@dataclass(frozen=True)
class Picture:
    """A box of a slide, `height` x `width` original pixels at (`top`, `left`), that becomes `rows` x `cols` pixels.

    The box may reach beyond the slide on any side; it is padded there.
    """

    top: int
    left: int
    height: float
    width: float
    rows: int
    cols: int

    def boxes(self, corners: np.ndarray, rows: int, cols: int) -> np.ndarray:
        """Boxes (n, 4) in original pixels of the tiles of `rows` x `cols` picture pixels at `corners` (n, 2)."""
        starts = corners * self._unit + (self.top, self.left)
        return np.concatenate([starts, starts + np.array([rows, cols]) * self._unit], axis=1)

    def inside(self, height: int, width: int) -> tuple[tuple[slice, slice], tuple[int, int, int, int]]:
        """What of a slide of `height` x `width` lies in the box, and the picture pixels to pad: top, bottom, left,
        right.
        """
        down = _clipped(self.top, self.height, self.rows, height)
        across = _clipped(self.left, self.width, self.cols, width)
        return (down[0], across[0]), (*down[1], *across[1])

    @property
    def _unit(self) -> np.ndarray:
        return np.array([self.height / self.rows, self.width / self.cols])


def plan(config: ConvertConfig, height: int, width: int, tissue: Box | None = None) -> Picture:
    """The picture of a slide of `height` x `width` original pixels; `tissue` is the box that a crop must show.

    Its shape never depends on `tissue`, so places in files and counts of tiles are known before any pixel is read.
    """
    if config.kind == "resize":
        side = max(height, width)  # one scale for both axes: what a slide lacks to a square is padded
        return Picture(0, 0, side, side, config.size, config.size)
    if config.cropped:
        picture = _canvas(config, height, width, tissue or (0, 0, height, width))
    else:
        picture = Picture(0, 0, height, width, *scaled_shape(height, width, 1.0, ScaleConfig(reduce=config.reduce)))
    if config.kind == "pad":
        return _extended(picture, *(-(-side // config.size) * config.size for side in (picture.rows, picture.cols)))
    if config.extends:
        ends = (tile_corners(config, picture.rows, picture.cols) + config.size).max(axis=0, initial=0)
        return _extended(picture, max(picture.rows, int(ends[0])), max(picture.cols, int(ends[1])))
    return picture


def tile_corners(config: ConvertConfig, rows: int, cols: int) -> np.ndarray:
    """Corners (n, 2) of the tiles of a picture before any filter; a picture that is not tiled is one tile."""
    return grid(rows, cols, config.size, config.overlap, config.edge) if config.tiled else np.zeros((1, 2), np.int64)


def cut(picture: Picture, pixels: np.ndarray, mask: np.ndarray, pad: str) -> tuple[np.ndarray, np.ndarray]:
    """The picture (rows, cols, 3) uint8 and its mask (rows, cols) of 0/1, out of a slide (H, W, 3) and its mask (H, W).

    `pad` fills what lies beyond the slide: reflect mirrors image and mask, white and mean (of the picture's own pixels)
    have no mask.
    """
    part, pads = picture.inside(*pixels.shape[:2])
    shape = picture.rows - pads[0] - pads[1], picture.cols - pads[2] - pads[3]
    image, label = (
        resize_image(np.ascontiguousarray(pixels[part]), shape),
        resize_mask(np.ascontiguousarray(mask[part]), shape),
    )
    if not any(pads):
        return image, label
    if pad == "reflect":
        return cv2.copyMakeBorder(image, *pads, cv2.BORDER_REFLECT), cv2.copyMakeBorder(
            label, *pads, cv2.BORDER_REFLECT
        )
    fill = (WHITE,) * 3 if pad == "white" else tuple(float(round(value)) for value in cv2.mean(image)[:3])
    return cv2.copyMakeBorder(image, *pads, cv2.BORDER_CONSTANT, value=fill), cv2.copyMakeBorder(
        label, *pads, cv2.BORDER_CONSTANT, value=0
    )


def union(first: Box | None, second: Box | None) -> Box | None:
    """The smallest box around both."""
    if first is None or second is None:
        return first or second
    return min(first[0], second[0]), min(first[1], second[1]), max(first[2], second[2]), max(first[3], second[3])


def _canvas(config: ConvertConfig, height: int, width: int, tissue: Box) -> Picture:
    top, left, bottom, right = tissue
    side = config.canvas if config.keep_scale else max(bottom - top, right - left)
    pixels = round(config.canvas / config.reduce)
    return Picture(_placed(top, bottom, side, height), _placed(left, right, side, width), side, side, pixels, pixels)


def _placed(first: int, last: int, side: int, length: int) -> int:
    """Start of a canvas whose middle is that of the tissue; it is moved so that nothing is padded, or nothing is cut,
    needlessly.
    """
    lowest, highest = sorted((0, length - side))
    return min(max((first + last - side) // 2, lowest), highest)


def _extended(picture: Picture, rows: int, cols: int) -> Picture:
    height, width = picture.height * rows / picture.rows, picture.width * cols / picture.cols
    return Picture(picture.top, picture.left, height, width, rows, cols)


def _clipped(start: int, span: float, pixels: int, length: int) -> tuple[slice, tuple[int, int]]:
    first, last = max(start, 0), min(start + span, length)
    before, end = round((first - start) * pixels / span), round((last - start) * pixels / span)
    if end <= before:  # a sliver of tissue on a wide canvas still gets its pixel
        before, end = min(before, pixels - 1), min(before, pixels - 1) + 1
    return slice(first, round(last)), (before, pixels - end)
