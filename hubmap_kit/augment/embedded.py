"""Drawn slides as stain references, for where nobody has real ones: HuBMAP's spleen in haematoxylin and eosin, its
kidney in PAS.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hubmap_kit.augment.stain import Reference, read_references
from hubmap_kit.sample.slide import SlideSpec, draw

UM_PER_PX = 1.0  # the embedded slides show a few units each at this scale
STAIN_OF_ORGAN = {"spleen": "eosin", "kidney": "PAS"}
SIDE, SEED, EACH = 480, 0, 4  # of the references that are drawn where no folder is named
MEMBER = 9  # of the draws of one seed, so that no reference is also a picture that is drawn beside it


def drawn(organ: str, source: str, size: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An embedded slide (S, S, 3) uint8 of an organ and its mask (S, S)."""
    return draw(SlideSpec(organ, source, size, size, UM_PER_PX), np.random.default_rng(seed))


def embedded_references(size: int, seed: int, each: int = 1) -> list[Reference]:
    """`each` references of either stain, measured on drawn slides of `size` pixels; strengths vary as between
    laboratories.
    """
    made = []
    for number in range(each):
        words = f" {number + 1}" if each > 1 else ""
        for organ, stain in STAIN_OF_ORGAN.items():
            made.append(
                Reference.of(drawn(organ, "Hubmap", size, (seed, MEMBER + number))[0], f"embedded {stain}{words}")
            )
    return made


def references_or_drawn(folder: str | Path) -> list[Reference]:
    """The references of a folder, or, for an empty name, several drawn ones of either stain.

    Raises ConfigError and SlideError.
    """
    return read_references(folder) if str(folder) else embedded_references(SIDE, SEED, EACH)
