"""The tables behind `hubmap eda`: one row a slide, one row a unit, and what they come to per organ and per source."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np
import pandas as pd

from hubmap_kit.competition import rle
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.processes import threads
from hubmap_kit.progress import track

WORKERS = 8
FRAGMENT = 0.01  # of the organ's median unit: below, a component is a slip of the pen rather than a unit
# Outlines drawn in the competition's 351 training slides, counted in its published polygon files
# (train_annotations/*.json).
PUBLISHED_OUTLINES: Mapping[str, int] = MappingProxyType(
    {"kidney": 337, "prostate": 1097, "largeintestine": 3117, "spleen": 167, "lung": 191}
)
PUBLISHED_SLIDES: Mapping[str, int] = MappingProxyType(
    {"kidney": 99, "prostate": 93, "largeintestine": 58, "spleen": 53, "lung": 48}
)
SEXES = {"male": "male", "m": "male", "female": "female", "f": "female"}
UNKNOWN = "unknown"
SHAPES = ("diameter_um", "length_um", "breadth_um", "eccentricity", "solidity")
BOX = ("top", "left", "height", "width")
UNIT_COLUMNS = ("id", "organ", "data_source", "unit", "area_px", "area_um2", *SHAPES, "parts", *BOX, "at_border")

# How a component is cut at its necks, to estimate how many units it holds.
NECK = 0.6  # breadth of a neck, as a share of the narrower of the bulges beside it
CONVEX = 0.95  # solidity from which a component has no neck worth a look
WIDEST = 24.0  # most pixels from outside to the innermost point: larger components are shrunk to that
LEAST = 2.0  # pixels of the shrunk picture: bulges below are roughness of the outline
STEP = 1.05  # ratio of two breadths at which the component is looked at


@dataclass(frozen=True)
class _Node:
    """One connected piece of {distance > level}: its peak, and the number of the piece that it lies in, -1 at the
    bottom.
    """

    level: float
    peak: float
    parent: int


def parts(component: np.ndarray, solidity: float) -> int:
    """The number of parts, at least 1, of one connected component (H, W) uint8 0/1, cut out along its frame."""
    if solidity >= CONVEX:
        return 1
    distance = _distance(component)
    factor = WIDEST / float(distance.max())
    if factor < 1:
        size = [max(1, round(length * factor)) for length in component.shape[::-1]]
        small = cv2.resize(component * np.uint8(255), size, interpolation=cv2.INTER_AREA)
        distance = _distance((small > 127).astype(np.uint8))
    nodes = _tree(distance)
    children: dict[int, list[int]] = {}
    for number, node in enumerate(nodes):
        children.setdefault(node.parent, []).append(number)
    return max(1, sum(_leaves(number, nodes, children) for number in children.get(-1, [])))


def _distance(mask: np.ndarray) -> np.ndarray:
    return cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 5)


def _tree(distance: np.ndarray) -> list[_Node]:
    """The pieces at rising levels, each level's after the one below it."""
    nodes: list[_Node] = []
    order = np.argsort(distance, axis=None)
    heights = distance.ravel()[order]
    below = np.zeros(distance.size, np.int64)  # of each pixel, the number of its piece at the level before, plus 1
    level = 0.0
    while level < heights[-1]:
        found, labels = cv2.connectedComponents((distance > level).astype(np.uint8), connectivity=8)
        inside = order[np.searchsorted(heights, level, side="right") :]
        own = labels.ravel()[inside]
        peaks, parents = np.zeros(found), np.zeros(found, np.int64)
        peaks[own] = heights[-len(own) :]  # of the values for one piece the last is kept, and they rise
        parents[own] = below[inside]
        below[inside] = len(nodes) + own
        nodes += [
            _Node(level, peak, parent - 1)
            for peak, parent in zip(peaks[1:].tolist(), parents[1:].tolist(), strict=True)
        ]
        level = max(1.0, level * STEP)
    return nodes


def _leaves(number: int, nodes: list[_Node], children: dict[int, list[int]]) -> int:
    """Parts of one piece: where two or more pieces that count lie in it, theirs; else 1.

    Climbs along the highest otherwise.
    """
    while True:
        inner = children.get(number, [])
        bulges = [
            child for child in inner if nodes[child].peak >= LEAST and nodes[child].level < NECK * nodes[child].peak
        ]
        if len(bulges) > 1:
            return sum(_leaves(child, nodes, children) for child in bulges)
        if not bulges:
            return 1
        number = bulges[0]


