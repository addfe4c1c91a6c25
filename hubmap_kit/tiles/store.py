"""The tile store: scaled slides as flat uint8 memory maps, packed masks, and a table of grid tiles.

A folder: `store.json` (what it was made from; written last, so a store without it is unfinished), `images.u8` (all
scaled slides, RGB, one after the other), `masks.bits` (8 mask pixels a byte, rows padded to whole bytes),
`slides.parquet` (one row a slide, with its offsets), and one `tiles-<size>-<overlap>.parquet` (one row a grid tile) for
every grid that was asked for.

Reading a crop touches only its own pages; nothing is decoded again. A PNG tile costs about 45 times as much to read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.organs import FACTS
from hubmap_kit.competition.pixel_sizes import PixelSizeWatch
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import ScaleChoices, ScaleConfig, TilesConfig
from hubmap_kit.errors import StoreError
from hubmap_kit.files import sweep, write_json
from hubmap_kit.progress import track
from hubmap_kit.tiles.grid import open_table, read_table
from hubmap_kit.tiles.scaling import resize_image, resize_mask, scaled_shape

FORMAT = 1
IMAGES, MASKS, SLIDES, META = "images.u8", "masks.bits", "slides.parquet", "store.json"


class TileStore:
    """A finished store, opened for reading with one grid of tiles, or with those of a conversion (`table`, a file of
    its folder).

    `slides` has one row a slide: id, organ, data_source, um_per_px, height, width (original pixels), rows, cols
    (network pixels), image_offset, mask_offset (bytes); pictures cut out of slides also have top, left (original
    pixels) and mask_kept (share of the slide's mask that they show). `tiles` has one row a grid tile: slide (row number
    in `slides`), id, y, x (original pixels), row, col, size (network pixels), foreground (share covered by the mask).
    """

    def __init__(self, folder: str | Path, tiles: TilesConfig, table: str = "") -> None:
        self.folder, self.grid, self.table = Path(folder), tiles, table
        self.meta = _read_meta(self.folder)
        self.slides = read_table(self.folder / SLIDES)
        self._rows = self.slides["rows"].to_numpy()
        self._cols = self.slides["cols"].to_numpy()
        self._image_offsets = self.slides["image_offset"].to_numpy()
        self._mask_offsets = self.slides["mask_offset"].to_numpy()
        self._images = self._map(IMAGES, int((self._rows * self._cols).sum()) * 3)
        self._masks = self._map(MASKS, int((self._rows * ((self._cols + 7) // 8)).sum()))
        self.tiles = open_table(self.folder, tiles, self.slides, self.mask, table)

    def __reduce__(self) -> tuple[type[TileStore], tuple[Path, TilesConfig, str]]:
        # A memory map pickles as a copy of its data; a spawned worker must open the files again instead.
        return TileStore, (self.folder, self.grid, self.table)

    def __len__(self) -> int:
        return len(self.slides)

    def image(self, slide: int) -> np.ndarray:
        """The scaled slide, (rows, cols, 3) uint8 RGB: a read-only view, nothing is copied."""
        rows, cols, start = self._rows[slide], self._cols[slide], self._image_offsets[slide]
        return self._images[start : start + rows * cols * 3].reshape(rows, cols, 3)

    def mask(self, slide: int) -> np.ndarray:
        """The scaled mask, (rows, cols) uint8 0/1."""
        return np.unpackbits(self._packed(slide), axis=1, count=self._cols[slide])

    def label(self, slide: int) -> np.ndarray:
        """The scaled mask with the organ's class index 1..5 inside, (rows, cols) uint8."""
        return self.mask(slide) * np.uint8(FACTS[str(self.slides["organ"][slide])].index)

    def crop(self, slide: int, row: int, col: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A square of `size` network pixels at (row, col): image (size, size, 3) and mask (size, size), both own
        copies.

        The square may reach over any edge; image and mask are mirrored there together.
        """
        rows, cols = int(self._rows[slide]), int(self._cols[slide])
        if not -size < row < rows or not -size < col < cols:
            raise IndexError(
                f"crop at ({row}, {col}) of {size} px lies outside slide {self.slides['id'][slide]} ({rows} x {cols})"
            )
        if row < 0 or col < 0 or row + size > rows or col + size > cols:
            places = np.ix_(_mirrored(row, size, rows), _mirrored(col, size, cols))
            return self.image(slide)[places], self.mask(slide)[places]
        first_byte = col // 8
        packed = self._packed(slide)[row : row + size, first_byte : (col + size + 7) // 8]
        mask = np.unpackbits(packed, axis=1)[:, col - 8 * first_byte :][:, :size]
        return self.image(slide)[row : row + size, col : col + size].copy(), mask.copy()

    def _packed(self, slide: int) -> np.ndarray:
        rows, stride, start = self._rows[slide], (self._cols[slide] + 7) // 8, self._mask_offsets[slide]
        return self._masks[start : start + rows * stride].reshape(rows, stride)

    def _map(self, name: str, expected: int) -> np.ndarray:
        path = self.folder / name
        found = path.stat().st_size if path.is_file() else -1
        if found != expected:
            state = "is missing" if found < 0 else f"has {found} bytes"
            raise StoreError(
                f"{path} {state} where the table says {expected} bytes; delete {self.folder} and run again to"
                " rebuild it"
            )
        return np.memmap(path, np.uint8, mode="r") if expected else np.zeros(0, np.uint8)


def mirror(pixels: np.ndarray, pads: tuple[int, int, int, int]) -> np.ndarray:
    """Extend `pixels` by (top, bottom, left, right) mirrored pixels; also where the padding is wider than the
    picture.
    """
    (top, bottom, left, right), (height, width) = pads, pixels.shape[:2]
    return pixels[np.ix_(_mirrored(-top, top + height + bottom, height), _mirrored(-left, left + width + right, width))]


def is_finished(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds a finished store made from exactly the data and settings that `fingerprint` stands for."""
    try:
        return _read_meta(folder).get("fingerprint") == fingerprint
    except StoreError:
        return False


def _read_meta(folder: Path) -> Mapping[str, object]:
    path = folder / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{folder} is not a finished tile store: {META} is missing; run again to build it") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not readable JSON; delete {folder} and run again to rebuild the store") from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise StoreError(f"{path} has store format {found}, this version reads {FORMAT}; delete {folder} and run again")
    return meta


