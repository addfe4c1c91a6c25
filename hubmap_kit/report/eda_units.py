"""The units of a mask, one row each: size, shape and place, counted in three ways.

A mask says which pixels belong to units, not where one unit ends. Counting joins pixels by their sides and corners (8
neighbours) or by their sides only (4 neighbours), and both differ from the outlines that annotators drew. Outlines of
neighbours that touch or cross were filled into one region and are one component: too few. Under 4 neighbours, pixels
that hang on an outline by a corner become units of their own: too many, most of them single pixels. `eda_parts` cuts
components at their necks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np

from hubmap_kit.report.eda_parts import parts

# Outlines drawn in the competition's 351 training slides, counted in its published polygon files
# (train_annotations/*.json).
PUBLISHED_OUTLINES: Mapping[str, int] = MappingProxyType(
    {"kidney": 337, "prostate": 1097, "largeintestine": 3117, "spleen": 167, "lung": 191}
)
PUBLISHED_SLIDES: Mapping[str, int] = MappingProxyType(
    {"kidney": 99, "prostate": 93, "largeintestine": 58, "spleen": 53, "lung": 48}
)


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


def count(mask: np.ndarray) -> MaskCounts:
    """Count the units of a mask (H, W), any value above 0 is inside."""
    mask = np.ascontiguousarray(mask > 0).view(np.uint8)
    left, top, width, height = cv2.boundingRect(mask)
    if not width:
        return MaskCounts(0, ())
    inside = np.ascontiguousarray(
        mask[top : top + height, left : left + width]
    )  # labels of the empty rest would cost as much again
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(inside, connectivity=8)
    units = tuple(_unit(labels, label, box, (top, left), mask.shape) for label, box in enumerate(boxes) if label)
    return MaskCounts(int(boxes[1:, cv2.CC_STAT_AREA].sum()), units)


def _unit(labels: np.ndarray, label: int, box: np.ndarray, offset: tuple[int, int], shape: tuple[int, ...]) -> Unit:
    x, y, width, height, area = (int(value) for value in box)
    shape_mask = (labels[y : y + height, x : x + width] == label).view(np.uint8)
    top, left = offset[0] + y, offset[1] + x
    length, breadth = _axes(shape_mask)
    solidity = _solidity(shape_mask)
    areas4 = cv2.connectedComponentsWithStats(shape_mask, connectivity=4)[2][
        1:, cv2.CC_STAT_AREA
    ]  # none of them crosses a unit's border
    return Unit(
        area=area,
        top=top,
        left=left,
        height=height,
        width=width,
        length=length,
        breadth=breadth,
        eccentricity=math.sqrt(max(0.0, 1 - (breadth / length) ** 2)),
        solidity=solidity,
        parts=parts(shape_mask, solidity),
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
        moments["mu02"] / moments["m00"] + 1 / 12,
        moments["mu20"] / moments["m00"] + 1 / 12,
        moments["mu11"] / moments["m00"],
    )
    middle, spread = (xx + yy) / 2, math.hypot((xx - yy) / 2, xy)
    return 4 * math.sqrt(middle + spread), 4 * math.sqrt(max(middle - spread, 1 / 12))


def _solidity(shape_mask: np.ndarray) -> float:
    outline = cv2.findContours(shape_mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0][0]
    hull = cv2.contourArea(cv2.convexHull(outline))
    return cv2.contourArea(outline) / hull if hull else 1.0  # lines one pixel thick have no area between pixel centres
