"""The demo job, with fewer and smaller slides than the demo itself."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
from tiny import TINY

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import HubmapError
from hubmap_kit.jobs.demo import Demo, demo


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    return demo(folder, TINY, device="cpu", slides_per_organ=2, size=256)


def pixels_of(path: Path, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Flat column-major masks of a table of 0-based strings, decoded by the plain definition."""
    csv.field_size_limit(2**31 - 1)
    masks = {}
    with open(path, newline="") as handle:
        for row in csv.DictReader(handle):
            masks[row["id"]] = np.zeros(sizes[row["id"]], bool)
            numbers = [int(word) for word in row["rle"].split()]
            for start, length in zip(numbers[::2], numbers[1::2], strict=True):
                masks[row["id"]][start : start + length] = True
    return masks


def test_it_leaves_what_the_readme_promises(made: Demo) -> None:
    for name in ("submission.csv", "data/train.csv", "run/config.yaml", "run/oof.csv", "run/thresholds.json"):
        assert (made.folder / name).is_file(), name
    for name in (
        "overview.png",
        "run/curves.png",
        "run/thresholds.png",
        *(f"overlays/{organ}.png" for organ in ORGANS),
    ):
        assert cv2.imread(str(made.folder / name)) is not None, name


def test_its_scores_are_the_dice_of_its_submission(made: Demo) -> None:
    with open(made.folder / "data" / "test.csv", newline="") as handle:
        sizes = {row["id"]: int(row["img_height"]) * int(row["img_width"]) for row in csv.DictReader(handle)}
    ours, truth = pixels_of(made.submission.path, sizes), pixels_of(made.folder / "data" / "test_truth.csv", sizes)
    assert len(made.test_scores) == len(sizes) == 2 * len(ORGANS)
    for row in made.test_scores.to_dict("records"):
        both = ours[row["id"]].sum() + truth[row["id"]].sum()
        assert row["dice"] == pytest.approx(2 * (ours[row["id"]] & truth[row["id"]]).sum() / both if both else 1.0)


def test_it_replaces_a_former_demo_but_never_another_folder(made: Demo, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(HubmapError, match="not made by the demo"):
        demo(tmp_path, TINY, device="cpu")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (made.folder / "submission.csv").write_text("stale")
    again = demo(made.folder, TINY, device="cpu", slides_per_organ=2, size=256)
    assert (made.folder / "submission.csv").read_text() != "stale"
    assert again.test_scores.equals(made.test_scores)
