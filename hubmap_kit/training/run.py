"""One run: a split, a store, some of its folds, and the tables that belong to all of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch

from hubmap_kit.competition.folds import assign_folds, read_folds, write_folds
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import DataConfig, Experiment
from hubmap_kit.errors import CheckpointError, ConfigError, TableError
from hubmap_kit.inference.ensemble import COUNTS_FILE, MODEL_FILE, Ensemble, fold_folders, load_network
from hubmap_kit.tiles.convert import open_or_build
from hubmap_kit.tiles.store import TileStore
from hubmap_kit.training import oof
from hubmap_kit.training.fold import FoldTask, FoldTrainer, OnEpoch

log = logging.getLogger(__name__)


def split(slides: Sequence[Slide], config: DataConfig, run: Path) -> dict[str, int]:
    """The fold of every slide: the run's own folds.csv if it has one, else the config's file, else a new split."""
    kept = run / "folds.csv"
    if kept.is_file():
        return read_folds(kept, slides)
    return read_folds(Path(config.folds_csv), slides) if config.folds_csv else assign_folds(slides, config.n_folds, config.fold_seed)


def train_folds(
    settings: Experiment, slides: Sequence[Slide], run: Path, stores: Path, device: torch.device,
    chosen: Sequence[int] | None = None, on_epoch: OnEpoch | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Train the chosen folds (default: all) one after the other into `run`, and return the out-of-fold table.

    A fold that is done is left as it is; one that was interrupted goes on from its last epoch. `stores` is the parent folder
    of tile stores. Raises ConfigError for fold numbers that the split does not have.
    """
    folds = split(slides, settings.data, run)
    numbers = check_folds(chosen, folds)
    write_folds(run / "folds.csv", folds, slides)
    store = open_or_build(stores, slides, settings.scale, settings.tiles)
    for number in numbers:
        _train_one(settings, slides, folds, number, store, run, device, on_epoch)
    return oof.collect(run, slides, folds)


def evaluate_folds(settings: Experiment, slides: Sequence[Slide], run: Path, stores: Path, device: torch.device) -> pd.DataFrame:
    """Predict every trained fold's held-out slides again with `settings.inference`, and write the run's tables anew."""
    if not (run / "folds.csv").is_file():
        raise CheckpointError(f"{run} has no folds.csv, so nobody knows which slides its folds have seen; take it from the original run folder")
    folds = split(slides, settings.data, run)
    store = open_or_build(stores, slides, settings.scale, settings.tiles)
    found = fold_folders(run)
    if not found:
        raise CheckpointError(f"{run} holds no trained fold (fold<k>/{MODEL_FILE}); train it first")
    for number, folder in found.items():
        _predict_one(settings, slides, folds, number, store, folder, device)
    return oof.collect(run, slides, folds)


def check_folds(chosen: Sequence[int] | None, folds: Mapping[str, int]) -> list[int]:
    """The chosen fold numbers, all of them by default. Raises ConfigError for a number that the split does not have."""
    known = sorted(set(folds.values()))
    wrong = [number for number in chosen or () if number not in known]
    if wrong:
        raise ConfigError(f"fold {wrong[0]} was asked for, but the split has the folds {known}; choose among them with --folds")
    return sorted(set(chosen)) if chosen else known


def _train_one(
    settings: Experiment, slides: Sequence[Slide], folds: Mapping[str, int], number: int, store: TileStore,
    run: Path, device: torch.device, on_epoch: OnEpoch | None,
) -> None:  # fmt: skip
    folder = run / f"fold{number}"
    train, valid = _rows(store, folds, number)
    if not train:
        raise TableError(f"{run / 'folds.csv'} puts every slide into fold {number}, so nothing is left to learn from; use another split")
    if (folder / MODEL_FILE).is_file() and not (folder / "last.ckpt").is_file():
        log.warning("%s holds weights but no last.ckpt to go on from; it is taken as finished", folder)
    else:
        log.info("fold %d: %d slides to learn from, %d held out", number, len(train), len(valid))
        FoldTrainer(settings, FoldTask(number, store, train, valid, folder, device)).run(on_epoch)
    if not (folder / COUNTS_FILE).is_file():
        _predict_one(settings, slides, folds, number, store, folder, device)


def _predict_one(
    settings: Experiment, slides: Sequence[Slide], folds: Mapping[str, int], number: int, store: TileStore, folder: Path, device: torch.device
) -> None:
    ensemble = Ensemble(settings, [load_network(settings, folder, device)], {}, device)
    oof.predict_fold(ensemble, store, slides, _rows(store, folds, number)[1], folder / COUNTS_FILE)


def _rows(store: TileStore, folds: Mapping[str, int], number: int) -> tuple[list[int], list[int]]:
    """Row numbers in the store to learn from and to hold out."""
    fold_of = [folds[slide_id] for slide_id in store.slides["id"]]
    return [row for row, fold in enumerate(fold_of) if fold != number], [row for row, fold in enumerate(fold_of) if fold == number]
