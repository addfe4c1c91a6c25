"""One run: a split, a store, some of its folds, and the tables that belong to all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hubmap_kit.augment.stain import Reference
from hubmap_kit.competition.folds import assign_folds, check_folds, read_folds, write_folds
from hubmap_kit.competition.lineage import judged, judged_slides
from hubmap_kit.competition.organs import ORGANS, SOURCES
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import DataConfig, Experiment
from hubmap_kit.errors import CheckpointError, ConfigError, TableError
from hubmap_kit.files import write_text
from hubmap_kit.inference.ensemble import COUNTS_FILE, MODEL_FILE, fold_folders, load_fold
from hubmap_kit.inference.normalise import FORMAT, STAIN_FILE, as_plain
from hubmap_kit.inference.views import view_transforms
from hubmap_kit.tiles.conversion import convert
from hubmap_kit.tiles.convert_config import ConvertConfig, load
from hubmap_kit.tiles.finishing import open_conversion
from hubmap_kit.tiles.store import TileStore, open_or_build
from hubmap_kit.training import oof
from hubmap_kit.training.clock import SPARE, Clock, OutOfTime, was_told
from hubmap_kit.training.fold import FoldTask, FoldTrainer, OnEpoch
from hubmap_kit.training.history import CHECKPOINT_FILE, killed_at_first, longest, read_timing, unfinished
from hubmap_kit.training.world import ALONE, World

log = logging.getLogger(__name__)
CANDIDATES = 12  # slides of an organ whose colours are measured
PIXELS = 1 << 18  # of such a slide that are measured, about: whole rows, evenly spread
SECONDS_A_SLIDE = 1.0  # to resize and count a plane of 3000 x 3000 pixels, beside the network


def check_conversion(settings: Experiment) -> ConvertConfig | None:
    """The conversion that an experiment trains on, if it names one.

    Raises ConfigError where the two do not go together.
    """
    name = settings.data.conversion
    if not name:
        return None
    config, tiles, scale = load(name), settings.tiles, settings.scale
    if not config.stored:
        raise ConfigError(
            f"data.conversion is {name}, whose format is {config.format}; training reads stores, so set its format to"
            " store"
        )
    if config.tiled and (config.size, config.overlap) != (tiles.size, tiles.overlap):
        raise ConfigError(
            f"data.conversion is {name}, with tiles of {config.size} px and overlap {config.overlap:g}, but tiles.size"
            f" is {tiles.size} and tiles.overlap {tiles.overlap:g}; set both alike"
        )
    if config.kind in ("grid", "pad") and (scale.policy, scale.reduce, scale.organs) != ("reduce", config.reduce, {}):
        raise ConfigError(
            f"data.conversion is {name}, at reduce {config.reduce}, but held-out slides would be predicted at another"
            f" scale; set scale.policy=reduce and scale.reduce={config.reduce}"
        )
    return config


def converted_store(settings: Experiment, slides: Sequence[Slide], stores: Path) -> TileStore | None:
    """The store of `data.conversion`, made if it is not in `stores` yet; None where the experiment names none.

    Held-out slides are always predicted whole, as inference does it, at the experiment's `scale`.
    """
    config = check_conversion(settings)
    if config is None:
        return None
    made = convert(slides, stores, config)
    log.info("training tiles: conversion %s in %s", settings.data.conversion, made.folder)
    return open_conversion(made.folder, config) if config.tiled else TileStore(made.folder, settings.tiles)


def write_stain_references(run: Path, store: TileStore, slides: Sequence[Slide], folds: Mapping[str, int]) -> None:
    """Write stain_references.json: by organ the medoid of its training slides, and the medoid of those of other folds.

    Measured at the store's scale, on which networks look at slides. HPA slides count where an organ has any; copies
    with other stains, whose `parent` is there as well, never do. An organ whose slides show too little tissue is left
    out.
    """
    originals = judged({slide.id: slide.parent for slide in slides})
    learnt = {slide.id for slide in slides if slide.id in folds and slide.id in originals and slide.weight > 0}
    organs = {}
    for organ in ORGANS:
        measured = _measured(store, _candidates(store, organ, learnt))
        if measured:
            organs[organ] = [as_plain(reference, folds[reference.name]) for reference in _chosen(measured, folds)]
            log.debug(
                "%s: %s", organ, ", ".join(f"slide {entry['slide']} of fold {entry['fold']}" for entry in organs[organ])
            )
    write_text(run / STAIN_FILE, json.dumps({"format": FORMAT, "organs": organs}) + "\n")


def medoid(references: Sequence[Reference]) -> Reference:
    """The one whose mean colour in CIE Lab is nearest to all others': unlike a mean, no odd slide moves it far, and it
    is a real slide.
    """
    means = np.stack([reference.mean for reference in references])
    distances = np.linalg.norm(means[:, None] - means[None], axis=2).sum(axis=1)
    return references[int(distances.argmin())]


def _chosen(measured: Sequence[Reference], folds: Mapping[str, int]) -> list[Reference]:
    first = medoid(measured)
    others = [reference for reference in measured if folds[reference.name] != folds[first.name]]
    return [first, medoid(others)] if others else [first]


def _candidates(store: TileStore, organ: str, learnt: set[str]) -> list[int]:
    """Row numbers of an organ's slides in the store, evenly spread among them."""
    table = store.slides[(store.slides["organ"] == organ) & store.slides["id"].isin(learnt)]
    hpa = table[table["data_source"] == SOURCES[0]]
    rows = (hpa if len(hpa) else table).index.to_numpy()
    places = np.linspace(0, len(rows) - 1, min(len(rows), CANDIDATES)).round().astype(int)
    return [int(row) for row in rows[places]]


