"""What `hubmap pseudo` leaves behind: predictions as they are made, and the tables of a version."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from hubmap_kit.competition import external
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.external import IMAGES, TRAIN, Row
from hubmap_kit.competition.tables import Slide
from hubmap_kit.files import write_json
from hubmap_kit.inference.confidence import Rules, Scores
from hubmap_kit.runtime.joining_job import link
from hubmap_kit.runtime.pseudo_voices import Choir, Labelled, Voice, label

log = logging.getLogger(__name__)
ALL, NOTE, VERSIONS = "pseudo.csv", "pseudo.json", "versions"
ALL_COLUMNS = (
    "id",
    "organ",
    "data_source",
    "kept",
    "reasons",
    "confidence",
    "inside",
    "agreement",
    "coverage",
    "folds",
    "fold",
    "parent",
    "version",
)


@dataclass(frozen=True)
class Judged:
    """A slide with its row, the voices that may speak, its label (None: there is none) and the reasons to refuse it."""

    slide: Slide
    row: Row
    voices: list[Voice]
    fold: int | None
    label: Labelled | None
    reasons: list[str]


class Predictions:
    """What was predicted already, one JSON line a slide, appended as it comes; a line that was cut off is predicted
    again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, dict[str, Any]] = {}
        if path.is_file():
            for line in path.read_bytes().splitlines():
                try:
                    value = json.loads(line)
                    self._known[value["id"]] = value
                except (ValueError, KeyError, TypeError):
                    log.info("%s has a line that was cut off; its slide is predicted again", path)
        self._file = path.open("ab")
        if self._file.tell():
            self._file.write(b"\n")  # ends a line that was cut off; empty lines are passed over

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def label(self, slide: Slide, voices: Sequence[Voice]) -> Labelled:
        """The label of a slide by these voices, predicted where it is not known.

        Raises SlideError and what networks raise.
        """
        what = [slide.organ, slide.source, slide.um_per_px, slide.path.stat().st_size, [voice.name for voice in voices]]
        known = self._known.get(slide.id)
        if known and known.get("what") == what:
            scores = Scores(**{name: math.nan if value is None else value for name, value in known["scores"].items()})
            return Labelled(known["rle"], known["height"], known["width"], scores)
        made = label(slide, slide_files.read(slide.path), voices)
        told = {name: None if math.isnan(value) else value for name, value in asdict(made.scores).items()}
        line = {
            "id": slide.id,
            "what": what,
            "height": made.height,
            "width": made.width,
            "scores": told,
            "rle": made.rle,
        }
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return made


def write_tables(
    out: Path, judged: Sequence[Judged], choir: Choir, rules: Rules, version: str, weight: float, runs: Sequence[Path]
) -> None:
    """Write all tables of a version into `out` and its versions/<version>/, and link the kept slides."""
    good = [one for one in judged if not one.reasons]
    for one in good:
        link(one.slide.path, out / IMAGES[TRAIN])
    train = [_train_row(one, choir.weights_id, version, weight) for one in good]
    everything = [_all_row(one, version) for one in judged]
    note = {
        "version": version,
        "weights": choir.weights_id,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [str(run) for run in runs],
        "folds": [voice.name for voice in choir.voices],
        "rules": rules.plain(),
        "weight": weight,
        "slides": len(judged),
        "kept": len(good),
    }
    for folder in (out / VERSIONS / version, out):
        external.write_table(folder / ALL, everything, ALL_COLUMNS)
        external.write_table(folder / TRAIN, train, (*external.COLUMNS[TRAIN], "fold", "weight", "version"))
        write_json(folder / NOTE, note)


def _train_row(one: Judged, weights_id: str, version: str, weight: float) -> Row:
    assert one.label is not None
    return {
        **one.row,
        "img_height": str(one.label.height),
        "img_width": str(one.label.width),
        "rle": one.label.rle,
        "provenance": " ".join([f"pseudo:{weights_id}", *(voice.name for voice in one.voices)]),
        "parent": _parent(one),
        "fold": "" if one.fold is None else str(one.fold),
        "weight": f"{weight:g}",
        "version": version,
    }


def _all_row(one: Judged, version: str) -> Row:
    scores = asdict(one.label.scores) if one.label else {}
    return {
        "id": one.slide.id,
        "organ": one.slide.organ,
        "data_source": one.slide.source,
        "kept": "0" if one.reasons else "1",
        "reasons": "; ".join(one.reasons),
        **{name: "" if math.isnan(value) else f"{value:.4f}" for name, value in scores.items()},
        "folds": " ".join(voice.name for voice in one.voices),
        "fold": "" if one.fold is None else str(one.fold),
        "parent": _parent(one),
        "version": version,
    }


def _parent(one: Judged) -> str:
    """A slide that was labelled anew is its own parent: the label that it had before is what this one descends from."""
    return one.row.get("parent") or one.slide.id
