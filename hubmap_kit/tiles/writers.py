"""Where converted pixels go: into the flat files of a store, or into folders of PNG and JPEG files.

A writer is plain data and travels to worker processes. It writes one slide at a time, to places that are known before
any slide is read: so slides may come in any order, and a slide that is written twice leaves the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from hubmap_kit.competition.organs import FACTS
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import StoreError
from hubmap_kit.files import atomic_path
from hubmap_kit.tiles import store as files

JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1)  # higher levels cost several times as much to write, and no less to read


class Writer(Protocol):
    """Writes the picture (rows, cols, 3) uint8 of one slide, its mask (rows, cols) of 0/1, and its tiles.

    `corners` (n, 2) are the tiles' places in the picture, `size` their height and width. Returns what later tables
    need: always `files`, the size and sha256 of each file that belongs to this slide alone.
    """

    def write(
        self, slide: Slide, image: np.ndarray, mask: np.ndarray, corners: np.ndarray, size: tuple[int, int]
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class NoWriter:
    """Writes nothing: the pixels are there already, and only the table of tiles is wanted."""

    def write(
        self, slide: Slide, image: np.ndarray, mask: np.ndarray, corners: np.ndarray, size: tuple[int, int]
    ) -> dict[str, Any]:
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
