"""Which slides lend their colours: typical ones, HPA's, originals, of two folds; measured as a picture is measured."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from hubmap_kit.augment.stain import Reference
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.inference.normalise import STAIN_FILE, read_references
from hubmap_kit.sample.slide import SlideSpec, draw
from hubmap_kit.tiles.scaling import scaled_shape
from hubmap_kit.training.run import CANDIDATES, PIXELS, medoid, write_stain_references

TISSUE = draw(SlideSpec("kidney", "HPA", 96, 96, 1.0), np.random.default_rng(0))[0]
GLASS = np.full((96, 96, 3), 246, np.uint8)


@dataclass
class Pictures:
    """As much of a tile store as is read: a table, and a picture of each row."""

    rows: list[tuple[Slide, np.ndarray]]
    asked: list[str] = field(default_factory=list)

    @property
    def slides(self) -> pd.DataFrame:
        return pd.DataFrame(
            [{"id": slide.id, "organ": slide.organ, "data_source": slide.source} for slide, _ in self.rows]
        )

    def image(self, row: int) -> np.ndarray:
        self.asked.append(self.rows[row][0].id)
        return self.rows[row][1]


def slide(slide_id: str, organ: str = "kidney", source: str = "HPA", **more: object) -> Slide:
    return Slide(slide_id, organ, source, 96, 96, 0.4, 4.0, Path("x.tiff"), "", **more)


def tinted(amount: float) -> np.ndarray:
    """The tissue, more blue by that many levels."""
    return np.clip(TISSUE.astype(float) + np.array([-amount, 0, amount]), 0, 255).astype(np.uint8)


def chosen(store: Pictures, run: Path, folds: dict[str, int] | None = None) -> dict[str, list[tuple[str, int]]]:
    slides = [each for each, _ in store.rows]
    write_stain_references(run, store, slides, folds or {each.id: place % 2 for place, each in enumerate(slides)})
    values = json.loads((run / STAIN_FILE).read_text())
    return {
        organ: [(entry["slide"], entry["fold"]) for entry in entries] for organ, entries in values["organs"].items()
    }


def test_an_odd_slide_is_never_the_reference(tmp_path: Path) -> None:
    tints = {"a": 0, "b": 6, "c": 12, "odd": 80, "d": 9}
    store = Pictures([(slide(name), tinted(amount)) for name, amount in tints.items()])
    # By their tint alone, from the smallest: a b d c odd. The middle is d; in the other fold, without d, b.
    folds = {"a": 0, "b": 0, "c": 1, "odd": 0, "d": 1}
    assert chosen(store, tmp_path, folds) == {"kidney": [("d", 1), ("b", 0)]}
    assert read_references(tmp_path, 1)["kidney"].name == "b" and read_references(tmp_path, 0)["kidney"].name == "d"


def test_hpa_goes_before_other_sources_and_originals_alone_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    rows = [
        (slide("h", source="Hubmap"), TISSUE),
        (slide("p"), TISSUE),
        (slide("p_copy", parent="p"), TISSUE),
        (slide("light", weight=0.0), TISSUE),
        (slide("s", "spleen", "Hubmap"), TISSUE),
        (slide("empty", "spleen", "Hubmap"), GLASS),
        (slide("glass", "lung"), GLASS),
        (slide("other", "prostate"), TISSUE),
    ]
    store = Pictures(rows)
    folds = {each.id: 0 for each, _ in rows if each.id != "other"}  # a slide of no fold is none of the run's
    assert chosen(store, tmp_path, folds) == {"kidney": [("p", 0)], "spleen": [("s", 0)]}
    assert set(store.asked) == {"p", "s", "empty", "glass"}
    assert "slide empty is no stain reference" in caplog.text and "slide glass is no stain reference" in caplog.text
    assert read_references(tmp_path, held_out=0) == {}


def test_a_few_slides_of_many_are_measured_evenly(tmp_path: Path) -> None:
    store = Pictures([(slide(str(number)), TISSUE) for number in range(100)])
    chosen(store, tmp_path)
    numbers = [int(name) for name in store.asked]
    assert len(numbers) == CANDIDATES and numbers[0] == 0 and numbers[-1] == 99 and max(np.diff(numbers)) <= 10


@hypothesis(deadline=None, max_examples=100)
@given(st.lists(st.tuples(*[st.floats(-60, 60)] * 3), min_size=1, max_size=14), st.randoms())
def test_the_medoid_is_the_least_far_from_all(means: list[tuple[float, float, float]], random) -> None:
    none = np.zeros(1)
    references = [Reference(str(place), none, none, np.array(mean), none, none) for place, mean in enumerate(means)]

    def far(one: Reference) -> float:
        return sum(float(np.sqrt(((one.mean - other.mean) ** 2).sum())) for other in references)

    random.shuffle(references)
    assert far(medoid(references)) <= min(map(far, references)) + 1e-9


def test_a_large_slide_is_measured_by_some_of_its_rows(tmp_path: Path) -> None:
    large = cv2.resize(TISSUE, (1500, 1500), interpolation=cv2.INTER_CUBIC)
    assert large.shape[0] * large.shape[1] > 8 * PIXELS
    chosen(Pictures([(slide("large"), large)]), tmp_path)
    found, whole = read_references(tmp_path)["kidney"], Reference.of(large)
    np.testing.assert_allclose(found.mean, whole.mean, atol=0.5)
    np.testing.assert_allclose(found.std, whole.std, atol=0.5)
    np.testing.assert_allclose(found.shares, whole.shares, atol=0.01)
    angles = np.degrees(np.arccos(np.clip((found.vectors * whole.vectors).sum(axis=1), -1, 1)))
    assert angles.max() < 2 and np.abs(found.strengths / whole.strengths - 1).max() < 0.05


def test_a_trained_run_has_the_colours_of_its_slides_at_its_scale(tiny_run: Path, sample_data: Path) -> None:
    from hubmap_kit import experiment

    scale, by_id = (
        experiment.read(tiny_run / "config.yaml").scale,
        {each.id: each for each in read_train(sample_data / "train.csv")},
    )
    for organ, found in read_references(tiny_run).items():
        one = by_id[found.name]
        assert (one.organ, one.source) == (organ, "HPA")
        pixels = slide_files.read(one.path)
        shape = scaled_shape(*pixels.shape[:2], one.um_per_px, scale, organ)
        expected = Reference.of(cv2.resize(pixels, shape[::-1], interpolation=cv2.INTER_AREA))
        for key in ("vectors", "strengths", "mean", "std", "shares"):
            np.testing.assert_allclose(getattr(found, key), getattr(expected, key), atol=1e-6)