@dataclass(frozen=True)
class Unit:
    """One component of 8 neighbours. Pixels of its slide; `top`, `left`, `height`, `width` frame it.

    `length` and `breadth` are the axes of the ellipse with the component's second moments, `eccentricity` that
    ellipse's: 0 for a disc, towards 1 for a line. `solidity` is the area within the outer outline over that of its
    convex hull. `parts` counts what is left when the component is cut at its necks, `components4` what it falls into
    under 4 neighbours, `specks` of them single pixels. `at_border` says that it touches the slide's edge.
    """

    area: int
    top: int
    left: int
    height: int
    width: int
    length: float
    breadth: float
    eccentricity: float
    solidity: float
    parts: int
    components4: int
    specks: int
    at_border: bool


@dataclass(frozen=True)
class MaskCounts:
    """What a mask (H, W) holds: set pixels, and its units."""

    area: int
    units: tuple[Unit, ...]

    def total(self, name: str) -> int:
        """The sum over units of `parts`, `components4` or `specks`."""
        return sum(getattr(unit, name) for unit in self.units)


def count_units(mask: np.ndarray) -> MaskCounts:
    """Count the units of a mask (H, W), any value above 0 is inside."""
    mask = np.ascontiguousarray(mask > 0).view(np.uint8)
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        return MaskCounts(0, ())
    # Labels of the empty rest would cost as much again.
    inside = np.ascontiguousarray(mask[top : top + height, left : left + width])
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(inside, connectivity=8)
    units = tuple(_unit(labels, label, box, (top, left), mask.shape) for label, box in enumerate(boxes) if label)
    return MaskCounts(int(boxes[1:, cv2.CC_STAT_AREA].sum()), units)


def _unit(labels: np.ndarray, label: int, box: np.ndarray, offset: tuple[int, int], shape: tuple[int, ...]) -> Unit:
    x, y, width, height, area = (int(value) for value in box)
    component = (labels[y : y + height, x : x + width] == label).view(np.uint8)
    top, left = offset[0] + y, offset[1] + x
    length, breadth = _axes(component)
    solidity = _solidity(component)
    # Components of 4 neighbours lie within one of 8 neighbours.
    areas4 = cv2.connectedComponentsWithStats(component, connectivity=4)[2][1:, cv2.CC_STAT_AREA]
    return Unit(
        *(area, top, left, height, width, length, breadth),
        eccentricity=math.sqrt(max(0.0, 1 - (breadth / length) ** 2)),
        solidity=solidity,
        parts=parts(component, solidity),
        components4=len(areas4),
        specks=int(np.count_nonzero(areas4 == 1)),
        at_border=top == 0 or left == 0 or top + height == shape[0] or left + width == shape[1],
    )


def _axes(shape_mask: np.ndarray) -> tuple[float, float]:
    """Long and short axis in pixels of the ellipse with the same second moments; 4 standard deviations each, as in a
    full ellipse.
    """
    moments = cv2.moments(shape_mask, binaryImage=True)
    # A pixel is a square, not a point: its own variance of 1/12 keeps the axes of lines and single pixels above 0.
    yy, xx, xy = (
        moments[name] / moments["m00"] + own for name, own in (("mu02", 1 / 12), ("mu20", 1 / 12), ("mu11", 0))
    )
    middle, spread = (xx + yy) / 2, math.hypot((xx - yy) / 2, xy)
    return 4 * math.sqrt(middle + spread), 4 * math.sqrt(max(middle - spread, 1 / 12))


def _solidity(shape_mask: np.ndarray) -> float:
    outline = cv2.findContours(shape_mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0][0]
    hull = cv2.contourArea(cv2.convexHull(outline))
    return cv2.contourArea(outline) / hull if hull else 1.0  # lines one pixel thick have no area between pixel centres


@dataclass(frozen=True)
class Donor:
    """What a table says about the donor of a slide: `age` in years or NaN, `sex` male, female or unknown, and the cells
    as written.
    """

    age: float
    sex: str
    age_cell: str
    sex_cell: str


