"""`hubmap pseudo`: an ensemble labels slides, rules keep the labels that it is sure of, and a versioned train table
holds them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hubmap_kit.competition import external, rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.external import IMAGES, TEST, TRAIN, Row
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import TEST_COLUMNS, Slide, read_test
from hubmap_kit.errors import HubmapError, SlideError, TableError
from hubmap_kit.inference.confidence import Rules
from hubmap_kit.progress import bar
from hubmap_kit.report.pseudo_sheet import Shown, save_sheet
from hubmap_kit.runtime.joining_job import parents_of
from hubmap_kit.runtime.pseudo_tables import VERSIONS, Judged, Predictions, write_tables
from hubmap_kit.runtime.pseudo_voices import Choir, Voice, short_hash

log = logging.getLogger(__name__)
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
