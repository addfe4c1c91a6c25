"""The grid of tiles on a slide, with three ways to treat the right and bottom edges."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd

from hubmap_kit.config import TilesConfig
from hubmap_kit.errors import StoreError
from hubmap_kit.files import atomic_path

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


# The table of grid tiles of a store: one row a tile, one file a grid, so that every grid shares the store's pixels.

log = logging.getLogger(__name__)


def plain_name(tiles: TilesConfig) -> str:
    """The file that holds all tiles of a grid, in a store's folder."""
    return f"tiles-{tiles.size}-{tiles.overlap:g}.parquet"


def open_table(
    folder: Path, tiles: TilesConfig, slides: pd.DataFrame, mask: Callable[[int], np.ndarray], name: str = ""
) -> pd.DataFrame:
    """The table of a grid: read from `folder`, or made from the masks and kept there if the folder can be written.

    `slides` has one row a slide with id, height, width (original) and rows, cols (network pixels); `mask(number)` gives
    a slide's mask. Columns: slide, id, y, x (original pixels), row, col, size (network pixels), foreground (share).
    `name` is the table of a conversion, which is only read: it may hold a choice of tiles, and their share of tissue.
    Raises StoreError.
    """
    path = folder / (name or plain_name(tiles))
    if name or path.is_file():
        return read_table(path)
    table = pd.concat(
        [_of_slide(number, record, mask(number), tiles) for number, record in enumerate(slides.to_dict("records"))]
    )
    table = table.reset_index(drop=True)
    try:
        with atomic_path(path) as temporary:
            table.to_parquet(temporary)
    except OSError:
        log.debug("%s cannot be written; the table of this grid is made anew each time", path)
    return table


def read_table(path: Path) -> pd.DataFrame:
    """A parquet table of the store. Raises StoreError when it is missing or damaged."""
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{path} is missing or damaged; delete {path.parent} and run again to rebuild the store"
        ) from error


def _of_slide(number: int, record: Mapping[str, Any], mask: np.ndarray, tiles: TilesConfig) -> pd.DataFrame:
    height, width = mask.shape
    corners = grid(height, width, tiles.size, tiles.overlap)
    per_row, per_col = int(record["height"]) / mask.shape[0], int(record["width"]) / mask.shape[1]
    return pd.DataFrame(
        {
            "slide": number,
            "id": record["id"],
            "y": int(record.get("top", 0)) + np.round(corners[:, 0] * per_row).astype(np.int64),
            "x": int(record.get("left", 0)) + np.round(corners[:, 1] * per_col).astype(np.int64),
            "row": corners[:, 0],
            "col": corners[:, 1],
            "size": tiles.size,
            "foreground": box_shares(mask, corners, tiles.size),
        }
    )
