"""Mosaics: four tiles around a random centre in one, masks with them; on tiles, in a batch, and as files made before
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import pandas as pd

from hubmap_kit.errors import HubmapError, StoreError
from hubmap_kit.files import atomic_path
from hubmap_kit.progress import track

Tile = tuple[np.ndarray, np.ndarray]
MARGIN = 0.2  # share of the side that every quarter keeps at least
AIMED = 0.75  # share of the quarters of a made mosaic that are cut near a tile with units
COLUMNS = (
    "file",
    "size",
    "seed",
    "row",
    "col",
    *(f"{name}{part}" for part in range(1, 5) for name in ("id", "organ", "y", "x")),
    "foreground",
)


class Store(Protocol):
    """What is needed of a tile store (`tiles.store.TileStore`): its tables `slides` and `tiles`, and its crops."""

    slides: Any
    tiles: Any

    def crop(self, slide: int, row: int, col: int, size: int) -> Tile:
        """Image (size, size, 3) and mask (size, size) of a square of network pixels."""


def mosaic(tiles: Sequence[Tile], random: np.random.Generator) -> Tile:
    """Four tiles of one size (S, S) in one of that size: each fills a quarter, with a random part of its own; scale
    stays.

    After the mosaic of Bochkovskiy et al., YOLOv4 (2020). The quarters meet at a random centre, 0.2 S away from every
    edge. Masks are any uint8 values. Raises ValueError for other than four tiles or tiles of different sizes.
    """
    return quarters(tiles, centre(tiles[0][1].shape[0], random), random)[0]


def centre(size: int, random: np.random.Generator) -> tuple[int, int]:
    """Where the quarters of a mosaic of `size` pixels meet: a row and a column."""
    least = max(1, round(MARGIN * size))
    row, col = random.integers(least, size - least + 1, 2)
    return int(row), int(col)


def quarters(
    tiles: Sequence[Tile], middle: tuple[int, int], random: np.random.Generator
) -> tuple[Tile, list[tuple[int, int]]]:
    """The mosaic around `middle`, and from which (row, col) of its tile each quarter was taken; quarters as in
    reading.
    """
    shapes = {tile[1].shape for tile in tiles} | {tile[0].shape[:2] for tile in tiles}
    if len(tiles) != 4 or len(shapes) != 1:
        raise ValueError(f"a mosaic needs four tiles of one size, got {len(tiles)} of {sorted(shapes)}")
    rows, cols = shapes.pop()
    image, mask, taken = np.empty_like(tiles[0][0]), np.empty_like(tiles[0][1]), []
    spans = [(slice(0, middle[0]), slice(middle[0], rows)), (slice(0, middle[1]), slice(middle[1], cols))]
    for number, tile in enumerate(tiles):
        down, across = spans[0][number // 2], spans[1][number % 2]
        height, width = down.stop - down.start, across.stop - across.start
        top, left = int(random.integers(rows - height + 1)), int(random.integers(cols - width + 1))
        image[down, across] = tile[0][top : top + height, left : left + width]
        mask[down, across] = tile[1][top : top + height, left : left + width]
        taken.append((top, left))
    return (image, mask), taken


def mosaic_batch(
    images: np.ndarray,
    masks: np.ndarray,
    random: np.random.Generator,
    probability: float = 0.5,
    organs: Sequence[object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A batch (N, S, S, 3) and its masks (N, S, S), where each tile becomes a mosaic with three of the batch with
    `probability`.

    With `organs`, one for each tile, the three are of the tile's own organ; they may repeat where the batch holds few.
    The first quarter is the tile's own. Inputs stay as they are.
    """
    mixed_images, mixed_masks = images.copy(), masks.copy()
    labels = np.zeros(len(images)) if organs is None else np.asarray(organs)
    for number in np.flatnonzero(random.random(len(images)) < probability):
        partners = random.choice(np.flatnonzero(labels == labels[number]), 3)
        tiles = [(images[place], masks[place]) for place in (number, *partners)]
        mixed_images[number], mixed_masks[number] = mosaic(tiles, random)
    return mixed_images, mixed_masks


