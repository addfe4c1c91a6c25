"""The scores of a label against sums written out, and which rule refuses what."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hubmap_kit.competition import rle
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import read_train
from hubmap_kit.jobs.labellers import COVERAGE, Rules, Scores, agreement, confidence, inside

GOOD = Scores(0.45, 0.9, 0.95, 0.05)


def test_confidence_counts_tissue_only() -> None:
    pixels = np.full((128, 256, 3), 245, np.uint8)
    pixels[:, 128:] = (180, 90, 150)
    plane = np.full((128, 256), 0.5, np.float32)  # undecided on the glass
    plane[:, 128:192], plane[:, 192:] = 1.0, 0.2
    assert confidence(plane, pixels) == pytest.approx((0.5 + 0.3) / 2)
    assert math.isnan(confidence(plane, np.full((128, 256, 3), 245, np.uint8)))


def test_inside_and_agreement() -> None:
    plane = np.array([[0.9, 0.5], [0.1, 0.2]], np.float32)
    assert inside(plane, plane > 0.3) == pytest.approx(0.7) and math.isnan(inside(plane, plane > 2))
    masks = [np.array([row], np.uint8) for row in ([1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1])]
    assert agreement([rle.runs_of(mask) for mask in masks]) == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert math.isnan(agreement([rle.runs_of(masks[0])]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"agreement": math.nan}, ""),
        ({"confidence": 0.2}, "confidence 0.200 below 0.35"),
        ({"confidence": math.nan}, "no tissue"),
        ({"inside": 0.3}, "probability inside 0.300 below 0.5"),
        ({"agreement": 0.7}, "agreement 0.700 below 0.8"),
        ({"coverage": 0.0, "inside": math.nan}, "coverage 0.00% below 0.04%"),
        ({"coverage": 0.5}, "coverage 50.00% above 18.00%"),
    ],
)
def test_each_rule_refuses_by_itself(change: dict[str, float], reason: str) -> None:
    assert "; ".join(Rules().reasons("lung", Scores(**{**vars(GOOD), **change}))) == reason


def test_every_mask_of_the_competition_has_an_allowed_coverage(shared_data: Path) -> None:
    slides = read_train(shared_data / "hubmap-2022/train.csv.gz", check_files=False)
    shares = {
        organ: [rle.area(slide.rle) / slide.height / slide.width for slide in slides if slide.organ == organ]
        for organ in ORGANS
    }
    for organ, (least, most) in COVERAGE.items():
        assert least == pytest.approx(min(shares[organ]) / 2, rel=0.15) and most == pytest.approx(
            max(shares[organ]) * 2, rel=0.02
        ), organ