def _mirrored(start: int, size: int, length: int) -> np.ndarray:
    """Indices start .. start + size - 1 of an axis that is mirrored at both ends, edge pixels repeated: ...

    1 0 | 0 1 2 | 2 1 ...
    """
    index = np.arange(start, start + size) % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


# Slides -> tile store.

log = logging.getLogger(__name__)


def fingerprint(slides: Sequence[Slide], scale: ScaleConfig) -> str:
    """A hash (hex, 16 digits) of everything that a store's bytes depend on; slide files count by name and size."""
    parts: list[object] = [FORMAT, *_what_counts(scale)]
    parts += [[organ, *_what_counts(choices)] for organ, choices in sorted(scale.organs.items())]
    for slide in slides:
        size = slide.path.stat().st_size if slide.path.is_file() else -1
        labels = hashlib.sha256((slide.rle or "").encode()).hexdigest()
        parts.append(
            [
                slide.id,
                slide.organ,
                slide.source,
                slide.um_per_px,
                slide.height,
                slide.width,
                slide.path.name,
                size,
                labels,
            ]
        )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _what_counts(choices: ScaleChoices) -> list[object]:
    used = {"reduce": ("reduce",), "physical": ("um_per_px", "max_zoom"), "fit": ("fit",)}[choices.policy]
    return [choices.policy, *(getattr(choices, key) for key in used)]


def open_or_build(parent: Path, slides: Sequence[Slide], scale: ScaleConfig, tiles: TilesConfig) -> TileStore:
    """The store for these slides and this scale in `parent`, built if it is not there yet, with the tiles of one grid.

    The folder is named by the fingerprint, so runs that share data and scale share it, whatever their tiles. Raises
    SlideError and RleError.
    """
    mark = fingerprint(slides, scale)
    folder = parent / mark
    if not is_finished(folder, mark):
        build(folder, slides, scale, mark)
    return TileStore(folder, tiles)


def build(folder: Path, slides: Sequence[Slide], scale: ScaleConfig, mark: str) -> None:
    """Write a store.

    It grows under a temporary name and takes its own when it is complete; one slide is in memory at a time.
    """
    growing = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    sweep(folder.parent, f".{folder.name}.*.tmp")
    growing.mkdir(parents=True)
    watch = PixelSizeWatch()
    try:
        with open(growing / IMAGES, "wb") as images, open(growing / MASKS, "wb") as masks:
            rows = [_append(slide, scale, images, masks, watch) for slide in track(slides, "tile store", "slide")]
        pd.DataFrame(rows).to_parquet(growing / SLIDES)
        meta = {"format": FORMAT, "fingerprint": mark, "slides": len(rows), "scale": scale.model_dump()}
        write_json(growing / META, meta)
        if is_finished(folder, mark):
            return  # another process, such as the fold on the other GPU, was faster with the same store
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(growing, folder)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    log.info("tile store of %d slides in %s", len(rows), folder)


def _append(
    slide: Slide, scale: ScaleConfig, images: BinaryIO, masks: BinaryIO, watch: PixelSizeWatch
) -> dict[str, object]:
    pixels = slide_files.read(slide.path)
    height, width = pixels.shape[:2]
    watch.look(slide, height, width)
    shape = scaled_shape(height, width, slide.um_per_px, scale, slide.organ)
    mask = resize_mask(decode_for(slide, height, width), shape)
    offsets = {"image_offset": images.tell(), "mask_offset": masks.tell()}
    images.write(np.ascontiguousarray(resize_image(pixels, shape)).data)
    masks.write(np.packbits(mask, axis=1).data)
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "um_per_px": slide.um_per_px,
        "height": height,
        "width": width,
        "rows": shape[0],
        "cols": shape[1],
        **offsets,
    }


def decode_for(slide: Slide, height: int, width: int) -> np.ndarray:
    """The slide's mask (height, width) of 0/1 at the size that its file has.

    Sizes in the table are sometimes off. Runs go down columns, so where only the width differs the file is believed as
    it is; where the height differs too, the file must be a resampled copy, and the mask is resampled with it.
    """
    text = slide.rle or ""
    if (height, width) == (slide.height, slide.width) or not text:
        return rle.decode(text, height, width)
    log.warning(
        "slide %s is %d x %d in its file but %d x %d in the table", slide.id, height, width, slide.height, slide.width
    )
    if height == slide.height:
        return rle.decode(text, height, width)
    return resize_mask(rle.decode(text, slide.height, slide.width), (height, width))
