"""Pictures of the smallest and the largest units of every organ: cut out of the slide where it is present, else the
mask alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from hubmap_kit.competition import rle
from hubmap_kit.competition.tables import Slide
from hubmap_kit.report.eda_data import Tables
from hubmap_kit.report.eda_pixels import Frame
from hubmap_kit.report.eda_plots import ORGAN_COLOURS
from hubmap_kit.report.html import Gallery, Picture, data_uri
from hubmap_kit.report.overlays import TRUTH

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
