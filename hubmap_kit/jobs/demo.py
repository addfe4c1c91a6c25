"""The demo: the whole journey on the embedded slides, small enough for two CPU cores."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hubmap_kit import experiment
from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_test
from hubmap_kit.errors import HubmapError
from hubmap_kit.jobs.predict import Submission, predict
from hubmap_kit.jobs.preflight import check_experiment
from hubmap_kit.jobs.train import train
from hubmap_kit.models.device import choose_device
from hubmap_kit.report.overlays import contact_sheet, save_overlay
from hubmap_kit.sample.generate import generate, plan_slides

log = logging.getLogger(__name__)
MARKER = ".hubmap-demo"  # only a folder that the demo made itself is ever cleared


@dataclass(frozen=True)
class Demo:
    """What the demo made: the out-of-fold table, the submission, and the test slides' Dice (id, organ, data_source,
    dice).
    """

    folder: Path
    oof: pd.DataFrame
    submission: Submission
    test_scores: pd.DataFrame


def demo(
    folder: Path,
    overrides: Sequence[str] = (),
    device: str = "auto",
    seed: int = 0,
    slides_per_organ: int = 6,
    size: int = 1536,
) -> Demo:
    """Write the embedded slides, train two folds, predict with views and both folds, score against the known masks,
    draw.

    `folder` gets data/, run/, submission.csv, overlays/<organ>.png and overview.png. A former demo there is replaced;
    any other folder with files in it is refused. `slides_per_organ` and `size` (pixels) are those of the training
    slides.
    """
    data = folder / "data"
    settings = experiment.load("demo", overrides, str(data))
    check_experiment(settings, choose_device(device))
    plan_slides(seed, slides_per_organ, size)  # wrong numbers are found before a former demo is removed
    _clear(folder)
    log.info("writing the embedded slides to %s", data)
    generate(data, seed=seed, slides_per_organ=slides_per_organ, size=size)
    table = train(settings, folder / "run", device=device, stores=folder / "stores")
    submission = predict([folder / "run"], data / "test.csv", folder / "submission.csv", device=device)
    slides = read_test(data / "test.csv")
    predicted, truth = read_masks(submission.path), read_masks(data / "test_truth.csv")
    scores = pd.DataFrame(
        [
            {"id": s.id, "organ": s.organ, "data_source": s.source, "dice": rle.dice(predicted[s.id], truth[s.id])}
            for s in slides
        ]
    )
    _draw(folder, slides, predicted, truth, scores)
    return Demo(folder, table, submission, scores)


def read_masks(path: Path) -> dict[str, str]:
    """The run-length strings of a table with the columns id and rle."""
    return {row["id"]: row["rle"] for _, row in read_rows(path, ("id", "rle"))}


def _clear(folder: Path) -> None:
    if folder.is_file():
        raise HubmapError(f"{folder} is a file; choose a folder with --out")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise HubmapError(f"{folder} is not empty and was not made by the demo; choose another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _draw(
    folder: Path, slides: Sequence[Slide], predicted: dict[str, str], truth: dict[str, str], scores: pd.DataFrame
) -> None:
    """One overlay an organ (of the unseen stain and scale, where there is one), and all test slides on one sheet."""
    dice = dict(zip(scores["id"], scores["dice"], strict=True))
    items = []
    for slide in sorted(slides, key=lambda slide: (slide.source, ORGANS.index(slide.organ))):
        pixels = slide_files.read(slide.path)
        masks = [rle.decode(table[slide.id], *pixels.shape[:2]) for table in (truth, predicted)]
        title = f"{slide.organ} ({slide.source}, {slide.um_per_px:g} um/px), Dice {dice[slide.id]:.2f}"
        items.append((pixels, masks[0], masks[1], title))
        if slide.source == "Hubmap":
            save_overlay(folder / "overlays" / f"{slide.organ}.png", *items[-1])
    contact_sheet(folder / "overview.png", items, columns=len(ORGANS))
