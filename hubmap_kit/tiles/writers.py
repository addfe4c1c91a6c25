"""Where converted pixels go: into the flat files of a store, or into folders of PNG and JPEG files.

A writer is plain data and travels to worker processes. It writes one slide at a time, to places that are known before
any slide is read: so slides may come in any order, and a slide that is written twice leaves the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import cv2
import numpy as np

from hubmap_kit.competition.organs import FACTS
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import ScaleConfig
from hubmap_kit.errors import StoreError
from hubmap_kit.files import atomic_path
from hubmap_kit.tiles import store as files
from hubmap_kit.tiles.background import Box
from hubmap_kit.tiles.convert_config import PRESETS, ConvertConfig
from hubmap_kit.tiles.grid import grid
from hubmap_kit.tiles.scaling import resize_image, resize_mask, scaled_shape

JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1)  # higher levels cost several times as much to write, and no less to read


class Writer(Protocol):
    """Writes the picture (rows, cols, 3) uint8 of one slide, its mask (rows, cols) of 0/1, and its tiles.

    `corners` (n, 2) are the tiles' places in the picture, `size` their height and width. Returns what later tables
    need: always `files`, the size and sha256 of each file that belongs to this slide alone.
    """

    def write(
        self, slide: Slide, image: np.ndarray, mask: np.ndarray, corners: np.ndarray, size: tuple[int, int]
    ) -> dict[str, Any]:
        """Write one slide; arguments and result as the class says."""
        ...


@dataclass(frozen=True)
class NoWriter:
    """Writes nothing: the pixels are there already, and only the table of tiles is wanted."""

    def write(
        self, slide: Slide, image: np.ndarray, mask: np.ndarray, corners: np.ndarray, size: tuple[int, int]
    ) -> dict[str, Any]:
        """Nothing; see Writer.write."""
        return {"files": {}}


@dataclass(frozen=True)
class StoreWriter:
    """Writes a picture at its offsets in the images and masks of a store; a tile is a row of a table and costs
    nothing.
    """

    folder: Path
    image_offset: int
    mask_offset: int

    def write(
        self, slide: Slide, image: np.ndarray, mask: np.ndarray, corners: np.ndarray, size: tuple[int, int]
    ) -> dict[str, Any]:
        """Write the picture and its mask into the store's files; see Writer.write."""
        places = (
            (files.IMAGES, self.image_offset, np.ascontiguousarray(image)),
            (files.MASKS, self.mask_offset, np.packbits(mask, axis=1)),
        )
        for name, offset, content in places:
            with open(self.folder / name, "r+b", buffering=0) as handle:
                handle.seek(offset)
                handle.write(content.data)
        return {"image_offset": self.image_offset, "mask_offset": self.mask_offset, "files": {}}


@dataclass(frozen=True)
class FolderWriter:
    """Writes every tile as an image file and a PNG of its mask: `<id>_r<row>_c<col>`, or `<id>` where a slide is one
    picture.

    `images` and `masks` are folders inside `folder`, `suffix` the kind of image file. Masks hold 0/1, or the organ's
    index 1..5.
    """

    folder: Path
    images: str
    masks: str
    suffix: str
    organ_labels: bool
    tiled: bool

    def write(
        self, slide: Slide, image: np.ndarray, mask: np.ndarray, corners: np.ndarray, size: tuple[int, int]
    ) -> dict[str, Any]:
        """Write each tile and its mask as files; see Writer.write."""
        label = mask * np.uint8(FACTS[slide.organ].index) if self.organ_labels else mask
        names, written = [], {}
        for row, col in corners.tolist():
            stem = f"{slide.id}_r{row:05d}_c{col:05d}" if self.tiled else slide.id
            part = slice(row, row + size[0]), slice(col, col + size[1])
            pair = f"{self.images}/{stem}{self.suffix}", f"{self.masks}/{stem}.png"
            written[pair[0]] = self._file(pair[0], image[part][..., ::-1], JPEG if self.suffix == ".jpg" else PNG)
            written[pair[1]] = self._file(pair[1], label[part], PNG)
            names.append(pair)
        return {"names": names, "files": written}

    def _file(self, name: str, pixels: np.ndarray, options: Sequence[int]) -> dict[str, Any]:
        done, content = cv2.imencode(Path(name).suffix, np.ascontiguousarray(pixels), options)
        if not done:
            raise StoreError(f"{name} cannot be encoded by OpenCV; choose another convert.format")
        with atomic_path(self.folder / name) as temporary:
            temporary.write_bytes(content.data)
        return {"bytes": content.nbytes, "sha256": hashlib.sha256(content.data).hexdigest()}


