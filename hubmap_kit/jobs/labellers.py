"""Who may label a slide: the folds of several runs, each with the slides that it held out."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np

from hubmap_kit.competition import external, rle
from hubmap_kit.competition.external import TRAIN
from hubmap_kit.competition.lineage import Families, held_out_by
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import CheckpointError, TableError
from hubmap_kit.inference.ensemble import MODEL_FILE, Ensemble, fold_folders, load_ensemble, run_settings
from hubmap_kit.inference.normalise import digest_words
from hubmap_kit.inference.predict import mask_of
from hubmap_kit.jobs.external import fold_numbers_of, parents_of
from hubmap_kit.models.device import choose_device
from hubmap_kit.models.pretrained import sha256
from hubmap_kit.tiles.background import tissue_map

# How sure an ensemble is of one slide, in four numbers, and the rules by which a mask of its own may teach others.

# Half of the smallest and twice the largest share of a slide that the masks of the competition's 351 training slides
# cover.
COVERAGE: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "kidney": (0.0016, 0.16),
        "prostate": (0.005, 0.86),
        "largeintestine": (0.01, 0.70),
        "spleen": (0.004, 0.69),
        "lung": (0.0004, 0.18),
    }
)


@dataclass(frozen=True)
class Scores:
    """`confidence` 0..0.5: mean distance of the probability from 0.5 within the tissue, NaN without tissue; `inside`
    0..1: mean probability within the mask, NaN of an empty one; `agreement` 0..1: mean Dice of every two folds' masks,
    NaN of a single fold; `coverage` 0..1: share of the slide that the mask covers.
    """

    confidence: float
    inside: float
    agreement: float
    coverage: float


@dataclass(frozen=True)
class Rules:
    """What a slide must reach; `coverage` gives the least and the most for each organ.

    `inside` is there because thresholds are fitted: a network that says 0.05 nearly everywhere is far from 0.5 nearly
    everywhere, and with a threshold of 0.04 its noise is a mask. The defaults of `confidence`, `inside` and `agreement`
    are a careful start, not fitted to anything: look at the contact sheets.
    """

    confidence: float = 0.35
    inside: float = 0.5
    agreement: float = 0.8
    coverage: Mapping[str, tuple[float, float]] = field(default_factory=lambda: COVERAGE)

    def plain(self) -> dict[str, Any]:
        """The rules as plain values, for JSON."""
        bounds = {organ: list(pair) for organ, pair in sorted(self.coverage.items())}
        return {"confidence": self.confidence, "inside": self.inside, "agreement": self.agreement, "coverage": bounds}

    def reasons(self, organ: str, scores: Scores) -> list[str]:
        """Why a slide is refused, a few words a rule; nothing where it is kept.

        One fold alone is not asked for its agreement.
        """
        least, most = self.coverage[organ]
        found = []
        if math.isnan(scores.confidence):
            found.append("no tissue")
        elif scores.confidence < self.confidence:
            found.append(f"confidence {scores.confidence:.3f} below {self.confidence:g}")
        if scores.inside < self.inside:
            found.append(f"probability inside {scores.inside:.3f} below {self.inside:g}")
        if scores.agreement < self.agreement:
            found.append(f"agreement {scores.agreement:.3f} below {self.agreement:g}")
        if scores.coverage < least:
            found.append(f"coverage {scores.coverage:.2%} below {least:.2%}")
        if scores.coverage > most:
            found.append(f"coverage {scores.coverage:.2%} above {most:.2%}")
        return found


def confidence(plane: np.ndarray, pixels: np.ndarray) -> float:
    """Mean |p - 0.5| of a plane (H, W) within the tissue of its slide (H, W, 3) uint8; NaN where there is none."""
    cells = tissue_map(pixels).cells
    sure = cv2.resize(np.abs(plane - np.float32(0.5)), cells.shape[::-1], interpolation=cv2.INTER_AREA)
    return float(sure[cells > 0].mean()) if cells.any() else math.nan


def inside(plane: np.ndarray, mask: np.ndarray) -> float:
    """Mean probability of a plane (H, W) within a mask (H, W); NaN where it is empty."""
    return float(plane[mask > 0].mean(dtype=np.float64)) if mask.any() else math.nan


def agreement(masks: Sequence[rle.Runs]) -> float:
    """Mean Dice of every two masks of one slide; NaN of fewer than two."""
    pairs = [rle.dice(one, other) for one, other in combinations(masks, 2)]
    return float(np.mean(pairs)) if pairs else math.nan


log = logging.getLogger(__name__)
FORMAT = 1  # of the scores: predictions that are kept under another one are made again


@dataclass(frozen=True)
class Voice:
    """One fold of one run: its number, the run's place among the runs, its name in tables, its weights' sha256, and its
    network.
    """

    run: int
    fold: int
    name: str
    digest: str
    ensemble: Ensemble


@dataclass(frozen=True)
class Labelled:
    """What the voices say of a slide: run-length string, its height and width in pixels, and the scores."""

    rle: str
    height: int
    width: int
    scores: Scores


class Choir:
    """All voices, and which of them may label a slide.

    The rule against leaks: a slide of a run's training table, a slide that descends from one (column `parent`, of
    either table), and one of the same known duplicate tissue are labelled only by the fold of that run for which this
    tissue was held out. Every other fold has learnt the tissue's own labels, and would hand them on. The label's row
    keeps the fold number, so that the slide is held out again together with its tissue. Slides that no run knows may be
    labelled by all folds.

    What remains: the folds that label a foreign slide have, together, learnt from all training slides, so a fold that
    is later trained on that label meets a faint echo of its own held-out slides. Labels made with one fold only
    (`folds`), used for training that fold only, are free of that too. And a run's kept epochs and thresholds were
    chosen on its held-out slides: a few numbers a run.
    """

    def __init__(
        self,
        runs: Sequence[Path],
        parents: Mapping[str, str],
        folds: Sequence[int] | None,
        overrides: Sequence[str],
        device: str,
    ) -> None:
        chosen = choose_device(device)
        tables, links = [], [parents]
        self._names = [str(run) for run in runs]
        self.voices: list[Voice] = []
        for place, run in enumerate(runs):
            settings = run_settings(run, overrides)
            if not (run / "folds.csv").is_file():
                unknown = "so nobody knows which slides its folds have seen; take it from the original run folder"
                raise CheckpointError(f"{run} has no folds.csv, {unknown}")
            tables.append(fold_numbers_of(run / "folds.csv"))
            links.append(_parents(run, Path(settings.data.folder)))
            numbers = list(fold_folders(run)) if folds is None else sorted(set(folds))
            for fold in numbers or [0]:  # a run without folds is refused where one is loaded
                ensemble = load_ensemble(run, chosen, [fold], overrides)
                digest = sha256(fold_folders(run)[fold] / MODEL_FILE)
                self.voices.append(Voice(place, fold, f"{run.resolve().name}/fold{fold}", digest, ensemble))
        self._families = Families(*links)
        self._folds = [self._families.folds(table) for table in tables]  # of every run: family -> folds

    @property
    def weights_id(self) -> str:
        """12 hex digits that stand for the weights of all voices."""
        return hashlib.sha256("".join(sorted(voice.digest for voice in self.voices)).encode()).hexdigest()[:12]

    @property
    def key(self) -> str:
        """12 hex digits that stand for everything that a prediction depends on beside the slide."""
        parts: list[object] = [FORMAT]
        for voice in self.voices:
            settings = voice.ensemble.experiment.model_dump(mode="json", include={"model", "scale", "inference"})
            parts.append(
                [
                    voice.name,
                    voice.digest,
                    settings,
                    voice.ensemble.thresholds,
                    *digest_words(voice.ensemble.references),
                ]
            )
        return short_hash(parts)

    def fold_of(self, slide_id: str) -> int | None:
        """The fold that a slide's tissue lies in; None where no run knows it.

        Raises TableError where runs do not agree on it.
        """
        found = self._held_out(slide_id)
        numbers = {fold: self._names[place] for place, fold in enumerate(found) if fold is not None}
        if len(numbers) > 1:
            told = ", ".join(f"{fold} in {name}" for fold, name in sorted(numbers.items()))
            raise TableError(
                f"slide {slide_id} or its tissue lies in fold {told}; labels that are trained on together need runs of"
                " one split"
            )
        return next(iter(numbers), None)

    def may_label(self, slide_id: str) -> list[Voice]:
        """The voices that may label a slide, see the class. Raises TableError as `fold_of`."""
        self.fold_of(slide_id)
        held_out = self._held_out(slide_id)
        return [voice for voice in self.voices if held_out[voice.run] in (None, voice.fold)]

    def _held_out(self, slide_id: str) -> list[int | None]:
        """For every run the fold that held the slide's tissue out, None where the run does not know it."""
        return [held_out_by(slide_id, self._families, folds) for folds in self._folds]


