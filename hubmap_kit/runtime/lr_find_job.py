"""`hubmap lr-find`: a learning-rate range test with the very network, tiles and loss that a training would have."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError, TableError
from hubmap_kit.files import atomic_path
from hubmap_kit.models.device import choose_device
from hubmap_kit.progress import bar
from hubmap_kit.report.lr_curve import save_lr_curve
from hubmap_kit.runtime.preflight import check_experiment
from hubmap_kit.runtime.train_job import train_csv
from hubmap_kit.tiles.convert import open_or_build
from hubmap_kit.training.converted import converted_store
from hubmap_kit.training.fold import FoldTask, FoldTrainer
from hubmap_kit.training.lr_finder import Sweep, preserved, sweep
from hubmap_kit.training.run import check_folds, of_organs, split

TABLE, PICTURE = "lr_find.csv", "lr_find.png"


@dataclass(frozen=True)
class Found:
    """What a range test found. As text: the suggestions, the files and the next command."""

    test: Sweep
    table: Path
    picture: Path
    command: str

    @property
    def suggestion(self) -> float | None:
        """The valley, which is the safer one; else the steepest place; None when the loss never fell."""
        return self.test.valley if self.test.valley is not None else self.test.steep

    def __str__(self) -> str:
        places = {"valley": self.test.valley, "steep": self.test.steep}
        suggested = ", ".join(f"{name} {rate:.2g}" for name, rate in places.items() if rate is not None)
        if not suggested:
            advice = "a lower --low" if self.test.exploded else "more --steps, or a larger training.batch_size"
            suggested = f"none: the loss never fell; try {advice}"
        ended = (
            f"the loss exploded at {self.test.rates[-1]:.2g}"
            if self.test.exploded and len(self.test.rates)
            else "the loss never exploded"
        )
        if self.test.exploded and not len(self.test.rates):
            ended = "the first loss was no number"
        return (
            f"suggested learning rate: {suggested} ({ended})\nwritten: {self.table}, {self.picture}\nnext:"
            f" {self.command}"
        )


def lr_find(
    settings: Experiment,
    out: Path,
    fold: int = 0,
    steps: int = 100,
    device: str = "auto",
    stores: Path | None = None,
    low: float = 1e-7,
    high: float = 10.0,
    words: Sequence[str] = (),
) -> Found:
    """Train fold `fold` for up to `steps` optimiser steps at rates from `low` to `high`, and write lr_find.csv and
    lr_find.png to `out`.

    Nothing else in `out` is read, but for a folds.csv, or written: it may be a run folder, whose training is not
    touched. The whole network learns, also where `training.freeze_epochs` will keep the encoder back. `words` are the
    arguments of a `hubmap train` that the next command repeats. Raises HubmapError.
    """
    if not settings.data.folder:
        raise ConfigError("a range test trains on slides; name the folder of their train.csv with --data")
    chosen = choose_device(device)
    everyone = read_train(train_csv(settings))
    slides, settings = of_organs(everyone, settings.data), _plain(settings)
    check_experiment(settings, chosen)
    folds = split(everyone, settings.data, out)
    check_folds([fold], folds)
    store = open_or_build(stores or out.parent / "stores", slides, settings.scale, settings.tiles)
    rows = [folds[slide_id] for slide_id in store.slides["id"]]
    valid = [row for row, number in enumerate(rows) if number == fold]
    if len(valid) == len(rows):
        raise TableError(
            f"the split puts every slide into fold {fold}, so nothing is left to learn from; use another split"
        )
    tiles = converted_store(settings, slides, stores or out.parent / "stores") or store
    train = [row for row, slide_id in enumerate(tiles.slides["id"]) if folds[slide_id] != fold]
    # The folder of this task is never made: there is no checkpoint to take over, and none is written.
    trainer = FoldTrainer(settings, FoldTask(fold, store, train, valid, out / ".lr-find", chosen, tiles=tiles))
    with (
        closing(trainer),
        preserved(trainer.network, trainer.learner.optimizer, chosen),
        bar(steps, "range test", "step") as progress,
    ):
        test = sweep(_stepper(trainer, progress.update), trainer.learner.optimizer, low, high, steps)
    return _written(test, settings, out, fold, words)


def _plain(settings: Experiment) -> Experiment:
    """The same experiment without what would change rates, or has no meaning in so few steps."""
    changes = {
        "schedule": "constant",
        "ema_decay": 0.0,
        "swa": 0.0,
        "hard_share": 0.0,
        "keep_last": 0,
        "average_last": False,
        "freeze_epochs": 0,
        "sinks": [],
    }
    return settings.model_copy(update={"training": settings.training.model_copy(update=changes)})


def _stepper(trainer: FoldTrainer, tell: Callable[[int], object]) -> Callable[[], float]:
    """What makes one optimiser step and returns its mean loss; epochs follow each other as in a training."""

    def groups():  # type: ignore[no-untyped-def]
        for epoch in itertools.count():
            trainer.learner.begin(epoch)
            trainer.draws.epoch = epoch
            yield from ((group, epoch) for group in trainer.groups())

    coming = groups()

    def step() -> float:
        group, epoch = next(coming)
        loss = float(trainer.learner.learn(group, epoch)) / len(group)
        tell(1)
        return loss

    return step


def _written(test: Sweep, settings: Experiment, out: Path, fold: int, words: Sequence[str]) -> Found:
    with atomic_path(out / TABLE) as temporary:
        pd.DataFrame({"lr": test.rates, "loss": test.losses, "smoothed": test.smoothed}).to_csv(temporary, index=False)
    places = {"valley": test.valley, "steep": test.steep}
    save_lr_curve(
        out / PICTURE, test.rates, test.losses, test.smoothed, places, f"{settings.name}, fold {fold}: range test"
    )
    rate = test.valley if test.valley is not None else test.steep
    setting = [] if rate is None else ["--set", f"training.lr={rate:.2g}"]
    command = shlex.join(["hubmap", "train", *words, *setting]) if words else " ".join(["hubmap train ...", *setting])
    return Found(test, out / TABLE, out / PICTURE, command)
