"""Restained copies of one slide: which look, reference and method each has, and its file, which says what it is made
of.

All of it follows from the copy's id, the references and the slide, so a repeated job makes the same copies, and finds
those that it has.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

from hubmap_kit.augment.stain import TRANSFERS, Reference
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import SlideError
from hubmap_kit.files import atomic_path
from hubmap_kit.tiles.scaling import reduced_shape, resize_image

FORMAT = 1  # of the copies' pixels: copies of another number are made again
KIND = "restained"  # how the provenance of a copy begins
FALLBACK = "reinhard"  # needs one stain only, where Macenko's method needs two
STRIP_ROWS = 256
DESCRIPTION = 270  # TIFF tag ImageDescription


@dataclass(frozen=True)
class Recipe:
    """What all copies share: the references of every look by its name, and how many times coarser than their slides
    they are.
    """

    looks: Mapping[str, Sequence[Reference]]
    reduce: int
    folder: Path

    def copies(self, slide_id: str, count: int) -> dict[str, str]:
        """Id -> look of `count` copies of a slide: the looks in turn, from one that its id decides, so that few copies
        are even as well.
        """
        names = list(self.looks)
        first = int(_random(slide_id).integers(len(names)))
        turns = [((first + number) % len(names), number // len(names) + 1) for number in range(count)]
        return {f"{slide_id}_{names[look]}{number}": names[look] for look, number in sorted(turns)}

    def draw(self, copy_id: str, look: str) -> tuple[Reference, str]:
        """The reference and the method of a copy, all equally often."""
        random, references = _random(copy_id), self.looks[look]
        reference = references[int(random.integers(len(references)))]
        return reference, list(TRANSFERS)[int(random.integers(len(TRANSFERS)))]

    def path(self, copy_id: str) -> Path:
        """The file of a copy."""
        return self.folder / f"{copy_id}.tiff"

    def kept(self, slide: Slide, copy_id: str, look: str) -> str | None:
        """The provenance of a copy that is there, whole and made as it would be now; None where it must be made."""
        path = self.path(copy_id)
        if not path.is_file():
            return None
        try:
            slide_files.size(path)
            with tifffile.TiffFile(path, is_ome=False) as tif:
                provenance, _, mark = str(tif.pages.first.tags.valueof(DESCRIPTION, "")).rpartition(" ")
        except (SlideError, OSError, ValueError, tifffile.TiffFileError):
            return None
        return provenance if provenance and mark == self._mark(slide, copy_id, look) else None

    def make(self, slide: Slide, pixels: np.ndarray, copy_id: str, look: str) -> str | None:
        """Write a copy of a slide's `pixels` (H, W, 3) and return its provenance; None where there is too little tissue
        to go by.
        """
        reference, method = self.draw(copy_id, look)
        image = resize_image(pixels, reduced_shape(pixels.shape[:2], self.reduce))
        made = TRANSFERS[method](image, reference)
        if made is image:
            method, made = FALLBACK, TRANSFERS[FALLBACK](image, reference)
        if made is image:
            return None
        provenance = f"{KIND}:{look}:{plain_name(reference.name)}:{method}"
        self._write(
            self.path(copy_id), made, slide.um_per_px * self.reduce, f"{provenance} {self._mark(slide, copy_id, look)}"
        )
        return provenance

    def _mark(self, slide: Slide, copy_id: str, look: str) -> str:
        reference, method = self.draw(copy_id, look)
        size = slide.path.stat().st_size if slide.path.is_file() else -1
        parts = [FORMAT, copy_id, slide.path.name, size, slide.um_per_px, self.reduce, method, _digest(reference)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _write(self, path: Path, image: np.ndarray, um_per_px: float, description: str) -> None:
        with atomic_path(path) as temporary:
            tifffile.imwrite(
                temporary,
                image,
                photometric="rgb",
                compression="zlib",
                predictor=True,
                rowsperstrip=STRIP_ROWS,
                metadata=None,
                software=False,
                description=description,
                resolution=(10_000 / um_per_px,) * 2,
                resolutionunit="CENTIMETER",
            )


def plain_name(name: str) -> str:
    """A reference's name without its folder and suffix, in letters that a TIFF's description and a one-word provenance
    may hold.
    """
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(name).stem).strip("-") or "reference"


def _digest(reference: Reference) -> str:
    return hashlib.sha256(plain_name(reference.name).encode() + reference.packed).hexdigest()


def _random(words: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"restained/{words}".encode()).digest()[:8], "big"))