# Where a conversion's pictures and tiles lie on a slide, and cutting them: image and mask always by the same numbers.

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


# How many tiles each conversion makes, from the sizes in train.csv alone, beside the counts that the first team
# published.

# Tiles of the 351 training slides: the first team's report, 2022. (side of the slide or of its canvas, tile, reduce) ->
# tiles.
PUBLISHED: Mapping[tuple[int, int, int], int] = MappingProxyType(
    {
        (3000, 512, 1): 10271,
        (3000, 512, 2): 3115,
        (3000, 768, 1): 5373,
        (3000, 768, 2): 1404,
        (2048, 512, 1): 5599,
        (2048, 512, 2): 1404,
        (2048, 768, 1): 3157,
    }
)
PUBLISHED_SLIDES = 351


@dataclass(frozen=True)
class Row:
    """One conversion: tiles with the edge padded (as many as with shift) and dropped, both unfiltered; published tiles
    if there are any.
    """

    name: str
    side: str
    size: int
    reduce: int
    padded: int
    dropped: int
    published: int | None

    @property
    def filtered(self) -> float | None:
        """The share of the padded tiles that a filter must have dropped to leave the published ones."""
        return None if self.published is None else 1 - self.published / self.padded


def count(slides: Sequence[Slide], config: ConvertConfig) -> int:
    """Tiles (or pictures) of a conversion before any filter, from the sizes that the table states."""
    total = 0
    for slide in slides:
        picture = plan(config, slide.height, slide.width)
        total += len(tile_corners(config, picture.rows, picture.cols))
    return total


def count_table(slides: Sequence[Slide]) -> list[Row]:
    """A row for each tiled preset without a filter; published counts only for the 351 slides that they are of."""
    rows = []
    for name, values in PRESETS.items():
        config = ConvertConfig(**values)
        if not config.tiled or config.min_tissue:
            continue
        key = (config.canvas if config.cropped else 3000, config.size, config.reduce)
        published = PUBLISHED.get(key) if len(slides) == PUBLISHED_SLIDES else None
        padded, dropped = (count(slides, config.model_copy(update={"edge": edge})) for edge in ("pad", "drop"))
        rows.append(
            Row(
                name,
                "canvas 2048" if config.cropped else "slide",
                config.size,
                config.reduce,
                padded,
                dropped,
                published,
            )
        )
    return rows


def count_text(slides: Sequence[Slide], config: ConvertConfig | None = None) -> str:
    """The table as text; `config`, if given, adds the count of one more conversion."""
    lines = [
        f"{'--config':<12} {'of':<11} {'size':>4} {'reduce':>6} {'pad, shift':>10} {'drop':>7} {'published':>9}"
        f" {'filtered':>8}"
    ]
    for row in count_table(slides):
        published = "" if row.published is None else f"{row.published:>9} {row.filtered:>8.2%}"
        line = (
            f"{row.name:<12} {row.side:<11} {row.size:>4} {row.reduce:>6} {row.padded:>10} {row.dropped:>7} {published}"
        )
        lines.append(line.rstrip())
    lines += ["", "pad, shift, drop: tiles by edge policy, before any filter."]
    if len(slides) == PUBLISHED_SLIDES:
        lines.append(
            "published: the first team's report, 2022. filtered: the share of padded tiles that its filter must have"
            " dropped."
        )
        lines.append(
            "With drop there would be fewer tiles than published, so that team's edges were padded or shifted."
        )
    else:
        lines.append(f"Published counts are of the {PUBLISHED_SLIDES} training slides; this table has {len(slides)}.")
    if config is not None:
        filtered = f", before min_tissue {config.min_tissue:g} drops some" if config.min_tissue else ""
        lines.append(
            f"\nthese settings ({config.kind}, size {config.size}, reduce {config.reduce}, edge {config.edge}):"
            f" {count(slides, config)}{filtered}"
        )
    return "\n".join(lines)