def label(slide: Slide, pixels: np.ndarray, voices: Sequence[Voice]) -> Labelled:
    """The mask of a slide (H, W, 3) by the mean of its voices: folds within a run first, then runs, as `hubmap predict`
    does.
    """
    masks, total, team = [], np.zeros(pixels.shape[:2], np.float32), []
    of_run = {
        place: [voice for voice in voices if voice.run == place]
        for place in dict.fromkeys(voice.run for voice in voices)
    }
    for members in of_run.values():
        team.append(members[0].ensemble)
        for voice in members:
            plane = voice.ensemble.probability(pixels, slide.um_per_px, organ=slide.organ, source=slide.source)
            masks.append(rle.runs_of(mask_of(slide, plane, [voice.ensemble])))
            total += plane / np.float32(len(members) * len(of_run))
    mask = mask_of(slide, total, team)
    scores = Scores(confidence(total, pixels), inside(total, mask), agreement(masks), float(mask.mean()))
    height, width = mask.shape
    return Labelled(rle.encode(mask), height, width, scores)


def _parents(run: Path, folder: Path) -> dict[str, str]:
    """Parents among a run's own training slides, as far as its table is still where it was."""
    if not (folder / TRAIN).is_file():
        log.warning(
            "%s was trained on %s, which is not here; which of its slides descend from others is not known, only their"
            " ids are",
            run,
            folder,
        )
        return {}
    return parents_of(external.read_table(folder / TRAIN))


def short_hash(value: object) -> str:
    """12 hex digits of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
