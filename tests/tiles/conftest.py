"""Small slides written to disk, with run-length strings made by a plain loop that shares no code with the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from hubmap_kit.competition.tables import Slide

SlideMaker = Callable[..., tuple[Slide, np.ndarray, np.ndarray]]


def plain_rle(mask: np.ndarray) -> str:
    """Column-major, 0-based: the competition's own format, one pixel at a time."""
    words, start = [], None
    flat = [*mask.ravel(order="F").tolist(), 0]
    for place, value in enumerate(flat):
        if value and start is None:
            start = place
        elif not value and start is not None:
            words += [str(start), str(place - start)]
            start = None
    return " ".join(words)


def blobs(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """A mask of smooth shapes, about a third of it inside; pixel (0, 0) is clear."""
    noise = cv2.GaussianBlur(random.random((height, width)), (0, 0), 3, borderType=cv2.BORDER_REFLECT)
    mask = (noise > np.quantile(noise, 0.67)).astype(np.uint8)
    mask[0, 0] = 0
    return mask


@pytest.fixture
def make_slide(tmp_path: Path) -> SlideMaker:
    """`make_slide(id, height, width)` -> the table row, the pixels (H, W, 3) and the mask (H, W) of a TIFF just
    written.
    """

    def make(name: str, height: int, width: int) -> tuple[Slide, np.ndarray, np.ndarray]:
        random = np.random.default_rng(sum(map(ord, name)) + height)
        pixels = random.integers(0, 256, (height, width, 3), np.uint8)
        mask = blobs(height, width, random)
        path = tmp_path / "slides" / f"{name}.tiff"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, pixels, photometric="rgb")
        slide = Slide(
            id=name,
            organ="kidney",
            source="HPA",
            height=height,
            width=width,
            um_per_px=0.4,
            thickness_um=4.0,
            path=path,
            rle=plain_rle(mask),
        )
        return slide, pixels, mask

    return make
