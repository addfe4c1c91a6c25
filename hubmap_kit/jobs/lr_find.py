"""`hubmap lr-find`: a learning-rate range test with the very network, tiles and loss that a training would have."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from hubmap_kit.competition.folds import check_folds
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError, HubmapError, TableError
from hubmap_kit.files import atomic_path
from hubmap_kit.jobs.preflight import check_experiment
from hubmap_kit.jobs.train import train_csv
from hubmap_kit.models.device import choose_device
from hubmap_kit.progress import bar
from hubmap_kit.report.curves import save_lr_curve
from hubmap_kit.tiles.store import open_or_build
from hubmap_kit.training.checkpoint import restore_rng, rng_state
from hubmap_kit.training.fold import FoldTask, FoldTrainer
from hubmap_kit.training.run import converted_store, of_organs, split

# The learning-rate range test: train for a few steps while the rate rises from nothing to too much, and look at the
# loss.

SMOOTHING = 0.98  # weight of the past in the smoothed loss
EXPLODED = 4.0  # times the best smoothed loss
START, END = (
    0.1,
    5,
)  # the share of the steps at the start and the number of points at the end that suggestions do not look at
DIGITS = 9  # of the loss that count
FEWEST = 10  # steps that a suggestion can be made from


@dataclass(frozen=True)
class Sweep:
    """A range test: the rate, the loss and the smoothed loss of every step, (S,) each.

    Suggestions, None where the loss never fell: `steep`, where the smoothed loss falls fastest; `valley`, half way down
    its longest fall, which is the safer one. `exploded`: the test ended early because the loss did.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    valley: float | None
    steep: float | None
    exploded: bool


def sweep(
    step: Callable[[], float],
    optimizer: torch.optim.Optimizer,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = SMOOTHING,
) -> Sweep:
    """Call `step`, which makes one optimiser step and returns its loss, while the rate rises from `low` to `high` by
    equal factors.

    The fastest group has the rate, the others keep their proportion to it. It ends early when the smoothed loss is more
    than four times its best or no number any more. Weights and rates are left as they are then: see `preserved`. Raises
    HubmapError for a range or a number of steps that makes no test.
    """
    if not (0 < low < high < math.inf and steps >= 2 * FEWEST):
        raise HubmapError(
            f"a range test from {low:g} to {high:g} in {steps} steps is none; it takes rising rates above 0 and"
            f" {2 * FEWEST} steps or more"
        )
    top = max(group["lr"] for group in optimizer.param_groups)
    shares = [group["lr"] / top for group in optimizer.param_groups]
    rates, losses, smoothed = [], [], []
    mean, best, exploded = 0.0, math.inf, False
    for number in range(steps):
        rate = low * (high / low) ** (number / (steps - 1))
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = rate * share
        loss = float(step())
        if not math.isfinite(loss):
            exploded = True
            break
        mean = smoothing * mean + (1 - smoothing) * loss
        now = mean / (1 - smoothing ** (number + 1))
        rates.append(rate)
        losses.append(loss)
        smoothed.append(now)
        best = min(best, now)
        if now - best > (EXPLODED - 1) * abs(best):
            exploded = True
            break
    curve = np.array(rates), np.array(losses), np.array(smoothed)
    return Sweep(*curve, *_suggest(curve[0], curve[2], steps), exploded)


@contextmanager
def preserved(network: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[None]:
    """Put weights, buffers, the optimiser and all random generators back, to the bit, when the block ends, also by an
    error.
    """
    weights, state, random = deepcopy(network.state_dict()), deepcopy(optimizer.state_dict()), rng_state(device)
    training = {name: part.training for name, part in network.named_modules()}
    try:
        yield
    finally:
        network.load_state_dict(weights)
        optimizer.load_state_dict(state)
        optimizer.zero_grad(set_to_none=True)
        for name, part in network.named_modules():
            part.training = training[name]
        restore_rng(random, device)


def _suggest(rates: np.ndarray, smoothed: np.ndarray, steps: int) -> tuple[float | None, float | None]:
    """Valley and steep.

    The first tenth of the steps, where the smoothed loss is still settling, and the last points do not count.
    """
    part = slice(int(START * steps), max(len(rates) - END, 0))
    rates, smoothed = rates[part], smoothed[part]
    if len(rates) < FEWEST - END:
        return None, None
    smoothed = np.round(
        smoothed / max(float(np.abs(smoothed).max()), 1e-30), DIGITS
    )  # a loss that stays is no fall by its rounding errors
    return valley(rates, smoothed), steepest(rates, smoothed)


def steepest(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """The rate from which the loss falls most by the logarithm of the rate; None when it only rises.

    Both (S,), S of 2 or more.
    """
    slopes = np.diff(losses) / np.diff(np.log(rates))
    return float(rates[int(slopes.argmin())]) if slopes.min() < 0 else None


def valley(rates: np.ndarray, losses: np.ndarray) -> float | None:
    """The rate half way through the longest fall of the loss; None when it only rises. Both (S,).

    The longest fall is the longest subsequence of falling losses. It may skip points; the stretch that is halved is
    taken to have as many points as it, up to its end. Halves are rounded towards the lower rate.
    """
    length = np.ones(len(losses), np.int64)  # of the longest falling subsequence that ends at each point
    for end in range(1, len(losses)):
        higher = losses[:end] > losses[end]
        if higher.any():
            length[end] = length[:end][higher].max() + 1
    end = int(length.argmax())
    longest = int(length[end])
    if longest < 2:
        return None
    third = longest / 3
    return float(rates[max(end - longest, 0) + int(third) + int(third / 2)])


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
    check_folds([fold], folds.values())
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

    def groups() -> Iterator[Any]:
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
