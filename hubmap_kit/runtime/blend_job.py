"""The blend job: several runs that share folds -> weights by organ for their mean, with what that is worth."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.folds import read_folds
from hubmap_kit.competition.lineage import judged_slides
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.files import atomic_path, write_json, write_text
from hubmap_kit.inference.blend import BLEND_FILE, FORMAT, weights_id
from hubmap_kit.inference.ensemble import fold_folders, run_settings
from hubmap_kit.models.device import choose_device
from hubmap_kit.progress import bar, track
from hubmap_kit.report.blend_page import Fitted, blend_page, blend_summary
from hubmap_kit.runtime.blend_planes import Member, Planes, gather
from hubmap_kit.runtime.train_job import train_csv
from hubmap_kit.tiles.convert import open_or_build
from hubmap_kit.tiles.store import TileStore
from hubmap_kit.training.blend_fit import ROWS, STRENGTH, Pixels, greedy, group, joined, parts_of
from hubmap_kit.training.blend_score import OrganBlend, among, blend_organ, likeness
from hubmap_kit.training.history import unfinished
from hubmap_kit.training.run import folds_table

log = logging.getLogger(__name__)
SIDE = 750
TABLE, PAGE, PLANES = "blend.csv", "index.html", "planes"


def blend(
    runs: Sequence[Path],
    out: Path,
    data: str = "",
    overrides: Sequence[str] = (),
    device: str = "auto",
    stores: Path | None = None,
    side: int = SIDE,
    strength: float = STRENGTH,
) -> str:
    """Fit the weights of `runs` on their held-out slides and write blend.json, blend.csv and index.html into `out`;
    returns a table of it.

    A run that holds out no slide of an organ, such as one with `data.organs: [lung]`, gets weight 0 there; the others
    share that organ. Every slide is predicted by the fold of each run that never saw it, at most `side` pixels on its
    longer side; those planes stay in `out`/planes, so a blend that was killed goes on, and another choice of runs costs
    only what is new. Slides of folds that not all runs have trained are left out. `data` is the folder of train.csv,
    where it has moved; `overrides` are inference.key=value for these planes only, so give `predict` the same. Raises
    ConfigError for fewer than two runs, CheckpointError for runs that do not hold out the same slides together.
    """
    _check_runs(runs, out)
    folds_of = [_fold_table(run) for run in runs]
    settings = [run_settings(run, overrides, data) for run in runs]
    widest = max(range(len(runs)), key=lambda place: len(folds_of[place]))
    everyone = read_train(train_csv(settings[widest]))
    known = [_organs(everyone, table, each) for table, each in zip(folds_of, settings, strict=True)]
    for run, table, organs in zip(runs, folds_of, known, strict=True):
        _check_same(
            runs[widest], folds_of[widest], run, table, {slide.id for slide in everyone if slide.organ not in organs}
        )
    folds = read_folds(runs[widest] / "folds.csv", everyone)
    slides = _held_out(runs, known, everyone, folds)
    members = [
        Member(name, run, each, _store(stores or run.parent / "stores", everyone, each, organs), organs)
        for name, run, each, organs in zip(distinct_names(runs), runs, settings, known, strict=True)
    ]
    for member in members:
        for phrase in unfinished(member.run, member.settings.training).values():
            log.warning("%s: %s; the blend is fitted to its best epoch so far, or without it", member.run, phrase)
    with bar(sum(slide.organ in organs for slide in slides for organs in known), "blend", "plane") as progress:
        planes = gather(out / PLANES, members, slides, folds, side, choose_device(device), progress)
    fitted = _fit(members, slides, folds, planes, strength)
    _write(out, runs, fitted, slides, folds, side, strength)
    return blend_summary(fitted)


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The runs' folder names, made different and fit for a dataset."""
    names: list[str] = []
    for run in runs:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "-", run.resolve().name).strip("._-") or "run"
        number = next(number for number in range(1, len(runs) + 1) if _numbered(plain, number) not in names)
        names.append(_numbered(plain, number))
    return names


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def _check_runs(runs: Sequence[Path], out: Path) -> None:
    if len(runs) < 2:
        raise ConfigError(
            f"{len(runs)} run is no blend; give two or more run folders that were trained on the same folds"
        )
    for place, run in enumerate(runs):
        if run.resolve() in [other.resolve() for other in runs[:place]]:
            raise ConfigError(f"{run} is given twice; name every run once")
    if (out / "config.yaml").is_file():
        raise ConfigError(f"--out {out} is a run folder; choose another folder for the blend")


def _fold_table(run: Path) -> dict[str, str]:
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run} is not a run folder: config.yaml is missing; give the folder that 'hubmap train --out' wrote"
        )
    return {row["id"]: row["fold"] for _, row in read_rows(folds_table(run), ("id", "fold"))}


def _organs(slides: Sequence[Slide], folds: Mapping[str, str], settings: Experiment) -> frozenset[str]:
    """The organs that a run has slides of, in its table of folds and by its own choice."""
    return frozenset(slide.organ for slide in slides if slide.id in folds and settings.data.has(slide.organ))


def _store(stores: Path, slides: Sequence[Slide], settings: Experiment, organs: Collection[str]) -> TileStore:
    """The store of a run's organs: where it has learnt from some only, the one that it was trained on."""
    return open_or_build(stores, [slide for slide in slides if slide.organ in organs], settings.scale, settings.tiles)


