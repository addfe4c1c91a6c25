"""Tables and slides whose bytes depend on nothing but their content."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from hubmap_kit.files import atomic_path

STRIP_ROWS = 256


def write_tiff(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image `(H, W, 3)` uint8 RGB as a deflated TIFF, atomically.

    Neither date nor software is written: they would make two equal slides differ.
    """
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            _strips(image),
            shape=image.shape,
            dtype=image.dtype,
            photometric="rgb",
            compression="zlib",
            predictor=True,
            metadata=None,
            software=False,
            rowsperstrip=STRIP_ROWS,
        )


def _strips(image: NDArray[np.uint8]) -> Iterator[bytes]:
    """Strips, differenced and deflated by Python's own zlib, so that the bytes do not depend on which codecs are
    installed.
    """
    for top in range(0, len(image), STRIP_ROWS):
        strip = image[top : top + STRIP_ROWS]
        difference = strip.copy()
        difference[:, 1:] -= strip[:, :-1]  # wraps around at 256, as TIFF's predictor 2 does
        yield zlib.compress(difference.tobytes(), 6)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV with one header line, atomically; line ends are the same on every system."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
