"""The table and the picture of a tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import PostprocessChoices
from hubmap_kit.report.curves import COLOURS
from hubmap_kit.report.thresholds import in_words, save_tuning, tune_summary
from hubmap_kit.training.tune import CANDIDATES, Choice, OrganResult, Scores, SlideScores, grid_of


def result_of(
    organ: str, slides: int = 3, candidate: int = 0, dice: float = 0.5, sources: dict[str, float] | None = None
) -> OrganResult:
    choice = Choice(candidate, 0.4, sources or {})
    return OrganResult(organ, slides, "steps", choice, 0.04, dice, dice - 0.1, dice + 0.1, dice + 0.05, (0.2, 0.6))


def scores_of(organs: list[str]) -> Scores:
    curves = tuple(np.sqrt(grid_of(number)) for number in range(len(CANDIDATES)))
    return Scores(organs, ["HPA"] * len(organs), [0] * len(organs), [SlideScores(curves, curves)] * len(organs))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.array(picture.convert("RGB")).astype(int)


def count(picture: np.ndarray, colour: str) -> int:
    return int((np.abs(picture - np.round(np.array(to_rgb(colour)) * 255)).max(axis=2) < 12).sum())


@pytest.mark.parametrize("organs", [["lung"], ["lung", "kidney"], [*ORGANS]])
def test_every_organ_has_a_panel_in_its_colour(tmp_path: Path, organs: list[str]) -> None:
    save_tuning(tmp_path / "tune.png", scores_of(organs), [result_of(organ) for organ in organs], True, "a title")
    picture = pixels(tmp_path / "tune.png")
    for organ, colour in zip(ORGANS, COLOURS, strict=False):
        assert (count(picture, colour) > 100) == (organ in organs), organ


def test_sources_and_steps_are_drawn(tmp_path: Path) -> None:
    save_tuning(tmp_path / "one.png", scores_of(["lung"]), [result_of("lung", candidate=3)], False)
    save_tuning(
        tmp_path / "two.png",
        scores_of(["lung"]),
        [result_of("lung", candidate=3, sources={"HPA": 0.3, "Hubmap": 0.8})],
        False,
    )
    colour = COLOURS[ORGANS.index("lung")]
    one, two = pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png")
    assert count(two, colour) > count(one, colour) + 50


def test_the_table_weighs_organs_by_their_slides() -> None:
    results = [
        result_of("lung", 1, dice=0.2),
        result_of("kidney", 3, candidate=3, dice=0.6, sources={"HPA": 0.35, "Hubmap": 0.45}),
    ]
    lines = tune_summary(results, rescue=True).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["kidney", "HPA", "Hubmap", "lung", "all"]
    assert lines[2].split()[1:8] == ["3", "0.040", "0.400", "0.6000", "0.7000", "0.5000", "0.6500"]
    assert lines[2].endswith("fill, drop < 0.05 %, rescue") and lines[5].endswith(" rescue")
    assert lines[-1].split() == ["all", "4", "0.5000", "0.6000", "0.4000", "0.5500"]


def test_steps_in_words() -> None:
    assert in_words(PostprocessChoices()) == "nothing"
    choices = PostprocessChoices(fill_holes=True, opening=3, min_area=0.002, shrink=4, rescue=True)
    assert in_words(choices) == "fill, open 3, drop < 0.2 %, shrink 4, rescue"
