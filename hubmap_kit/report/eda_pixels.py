"""What the slide files show, where there are any: mean colour and stain vectors of the tissue, and cut-outs of
units.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from hubmap_kit.augment.density import tissue
from hubmap_kit.augment.stain import stain_matrix
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import SlideError
from hubmap_kit.progress import track

log = logging.getLogger(__name__)
COLOUR_SIDE = 1024  # pixels of the picture that colours are taken from: a slide's mean colour needs no more
COLOURS = ("red", "green", "blue")
STAINS = tuple(f"stain{stain}_{colour}" for stain in (1, 2) for colour in COLOURS)


@dataclass(frozen=True)
class Frame:
    """A cut-out to keep: the slide's rows and columns from `top` and `left` on."""

    id: str
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Pixels:
    """`slides`: id, organ, data_source, size and mean tissue colour (NaN: too little tissue), stain vectors; `cuts`:
    frame -> RGB pixels; `oddities`: rows (kind, ids, detail) about files.
    """

    slides: pd.DataFrame
    cuts: Mapping[Frame, np.ndarray]
    oddities: Sequence[tuple[str, str, str]]


def look(slides: Sequence[Slide], frames: Sequence[Frame]) -> Pixels:
    """Read every slide file that is there, once, one in memory at a time."""
    wanted: dict[str, list[Frame]] = {}
    for frame in frames:
        wanted.setdefault(frame.id, []).append(frame)
    rows, cuts, oddities, seen = [], {}, [], {}
    present = [slide for slide in slides if slide.path.is_file()]
    for slide in track(present, "slides", "slide"):
        try:
            pixels = slide_files.read(slide.path)
        except SlideError as error:
            oddities.append(("file that cannot be read", slide.id, str(error)))
            continue
        rows.append(_row(slide, pixels))
        if pixels.shape[:2] == (slide.height, slide.width):
            cuts |= {frame: _cut(pixels, frame) for frame in wanted.get(slide.id, [])}
        else:
            found = f"{pixels.shape[0]} x {pixels.shape[1]} in the file, {slide.height} x {slide.width} in the table"
            oddities.append(("size differs from the file's", slide.id, found))
        first = seen.setdefault(hashlib.sha256(pixels).digest(), slide.id)
        if first != slide.id:
            oddities.append(("same picture twice", f"{first} {slide.id}", "every pixel is equal"))
    return Pixels(pd.DataFrame(rows), cuts, oddities)


def _cut(pixels: np.ndarray, frame: Frame) -> np.ndarray:
    return pixels[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width].copy()


def _row(slide: Slide, pixels: np.ndarray) -> dict[str, object]:
    factor = COLOUR_SIDE / max(pixels.shape[:2])
    small = pixels if factor >= 1 else cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    stained, vectors = tissue(small), stain_matrix(small)
    colour = [np.nan] * 3 if stained is None else small[stained].mean(0).tolist()
    values = [np.nan] * 6 if vectors is None else np.asarray(vectors, float).ravel().tolist()
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "file_height": pixels.shape[0],
        "file_width": pixels.shape[1],
        "tissue_share": 0.0 if stained is None else float(stained.mean()),
        **dict(zip(COLOURS, colour, strict=True)),
        **dict(zip(STAINS, values, strict=True)),
    }


def per_source(pixels: Pixels) -> pd.DataFrame:
    """One row for each source and organ, and one for each source: slides, mean tissue colour, mean stain vectors at
    length 1.
    """
    rows = []
    if pixels.slides.empty:
        return pd.DataFrame()
    for source, all_of in pixels.slides.groupby("data_source"):
        for organ, group in [("all", all_of), *all_of.groupby("organ")]:
            means = {name: group[name].mean() for name in ("tissue_share", *COLOURS)}
            vectors = group[list(STAINS)].mean().to_numpy().reshape(2, 3)
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            known = int(group[STAINS[0]].notna().sum())
            rows.append(
                {
                    "data_source": source,
                    "organ": organ,
                    "slides": len(group),
                    "slides_with_stains": known,
                    **means,
                    **dict(zip(STAINS, vectors.ravel(), strict=True)),
                }
            )
    return pd.DataFrame(rows)
