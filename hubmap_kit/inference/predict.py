"""Slides -> submission.csv: read, predicted and written side by side, a few slides in memory at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.pixel_sizes import PixelSizeWatch
from hubmap_kit.competition.submission import SubmissionWriter
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import SubmissionError
from hubmap_kit.inference import pipeline
from hubmap_kit.inference.blend import Blended, shares
from hubmap_kit.inference.governor import Governor
from hubmap_kit.inference.postprocess import threshold_for, to_mask
from hubmap_kit.inference.worker import Efforts, NoTime, Predicted, Team, Worker, first_line, govern, mean_plane
from hubmap_kit.progress import bar

log = logging.getLogger(__name__)
OnError = Literal["raise", "degrade"]
NO_TIME = "the session had no time left for it"
GOVERNOR_TABLE = "governor.csv"  # beside the submission
# slide, its pixels (H, W, 3), its mask (H, W); called from one thread, in the order in which slides are done
OnMask = Callable[[Slide, np.ndarray, np.ndarray], None]


class NothingWorkedError(SubmissionError):
    """A submission is written, but every single one of its `slides` (a number) failed, so it holds nothing but empty
    masks.
    """

    def __init__(self, message: str, slides: int) -> None:
        super().__init__(message)
        self.slides = slides


@dataclass(frozen=True)
class Failure:
    """A slide that got an empty mask because it could not be read or predicted, or came too late."""

    id: str
    reason: str


def predict_slides(
    slides: Sequence[Slide],
    teams: Sequence[Team],
    out: Path,
    on_error: OnError = "raise",
    on_mask: OnMask | None = None,
    check: Callable[[Path], object] | None = None,
    left: Callable[[], float] | None = None,
    spare: Callable[[], Team] | None = None,
) -> list[Failure]:
    """Predict every slide with the mean of all ensembles of a team and write `out` (submission.csv) as it goes.

    `teams` holds the same ensembles once for each device; the devices share the slides. While a slide is on the device,
    the next one is read and the one before is written.

    With `on_error="degrade"` whatever goes wrong with one slide costs that slide only: its row is an empty mask, and
    the fault is logged and returned; a device that breaks is replaced by `spare()`, if given. With "raise" the first
    fault ends the run; the rows before it stay in `<out>.partial`. `check` sees the complete file before it takes its
    name. `left` tells the seconds that are left: a governor then takes effort away where not all slides would be done
    in time, down to an empty mask, as a failure, and writes its decisions to governor.csv beside `out`. Raises
    NothingWorkedError, after writing, when every single slide failed.
    """
    governor = None if left is None else govern(slides, teams[0], left, len(teams))
    workers = [Worker(team, governor, on_mask is not None, spare if on_error == "degrade" else None) for team in teams]
    started = time.monotonic()
    try:
        with (
            SubmissionWriter(out, [slide.id for slide in slides], check) as writer,
            bar(len(slides), "predict", "slide") as progress,
        ):
            rows = _Rows(writer, progress, on_error)
            pipeline.run(slides, _reader(governor), workers, _finisher(teams[0], on_mask, on_error), rows.add)
    finally:
        if governor is not None:
            _note(governor, out.with_name(GOVERNOR_TABLE))
    seconds = time.monotonic() - started
    log.info(
        "%d slides in %s, %.0f %% of it in the network",
        len(slides),
        duration(seconds),
        100 * sum(worker.network_s for worker in workers) / (seconds * len(workers)),
    )
    for line in governor.report() if governor is not None else ():
        log.info("%s", line)
    if rows.failures and len(rows.failures) == len(slides):
        why = f"all {len(slides)} slides failed, the first because: {rows.failures[0].reason}"
        raise NothingWorkedError(f"{out} holds nothing but empty masks: {why}", len(slides))
    return rows.failures


def segment(slide: Slide, pixels: np.ndarray, team: Team, efforts: Efforts | None = None) -> np.ndarray:
    """The mask (H, W) uint8 0/1 of a slide's pixels (H, W, 3) uint8, as a submission has it; `efforts` None: as
    configured.
    """
    return mask_of(slide, mean_plane(slide, pixels, team, efforts), team)


def mask_of(slide: Slide, plane: np.ndarray, team: Team) -> np.ndarray:
    """The mask (H, W) of a mean plane: the mean of the ensembles' thresholds, weighted as their planes are, and the
    first ensemble's post-processing; those of a blend where the team is one.
    """
    config = team.inference if isinstance(team, Blended) else team[0].experiment.inference
    return to_mask(plane, _threshold(slide, team), slide.organ, config)


def duration(seconds: float) -> str:
    """Seconds in words, such as 8 h 2 min, 12 min 3 s or 4.2 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _threshold(slide: Slide, team: Team) -> float:
    if isinstance(team, Blended) and slide.organ in team.blend.thresholds:
        return threshold_for(slide.organ, slide.source, team.blend.thresholds, team.inference)
    weights = shares(team, slide.organ) or (1 / len(team),) * len(team)
    found = [threshold_for(slide.organ, slide.source, each.thresholds, each.experiment.inference) for each in team]
    return sum(weight * threshold for weight, threshold in zip(weights, found, strict=True))


