"""Contact sheets of labels that a model made: those that were kept, and those that were refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from hubmap_kit.report.overlays import CELL, PREDICTION, TINT, Item, contact_sheet

COLUMNS = 4


@dataclass(frozen=True)
class Shown:
    """A slide on a sheet: its id, a line above its picture, and the number by which slides are put in order."""

    id: str
    title: str
    order: float


def save_sheet(
    path: Path, slides: Sequence[Shown], read: Callable[[str], tuple[np.ndarray, np.ndarray]], most: int
) -> int:
    """Draw up to `most` of the slides, spread evenly over their order, lowest first; returns how many.

    Without any, no sheet is left.

    `read` gives the pixels (H, W, 3) and the mask (H, W) of an id; one slide is in memory at full size at a time.
    """
    chosen = spread(sorted(slides, key=lambda shown: (shown.order, shown.id)), most)
    if not chosen:
        path.unlink(missing_ok=True)  # of an earlier time
        return 0
    contact_sheet(path, [_item(*read(shown.id), shown.title) for shown in chosen], COLUMNS)
    return len(chosen)


def spread(slides: Sequence[Shown], most: int) -> list[Shown]:
    """At most `most` of them at even distances, the first and the last among them."""
    if len(slides) <= most:
        return list(slides)
    return (
        [slides[round(place)] for place in np.linspace(0, len(slides) - 1, most)] if most > 1 else list(slides[:most])
    )


def _item(pixels: np.ndarray, mask: np.ndarray, title: str) -> Item:
    factor = CELL / max(mask.shape)
    if factor < 1:
        size = max(1, round(mask.shape[1] * factor)), max(1, round(mask.shape[0] * factor))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        mask = (cv2.resize(mask * np.uint8(255), size, interpolation=cv2.INTER_AREA) > 127).astype(np.uint8)
    return _tinted(pixels, mask), None, mask, title


def _tinted(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The slide with what is inside the mask in blue: an outline alone does not tell which side is meant."""
    blue = cv2.addWeighted(pixels, 1 - TINT, np.full_like(pixels, PREDICTION), TINT, 0)
    return np.where(mask[..., None] > 0, blue, pixels)
