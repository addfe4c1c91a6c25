"""`hubmap evaluate RUN --on DATA`: a run's folds together on the labelled slides of another folder, which none of them
has seen.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hubmap_kit.augment.changes import embedded_references
from hubmap_kit.augment.shift import HUBMAP, PLAIN, Looks, names_of, preview_shift
from hubmap_kit.augment.stain import read_references
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.lineage import Families
from hubmap_kit.competition.metric import dice
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError, TableError, did_you_mean
from hubmap_kit.files import atomic_path, write_json, write_text
from hubmap_kit.inference.ensemble import (
    MODEL_FILE,
    VIEW_COUNTS,
    fold_folders,
    load_ensemble,
    read_thresholds,
    run_settings,
)
from hubmap_kit.inference.postprocess import FITTED_FILE, read_fitted, threshold_for
from hubmap_kit.inference.predict import mask_of
from hubmap_kit.inference.worker import Team, mean_plane
from hubmap_kit.jobs.shift_counts import Battery, Counted, count_all, read_slide, source_under
from hubmap_kit.jobs.train import train_csv
from hubmap_kit.models.device import choose_device
from hubmap_kit.progress import track
from hubmap_kit.report.overlays import contact_sheet
from hubmap_kit.report.shift_page import (
    LOST,
    Results,
    WorstSlide,
    gain_of,
    save_shift_page,
    save_shift_picture,
    shift_summary,
    worst_of,
)
from hubmap_kit.report.tables import text_table
from hubmap_kit.tiles.store import decode_for
from hubmap_kit.training.counts import (
    HALF,
    MixtureFit,
    best_threshold,
    dice_curve,
    fit_mixture,
    level_of,
    threshold_counts,
)
from hubmap_kit.training.history import unfinished
from hubmap_kit.training.run import folds_table, of_organs, split

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
    small = [np.ascontiguousarray(array[::step, ::step]) for array in (pixels, truth, mask)]
    curve = dice_curve(threshold_counts(plane, truth))
    return _Seen(slide, dice(mask, truth), curve, (small[0], small[1], small[2]))


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


# `hubmap evaluate --shift hubmap`: held-out slides plain and under shifts that imitate HuBMAP; tables, a page,
# thresholds for both.

BATTERIES = (HUBMAP,)
SHIFT, TABLE_FILE, PAGE_FILE, PICTURE_FILE, FIT_FILE = "shift", "shift.csv", "shift.html", "shift.png", "shift.json"
THRESHOLDS_FILE, PLAIN_FILE = "thresholds.json", "thresholds.plain.json"
REFERENCE_SIDE, REFERENCE_SEED = 480, 0  # of the embedded references


@dataclass(frozen=True)
class ShiftReport:
    """What was found: one row a slide and shift, what was fitted (None without `fit`), and a table for the terminal."""

    table: pd.DataFrame
    fits: list[MixtureFit] | None
    summary: str


def evaluate_shifted(
    run: Path,
    battery: str = HUBMAP,
    data: str = "",
    overrides: Sequence[str] = (),
    device: str = "auto",
    shifts: str = "",
    references: str = "",
    views: str = "",
    fit: bool = False,
    pictures: bool = True,
) -> ShiftReport:
    """Predict a run's held-out slides plain and shifted, each by the fold that never saw it, and write shift.csv, .html
    and .png.

    `shifts` picks some of the battery ("scale,hubmap"); plain is always among them. `references`: folder of stain
    references whose names tell pas or he; empty: embedded slides. `views`: none, flips or d4 instead of the run's.
    `overrides` (`inference.key=value`) hold for this evaluation only. `fit` writes thresholds for plain and "hubmap"
    slides alike into the run's thresholds.json and keeps the former as thresholds.plain.json; figures and page tell
    Dice at the former. An evaluation that was interrupted goes on. Raises ConfigError, CheckpointError and the errors
    of slides and tables.
    """
    if battery not in BATTERIES:
        raise ConfigError(f"--shift is '{battery}'; known is {', '.join(BATTERIES)}{did_you_mean(battery, BATTERIES)}")
    if views and views not in VIEW_COUNTS:
        raise ConfigError(f"--views is '{views}'; known are {', '.join(VIEW_COUNTS)}{did_you_mean(views, VIEW_COUNTS)}")
    chosen = names_of(f"{PLAIN},{shifts}" if shifts.strip() else "")
    if fit and HUBMAP not in chosen:
        raise ConfigError(f"--fit needs the shift {HUBMAP}, but --shifts is {shifts}; add it there")
    work = _battery(run, data, overrides, device, chosen, references, views)
    slides = of_organs(read_train(train_csv(work.settings)), work.settings.data)
    work = replace(work, folds=split(slides, work.settings.data, run))
    if not any(number in work.folders for number in work.folds.values()):
        raise CheckpointError(
            f"{run} holds no trained fold (fold<k>/{MODEL_FILE}) with held-out slides; train it first"
        )
    counted = count_all(work, slides)
    fitted = read_thresholds(run)
    table = _shift_table(work, slides, counted, fitted)
    with atomic_path(run / TABLE_FILE) as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f")
    fits = _fit(work, slides, counted, fitted) if fit else None
    results = Results(work.settings.name, table, fits, _notes(run, work, fitted, references))
    save_shift_picture(run / PICTURE_FILE, results)
    save_shift_page(run / PAGE_FILE, results, _worst(work, slides, table, run / SHIFT) if pictures else [])
    if fits is not None:
        _write_thresholds(run, fits, fitted)
        if gain_of(fits) < 0:
            log.warning("%s: %s", run, LOST)
    return ShiftReport(table, fits, shift_summary(results))


def preview(out: Path, data: str, slide: str = "", references: str = "", shifts: str = "") -> int:
    """Draw a slide of the train.csv in the folder `data` (its first one when empty) under each shift into the PNG
    `out`; masks outlined.

    Returns the number of pictures. Raises HubmapError.
    """
    slides = read_train(Path(data) / "train.csv", check_files=False)
    ids = [each.id for each in slides]
    if slide and slide not in ids:
        raise TableError(
            f"{Path(data) / 'train.csv'} has no slide {slide}{did_you_mean(slide, ids)}; name one of its ids with"
            " --slide"
        )
    one, names = slides[ids.index(slide)] if slide else slides[0], names_of(shifts)
    items = preview_shift(*read_slide(one), one.organ, one.um_per_px, one.id, looks_of(references, names), names)
    contact_sheet(out, [(image, mask, None, title) for image, mask, title in items], 4)
    return len(items)


def looks_of(references: str, shifts: Sequence[str]) -> Looks:
    """The stain references of a folder, or the embedded ones.

    Raises ConfigError when a shift needs one that is not there.
    """
    found = read_references(references) if references else embedded_references(REFERENCE_SIDE, REFERENCE_SEED)
    looks = Looks.of(found)
    looks.check(shifts)
    return looks


def _battery(
    run: Path, data: str, overrides: Sequence[str], device: str, shifts: Sequence[str], references: str, views: str
) -> Battery:
    settings = run_settings(run, overrides, data)
    folds_table(run)
    for phrase in unfinished(run, settings.training).values():
        log.warning("%s: %s; what is told now is of its best epoch so far, or without it", run, phrase)
    looks = looks_of(references, shifts)
    return Battery(
        settings,
        fold_folders(run),
        {},
        shifts,
        looks,
        views or settings.inference.views,
        run / SHIFT,
        choose_device(device),
    )


def _shift_table(
    work: Battery, slides: Sequence[Slide], counted: Mapping[tuple[str, str], Counted], fitted: Mapping[str, float]
) -> pd.DataFrame:
    by_id, rows = {slide.id: slide for slide in slides}, []
    for (slide_id, shift), found in counted.items():
        slide, curve = by_id[slide_id], dice_curve(found.counts)
        threshold = threshold_for(slide.organ, source_under(slide, shift), fitted, work.settings.inference)
        rows.append(
            {
                "id": slide_id,
                "organ": slide.organ,
                "source": slide.source,
                "fold": work.folds[slide_id],
                "shift": shift,
                "dice": curve[level_of(threshold)],
                "dice@0.5": curve[HALF],
                "threshold": threshold,
                "height": found.height,
                "width": found.width,
                "um_per_px": found.um_per_px,
            }
        )
    return pd.DataFrame(rows)


def _fit(
    work: Battery, slides: Sequence[Slide], counted: Mapping[tuple[str, str], Counted], fitted: Mapping[str, float]
) -> list[MixtureFit]:
    mine = [slide for slide in slides if (slide.id, PLAIN) in counted]
    plain, hubmap = (
        dice_curve(np.stack([counted[slide.id, shift].counts for slide in mine])) for shift in (PLAIN, HUBMAP)
    )
    organs = [slide.organ for slide in mine]
    if work.settings.inference.thresholds or work.settings.inference.source_thresholds:
        log.warning("the run's config.yaml sets thresholds itself, which go before those that are fitted now")
    before = {organ: threshold_for(organ, "Hubmap", fitted, work.settings.inference) for organ in organs}
    return fit_mixture(organs, [work.folds[slide.id] for slide in mine], plain, hubmap, before)


def _write_thresholds(run: Path, fits: Sequence[MixtureFit], former: Mapping[str, float]) -> None:
    """Thresholds for both kinds of slides become the run's; organs without held-out slides keep theirs.

    thresholds.plain.json stays as it is when thresholds.json is an earlier fit's own, here or of 'hubmap
    tune-thresholds'.
    """
    fitted = {fit.organ: fit.threshold for fit in fits}
    others = {key: value for key, value in former.items() if key.partition("/")[0] not in fitted}
    path, plain = run / THRESHOLDS_FILE, run / PLAIN_FILE
    own = former in (_thresholds_in(run / FIT_FILE), _thresholds_in(run / FITTED_FILE))
    if path.is_file() and not (own and plain.is_file()):
        write_text(plain, path.read_text(encoding="utf-8"))
    write_json(
        run / FIT_FILE,
        {"thresholds": others | fitted, "mixture": [PLAIN, HUBMAP], "results": [asdict(fit) for fit in fits]},
    )
    write_json(path, others | fitted)


def _thresholds_in(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["thresholds"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _worst(work: Battery, slides: Sequence[Slide], table: pd.DataFrame, folder: Path) -> list[WorstSlide]:
    """The slides with the lowest Dice under the last shift, predicted again and drawn plain and shifted, truth and
    prediction.
    """
    by_id, shift, found = {slide.id: slide for slide in slides}, work.shifts[-1], []
    for old in folder.glob("worst-*.png"):
        old.unlink()
    for place, row in enumerate(worst_of(table, shift), 1):
        slide, ensemble = by_id[row["id"]], work.ensemble(int(row["fold"]))
        pixels, truth = read_slide(slide)
        items = []
        for name in dict.fromkeys((PLAIN, shift)):
            made = work.made(slide, name, pixels, truth)
            mine = table[(table["id"] == slide.id) & (table["shift"] == name)].iloc[0]
            mask = work.plane(ensemble, slide, name, made) >= np.float32(mine["threshold"])
            items.append((made.image, made.mask, mask, f"{name}, {made.mask.shape[0]} px: Dice {mine['dice']:.3f}"))
        path = folder / f"worst-{place}-{slide.id}.png"
        contact_sheet(path, items, len(items))
        found.append(WorstSlide(slide.id, slide.organ, slide.source, float(row["dice"]), float(row["plain"]), path))
    return found


def _notes(run: Path, work: Battery, fitted: Mapping[str, float], references: str) -> list[str]:
    """What a reader of the page should know about these figures."""
    count = VIEW_COUNTS[work.views]
    names = f"{len(work.looks.pas)} for PAS and {len(work.looks.he)} for haematoxylin and eosin"
    notes = [
        f"Predicted with {count} view{'s' * (count > 1)}, each slide by the fold that never saw it. Stain references:"
        f" {names}, "
        + (
            "from a folder of the user."
            if references
            else "embedded slides, which are drawn, not real; real ones are given with --references."
        )
    ]
    if methods := work.settings.inference.normalise:
        named = " and ".join(methods)
        notes.append(
            "Shifted slides count as HuBMAP's: they were predicted in the colours of the organ's training slides as"
            f" well ({named})."
        )
    if not fitted:
        notes.append("The run has no fitted thresholds: Dice is told at those of its config.")
    try:
        after = bool(read_fitted(run, fitted))
    except HubmapError:
        after = False
    if after:
        notes.append(
            "The run has fitted post-processing, which counts in 'hubmap predict' and not here: Dice is of thresholds"
            " alone."
        )
    return notes
