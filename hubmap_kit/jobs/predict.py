"""The infer job: test table + run folders -> submission.csv, checked.

A verb and a Kaggle kernel call the same function.
"""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hubmap_kit.competition.checker import SubmissionReport, check_rows
from hubmap_kit.competition.csv_rows import wide_fields
from hubmap_kit.competition.lenient import read_test_leniently
from hubmap_kit.competition.submission import SubmissionWriter
from hubmap_kit.competition.tables import Slide, read_test
from hubmap_kit.errors import SubmissionError
from hubmap_kit.inference.blend import Blended, read_blend
from hubmap_kit.inference.ensemble import load_ensemble
from hubmap_kit.inference.predict import Failure, OnError, predict_slides
from hubmap_kit.inference.worker import Team
from hubmap_kit.models.device import choose_device, choose_devices
from hubmap_kit.report.overlays import save_overlay
from hubmap_kit.training.clock import SessionClock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """A written submission, what its check found, and the slides that got an empty mask because of a fault.

    `tolerated` is the share of slides that may; `doubt` is what the check refused, where the file was kept all the
    same.
    """

    path: Path
    report: SubmissionReport
    failures: list[Failure]
    tolerated: float
    doubt: str = ""

    @property
    def trouble(self) -> str:
        """Why this file is worth less than it should be, in one sentence; "" where it is not."""
        if self.doubt:
            return f"{self.path} is kept although its check failed: {self.doubt}"
        if len(self.failures) <= self.tolerated * self.report.rows:
            return ""
        # Slides that failed alike differ in their names and numbers.
        alike = [re.sub(r"\d+", "", failure.reason.replace(failure.id, "")) for failure in self.failures]
        usual, count = Counter(alike).most_common(1)[0]
        first = self.failures[alike.index(usual)]
        return (
            f"{self.path}: {len(self.failures)} of {self.report.rows} slides failed and have empty masks, more than the"
            f" {self.tolerated:.0%} of inference.tolerated_failures; {count} failed as slide {first.id} did:"
            f" {first.reason}"
        )


def predict(
    runs: Sequence[Path],
    test_csv: Path,
    out: Path,
    folds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    on_error: OnError = "raise",
    overlays: Path | None = None,
    left: Callable[[], float] | None = None,
    deadline: float | None = None,
    blend: Path | None = None,
) -> Submission:
    """Predict every slide of `test_csv` with all runs' folds and write `out`.

    Before the file takes its name, the checker reads it back; what it knows of run-length strings is its own, not the
    writer's. `overlays` is a folder for one picture a slide. Missing slide files and rows that are not as they should
    be are an error with on_error="raise"; with "degrade" they cost an empty mask at most, and a table without rows
    gives a file without. Several devices (cuda:0,cuda:1) share the slides.

    `left` gives the seconds left, see `predict_slides`; `deadline` does the same in seconds since the start of this
    process, less a twentieth of it (five minutes at most) for what comes after the last slide.

    `blend` is a blend.json, or the folder of one, that weighs the `runs`, which are given in its order
    (`blend.runs_at`, `blend.runs_among`); its thresholds go before those of the runs.
    """
    if deadline is not None:
        left = _earlier(left, SessionClock(deadline).left)
    devices = choose_devices(device)
    slides = read_test(test_csv) if on_error == "raise" else read_test_leniently(test_csv)

    weighed = None if blend is None else read_blend(blend)

    def team(chosen: torch.device) -> Team:
        ensembles = [load_ensemble(run, chosen, folds, overrides) for run in runs]
        return ensembles if weighed is None else Blended(ensembles, weighed, overrides)

    teams = [team(chosen) for chosen in devices]

    def draw(slide: Slide, pixels: np.ndarray, mask: np.ndarray) -> None:
        assert overlays is not None
        save_overlay(
            overlays / f"{slide.path.stem}.png",
            pixels,
            None,
            mask,
            f"{slide.organ} {slide.id} ({slide.source}), covered {mask.mean():.1%}",
        )

    checked: list[tuple[SubmissionReport, str]] = []

    def check(partial: Path) -> None:
        try:
            checked.append((check_rows(partial, slides), ""))
        except SubmissionError as error:
            if on_error == "raise":
                raise
            # The masks that are there are worth more than a doubt about one row.
            checked.append((_counted(partial), str(error)))

    drawn = draw if overlays is not None else None
    failures = predict_slides(
        slides, teams, out, on_error, drawn, check, left, spare=lambda: team(choose_device("cpu"))
    )
    inference = teams[0].inference if isinstance(teams[0], Blended) else teams[0][0].experiment.inference
    return Submission(out, checked[0][0], failures, inference.tolerated_failures, checked[0][1])


def empty_submission(test_csv: Path, out: Path) -> int:
    """Write a complete submission of empty masks, for when nothing else could be made; returns the number of rows."""
    slides = read_test_leniently(test_csv)
    with SubmissionWriter(out, [slide.id for slide in slides]) as writer:
        for slide in slides:
            writer.add(slide.id, "")
    return len(slides)


def _earlier(left: Callable[[], float] | None, other: Callable[[], float]) -> Callable[[], float]:
    return other if left is None else lambda: min(left(), other())


def _counted(path: Path) -> SubmissionReport:
    with wide_fields(), path.open(encoding="utf-8", newline="") as file:
        masks = [row[-1] for row in csv.reader(file)][1:]
    return SubmissionReport(len(masks), masks.count(""), float("nan"))