def mosaic_tiles(store: Store, n: int, size: int, seed: int, same_organ: bool, out: str | Path) -> Path:
    """Make `n` mosaics of `size` pixels (256, 512 or 768 as a rule) from a store; returns the table `out`/mosaics.csv.

    Written are `out`/images/mosaic-00000.png (RGB), `out`/masks/mosaic-00000.png (0 and 255), and the table, last: for
    each the four sources' ids, organs and places (y, x of the quarter's first pixel in the slide's network pixels),
    quarters as in reading. Three of four quarters are cut near a tile with units. With `same_organ` all four are of one
    organ, organs taking turns; else of any. Each mosaic depends on (seed, number) alone. Raises HubmapError for a
    number below 1, StoreError for a store without tiles.
    """
    for name, found, least in (("n", n, 1), ("size", size, 16), ("seed", seed, 0)):
        if found < least:
            raise HubmapError(
                f"mosaics were asked for with {name}={found}, but {least} or more is needed; pass a larger number"
            )
    if not len(store.tiles):
        raise StoreError("the store holds no tiles, so no mosaic can be made of it; choose slides with tissue")
    out, maker = Path(out), _Maker(store, size, seed, same_organ)
    rows = [maker.write(number, out) for number in track(range(n), f"mosaics of {size} px", "mosaic")]
    table = out / "mosaics.csv"
    with atomic_path(table) as temporary:
        pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(temporary, index=False)
    return table


class _Maker:
    """Draws and writes single mosaics of one store."""

    def __init__(self, store: Store, size: int, seed: int, same_organ: bool) -> None:
        self.store, self.size, self.seed = store, size, seed
        self.organs = store.slides["organ"].to_numpy()
        self.lengths = store.slides[["rows", "cols"]].to_numpy(np.int64)
        places = store.tiles[["slide", "row", "col", "size"]].to_numpy(np.int64)
        filled = (store.tiles["foreground"] > 0).to_numpy()
        groups = np.unique(self.organs[places[:, 0]]) if same_organ else [None]
        own = [np.full(len(places), True) if organ is None else self.organs[places[:, 0]] == organ for organ in groups]
        self.groups = [(places[mine], places[mine & filled]) for mine in own]

    def write(self, number: int, out: Path) -> list[object]:
        random = np.random.default_rng((self.seed, self.size, number))
        everything, filled = self.groups[number % len(self.groups)]
        tiles, places = [], []
        for _ in range(4):
            choices = filled if len(filled) and random.random() < AIMED else everything
            places.append(self._around(*choices[random.integers(len(choices))].tolist()))
            tiles.append(self.store.crop(*places[-1], self.size))
        middle = centre(self.size, random)
        (image, mask), taken = quarters(tiles, middle, random)
        name = f"mosaic-{number:05d}.png"
        _write_png(out / "images" / name, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        _write_png(out / "masks" / name, (mask > 0).astype(np.uint8) * np.uint8(255))
        sources = []
        for (slide, row, col), (top, left) in zip(places, taken, strict=True):
            sources += [self.store.slides["id"].iloc[slide], self.organs[slide], row + top, col + left]
        return [name, self.size, self.seed, *middle, *sources, round(float((mask > 0).mean()), 6)]

    def _around(self, slide: int, row: int, col: int, side: int) -> tuple[int, int, int]:
        """The crop of this mosaic's size with the middle of a grid tile in its own, moved into the slide where it can
        be.
        """
        room = np.maximum(self.lengths[slide] - self.size, 0)
        top, left = np.clip(np.array([row, col]) + (side - self.size) // 2, 0, room).tolist()
        return slide, top, left


def _write_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        if not cv2.imwrite(str(temporary), pixels):
            raise HubmapError(f"{path} could not be written; check the folder and the free disk space")
