"""What the drawn tissue must have in common with real tissue: sizes in um, coverage, tissue under the mask, and a stain
shift.
"""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from hubmap_kit.sample.generate import PlannedSlide, plan_slides
from hubmap_kit.sample.slide import draw

SEEDS = (0, 1)
# Coverage of a single slide. The measured means of real slides are 3, 15, 19, 10 and 2 percent.
COVERAGE = {
    "kidney": (0.01, 0.11),
    "prostate": (0.08, 0.26),
    "largeintestine": (0.07, 0.36),
    "spleen": (0.02, 0.25),
    "lung": (0.015, 0.12),
}
# Diameters in um of the middle unit, from textbooks of histology; wide, because a section cuts units anywhere.
DIAMETERS = {
    "kidney": (110, 230),
    "prostate": (70, 350),
    "largeintestine": (45, 110),
    "spleen": (120, 500),
    "lung": (70, 250),
}


class Drawn:
    """One drawn slide with what the tests measure on it."""

    def __init__(self, seed: int, plan: PlannedSlide) -> None:
        self.spec = plan.spec
        self.image, self.mask = draw(plan.spec, np.random.default_rng([seed, *plan.key]))

    @property
    def stained(self) -> NDArray[np.bool_]:
        """Pixels clearly darker than glass in some channel."""
        return self.image.min(axis=2) < 215

    def diameters_um(self) -> list[float]:
        """Equivalent diameters of the units that no border of the frame cuts."""
        labels, _ = ndimage.label(self.mask)
        found = []
        for index, box in enumerate(ndimage.find_objects(labels), start=1):
            touches = any(part.start == 0 or part.stop == size for part, size in zip(box, self.mask.shape, strict=True))
            if not touches:
                found.append(2 * float(np.sqrt((labels[box] == index).sum() / np.pi)) * self.spec.um_per_px)
        return found


@pytest.fixture(scope="module")
def slides() -> dict[tuple[str, str], list[Drawn]]:
    drawn = defaultdict(list)
    for seed in SEEDS:
        for plan in plan_slides(seed, 1, 256):
            if plan.split == "test":
                drawn[plan.spec.organ, plan.spec.source].append(Drawn(seed, plan))
    return drawn


Slides = dict[tuple[str, str], list[Drawn]]


def test_arrays_are_what_the_kit_expects(slides: Slides) -> None:
    for group in slides.values():
        for slide in group:
            assert slide.image.dtype == slide.mask.dtype == np.uint8
            assert slide.image.shape == (slide.spec.height, slide.spec.width, 3)
            assert slide.mask.shape == slide.image.shape[:2]
            assert set(np.unique(slide.mask).tolist()) == {0, 1}


@pytest.mark.parametrize("source", ["HPA", "Hubmap"])
@pytest.mark.parametrize("organ", COVERAGE)
def test_coverage_is_believable(slides: Slides, organ: str, source: str) -> None:
    low, high = COVERAGE[organ]
    for slide in slides[organ, source]:
        assert low <= slide.mask.mean() <= high


def test_coverage_follows_the_real_slides(slides: Slides, shared_data: Path) -> None:
    real = defaultdict(list)
    with gzip.open(shared_data / "hubmap-2022" / "train.csv.gz", "rt", encoding="utf-8", newline="") as file:
        csv.field_size_limit(10**8)
        for row in csv.DictReader(file):
            lengths = row["rle"].split()[1::2]
            real[row["organ"]].append(sum(map(int, lengths)) / (int(row["img_height"]) * int(row["img_width"])))
    for organ, values in real.items():
        ours = np.mean([slide.mask.mean() for slide in slides[organ, "HPA"]])
        assert 1 / 4 < ours / np.mean(values) < 4, organ


@pytest.mark.parametrize("source", ["HPA", "Hubmap"])
@pytest.mark.parametrize("organ", DIAMETERS)
def test_units_have_their_physical_size_at_every_scale(slides: Slides, organ: str, source: str) -> None:
    diameters = [size for slide in slides[organ, source] for size in slide.diameters_um()]
    low, high = DIAMETERS[organ]
    assert diameters, "every unit is cut by the frame"
    assert low <= np.median(diameters) <= high


def test_every_unit_lies_on_tissue(slides: Slides) -> None:
    """Units may be hollow (lumen, air), but each has stained tissue in it and is darker than the glass around."""
    for group in slides.values():
        for slide in group:
            glass = np.percentile(slide.image.mean(axis=2), 99)
            labels, count = ndimage.label(slide.mask)
            for index in range(1, count + 1):
                unit = labels == index
                assert slide.stained[unit].mean() > 0.1, (slide.spec, index)
                assert slide.image[unit].mean() < glass - 4, (slide.spec, index)


def test_tissue_around_the_units_is_stained_too(slides: Slides) -> None:
    """Otherwise the background alone would give the mask away."""
    for group in slides.values():
        for slide in group:
            assert slide.stained[slide.mask == 0].sum() > slide.stained[slide.mask == 1].sum()


def test_a_core_lies_on_bright_glass_and_a_section_reaches_the_frame(slides: Slides) -> None:
    for (_, source), group in slides.items():
        for slide in group:
            edge = np.concatenate([slide.stained[0], slide.stained[-1], slide.stained[:, 0], slide.stained[:, -1]])
            if source == "HPA":
                height, width = slide.mask.shape
                corner = slide.image[: height // 12, : width // 12]
                assert corner.mean() > 225 and edge.mean() < 0.02
            else:
                assert edge.mean() > 0.06


def mean_colours(group: list[Drawn]) -> NDArray[np.float64]:
    return np.array([slide.image[slide.stained].mean(axis=0) for slide in group])


def lack_of_green(colours: NDArray[np.float64]) -> NDArray[np.float64]:
    return colours[:, [0, 2]].mean(axis=1) - colours[:, 1]


def test_sources_differ_in_colour(slides: Slides) -> None:
    """DAB against H&E or PAS: the stain shift that the competition is about, compared with the spread inside one
    source.
    """
    for organ in COVERAGE:
        hpa, hubmap = mean_colours(slides[organ, "HPA"]), mean_colours(slides[organ, "Hubmap"])
        assert lack_of_green(hubmap).min() > lack_of_green(hpa).max() + 10, "eosin and PAS absorb green, DAB does not"
        assert np.linalg.norm(hpa.mean(axis=0) - hubmap.mean(axis=0)) > 25


def test_no_threshold_on_one_channel_finds_the_units(slides: Slides) -> None:
    for group in slides.values():
        for slide in group:
            for channel in cv2.split(slide.image):
                for level in range(60, 250, 15):
                    for guess in (channel < level, channel >= level):
                        dice = 2 * slide.mask[guess].sum() / (guess.sum() + slide.mask.sum())
                        assert dice < 0.7
