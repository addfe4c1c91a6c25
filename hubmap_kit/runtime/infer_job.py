"""The infer job: test table + run folders -> submission.csv, checked. A verb and a Kaggle kernel call the same function."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hubmap_kit.competition.checker import SubmissionReport, check_submission
from hubmap_kit.competition.tables import Slide, read_test
from hubmap_kit.inference.ensemble import load_ensemble
from hubmap_kit.inference.predict import Failure, OnError, predict_slides
from hubmap_kit.models.device import choose_device
from hubmap_kit.report.overlays import save_overlay

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Submission:
    """A written and checked submission, and the slides that got an empty mask because of a fault."""

    path: Path
    report: SubmissionReport
    failures: list[Failure]


def predict(
    runs: Sequence[Path], test_csv: Path, out: Path, folds: Sequence[int] | None = None, overrides: Sequence[str] = (),
    device: str = "auto", on_error: OnError = "raise", overlays: Path | None = None,
) -> Submission:  # fmt: skip
    """Predict every slide of `test_csv` with all runs' folds and write `out`.

    Before the file takes its name, the checker reads it back; what it knows of run-length strings is its own, not the writer's.
    `overlays` is a folder for one picture a slide. Missing slide files are an error with on_error="raise", an empty mask with
    "degrade".
    """
    chosen = choose_device(device)
    slides = read_test(test_csv, check_files=on_error == "raise")
    ensembles = [load_ensemble(run, chosen, folds, overrides) for run in runs]

    def draw(slide: Slide, pixels: np.ndarray, mask: np.ndarray) -> None:
        assert overlays is not None
        save_overlay(overlays / f"{slide.id}.png", pixels, None, mask, f"{slide.organ} {slide.id} ({slide.source}), covered {mask.mean():.1%}")

    reports: list[SubmissionReport] = []

    def check(partial: Path) -> None:
        reports.append(check_submission(partial, test_csv))

    failures = predict_slides(slides, ensembles, out, on_error, draw if overlays is not None else None, check)
    return Submission(out, reports[0], failures)
