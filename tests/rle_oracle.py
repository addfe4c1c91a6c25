"""Run-length strings and tables read without the kit: pycocotools and the csv module are the second opinion."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from pycocotools import mask as coco


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def coco_mask(text: str, height: int, width: int) -> np.ndarray:
    """Decode a 0-based column-major string with pycocotools, which wants alternating run lengths."""
    counts, position = [], 0
    numbers = [int(word) for word in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        counts += [start - position, length]
        position = start + length
    counts.append(height * width - position)
    return coco.decode(coco.frPyObjects({"counts": counts, "size": [height, width]}, height, width))


def text_of(mask: np.ndarray) -> str:
    """The run-length string of a mask, from the definition."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
    starts, stops = np.flatnonzero(np.diff(flat) == 1), np.flatnonzero(np.diff(flat) == -1)
    return " ".join(f"{start} {stop - start}" for start, stop in zip(starts, stops, strict=True))


def dice(one: np.ndarray, two: np.ndarray) -> float:
    """Dice from the areas of pycocotools' own encodings and their intersection; one of the masks must not be empty."""
    first, second = (coco.encode(np.asfortranarray(mask)) for mask in (one, two))
    common = coco.area(coco.merge([first, second], intersect=True))
    return float(2 * common / (coco.area(first) + coco.area(second)))