def _check_same(
    first: Path, wanted: Mapping[str, str], run: Path, found: Mapping[str, str], unknown: Collection[str]
) -> None:
    """That two runs hold out the same slides together, but for the slides that are `unknown` to the other one."""
    for slide_id in [*(each for each in wanted if each not in unknown), *found]:
        one, other = wanted.get(slide_id), found.get(slide_id)
        if one != other:
            where = [
                f"in fold {fold} of {path}" if fold is not None else f"not in {path}"
                for path, fold in ((first, one), (run, other))
            ]
            raise CheckpointError(
                f"slide {slide_id} is {where[0]} and {where[1]}; a blend needs runs that hold out the same slides"
                " together, so train them with the same data.folds_csv, or the same data.n_folds and data.fold_seed"
            )


def _held_out(
    runs: Sequence[Path], known: Sequence[frozenset[str]], slides: Sequence[Slide], folds: Mapping[str, int]
) -> list[Slide]:
    """The slides of the folds that all runs which know their organ have trained, each run with weights of its own."""
    trained = [set(fold_folders(run)) for run in runs]
    judged = judged_slides(slides)  # a restained copy would count its tissue once more
    of_someone = [slide for slide in slides if slide.id in judged and any(slide.organ in organs for organs in known)]
    found = [
        slide
        for slide in of_someone
        if all(
            folds[slide.id] in numbers for numbers, organs in zip(trained, known, strict=True) if slide.organ in organs
        )
    ]
    if not found:
        said = "; ".join(f"{run} has {sorted(each)}" for run, each in zip(runs, trained, strict=True))
        raise CheckpointError(
            f"the runs share no trained fold with slides ({said}); train the same fold of all of them"
        )
    ids = [weights_id(run) for run in runs]
    for place, (run, mark) in enumerate(zip(runs, ids, strict=True)):
        if mark in ids[:place]:
            raise ConfigError(f"{run} holds the same weights as {runs[ids.index(mark)]}; name one of them")
    if len(found) < len(of_someone):
        numbers = sorted({folds[slide.id] for slide in found})
        log.warning(
            "only folds %s are trained in all runs; the blend is fitted on %d of %d slides",
            numbers,
            len(found),
            len(of_someone),
        )
    return found


def _fit(
    members: Sequence[Member], slides: Sequence[Slide], folds: Mapping[str, int], planes: Planes, strength: float
) -> Fitted:
    by_organ: dict[str, list[tuple[str, Pixels]]] = {
        organ: [] for organ in ORGANS if any(slide.organ == organ for slide in slides)
    }
    for slide in track(slides, "grouping", "slide"):
        values, truth, _ = planes.read(slide.id)
        by_organ[slide.organ].append((slide.id, group(values, truth, ROWS // len(slides))))
    numbers = {organ: np.array([folds[slide_id] for slide_id, _ in found]) for organ, found in by_organ.items()}
    knowing = {organ: [number for number, member in enumerate(members) if organ in member.organs] for organ in by_organ}
    organs: list[OrganBlend] = []
    for organ, found in track(by_organ.items(), "fitting", "organ", len(by_organ)):
        ids, pixels = [slide_id for slide_id, _ in found], [each for _, each in found]
        one = blend_organ(organ, ids, numbers[organ], pixels, planes.read, strength)
        organs.append(among(one, knowing[organ], len(members), planes.read))
    parts = [parts_of(numbers[organ]) for organ in by_organ]
    steps = greedy(
        [joined([pixels for _, pixels in found]) for found in by_organ.values()], parts, list(knowing.values())
    )
    return Fitted([member.name for member in members], organs, steps, *likeness(organs, planes.read))


def _write(
    out: Path,
    runs: Sequence[Path],
    fitted: Fitted,
    slides: Sequence[Slide],
    folds: Mapping[str, int],
    side: int,
    strength: float,
) -> None:
    by_id = {slide.id: slide for slide in slides}
    rows = [
        {
            "id": slide_id,
            "organ": each.organ,
            "data_source": by_id[slide_id].source,
            "fold": folds[slide_id],
            **{
                f"dice {name}": each.singles[run, place] if run in each.members else None
                for run, name in enumerate(fitted.names)
            },
            "dice equal": each.even[place],
            "dice blend": each.blend[place],
        }
        for each in fitted.organs
        for place, slide_id in enumerate(each.ids)
    ]
    with atomic_path(out / TABLE) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False, float_format="%.6f")
    write_text(out / PAGE, blend_page(fitted))
    values = {
        "format": FORMAT,
        "side": side,
        "strength": strength,
        "rescue": all(slide.rle for slide in slides),
        "runs": [
            {
                "name": name,
                "path": Path(os.path.relpath(run.resolve(), out.resolve())).as_posix(),
                "weights_id": weights_id(run),
            }
            for name, run in zip(fitted.names, runs, strict=True)
        ],
        "organs": {each.organ: _facts(each, fitted.names) for each in fitted.organs},
        "greedy": [
            {"run": fitted.names[step.run], "dice": round(step.dice, 6), "gain": round(step.gain, 6)}
            for step in fitted.steps
        ],
        "correlation": np.round(fitted.correlation, 4).tolist(),
        "mask_dice": np.round(fitted.overlap, 4).tolist(),
    }
    write_json(out / BLEND_FILE, values)


def _facts(each: OrganBlend, names: Sequence[str]) -> dict[str, object]:
    dice = {names[run]: each.singles[run] for run in each.members} | {"equal": each.even, "blend": each.blend}
    return {
        "weights": each.weights.tolist(),
        "threshold": each.threshold,
        "used": each.used,
        "slides": len(each.ids),
        "fitted": each.fitted.tolist(),
        "dice": {name: round(float(value.mean()), 6) for name, value in dice.items()},
    }
