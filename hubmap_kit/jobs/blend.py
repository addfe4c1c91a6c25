"""The blend job: several runs that share folds -> weights by organ for their mean, with what that is worth."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.folds import read_folds
from hubmap_kit.competition.lineage import judged_slides
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.files import atomic_path, sweep, write_json, write_text
from hubmap_kit.inference.blend import BLEND_FILE, FORMAT, weights_id
from hubmap_kit.inference.ensemble import MODEL_FILE, fold_folders, load_fold, run_settings
from hubmap_kit.inference.normalise import digest_words, references_of
from hubmap_kit.inference.windows import tissue_map
from hubmap_kit.jobs.train import train_csv
from hubmap_kit.models.device import choose_device
from hubmap_kit.models.pretrained import sha256
from hubmap_kit.progress import bar, track
from hubmap_kit.report.blend_page import Fitted, blend_page, blend_summary
from hubmap_kit.tiles.scaling import resize_mask, resize_plane
from hubmap_kit.tiles.store import TileStore, decode_for, open_or_build
from hubmap_kit.training.blend import (
    ROWS,
    STRENGTH,
    OrganBlend,
    Pixels,
    among,
    blend_organ,
    greedy,
    group,
    joined,
    likeness,
    parts_of,
)
from hubmap_kit.training.history import unfinished
from hubmap_kit.training.run import folds_table

# The out-of-fold planes of several runs at one small size, one file a slide and run: what blends are fitted on.

log = logging.getLogger(__name__)
TRUTH, TISSUE = 1, 2  # bits of the truth files
# Of inference, these change no plane or only its last digit.
APART = {"threshold", "thresholds", "source_thresholds", "postprocess", "ladder", "batch_size", "tune_speed"}


@dataclass(frozen=True)
class Member:
    """A run that may become part of a blend: its name in it, its folder and settings, the organs that it knows, and
    their store at its scale.
    """

    name: str
    run: Path
    settings: Experiment
    store: TileStore
    organs: frozenset[str]


@dataclass(frozen=True)
class Planes:
    """Where the planes of the slides lie: `of[id]` has one file for each run that knows its organ, `truth[id]` its mask
    and tissue.
    """

    of: dict[str, list[Path]]
    truth: dict[str, Path]

    def read(self, slide_id: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The planes (runs that know its organ, h, w) uint8 of a slide, its mask and its tissue (h, w) bool."""
        bits = np.load(self.truth[slide_id])
        return np.stack([np.load(path) for path in self.of[slide_id]]), (bits & TRUTH) > 0, (bits & TISSUE) > 0


def small_shape(height: int, width: int, side: int) -> tuple[int, int]:
    """(h, w) of a slide whose longer side has at most `side` pixels."""
    zoom = min(1.0, side / max(height, width))
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def gather(
    root: Path,
    members: Sequence[Member],
    slides: Sequence[Slide],
    folds: Mapping[str, int],
    side: int,
    device: torch.device,
    progress: tqdm,
) -> Planes:
    """Predict what is not there yet of the `slides`, each by the fold that held it out; one slide is in memory at a
    time.

    Every run has trained all folds of the slides whose organ it knows. `progress` counts these slides over all runs.
    """
    of: dict[str, list[Path]] = {slide.id: [] for slide in slides}
    truth: dict[str, Path] = {}
    for member in members:
        known = [slide for slide in slides if slide.organ in member.organs]
        for number in sorted({folds[slide.id] for slide in known}):
            held_out = [slide for slide in known if folds[slide.id] == number]
            folder = root / member.name / f"fold{number}-{_mark(member, number, side)}"
            _fill(folder, member, number, held_out, side, device, progress)
            for slide in held_out:
                of[slide.id].append(folder / f"{slide.id}.npy")
        truth |= _truths(root, member.store, [slide for slide in known if slide.id not in truth], side)
    return Planes(of, truth)


def _mark(member: Member, number: int, side: int) -> str:
    values = {
        "weights": sha256(fold_folders(member.run)[number] / MODEL_FILE),
        "side": side,
        "slides": member.store.folder.name,
        "model": member.settings.model.model_dump(mode="json"),
        "inference": member.settings.inference.model_dump(mode="json", exclude=APART),
    }
    if member.settings.inference.normalise:
        values["references"] = digest_words(references_of(member.run, member.settings.inference, number))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _fill(
    folder: Path, member: Member, number: int, slides: Sequence[Slide], side: int, device: torch.device, progress: tqdm
) -> None:
    rows = {slide_id: row for row, slide_id in enumerate(member.store.slides["id"])}
    sweep(folder, ".*.tmp.npy")
    missing = [
        slide
        for slide in slides
        if not _is_whole(folder / f"{slide.id}.npy", _shape(member.store, rows[slide.id], side))
    ]
    progress.update(len(slides) - len(missing))
    if not missing:
        return
    if len(missing) < len(slides):
        log.info(
            "%s fold %d: %d of %d planes are there already",
            member.name,
            number,
            len(slides) - len(missing),
            len(slides),
        )
    ensemble = load_fold(member.settings, fold_folders(member.run)[number], device)
    for slide in missing:
        progress.set_postfix_str(f"{member.name} fold {number} {slide.organ} {slide.id}", refresh=False)
        row = rows[slide.id]
        plane = resize_plane(
            ensemble.plane(member.store.image(row), organ=slide.organ, source=slide.source),
            _shape(member.store, row, side),
        )
        _save(folder / f"{slide.id}.npy", np.rint(plane * 255).astype(np.uint8))
        progress.update(1)


def _truths(root: Path, store: TileStore, slides: Sequence[Slide], side: int) -> dict[str, Path]:
    folder = root / f"truth-{store.folder.name}-{side}"
    rows = {slide_id: row for row, slide_id in enumerate(store.slides["id"])}
    sweep(folder, ".*.tmp.npy")
    for slide in slides:
        row = rows[slide.id]
        shape, record = _shape(store, row, side), store.slides.iloc[row]
        if not _is_whole(folder / f"{slide.id}.npy", shape):
            truth = resize_mask(decode_for(slide, int(record["height"]), int(record["width"])), shape)
            cells = tissue_map(store.image(row), shape)
            down, across = ((np.arange(length) * cells.shape[axis]) // length for axis, length in enumerate(shape))
            _save(folder / f"{slide.id}.npy", truth * np.uint8(TRUTH) + cells[np.ix_(down, across)] * np.uint8(TISSUE))
    return {slide.id: folder / f"{slide.id}.npy" for slide in slides}


def _shape(store: TileStore, row: int, side: int) -> tuple[int, int]:
    record = store.slides.iloc[row]
    return small_shape(int(record["height"]), int(record["width"]), side)


def _is_whole(path: Path, shape: tuple[int, int]) -> bool:
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return found.shape == shape and found.dtype == np.uint8


def _save(path: Path, values: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, values)


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
