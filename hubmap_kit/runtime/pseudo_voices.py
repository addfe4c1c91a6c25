"""Who may label a slide: the folds of several runs, each with the slides that it held out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hubmap_kit.competition import external, rle
from hubmap_kit.competition.external import TRAIN
from hubmap_kit.competition.lineage import Families, held_out_by
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import CheckpointError, TableError
from hubmap_kit.inference.confidence import Scores, agreement, confidence, inside
from hubmap_kit.inference.ensemble import MODEL_FILE, Ensemble, fold_folders, load_ensemble, run_settings
from hubmap_kit.inference.normalise import digest_words
from hubmap_kit.inference.predict import mask_of
from hubmap_kit.models.device import choose_device
from hubmap_kit.models.weights_card import sha256
from hubmap_kit.runtime.joining_job import fold_numbers_of, parents_of

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
    return Labelled(rle.encode(mask), *mask.shape, scores)


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
