"""What slide files show, where there are any: mean colour and stain vectors of the tissue, and pictures of units."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pandas as pd
from PIL import Image, ImageColor

from hubmap_kit.augment.stain import stain_matrix, tissue
from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import SlideError
from hubmap_kit.progress import track
from hubmap_kit.report.drawings import ORGAN_COLOURS
from hubmap_kit.report.eda_tables import Tables
from hubmap_kit.report.html import Gallery, Picture, encode_picture
from hubmap_kit.report.overlays import TRUTH

COLOUR_SIDE = 1024  # pixels of the picture that colours are taken from: a slide's mean colour needs no more
COLOURS = ("red", "green", "blue")
STAINS = tuple(f"stain{stain}_{colour}" for stain in (1, 2) for colour in COLOURS)
EACH = 3  # smallest and largest units of an organ
EXAMPLE_SIDE = 304  # pixels of a picture's longer side
MARGIN = 0.2  # around a unit, as a share of its longer side
Example = dict[str, Any]


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


def read_pixels(slides: Sequence[Slide], frames: Sequence[Frame]) -> Pixels:
    """Read every slide file that is there, once, one in memory at a time."""
    wanted: dict[str, list[Frame]] = {}
    for frame in frames:
        wanted.setdefault(frame.id, []).append(frame)
    rows, oddities = [], []
    cuts: dict[Frame, Any] = {}
    seen: dict[bytes, str] = {}
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
        first = seen.setdefault(hashlib.sha256(np.ascontiguousarray(pixels).data).digest(), slide.id)
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


def colours_by_source(pixels: Pixels) -> pd.DataFrame:
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


def choose_examples(tables: Tables) -> dict[str, list[Example]]:
    """The smallest and the largest whole units of each organ, as rows of the table of units, by area."""
    whole = tables.units[~tables.units["fragment"]].sort_values("area_um2", kind="stable")
    chosen = {}
    for organ in tables.organs:
        rows = whole[whole["organ"] == organ].to_dict("records")
        if rows:
            chosen[organ] = rows if len(rows) <= 2 * EACH else rows[:EACH] + rows[-EACH:]
    return chosen


def unit_frame(slide: Slide, row: Mapping[str, Any]) -> Frame:
    """The unit with some margin around it, within the slide."""
    margin = max(6, round(MARGIN * max(row["height"], row["width"])))
    top, left = max(0, row["top"] - margin), max(0, row["left"] - margin)
    bottom = min(slide.height, row["top"] + row["height"] + margin)
    right = min(slide.width, row["left"] + row["width"] + margin)
    return Frame(slide.id, int(top), int(left), int(bottom - top), int(right - left))


def example_galleries(
    slides: Sequence[Slide], chosen: Mapping[str, list[Example]], cuts: Mapping[Frame, np.ndarray]
) -> list[Gallery]:
    """One gallery for each organ; a unit is cut out of its slide where that is present, else drawn from the mask."""
    by_id = {slide.id: slide for slide in slides}
    found = []
    for organ, rows in chosen.items():
        said = f"the {EACH} smallest, then the {EACH} largest" if len(rows) == 2 * EACH else "all units, by size"
        found.append(Gallery([_picture(by_id[row["id"]], row, cuts) for row in rows], f"{organ}: {said}"))
    return found


def _picture(slide: Slide, row: Example, cuts: Mapping[Frame, np.ndarray]) -> Picture:
    frame = unit_frame(slide, row)
    mask = _cut(rle.decode(slide.rle or "", slide.height, slide.width), frame)
    # The unit alone, found by its box and area among those that reach into the frame.
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    wanted = (row["left"] - frame.left, row["top"] - frame.top, row["width"], row["height"], row["area_px"])
    unit = np.isin(labels, 1 + np.flatnonzero((boxes[1:] == wanted).all(axis=1))).view(np.uint8)
    if frame in cuts:
        shown = _resized(cuts[frame])
        outlines, _ = cv2.findContours(_resized(unit * 255) >> 7, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        uri = encode_picture(Image.fromarray(cv2.drawContours(shown, outlines, -1, TRUTH, 2)), "JPEG")
    else:
        # The unit in its organ's colour on nothing, its neighbours fainter: that shows on light and dark pages.
        alpha = Image.fromarray(np.maximum(_resized(unit * 255), _resized(mask * 255) // 4))
        picture = Image.new("RGB", alpha.size, ImageColor.getrgb(ORGAN_COLOURS[slide.organ]))
        picture.putalpha(alpha)
        uri = encode_picture(picture, "PNG")
    said = (
        f"slide {slide.id}: {row['area_um2']:,.0f} µm², {row['length_um']:.0f} x {row['breadth_um']:.0f} µm,"
        f" eccentricity {row['eccentricity']:.2f}"
    )
    return Picture(uri, f"a unit of {slide.organ}", said)


def _resized(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W) or (H, W, 3) uint8 with the longer side EXAMPLE_SIDE."""
    factor = EXAMPLE_SIDE / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