def _measured(store: TileStore, rows: Sequence[int]) -> list[Reference]:
    found = []
    for row in rows:
        name = str(store.slides["id"][row])
        try:
            found.append(Reference.of(_some_rows(store.image(row)), name))
        except ConfigError as error:
            log.debug("slide %s is no stain reference: %s", name, error)
    return found


def _some_rows(image: np.ndarray) -> np.ndarray:
    """Every n-th row of a slide, about PIXELS pixels. An odd n meets every row of the 8 x 8 blocks of a JPEG."""
    return np.ascontiguousarray(image[:: -(-image.shape[0] * image.shape[1] // PIXELS) | 1])


def split(slides: Sequence[Slide], config: DataConfig, run: Path) -> dict[str, int]:
    """The fold of every slide: the run's own folds.csv if it has one, else the config's file, else a new split."""
    kept = run / "folds.csv"
    if kept.is_file():
        return read_folds(kept, slides)
    return (
        read_folds(Path(config.folds_csv), slides)
        if config.folds_csv
        else assign_folds(slides, config.n_folds, config.fold_seed)
    )


def folds_table(run: Path) -> Path:
    """The run's folds.csv. Raises CheckpointError where there is none."""
    path = run / "folds.csv"
    if not path.is_file():
        raise CheckpointError(
            f"{run} has no folds.csv, so nobody knows which slides its folds have seen; take it from the original run"
            " folder"
        )
    return path


def of_organs(slides: Sequence[Slide], config: DataConfig) -> list[Slide]:
    """The slides that an experiment learns from and is judged on: those of `data.organs`, or all.

    Raises TableError when none is left.
    """
    found = [slide for slide in slides if config.has(slide.organ)]
    if not found:
        raise TableError(
            f"data.organs is {', '.join(config.organs)}, but none of the {len(slides)} training slides is of them; name"
            " organs of train.csv"
        )
    return found


@dataclass(frozen=True)
class Plan:
    """A run that is about to be trained: the slides of its organs and their split (id -> fold), the fold numbers to
    train, and its open store.

    `session` marks what this session measures. `degrade`: a damaged checkpoint costs its fold some epochs, not the
    session.
    """

    settings: Experiment
    slides: Sequence[Slide]
    run: Path
    folds: Mapping[str, int]
    numbers: Sequence[int]
    store: TileStore
    session: str
    degrade: bool = False
    world: World = ALONE
    tiles: TileStore | None = None  # of a conversion to learn from, where the experiment names one


def plan(
    settings: Experiment,
    slides: Sequence[Slide],
    run: Path,
    stores: Path,
    chosen: Sequence[int] | None = None,
    degrade: bool = False,
    world: World = ALONE,
) -> Plan:
    """Split the slides, write folds.csv and stain_references.json into the run, and build the store if it is not in the
    folder `stores` yet.

    All slides are split, and only then those of `data.organs` are taken: a run on some organs has the folds of one on
    all, so the two can be blended. A fold that holds none of these out is not trained. Raises ConfigError for chosen
    fold numbers that the split does not have, TableError where no slide is left.
    """
    everyone = split(slides, settings.data, run)
    write_folds(run / "folds.csv", everyone, slides)
    slides = of_organs(slides, settings.data)
    folds = {slide.id: everyone[slide.id] for slide in slides}
    numbers = check_folds(chosen, folds.values())
    session = datetime.now(UTC).isoformat(timespec="microseconds")
    if not world.first:
        world.wait()  # the first process builds the store
    store = open_or_build(stores, slides, settings.scale, settings.tiles)
    tiles = converted_store(settings, slides, stores)
    if world.first:
        write_stain_references(run, store, slides, folds)
        world.wait()
    return Plan(settings, slides, run, folds, numbers, store, session, degrade, world, tiles)


def remaining(planned: Plan) -> dict[int, str]:
    """The planned folds that are not finished: number -> how far it came."""
    left = unfinished(planned.run, planned.settings.training, planned.numbers)
    return {number: left[number] for number in planned.numbers if number in left}


def collect_done(planned: Plan) -> pd.DataFrame | None:
    """Write the run's tables from the folds that are done, and return the out-of-fold table; None when no fold is
    done.
    """
    done = any((folder / COUNTS_FILE).is_file() for folder in fold_folders(planned.run).values())
    return oof.collect(planned.run, planned.slides, planned.folds) if done else None


def evaluate_folds(
    settings: Experiment, slides: Sequence[Slide], run: Path, stores: Path, device: torch.device
) -> pd.DataFrame:
    """Predict every trained fold's held-out slides again with `settings.inference`, and write the run's tables anew.

    A run of before there were stain references gets its stain_references.json.
    """
    folds_table(run)
    slides = of_organs(slides, settings.data)
    folds = split(slides, settings.data, run)
    store = open_or_build(stores, slides, settings.scale, settings.tiles)
    found = fold_folders(run)
    if not found:
        raise CheckpointError(f"{run} holds no trained fold (fold<k>/{MODEL_FILE}); train it first")
    if not (run / STAIN_FILE).is_file():
        write_stain_references(run, store, slides, folds)
    for number, folder in found.items():
        _predict_one(settings, slides, folds, number, store, folder, device)
    return oof.collect(run, slides, folds)


def train_fold(
    planned: Plan, number: int, device: torch.device, on_epoch: OnEpoch | None = None, clock: Clock | None = None
) -> None:
    """Train one fold to its end and predict its held-out slides; everything goes into the fold's own folder.

    A fold that is done is left as it is; one that was interrupted goes on from its last epoch. Raises OutOfTime when
    the clock does not leave enough for the next step.
    """
    folder = planned.run / f"fold{number}"
    train, valid = _rows(planned.store, planned.slides, planned.folds, number)
    if not train:
        raise TableError(
            f"{planned.run / 'folds.csv'} puts every slide into fold {number}, so nothing is left to learn from; use"
            " another split"
        )
    expected = longest(read_timing(planned.run), "seconds", planned.session)
    if (folder / MODEL_FILE).is_file() and not (folder / CHECKPOINT_FILE).is_file() and not killed_at_first(folder):
        log.warning("%s holds weights but no last.ckpt to go on from; it is taken as finished", folder)
    else:
        if planned.world.any(clock is not None and not folder.is_dir() and not clock.fits(SPARE * expected)):
            raise OutOfTime(f"fold {number} is not begun")
        log.info("fold %d: %d slides to learn from, %d held out", number, len(train), len(valid))
        tiles = planned.tiles or planned.store
        task = FoldTask(
            fold=number,
            store=planned.store,
            train=_rows(tiles, planned.slides, planned.folds, number)[0],
            valid=valid,
            folder=folder,
            device=device,
            clock=clock,
            expected_epoch_s=expected,
            session=planned.session,
            degrade=planned.degrade,
            world=planned.world,
            tiles=tiles,
            weights={slide.id: slide.weight for slide in planned.slides},
        )
        FoldTrainer(planned.settings, task).run(on_epoch)
    stopped = _predict_held_out(planned, number, len(valid), device, clock) if planned.world.first else None
    if where := planned.world.gathered(stopped)[0]:
        raise OutOfTime(where)


def _predict_held_out(planned: Plan, number: int, slides: int, device: torch.device, clock: Clock | None) -> str | None:
    """Predict a trained fold's held-out slides, unless that is done.

    Returns how far it came where the clock stopped it.
    """
    folder = planned.run / f"fold{number}"
    if (folder / COUNTS_FILE).is_file():
        return None
    try:
        check = _prediction_check(planned, number, slides, clock)
        _predict_one(planned.settings, planned.slides, planned.folds, number, planned.store, folder, device, check)
    except OutOfTime as stop:
        return stop.where
    return None


def _prediction_check(planned: Plan, number: int, slides: int, clock: Clock | None) -> Callable[[], None]:
    """What to call before every slide of a fold's prediction.

    Raises OutOfTime already here when the whole would not end in time.

    About how long that is: a validation is one view, and every slide comes back to its full size. A session that has
    validated nothing yet knows nothing of its own speed: its prediction begins, and stops when the time is up.
    """
    views = len(view_transforms(planned.settings.inference.views))
    measured = longest(read_timing(planned.run), "validation_seconds", planned.session)
    where = f"fold {number} is trained, its held-out slides are not predicted"
    if clock is not None and not clock.fits(SPARE * (views * measured + SECONDS_A_SLIDE * slides)):
        raise OutOfTime(where)

    def check() -> None:
        if was_told(clock) or (clock is not None and not measured and not clock.fits(0.0)):
            raise OutOfTime(where)

    return check


def _predict_one(
    settings: Experiment,
    slides: Sequence[Slide],
    folds: Mapping[str, int],
    number: int,
    store: TileStore,
    folder: Path,
    device: torch.device,
    check: Callable[[], None] | None = None,
) -> None:
    oof.predict_fold(
        load_fold(settings, folder, device),
        store,
        slides,
        _rows(store, slides, folds, number)[1],
        folder / COUNTS_FILE,
        check,
    )


def _rows(
    store: TileStore, slides: Sequence[Slide], folds: Mapping[str, int], number: int
) -> tuple[list[int], list[int]]:
    """Row numbers in the store to learn from and to hold out; a slide whose parent is among `slides` is held out
    unjudged.
    """
    ids, known = list(store.slides["id"]), judged_slides(slides)
    learnt = [row for row, slide_id in enumerate(ids) if folds[slide_id] != number]
    return learnt, [row for row, slide_id in enumerate(ids) if folds[slide_id] == number and slide_id in known]