def _reader(governor: Governor[Efforts] | None) -> Callable[[Slide], np.ndarray | None]:
    watch = PixelSizeWatch()

    def read(slide: Slide) -> np.ndarray | None:
        pixels = read_in_time(slide)
        if pixels is not None:
            watch.look(slide, *pixels.shape[:2])
        return pixels

    def read_in_time(slide: Slide) -> np.ndarray | None:
        if governor is None:
            return slide_files.read(slide.path)
        if governor.hopeless():
            return None  # hundreds of slides would have to be read for nothing, after the deadline
        try:
            return slide_files.read(slide.path)
        except Exception:
            governor.skip(slide, "it could not be read")
            raise

    return read


def _finisher(team: Team, on_mask: OnMask | None, on_error: OnError) -> Callable[[Slide, Predicted], str]:
    def finish(slide: Slide, predicted: Predicted) -> str:
        mask = mask_of(slide, predicted.plane, team)
        log.debug(
            "slide %s: %s, %d x %d at %g um/px, threshold %.3f, covered %.2f %%",
            slide.id,
            slide.organ,
            *mask.shape,
            slide.um_per_px,
            _threshold(slide, team),
            100 * mask.mean(),
        )
        if on_mask is not None and predicted.pixels is not None:
            try:
                on_mask(slide, predicted.pixels, mask)
            except Exception:
                if on_error == "raise":
                    raise
                log.warning("slide %s: its picture could not be drawn; its mask is kept", slide.id, exc_info=True)
        return rle.encode(mask)

    return finish


def _note(governor: Governor[Efforts], path: Path) -> None:
    try:
        governor.write(path)
    except OSError as error:
        log.warning("%s could not be written (%s); the submission does not depend on it", path, error)


class _Rows:
    """Writes each slide's row in its turn, and keeps count of what failed."""

    def __init__(self, writer: SubmissionWriter, progress: tqdm, on_error: OnError) -> None:
        self.failures: list[Failure] = []
        self._writer, self._progress, self._on_error = writer, progress, on_error

    def add(self, slide: Slide, result: str | Exception) -> None:
        if isinstance(result, NoTime):
            if not any(failure.reason == NO_TIME for failure in self.failures):
                log.warning(
                    "slide %s gets an empty mask: there is no time for it; governor.csv tells which other slides do",
                    slide.id,
                )
            self.failures.append(Failure(slide.id, NO_TIME))
        elif isinstance(result, Exception):
            if self._on_error == "raise":
                raise result
            # A kernel must hand in every row; what exactly failed is in the log, and the rest of the slides still
            # count.
            log.warning(
                "slide %s gets an empty mask: %s",
                slide.id,
                first_line(result),
                exc_info=result if log.isEnabledFor(logging.DEBUG) else None,
            )
            self.failures.append(Failure(slide.id, first_line(result)))
        self._writer.add(slide.id, result if isinstance(result, str) else "")
        self._progress.set_postfix_str(f"{slide.organ} {slide.id}", refresh=False)
        self._progress.update(1)
