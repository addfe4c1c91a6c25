"""Slides -> submission.csv, one slide in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hubmap_kit.competition import rle, slides as slide_files
from hubmap_kit.competition.submission import SubmissionWriter
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import SubmissionError
from hubmap_kit.inference.ensemble import Ensemble
from hubmap_kit.inference.postprocess import threshold_for, to_mask
from hubmap_kit.progress import bar

log = logging.getLogger(__name__)
OnError = Literal["raise", "degrade"]
NO_TIME = "the session had no time left for it"
# slide, its pixels (H, W, 3), its mask (H, W)
OnMask = Callable[[Slide, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Failure:
    """A slide that got an empty mask because it could not be read or predicted, or came too late."""

    id: str
    reason: str


def predict_slides(
    slides: Sequence[Slide], ensembles: Sequence[Ensemble], out: Path, on_error: OnError = "raise", on_mask: OnMask | None = None,
    check: Callable[[Path], object] | None = None, left: Callable[[], float] | None = None,
) -> list[Failure]:  # fmt: skip
    """Predict every slide with the mean of all ensembles and write `out` (submission.csv) as it goes.

    With `on_error="degrade"` whatever goes wrong with one slide costs that slide only: its row is an empty mask, and the fault
    is logged and returned. With "raise" the first fault ends the run; the rows so far stay in `<out>.partial`. `check` sees the
    complete file before it takes its name. `left` tells the seconds that are left; once there are none, every further slide gets
    an empty mask, as a failure, so that the file is complete in time. Raises SubmissionError, after writing, when every single
    slide failed.
    """
    failures: list[Failure] = []
    with SubmissionWriter(out, [slide.id for slide in slides], check) as writer, bar(len(slides), "predict", "slide") as progress:
        for slide in slides:
            progress.set_postfix_str(f"{slide.organ} {slide.id}", refresh=False)
            if left is not None and left() <= 0:
                if not any(failure.reason == NO_TIME for failure in failures):
                    log.warning("the time is up: slide %s and all after it get empty masks", slide.id)
                failures.append(Failure(slide.id, NO_TIME))
                writer.add(slide.id, "")
                continue
            try:
                text = _predict_one(slide, ensembles, on_mask, on_error)
            except Exception as error:
                if on_error == "raise":
                    raise
                # A kernel must hand in every row; what exactly failed is in the log, and the rest of the slides still count.
                log.warning("slide %s gets an empty mask: %s", slide.id, error, exc_info=log.isEnabledFor(logging.DEBUG))
                failures.append(Failure(slide.id, str(error)))
                text = ""
            writer.add(slide.id, text)
            progress.update(1)
    if failures and len(failures) == len(slides):
        raise SubmissionError(f"{out} holds nothing but empty masks: all {len(slides)} slides failed, the first because: {failures[0].reason}")
    return failures


def _predict_one(slide: Slide, ensembles: Sequence[Ensemble], on_mask: OnMask | None, on_error: OnError) -> str:
    pixels = slide_files.read(slide.path)
    plane = ensembles[0].probability(pixels, slide.um_per_px)
    for ensemble in ensembles[1:]:
        plane += ensemble.probability(pixels, slide.um_per_px)
    plane /= len(ensembles)
    threshold = sum(threshold_for(slide.organ, each.thresholds, each.experiment.inference) for each in ensembles) / len(ensembles)
    mask = to_mask(plane, threshold)
    text = rle.encode(mask)
    log.debug("slide %s: %s, %d x %d at %g um/px, threshold %.3f, covered %.2f %%",
              slide.id, slide.organ, *pixels.shape[:2], slide.um_per_px, threshold, 100 * mask.mean())  # fmt: skip
    if on_mask is not None:
        try:
            on_mask(slide, pixels, mask)
        except Exception:
            if on_error == "raise":
                raise
            log.warning("slide %s: its picture could not be drawn; its mask is kept", slide.id, exc_info=True)
    return text
