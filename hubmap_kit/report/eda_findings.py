"""What is odd about a table: rows that say one thing twice, and labels that stand out.

Each oddity is a row, none is an error.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import cv2
import numpy as np
import pandas as pd

from hubmap_kit.augment.stain import stain_matrix, tissue
from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.external import THIRD_PLACE
from hubmap_kit.competition.lineage import DUPLICATE_TISSUE
from hubmap_kit.competition.organs import FACTS
from hubmap_kit.competition.pixel_sizes import odd_extent, odd_file
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import SlideError
from hubmap_kit.progress import track
from hubmap_kit.report.drawings import ORGAN_COLOURS
from hubmap_kit.report.eda_tables import People, Tables
from hubmap_kit.report.html import Gallery, Picture, data_uri
from hubmap_kit.report.overlays import TRUTH

ALIKE = 0.9  # Dice of two masks from which they are one drawing
FULL = 0.8  # share of the slide from which a mask leaves hardly any background
COLUMNS = ("kind", "ids", "detail")
Oddity = tuple[str, str, str]


def find(slides: Sequence[Slide], people: Mapping[str, People], tables: Tables) -> pd.DataFrame:
    """The oddities of a table, with the columns kind, ids (separated by blanks) and detail, gathered by kind."""
    found = [
        *_same_masks(slides),
        *_known(slides),
        *_masks(slides, tables),
        *_frames(slides),
        *_scales(slides),
        *_extents(slides),
        *_donors(slides, people),
    ]
    return pd.DataFrame(found, columns=list(COLUMNS)).sort_values("kind", kind="stable", ignore_index=True)


def _same_masks(slides: Sequence[Slide]) -> Iterator[Oddity]:
    """Pairs of slides of one organ and size whose masks are equal or nearly so."""
    groups: dict[tuple[object, ...], list[tuple[Slide, int, rle.Runs]]] = {}
    for slide in slides:
        if slide.rle:
            runs = rle.parse(slide.rle)
            groups.setdefault((slide.organ, slide.height, slide.width), []).append((slide, rle.area(runs), runs))
    for members in groups.values():
        for (one, area, runs), (other, other_area, other_runs) in combinations(members, 2):
            # Dice cannot exceed this even if the smaller mask lies within the larger, so most pairs need no look.
            if 2 * min(area, other_area) < ALIKE * (area + other_area):
                continue
            dice = rle.dice(runs, other_runs)
            if dice >= ALIKE:
                yield "same mask twice", f"{one.id} {other.id}", "equal" if dice == 1 else f"Dice {dice:.3f}"


def _known(slides: Sequence[Slide]) -> Iterator[Oddity]:
    organ_of = {slide.id: slide.organ for slide in slides}
    for group in DUPLICATE_TISSUE:
        present = [slide_id for slide_id in group if slide_id in organ_of]
        if len(present) > 1:
            yield "known duplicate tissue", " ".join(present), f"{organ_of[present[0]]}; folds keep them together"
    other = [slide.id for slide in slides if slide.organ == "lung" and slide.id in THIRD_PLACE]
    if other:
        yield (
            "lung labelled in another way",
            " ".join(other),
            "alveoli are cut in another way than in other slides; some winners left them out",
        )


def _masks(slides: Sequence[Slide], tables: Tables) -> Iterator[Oddity]:
    fragments = tables.units[tables.units["fragment"]].groupby("id")["area_px"]
    small = {slide_id: areas.tolist() for slide_id, areas in fragments}
    for slide, row in zip(slides, tables.slides.to_dict("records"), strict=True):
        if not row["units"]:
            yield "empty mask", slide.id, "no pixel of it is labelled"
        if row["coverage"] >= FULL:
            yield "mask nearly everywhere", slide.id, f"{row['coverage']:.1%} of the slide"
        if slide.rle and int(rle.parse(slide.rle).starts[0]) == 0:
            yield "run starts at 0", slide.id, "the first pixel is labelled; a submission may not say so"
        if slide.id in small:
            areas = small[slide.id]
            listed = ", ".join(f"{area}" for area in areas[:6]) + (", ..." if len(areas) > 6 else "")
            yield "fragments", slide.id, f"{len(areas)} below 1 % of the organ's median unit: {listed} px"


def _frames(slides: Sequence[Slide]) -> Iterator[Oddity]:
    sizes: dict[tuple[int, int], list[str]] = {}
    for slide in slides:
        if slide.height != slide.width:
            sizes.setdefault((slide.height, slide.width), []).append(slide.id)
    for (height, width), ids in sizes.items():
        yield "not square", " ".join(ids), f"{height} x {width} (height x width)"


def _scales(slides: Sequence[Slide]) -> Iterator[Oddity]:
    """Physical sizes that are not those of the slide's source on the competition's data page, gathered by value."""
    other: dict[tuple[str, str, str, float, float], list[str]] = {}
    for slide in slides:
        facts = FACTS[slide.organ]
        for name, value, usual in (
            ("pixel size", slide.um_per_px, facts.um_per_px[slide.source]),
            ("thickness", slide.thickness_um, facts.thickness_um[slide.source]),
        ):
            if abs(value - usual) > 1e-3 * usual:
                other.setdefault((name, slide.organ, slide.source, value, usual), []).append(slide.id)
    for (name, organ, source, value, usual), ids in other.items():
        yield f"unusual {name}", " ".join(ids), f"{value:g} um, where {organ} of {source} has {usual:g} um"


def _extents(slides: Sequence[Slide]) -> Iterator[Oddity]:
    """Pixel sizes that cannot be true: by what the slide's file states (its header is read), and by the tissue that
    they add up to.
    """
    for slide in slides:
        if found := odd_file(slide):
            yield "pixel size of table and file", slide.id, found
        if found := odd_extent(slide, slide.height, slide.width):
            yield "extent of tissue", slide.id, found


def _donors(slides: Sequence[Slide], people: Mapping[str, People]) -> Iterator[Oddity]:
    for slide in slides:
        donor = people[slide.id]
        if donor.age_cell and donor.age != donor.age:
            yield "unreadable age", slide.id, f"'{donor.age_cell}' was left out"
        if donor.sex_cell and donor.sex == "unknown":
            yield "unreadable sex", slide.id, f"'{donor.sex_cell}' was left out"
        if slide.organ == "prostate" and donor.sex == "female":
            yield "prostate of a woman", slide.id, "organ or sex is wrong"


# What the slide files show, where there are any: mean colour and stain vectors of the tissue, and cut-outs of units.

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


# Pictures of the smallest and the largest units of every organ: cut out of the slide where it is present, else the mask
# alone.

EACH = 3  # smallest and largest units of an organ
EXAMPLE_SIDE = 304  # pixels of a picture's longer side
ROOM = 0.2  # of the unit's longer side, around it
Example = dict[str, Any]


def choose(tables: Tables) -> dict[str, list[Example]]:
    """The smallest and the largest whole units of each organ, as rows of the table of units, by area."""
    whole = tables.units[~tables.units["fragment"]].sort_values("area_um2", kind="stable")
    chosen = {}
    for organ in tables.organs:
        rows = whole[whole["organ"] == organ].to_dict("records")
        if rows:
            chosen[organ] = rows if len(rows) <= 2 * EACH else rows[:EACH] + rows[-EACH:]
    return chosen


def frame_of(slide: Slide, row: Mapping[str, Any]) -> Frame:
    """The unit with some room around it, within the slide."""
    room = max(6, round(ROOM * max(row["height"], row["width"])))
    top, left = max(0, row["top"] - room), max(0, row["left"] - room)
    bottom, right = (
        min(slide.height, row["top"] + row["height"] + room),
        min(slide.width, row["left"] + row["width"] + room),
    )
    return Frame(slide.id, int(top), int(left), int(bottom - top), int(right - left))


def galleries(
    slides: Sequence[Slide], chosen: Mapping[str, list[Example]], cuts: Mapping[Frame, np.ndarray]
) -> list[Gallery]:
    """One gallery for each organ."""
    by_id = {slide.id: slide for slide in slides}
    found = []
    for organ, rows in chosen.items():
        items = [_picture(by_id[row["id"]], row, cuts) for row in rows]
        found.append(Gallery(items, f"{organ}: {_title(len(rows))}"))
    return found


def _title(number: int) -> str:
    return f"the {EACH} smallest, then the {EACH} largest" if number == 2 * EACH else "all units, by size"


def _picture(slide: Slide, row: Example, cuts: Mapping[Frame, np.ndarray]) -> Picture:
    frame = frame_of(slide, row)
    mask = rle.decode(slide.rle or "", slide.height, slide.width)
    mask = mask[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width]
    unit = _only(mask, (row["left"] - frame.left, row["top"] - frame.top, row["width"], row["height"], row["area_px"]))
    if frame in cuts:
        uri = data_uri(_encoded(_on_slide(cuts[frame], unit), ".jpg"), "image/jpeg")
    else:
        uri = data_uri(_encoded(_alone(mask, unit, ORGAN_COLOURS[slide.organ]), ".png"), "image/png")
    said = (
        f"slide {slide.id}: {row['area_um2']:,.0f} µm², {row['length_um']:.0f} x {row['breadth_um']:.0f} µm,"
        f" eccentricity {row['eccentricity']:.2f}"
    )
    return Picture(uri, f"a unit of {slide.organ}", said)


def _only(mask: np.ndarray, wanted: tuple[int, int, int, int, int]) -> np.ndarray:
    """The mask without the units beside the one with this left, top, width, height and area."""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(np.ascontiguousarray(mask), connectivity=8)
    return np.isin(labels, 1 + np.flatnonzero((boxes[1:] == wanted).all(axis=1))).view(np.uint8)


def _on_slide(pixels: np.ndarray, unit: np.ndarray) -> np.ndarray:
    size = _size(unit)
    shown = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if size[0] < unit.shape[1] else cv2.INTER_LINEAR)
    outlines = cv2.findContours((_scaled(unit, size) > 127).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(shown, outlines, -1, TRUTH, 2)


def _alone(mask: np.ndarray, unit: np.ndarray, colour: str) -> np.ndarray:
    """The unit in its organ's colour on nothing, its neighbours fainter, (h, w, 4), so that it shows on light and dark
    pages.
    """
    size = _size(mask)
    out = np.empty((size[1], size[0], 4), np.uint8)
    out[..., :3] = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    out[..., 3] = np.maximum(_scaled(unit, size), _scaled(mask, size) // 4)
    return out


def _size(mask: np.ndarray) -> tuple[int, int]:
    factor = EXAMPLE_SIDE / max(mask.shape)
    return max(1, round(mask.shape[1] * factor)), max(1, round(mask.shape[0] * factor))


def _scaled(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(
        mask * np.uint8(255), size, interpolation=cv2.INTER_AREA if size[0] < mask.shape[1] else cv2.INTER_LINEAR
    )


def _encoded(picture: np.ndarray, suffix: str) -> bytes:
    done, data = cv2.imencode(
        suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR if picture.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    )
    if not done:
        raise ValueError(f"OpenCV could not write a picture of shape {picture.shape} as {suffix}")
    return data.tobytes()
