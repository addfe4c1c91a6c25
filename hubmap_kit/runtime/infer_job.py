"""The infer job: test table + run folders -> submission.csv, checked. A verb and a Kaggle kernel call the same function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hubmap_kit.competition.checker import SubmissionReport, check_submission
from hubmap_kit.competition.lenient import read_test_leniently
from hubmap_kit.competition.submission import SubmissionWriter
from hubmap_kit.competition.tables import Slide, read_test
from hubmap_kit.errors import SubmissionError, TableError
from hubmap_kit.inference.blend import Blended, read_blend
from hubmap_kit.inference.ensemble import load_ensemble
from hubmap_kit.inference.predict import Failure, OnError, predict_slides
from hubmap_kit.inference.worker import Team
from hubmap_kit.models.device import choose_device, choose_devices
from hubmap_kit.report.overlays import save_overlay
from hubmap_kit.runtime.clock import SessionClock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """A written and checked submission, and the slides that got an empty mask because of a fault."""

    path: Path
    report: SubmissionReport
    failures: list[Failure]


def predict(
    runs: Sequence[Path], test_csv: Path, out: Path, folds: Sequence[int] | None = None, overrides: Sequence[str] = (),
    device: str = "auto", on_error: OnError = "raise", overlays: Path | None = None, left: Callable[[], float] | None = None,
    deadline: float | None = None, blend: Path | None = None,
) -> Submission:  # fmt: skip
    """Predict every slide of `test_csv` with all runs' folds and write `out`.

    Before the file takes its name, the checker reads it back; what it knows of run-length strings is its own, not the writer's.
    `overlays` is a folder for one picture a slide. Missing slide files and rows that are not as they should be are an error with
    on_error="raise"; with "degrade" they cost an empty mask at most. Several devices (cuda:0,cuda:1) share the slides.

    `left` gives the seconds left, see `predict_slides`; `deadline` does the same in seconds since the start of this process, less a
    twentieth of it (five minutes at most) for what comes after the last slide.

    `blend` is a blend.json, or the folder of one, that weighs the `runs`, which are given in its order (`blend.runs_at`,
    `blend.runs_among`); its thresholds go before those of the runs.
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
        save_overlay(overlays / f"{slide.id}.png", pixels, None, mask, f"{slide.organ} {slide.id} ({slide.source}), covered {mask.mean():.1%}")

    reports: list[SubmissionReport] = []

    def check(partial: Path) -> None:
        try:
            reports.append(check_submission(partial, test_csv))
        except (TableError, SubmissionError, OSError) as error:
            if on_error == "raise":
                raise
            # The masks that are there are worth more than a doubt about one row.
            log.warning("%s is kept although its check failed: %s; it holds every id that could be read", out, error)
            reports.append(_counted(partial))

    drawn = draw if overlays is not None else None
    failures = predict_slides(slides, teams, out, on_error, drawn, check, left, spare=lambda: team(choose_device("cpu")))
    return Submission(out, reports[0], failures)


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
    rows = path.read_text(encoding="utf-8").splitlines()[1:]
    return SubmissionReport(len(rows), sum(row.endswith(",") for row in rows), float("nan"))