@dataclass(frozen=True)
class Tables:
    """`slides` one row a slide, in the table's order; `units` one row a component of 8 neighbours, largest first within
    a slide.
    """

    slides: pd.DataFrame
    units: pd.DataFrame

    @property
    def organs(self) -> list[str]:
        """Organs that occur, in the competition's order."""
        return [organ for organ in ORGANS if organ in set(self.slides["organ"])]


def read_slides_and_donors(csv: Path, images: Path | None = None) -> tuple[list[Slide], dict[str, Donor]]:
    """The slides of a train.csv (or .csv.gz), whose files may be absent, and their donors; raises as
    `read_train`.
    """
    slides = read_train(csv, images, check_files=False)
    rows = (row for _, row in read_rows(csv, ("id",)))
    return slides, {row["id"]: _donor(row.get("age", ""), row.get("sex", "")) for row in rows}


def _donor(age: str, sex: str) -> Donor:
    age, sex = age.strip(), sex.strip()
    try:
        years = float(age)
    except ValueError:
        years = math.nan
    return Donor(years if 0 <= years <= 120 else math.nan, SEXES.get(sex.lower(), UNKNOWN), age, sex)


def measure_masks(slides: Sequence[Slide], donors: Mapping[str, Donor]) -> Tables:
    """Count every mask; as many are in memory at a time as there are processors, at most WORKERS."""
    rows, units = [], []
    with threads(WORKERS) as pool:  # nearly all of the time is spent in OpenCV, outside Python's lock
        counted = pool.map(lambda slide: count_units(rle.decode(slide.rle or "", slide.height, slide.width)), slides)
        for slide, counts in zip(slides, track(counted, "masks", "slide", len(slides)), strict=True):
            rows.append(_slide_row(slide, donors[slide.id], counts))
            units += [
                _unit_row(slide, number, unit)
                for number, unit in enumerate(sorted(counts.units, key=lambda unit: -unit.area), start=1)
            ]
    table = pd.DataFrame(units, columns=list(UNIT_COLUMNS))
    # Sizes in um, so that slides of different scales share one median.
    table["fragment"] = table["area_um2"] < FRAGMENT * table.groupby("organ")["area_um2"].transform("median")
    return Tables(pd.DataFrame(rows), table)


def _slide_row(slide: Slide, donor: Donor, counts: MaskCounts) -> dict[str, object]:
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "height": slide.height,
        "width": slide.width,
        "um_per_px": slide.um_per_px,
        "thickness_um": slide.thickness_um,
        "age": donor.age,
        "sex": donor.sex,
        "coverage": counts.area / (slide.height * slide.width),
        "units": len(counts.units),
        "units_cut": counts.total("parts"),
        **{name: counts.total(name) for name in ("components4", "specks")},
        "has_file": slide.path.is_file(),
    }


def _unit_row(slide: Slide, number: int, unit: Unit) -> dict[str, object]:
    um = slide.um_per_px
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "unit": number,
        "area_px": unit.area,
        "area_um2": unit.area * um**2,
        "diameter_um": 2 * math.sqrt(unit.area / math.pi) * um,
        "length_um": unit.length * um,
        "breadth_um": unit.breadth * um,
        **{name: getattr(unit, name) for name in ("eccentricity", "solidity", "parts", *BOX, "at_border")},
    }


def organ_summary(tables: Tables) -> pd.DataFrame:
    """One row an organ: slides, share of all slides, coverage (share of pixels), units in three counts, and medians of
    their shape.
    """
    whole = tables.units[~tables.units["fragment"]]
    rows = []
    for organ in tables.organs:
        slides, units = (table[table["organ"] == organ] for table in (tables.slides, whole))
        covered = slides["coverage"].agg(["mean", "min", "median", "max"])
        sums = slides[["units", "units_cut", "components4", "specks"]].sum()
        rows.append(
            {
                "organ": organ,
                "slides": len(slides),
                "share": len(slides) / len(tables.slides),
                **{f"coverage_{name}": value for name, value in covered.items()},
                **sums,
                "fragments": sums["units"] - len(units),
                "units_per_slide": slides["units"].mean(),
                **{f"{name}_median": units[name].median() for name in ("area_um2", *SHAPES)},
            }
        )
    return pd.DataFrame(rows)
