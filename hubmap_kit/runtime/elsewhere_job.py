"""`hubmap evaluate RUN --on DATA`: a run's folds together on the labelled slides of another folder, which none of them
has seen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.lineage import Families
from hubmap_kit.competition.metric import dice
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.errors import TableError
from hubmap_kit.files import atomic_path
from hubmap_kit.inference.ensemble import load_ensemble
from hubmap_kit.inference.predict import mask_of
from hubmap_kit.inference.worker import Team, mean_plane
from hubmap_kit.models.device import choose_device
from hubmap_kit.progress import track
from hubmap_kit.report.overlays import contact_sheet
from hubmap_kit.report.tables import text_table
from hubmap_kit.tiles.convert import decode_for
from hubmap_kit.training.counts import HALF, best_threshold, dice_curve, threshold_counts
from hubmap_kit.training.run import folds_table
from hubmap_kit.training.shift_fit import level_of

log = logging.getLogger(__name__)
ELSEWHERE = "elsewhere"
SHOWN = 9  # slides of the picture: the worst, some around the median, the best
SIDE = 480  # pixels of a kept picture's longer side, about


@dataclass(frozen=True)
class Elsewhere:
    """One row a slide, a table for the terminal, and the two files that were written."""

    table: pd.DataFrame
    summary: str
    written: tuple[Path, Path]


@dataclass(frozen=True)
class _Seen:
    slide: Slide
    dice: float
    curve: np.ndarray
    picture: tuple[np.ndarray, np.ndarray, np.ndarray]


def evaluate_on(
    run: Path,
    data: Path,
    organs: Sequence[str] = (),
    folds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> Elsewhere:
    """Predict the slides of `data`/train.csv as the hidden test would be, and write RUN/elsewhere/NAME.csv and
    NAME.png.

    `organs` picks some. A slide that the run has learnt from, or one of its family, is refused. Dice is that of the
    finished mask, at the run's own thresholds; beside it are Dice at 0.5 and at the threshold that is best for this
    very folder, which nobody knows beforehand. Raises HubmapError.
    """
    slides = _chosen(data, organs)
    _check_unseen(run, slides)
    team = [load_ensemble(run, choose_device(device), folds, overrides)]
    seen = [_judged(slide, team) for slide in track(slides, "elsewhere", "slide")]
    table = _elsewhere_table(seen)
    name = data.resolve().name if data.is_dir() else data.resolve().parent.name
    written = run / ELSEWHERE / f"{name}.csv", run / ELSEWHERE / f"{name}.png"
    with atomic_path(written[0]) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f")
    contact_sheet(written[1], _pictures(seen), 3)
    return Elsewhere(table, _summary(table), written)


def _chosen(data: Path, organs: Sequence[str]) -> list[Slide]:
    path = data / "train.csv" if data.is_dir() else data
    slides = read_train(path)
    wrong = [organ for organ in organs if organ not in ORGANS]
    if wrong:
        raise TableError(f"--organs has '{wrong[0]}'; expected some of {', '.join(ORGANS)}")
    chosen = [slide for slide in slides if not organs or slide.organ in organs]
    if not chosen:
        raise TableError(f"{path} has no slide of {', '.join(organs)}; ask for other organs")
    return chosen


def _check_unseen(run: Path, slides: Sequence[Slide]) -> None:
    families = Families({slide.id: slide.parent for slide in slides})
    # Sources number their slides as they like: one id for slides of two organs, or of two sources, is a coincidence.
    known = {
        (families.of(row["id"]), row["organ"], row["data_source"])
        for _, row in read_rows(folds_table(run), ("id", "organ", "data_source"))
    }
    learnt = [slide.id for slide in slides if (families.of(slide.id), slide.organ, slide.source) in known]
    if learnt:
        raise TableError(
            f"{run} has learnt from {len(learnt)} of these slides, or from their tissue"
            f" ({', '.join(learnt[:3])}{', ...' if len(learnt) > 3 else ''}); for those 'hubmap evaluate' without --on"
            " asks the folds that held them out"
        )


def _judged(slide: Slide, team: Team) -> _Seen:
    pixels = slide_files.read(slide.path)
    truth, plane = decode_for(slide, *pixels.shape[:2]), mean_plane(slide, pixels, team)
    mask, step = mask_of(slide, plane, team), max(1, max(truth.shape) // SIDE)
    picture = tuple(np.ascontiguousarray(array[::step, ::step]) for array in (pixels, truth, mask))
    return _Seen(slide, dice(mask, truth), dice_curve(threshold_counts(plane, truth)), picture)  # type: ignore[arg-type]


def _elsewhere_table(seen: Sequence[_Seen]) -> pd.DataFrame:
    organs = [each.slide.organ for each in seen]
    best = {
        organ: best_threshold(np.mean([each.curve for each in seen if each.slide.organ == organ], axis=0))
        for organ in set(organs)
    }
    return pd.DataFrame(
        {
            "id": [each.slide.id for each in seen],
            "organ": organs,
            "source": [each.slide.source for each in seen],
            "dice": [each.dice for each in seen],
            "dice@0.5": [each.curve[HALF] for each in seen],
            "dice@best": [each.curve[level_of(best[each.slide.organ])] for each in seen],
            "best": [best[organ] for organ in organs],
        }
    )


def _summary(table: pd.DataFrame) -> str:
    rows = []
    for name in [*(organ for organ in ORGANS if organ in set(table["organ"])), "all"]:
        mine = table if name == "all" else table[table["organ"] == name]
        best = "" if name == "all" else f"{mine['best'].iloc[0]:.3f}"
        rows.append(
            [
                name,
                f"{len(mine)}",
                *(f"{mine[column].mean():.4f}" for column in ("dice", "dice@0.5", "dice@best")),
                best,
            ]
        )
    return text_table(["elsewhere", "slides", "Dice", "at 0.5", "at the best threshold", "which is"], rows)


def _pictures(seen: Sequence[_Seen]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, str]]:
    """From the worst to the best, evenly."""
    order = sorted(seen, key=lambda each: each.dice)
    places = np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))
    return [
        (*order[place].picture, f"{order[place].slide.id} {order[place].slide.organ}: Dice {order[place].dice:.3f}")
        for place in places
    ]
