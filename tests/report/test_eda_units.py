"""Counting units against scipy.ndimage and against shapes whose size and number of parts are known."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from hubmap_kit.report.eda_tables import NECK, Unit, count_units, parts

EIGHT, FOUR = np.ones((3, 3), int), np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
masks = arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.integers(0, 1))


@settings(max_examples=150, deadline=None)
@given(masks)
def test_units_are_the_components_of_scipy(mask: np.ndarray) -> None:
    found = count_units(mask)
    labels, number = ndimage.label(mask, EIGHT)
    labels4, number4 = ndimage.label(mask, FOUR)
    assert len(found.units) == number and found.area == mask.sum()
    assert found.total("components4") == number4
    assert found.total("specks") == int((np.bincount(labels4.ravel())[1:] == 1).sum())
    boxes = ndimage.find_objects(labels)
    expected = sorted(
        (int((labels[box] == label).sum()), box[0].start, box[1].start, box[0].stop, box[1].stop)
        for label, box in enumerate(boxes, start=1)
    )
    assert (
        sorted((unit.area, unit.top, unit.left, unit.top + unit.height, unit.left + unit.width) for unit in found.units)
        == expected
    )
    assert found.total("parts") >= number


@settings(max_examples=100, deadline=None)
@given(masks)
def test_axes_are_those_of_the_second_moments(mask: np.ndarray) -> None:
    labels, number = ndimage.label(mask, EIGHT)
    expected = []
    for label in range(1, number + 1):
        places = np.argwhere(labels == label).astype(float)
        spread = np.cov(places.T, bias=True) + np.eye(2) / 12  # of squares, not of points
        small, large = np.linalg.eigvalsh(spread)
        expected.append(
            (len(places), 4 * math.sqrt(large), 4 * math.sqrt(small), math.sqrt(max(0.0, 1 - small / large)))
        )
    found = [(unit.area, unit.length, unit.breadth, unit.eccentricity) for unit in count_units(mask).units]
    # Scipy numbers its components by rows as OpenCV does, but not always; sorting both makes the order of no account.
    assert np.allclose(sorted(np.round(found, 6).tolist()), sorted(np.round(expected, 6).tolist()), atol=1e-4)


def only(mask: np.ndarray) -> Unit:
    (unit,) = count_units(mask).units
    return unit


def ellipse(length: int, breadth: int) -> np.ndarray:
    ys, xs = np.mgrid[-150:151, -150:151]
    return ((xs / (length / 2)) ** 2 + (ys / (breadth / 2)) ** 2 <= 1).astype(np.uint8)


@pytest.mark.parametrize(("length", "breadth"), [(200, 200), (240, 120), (280, 40)])
def test_an_ellipse_has_its_own_axes(length: int, breadth: int) -> None:
    unit = only(ellipse(length, breadth))
    assert unit.length == pytest.approx(length, rel=0.02) and unit.breadth == pytest.approx(breadth, rel=0.03)
    assert unit.eccentricity == pytest.approx(
        math.sqrt(1 - (breadth / length) ** 2), abs=0.03 if breadth < length else 0.15
    )
    assert unit.parts == 1 and unit.solidity > 0.97 and not unit.at_border


def test_solidity_and_border() -> None:
    corner = np.zeros((100, 100), np.uint8)
    corner[20:80, 20:40] = corner[60:80, 20:80] = 1
    unit = only(corner)
    inside = 59 * 19 + 19 * 40  # of the outline through pixel centres: an L of two bars
    hull = 59 * 59 - 40 * 40 / 2
    assert unit.solidity == pytest.approx(inside / hull, rel=0.01) and not unit.at_border
    assert all(only(np.roll(corner, shift, axis)).at_border for shift, axis in ((-20, 0), (20, 0), (-20, 1), (20, 1)))


def dumbbell(radii: tuple[int, ...], neck: int, scale: int = 1) -> np.ndarray:
    """Discs in a row, joined by bars of `neck` pixels across."""
    picture = np.zeros((260 * scale, 260 * len(radii) * scale), np.uint8)
    centres = [((130 + 200 * number) * scale, 130 * scale) for number in range(len(radii))]
    half = neck * scale // 2
    cv2.rectangle(picture, (centres[0][0], 130 * scale - half), (centres[-1][0], 130 * scale + half), 1, -1)
    for centre, radius in zip(centres, radii, strict=True):
        cv2.circle(picture, centre, radius * scale, 1, -1)
    return picture


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize(
    ("radii", "neck", "number"),
    [
        ((80, 80), 20, 2),
        ((80, 80), 80, 2),
        ((80, 80), 112, 1),
        ((80, 80), 150, 1),
        ((80, 40), 20, 2),
        ((80, 40), 70, 1),
        ((60, 80, 60), 30, 3),
        ((60, 80, 60, 70), 30, 4),
    ],
)
def test_components_are_cut_at_their_necks(
    radii: tuple[int, ...], neck: int, number: int, turn: int, scale: int
) -> None:
    assert (neck < NECK * 2 * min(radii)) == (number > 1), "the example contradicts the rule that it shows"
    assert only(np.rot90(dumbbell(radii, neck, scale), turn)).parts == number


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2), (40, 40)])
def test_a_bar_is_one_part(shape: tuple[int, int]) -> None:
    assert parts(np.ones(shape, np.uint8), 0.5) == 1  # a solidity that makes it look


def test_a_ring_and_a_rough_outline_are_one_part() -> None:
    ring = ellipse(280, 260) - ellipse(160, 150)
    rough = ellipse(240, 200)
    rough[64:240:7] |= ellipse(252, 210)[64:240:7]  # spines a pixel thick
    assert only(ring).parts == 1 and only(rough).parts == 1


def test_outlines_that_touch_are_one_unit_of_two_parts() -> None:
    """How the competition's masks are made: each outline filled by itself, into one picture."""
    picture = np.zeros((300, 300), np.uint8)
    for x in (90, 208):
        cv2.fillPoly(picture, [cv2.ellipse2Poly((x, 150), (60, 90), 0, 0, 360, 3)], 1)
    unit = only(picture)
    assert unit.parts == 2 and ndimage.label(picture, EIGHT)[1] == 1
