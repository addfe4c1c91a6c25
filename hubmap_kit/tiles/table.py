"""The table of grid tiles of a store: one row a tile, one file a grid, so that every grid shares the store's pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hubmap_kit.config import TilesConfig
from hubmap_kit.errors import StoreError
from hubmap_kit.files import atomic_path
from hubmap_kit.tiles.grid import box_shares, grid

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
    corners = grid(*mask.shape, tiles.size, tiles.overlap)
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
