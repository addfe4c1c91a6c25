"""`hubmap pseudo`: an ensemble labels slides, rules keep the labels that it is sure of, and a versioned train table
holds them.
"""

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

import numpy as np

from hubmap_kit.competition import external, rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.external import IMAGES, TEST, TRAIN, Row
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import TEST_COLUMNS, Slide, read_test
from hubmap_kit.errors import HubmapError, SlideError, TableError
from hubmap_kit.files import write_json
from hubmap_kit.jobs.external import link, parents_of
from hubmap_kit.jobs.labellers import Choir, Labelled, Rules, Scores, Voice, label, short_hash
from hubmap_kit.progress import bar
from hubmap_kit.report.overlays import Shown, save_sheet

# What `hubmap pseudo` leaves behind: predictions as they are made, and the tables of a version.

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


PICTURES = 24  # on each contact sheet


@dataclass(frozen=True)
class Pseudo:
    """What came of it: the version, and the ids of the kept slides and of the refused ones with their reasons."""

    version: str
    kept: list[str]
    refused: dict[str, str]


def pseudo(
    runs: Sequence[Path],
    data: Path,
    out: Path,
    rules: Rules | None = None,
    folds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    only: Sequence[str] = (),
    weight: float = 1.0,
) -> Pseudo:
    """Label the slides of `data` (a table, or a folder with test.csv or else train.csv, whose own masks are not looked
    at).

    Who may label a slide is the rule of `pseudo_voices.Choir`. Writes into `out`: pseudo.csv, every slide with its
    scores, kept or why not; train.csv of the kept, with provenance pseudo:<weights id>, parent, fold, weight and
    version, and links to the slides; pseudo.json with rules and weights; kept.png and refused.png. The tables are kept
    for each version in versions/<version>/ too. Predictions are kept as they are made, so a killed job goes on, and
    other rules cost no prediction. A slide that cannot be read is refused with that reason. Raises CheckpointError,
    TableError for `only` ids that are not there and for runs that do not fit.
    """
    rules = rules or Rules()
    if not 0 < weight <= 1:
        raise TableError(
            f"--weight is {weight:g}, but the weight of a label lies above 0 and is at most 1; pass such a number"
        )
    slides, rows = _slides(data, only)
    choir = Choir(runs, parents_of(list(rows.values())), folds, overrides, device)
    who = {slide.id: (choir.may_label(slide.id), choir.fold_of(slide.id)) for slide in slides}
    key = choir.key
    judged = []
    with (
        Predictions(out / VERSIONS / f"predictions-{key}.jsonl") as kept,
        bar(len(slides), "pseudo", "slide") as progress,
    ):
        for slide in slides:
            judged.append(_judge(slide, rows[slide.id], *who[slide.id], rules, kept))
            progress.set_postfix_str(f"{slide.organ} {slide.id}", refresh=False)
            progress.update(1)
    cells = [
        {name: cell for name, cell in rows[slide.id].items() if name != "rle"} | {"fold": who[slide.id][1]}
        for slide in slides
    ]
    version = short_hash([key, rules.plain(), weight, cells])
    write_tables(out, judged, choir, rules, version, weight, runs)
    _draw(out, judged)
    refused = {one.slide.id: "; ".join(one.reasons) for one in judged if one.reasons}
    return Pseudo(version, [one.slide.id for one in judged if not one.reasons], refused)


def rules_from(confidence: float, inside: float, agreement: float, coverage: Sequence[str]) -> Rules:
    """Rules from the words of a command line; `coverage` as ORGAN=LEAST:MOST in shares of the slide.

    Raises TableError.
    """
    default = Rules()
    bounds = dict(default.coverage)
    for text in coverage:
        organ, _, values = text.partition("=")
        try:
            least, most = (float(part) for part in values.split(":"))
        except ValueError:
            least, most = math.nan, math.nan
        if organ not in ORGANS or not 0 <= least < most <= 1:
            raise TableError(
                f"--coverage {text} has no ORGAN=LEAST:MOST form with 0 <= LEAST < MOST <= 1; write for instance"
                " lung=0.001:0.1"
            )
        bounds[organ] = (least, most)
    for option, value, top in (
        ("--confidence", confidence, 0.5),
        ("--inside", inside, 1.0),
        ("--agreement", agreement, 1.0),
    ):
        if not 0 <= value <= top:
            raise TableError(f"{option} is {value:g}, but it lies between 0 and {top:g}; pass such a number")
    return Rules(confidence, inside, agreement, bounds)


def _slides(data: Path, only: Sequence[str]) -> tuple[list[Slide], dict[str, Row]]:
    table = data
    if data.is_dir():
        table = data / TEST if (data / TEST).is_file() else data / TRAIN
    folder = IMAGES[TRAIN] if table.name.startswith("train") else IMAGES[TEST]
    rows = {row["id"]: row for row in external.read_table(table, TEST_COLUMNS)}
    slides = read_test(table, table.parent / folder)
    if missing := [slide_id for slide_id in only if slide_id not in rows]:
        raise TableError(f"{table} has no slide {missing[0]}; name its ids, or leave --only out for all of them")
    return [slide for slide in slides if not only or slide.id in only], rows


def _judge(slide: Slide, row: Row, voices: list[Voice], fold: int | None, rules: Rules, kept: Predictions) -> Judged:
    if not voices:
        return Judged(slide, row, voices, fold, None, ["no fold that is here has held it out"])
    try:
        made = kept.label(slide, voices)
    except SlideError as error:
        log.warning("refused: %s", error)
        return Judged(slide, row, voices, fold, None, [str(error)])
    return Judged(slide, row, voices, fold, made, rules.reasons(slide.organ, made.scores))


def _draw(out: Path, judged: Sequence[Judged]) -> None:
    by_id = {one.slide.id: one for one in judged}

    def read(slide_id: str) -> tuple[np.ndarray, np.ndarray]:
        one = by_id[slide_id]
        assert one.label is not None
        return slide_files.read(one.slide.path), rle.decode(one.label.rle, one.label.height, one.label.width)

    for name, wanted in (("kept.png", False), ("refused.png", True)):
        shown = [_shown(one) for one in judged if one.label is not None and bool(one.reasons) == wanted]
        try:
            save_sheet(out / name, shown, read, PICTURES)
        except HubmapError as error:
            log.warning("%s is not drawn: %s", out / name, error)


def _shown(one: Judged) -> Shown:
    assert one.label is not None
    scores = one.label.scores
    told = {"sure": scores.confidence, "inside": scores.inside, "agree": scores.agreement, "cover": scores.coverage}
    line = "  ".join(f"{name} {value:.3f}" for name, value in told.items() if not math.isnan(value))
    return Shown(
        one.slide.id,
        f"{one.slide.organ} {one.slide.id}  {line}",
        0.0 if math.isnan(scores.confidence) else scores.confidence,
    )
