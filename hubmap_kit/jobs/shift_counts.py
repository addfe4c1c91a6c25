"""What a run makes of its held-out slides under the shifts: pixel counts of every slide and shift, kept one file each.

A killed evaluation goes on with the files that are there; one that was made with other weights, settings, labels or
references counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from hubmap_kit.augment.shift import FORMAT, HUBMAP, LOOKS, PLAIN, Looks, Shifted, shifted
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.lineage import judged_slides
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import Experiment
from hubmap_kit.files import atomic_path, sweep
from hubmap_kit.inference.ensemble import MODEL_FILE, Effort, Ensemble, load_fold
from hubmap_kit.inference.normalise import digest_words, is_normalised, references_of
from hubmap_kit.progress import bar
from hubmap_kit.tiles.store import decode_for
from hubmap_kit.training.counts import THRESHOLDS, threshold_counts

log = logging.getLogger(__name__)
# Keys of inference that a plane depends on; thresholds and what follows them come after the counts.
PLANE_KEYS = ("window", "overlap", "whole_slide", "skip_background", "precision")


@dataclass(frozen=True)
class Counted:
    """One slide under one shift: `counts` (3, T) as in training.counts, its size then and the width of its pixels."""

    counts: np.ndarray
    height: int
    width: int
    um_per_px: float


@dataclass(frozen=True)
class Battery:
    """All that the counts depend on, but the slides: the run's settings, its folds' folders, the shifts and where
    results are kept.
    """

    settings: Experiment
    folders: Mapping[int, Path]
    folds: Mapping[str, int]
    shifts: Sequence[str]
    looks: Looks
    views: str
    kept: Path
    device: torch.device

    def path(self, slide: Slide, shift: str) -> Path:
        """The file of a slide's counts under a shift."""
        return self.kept / shift / f"{slide.id}.npz"

    def ensemble(self, number: int) -> Ensemble:
        """The one network of a fold."""
        return load_fold(self.settings, self.folders[number], self.device)

    def plane(self, ensemble: Ensemble, slide: Slide, shift: str, made: Shifted) -> np.ndarray:
        """Probabilities (H, W) of a shifted slide at the size that the shift gave it, as the hidden test would ask for
        them.
        """
        effort: Effort = replace(ensemble.full_effort, views=self.views)
        return ensemble.probability(made.image, made.um_per_px, effort, slide.organ, source_under(slide, shift))

    def made(self, slide: Slide, shift: str, pixels: np.ndarray, mask: np.ndarray) -> Shifted:
        """The slide under the shift."""
        return shifted(shift, pixels, mask, slide.organ, slide.um_per_px, slide.id, self.looks)


def source_under(slide: Slide, shift: str) -> str:
    """The source that a slide counts as under a shift: a shifted one stands for one of HuBMAP."""
    return slide.source if shift == PLAIN else "Hubmap"


def read_slide(slide: Slide) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (H, W, 3) and truth (H, W) of a slide file."""
    pixels = slide_files.read(slide.path)
    return pixels, decode_for(slide, *pixels.shape[:2])


def count_all(battery: Battery, slides: Sequence[Slide]) -> dict[tuple[str, str], Counted]:
    """Counts of every slide of a trained fold under every shift, (id, shift) -> counts; each slide by the fold that
    never saw it.
    """
    judged = judged_slides(slides)  # a restained copy would count its tissue once more
    mine = [slide for slide in slides if slide.id in judged and battery.folds[slide.id] in battery.folders]
    marks = _Marks(battery)
    for shift in battery.shifts:
        sweep(battery.kept / shift, ".*.tmp*")
    found = {
        (slide.id, shift): _read(battery.path(slide, shift), marks(slide, shift))
        for slide in mine
        for shift in battery.shifts
    }
    done = {key: value for key, value in found.items() if value is not None}
    if done:
        log.info("%d of %d results are there already", len(done), len(found))
    with bar(len(found), "shifts", "slide") as progress:
        progress.update(len(done))
        for number in battery.folders:
            due = [
                slide
                for slide in mine
                if battery.folds[slide.id] == number and any((slide.id, shift) not in done for shift in battery.shifts)
            ]
            ensemble = battery.ensemble(number) if due else None
            for slide in due:
                pixels, mask = read_slide(slide)
                for shift in battery.shifts:
                    if (slide.id, shift) in done or ensemble is None:
                        continue
                    progress.set_postfix_str(f"fold {number} {slide.organ} {slide.id} {shift}", refresh=False)
                    made = battery.made(slide, shift, pixels, mask)
                    counts = threshold_counts(battery.plane(ensemble, slide, shift, made), made.mask)
                    height, width = made.mask.shape
                    counted = Counted(counts, height, width, made.um_per_px)
                    _write(battery.path(slide, shift), counted, marks(slide, shift))
                    done[slide.id, shift] = counted
                    progress.update(1)
    return {key: done[key] for key in found}


class _Marks:
    """The hash of what a slide's counts depend on."""

    def __init__(self, battery: Battery) -> None:
        self.battery = battery
        inference = battery.settings.inference
        common = [FORMAT, battery.settings.scale.model_dump(), battery.settings.model.model_dump(), battery.views]
        self.common = json.dumps(
            [*common, [getattr(inference, key) for key in PLANE_KEYS]], sort_keys=True, default=str
        )
        self.weights = {number: _digest(folder / MODEL_FILE) for number, folder in battery.folders.items()}
        self.looks = _looks_digest(battery.looks)
        self.normalise = {number: self._normalise(number) for number in battery.folders}

    def __call__(self, slide: Slide, shift: str) -> str:
        labels = hashlib.sha256((slide.rle or "").encode()).hexdigest()
        size = slide.path.stat().st_size if slide.path.is_file() else -1
        facts = [slide.id, slide.organ, slide.um_per_px, slide.height, slide.width, size, labels]
        stains = self.looks if shift in (*LOOKS, HUBMAP) else ""
        words = [self.common, self.weights[self.battery.folds[slide.id]], stains, shift, *facts]
        if is_normalised(source_under(slide, shift)):
            words += self.normalise[self.battery.folds[slide.id]]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()

    def _normalise(self, number: int) -> list[object]:
        """What normalisation adds for a fold; nothing without it, so that results of before there was any remain what
        they are.
        """
        inference = self.battery.settings.inference
        if not inference.normalise:
            return []
        return [
            inference.normalise,
            digest_words(references_of(self.battery.folders[number].parent, inference, number)),
        ]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _looks_digest(looks: Looks) -> str:
    found = hashlib.sha256()
    for references in (looks.pas, looks.he):
        for reference in references:
            found.update(reference.packed)
        found.update(b"/")
    return found.hexdigest()


def _write(path: Path, counted: Counted, mark: str) -> None:
    with atomic_path(path) as temporary:
        size = np.array([counted.height, counted.width])
        np.savez_compressed(
            temporary, counts=counted.counts, size=size, um_per_px=np.array(counted.um_per_px), mark=np.array(mark)
        )


def _read(path: Path, mark: str) -> Counted | None:
    """The kept counts; None when there are none, or they are damaged or belong to something else."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["mark"]) != mark or kept["counts"].shape != (3, len(THRESHOLDS)):
                return None
            height, width = (int(length) for length in kept["size"])
            return Counted(kept["counts"], height, width, float(kept["um_per_px"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        log.warning("%s is damaged; this slide is predicted again", path)
        return None
