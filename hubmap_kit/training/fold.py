"""One fold: a plain torch loop that can be killed at any moment and resumed; on a CPU, to the same numbers."""

from __future__ import annotations

import functools
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.files import atomic_path
from hubmap_kit.inference.ensemble import COUNTS_FILE, MODEL_FILE, load_network
from hubmap_kit.models.build import build
from hubmap_kit.progress import bar
from hubmap_kit.tiles.store import TileStore
from hubmap_kit.training import checkpoint, history
from hubmap_kit.training.averaging import KeepLast, average_files
from hubmap_kit.training.clock import SPARE, Clock, OutOfTime, was_told
from hubmap_kit.training.dataset import TileDataset
from hubmap_kit.training.history import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    TIMING_FILE,
    Row,
    longest,
    read_rows,
    read_timing,
    write_rows,
)
from hubmap_kit.training.learner import Batch, Learner
from hubmap_kit.training.loader import build_loader
from hubmap_kit.training.losses import Slides
from hubmap_kit.training.oof import validate
from hubmap_kit.training.sinks import GpuFacts, Sink, gpu_line, open_sinks
from hubmap_kit.training.world import ALONE, World

log = logging.getLogger(__name__)
GPU_EVERY_S = 2.0  # between two looks at the card while it works
LAST_FOLDER = "last"  # inside a fold's folder: the weights of its last epochs
OnEpoch = Callable[[int, Row], None]  # the fold, and the new row of its metrics.csv, which is on disk by then


@dataclass
class FoldTask:
    """What a fold is trained on: row numbers of `tiles.slides` to learn from, of `store.slides` to validate on, and
    where its files go.

    `tiles` is the store that training tiles come from; by default it is `store`, whose slides are predicted whole.

    `session` is a mark of this session, for the timing. `degrade`: a damaged checkpoint costs epochs, instead of being
    an error.
    """

    fold: int
    store: TileStore
    train: Sequence[int]
    valid: Sequence[int]
    folder: Path
    device: torch.device
    clock: Clock | None = None
    expected_epoch_s: float = 0.0  # what an epoch of another fold took in this session, for the first one of this fold
    session: str = ""
    degrade: bool = False
    world: World = ALONE  # the processes that train this fold together
    tiles: TileStore | None = None
    weights: Mapping[str, float] = field(default_factory=dict)  # of slides by id, where they are not 1


@dataclass
class _State:
    """What changes from epoch to epoch."""

    epoch: int = 0  # epochs done
    history: list[Row] = field(default_factory=list)
    timing: list[Row] = field(default_factory=list)


class FoldTrainer:
    """The epochs of one fold: tiles to the learner, validation, and the files that let it go on."""

    def __init__(self, settings: Experiment, task: FoldTask) -> None:
        self.settings, self.task, self.config = settings, task, settings.training
        if task.device.type == "cuda":
            # A one-cycle optimiser holds itself in a reference cycle; without this the last fold's moments stay on the
            # card.
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(task.device)
            torch.backends.cudnn.benchmark = True  # every batch has one shape
        if task.world.size > 1 and self.config.hard_share:
            raise ConfigError(
                "training.hard_share goes with one process, not with torchrun: no process sees the losses of all tiles;"
                " set it to 0"
            )
        self._seed()
        tiles = task.tiles or task.store
        self.dataset = TileDataset(tiles, task.train, settings, task.weights)
        self.loader = build_loader(self.dataset, settings, task.device.type == "cuda", task.world)
        self.draws = self.loader.draws
        self.hard = self.draws.hard
        if not len(self.loader):
            raise ConfigError(
                f"an epoch has {len(self.dataset)} tiles, which {task.world.size} processes cannot share; set"
                " training.samples_per_epoch higher"
            )
        fresh = not (task.folder / CHECKPOINT_FILE).is_file()
        steps = math.ceil(len(self.loader) / self.config.accumulate)
        self.learner = Learner(settings, steps, task.device, fresh, self.dataset.mixing.mask_scale, task.world)
        self._slides = Slides(tiles) if self.learner.objective.needs_slides else None
        self.gpu = GpuFacts(task.device)
        self.last = KeepLast(task.folder / LAST_FOLDER, self.config.keep_last)
        self.state = _State()
        self._saving_s = 0.0

    def _seed(self) -> None:
        torch.manual_seed(self.config.seed * 1000 + self.task.fold)

    @property
    def network(self) -> nn.Module:
        """The network that learns."""
        return self.learner.network

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and kept."""
        return self.learner.evaluated

    def run(self, on_epoch: OnEpoch | None = None) -> list[Row]:
        """Train to the last epoch or the early stop; returns the rows of metrics.csv.

        Raises OutOfTime before an epoch that would not end in time, and in the middle of one when there is none left:
        that epoch is then begun anew by the next session.
        """
        first = self.task.world.first
        if (self.task.folder / CHECKPOINT_FILE).is_file():
            self._resume()
        self._tell_guess()
        sinks = open_sinks(self.config.sinks, self.task.folder.parent, self.task.fold, self.settings) if first else []
        try:
            while not history.is_over(self.state.history, self.config):
                self._check_time(self._expected_s())
                self._epoch()
                self._keep(sinks, on_epoch)
            self._tell_early_stop()
            if self.config.average_last and first:
                self._average_last()
        finally:
            self.close()
            for sink in sinks:
                sink.close()
        return self.state.history

    def close(self) -> None:
        """End the processes that read tiles. `run` does so itself; whoever takes `groups` must do it."""
        self.loader.close()

    def _expected_s(self) -> float:
        """Seconds that the next epoch may take.

        Epochs of earlier sessions do not count: a slow one, on another machine, could keep this fold from ever going
        on.
        """
        epoch = longest(self.state.timing, "seconds", self.task.session) or self.task.expected_epoch_s
        return SPARE * epoch + self._saving_s

    def _keep(self, sinks: Sequence[Sink], on_epoch: OnEpoch | None) -> None:
        """Put the epoch on disk, then report it."""
        if not self.task.world.first:
            return
        started = time.perf_counter()
        self._save()
        row = self.state.history[-1]
        for sink in sinks:
            sink.write(row, self.state.epoch)
        if on_epoch is not None:
            on_epoch(self.task.fold, row)
        self._saving_s = max(self._saving_s, time.perf_counter() - started)

    def _tell_early_stop(self) -> None:
        if self.state.epoch < self.config.epochs:
            since = history.validations_since_best(self.state.history, self.config)
            log.info(
                "fold %d: no better epoch in %d validations, stopped at epoch %d",
                self.task.fold,
                since,
                self.state.epoch,
            )

    def _tell_guess(self) -> None:
        earlier = longest(self.state.timing, "seconds")
        if earlier and not history.is_over(self.state.history, self.config):
            log.info("fold %d: an epoch took up to %.1f s in earlier sessions", self.task.fold, earlier)

    def _where(self) -> str:
        return f"fold {self.task.fold} after epoch {self.state.epoch} of {self.config.epochs}"

    def _check_time(self, seconds: float = 0.0) -> None:
        # One process that stopped alone would leave the others waiting.
        if self.task.clock is not None and self.task.world.any(not self.task.clock.fits(seconds)):
            raise OutOfTime(self._where())

    def _check_told(self) -> None:
        if was_told(self.task.clock):
            raise OutOfTime(self._where())

    def _epoch(self) -> None:
        epoch, started = self.state.epoch, time.perf_counter()
        train_loss, lr = self._train(epoch), self.learner.schedule.lr
        self.learner.end(epoch)
        seconds = time.perf_counter() - started
        row: Row = {"fold": self.task.fold, "epoch": epoch + 1, "lr": lr, "train_loss": train_loss}
        if (epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.config.epochs:
            row |= self._validated(self.evaluated, self.task.world)
        row |= self.gpu.read()
        self.state.epoch += 1
        self.state.history.append(row)
        self.state.timing.append(self._timing(epoch + 1, seconds, time.perf_counter() - started))
        self._report(row)

    def _validated(self, network: nn.Module, world: World = ALONE) -> Row:
        """Scores of the held-out slides, which the processes of `world` share; all of them must call this."""
        task = self.task
        # A process that stopped in here alone would leave the others waiting for its slides.
        check = self._check_told if task.world.size == 1 else None
        found = validate(
            network, self.learner.objective.plain, task.store, task.valid, self.settings, task.device, check, world
        )
        scores: Row = {"val_loss": found.loss, "dice": found.dice, "dice@0.5": found.dice_at_half}
        return scores | {f"dice_{organ}": value for organ, value in found.organs.items()}

    def _train(self, epoch: int) -> float:
        """One pass over the epoch's tiles; returns the mean loss."""
        self.learner.begin(epoch)
        self.draws.epoch = epoch
        total = torch.zeros((), dtype=torch.float64, device=self.task.device)
        looked = -math.inf
        note = functools.partial(self.hard.note, self.learner.objective.mask) if self.hard is not None else None
        with bar(
            len(self.loader), f"fold {self.task.fold} epoch {epoch + 1}/{self.config.epochs}", "batch"
        ) as progress:
            for group in self.groups():
                total += self.learner.learn(group, epoch, note)
                if time.monotonic() - looked >= GPU_EVERY_S:
                    progress.set_postfix_str(gpu_line(self.gpu.read()), refresh=False)
                    looked = time.monotonic()
                progress.update(len(group))
        mean = float(total) / len(self.loader)
        if self.task.world.size > 1:
            mean = math.fsum(self.task.world.gathered(mean)) / self.task.world.size
        if not math.isfinite(mean):
            raise HubmapError(
                f"fold {self.task.fold}: the loss became {mean} in epoch {epoch + 1}; train into another --out with a"
                f" lower training.lr (now {self.config.lr:g}) or with training.precision=fp32"
            )
        if self.hard is not None:
            self.hard.learn(self.dataset.places(self.draws.draws()))
        return mean

    def groups(self) -> Iterator[list[Batch]]:
        """The batches of an epoch, as many together as share a step; the last group may be smaller."""
        rows = self.dataset.places(self.draws.draws())[:, 0] if self._slides is not None else None
        size, group = self.config.batch_size, []
        for number, (tiles, masks) in enumerate(self.loader):
            self._check_time()
            about = None
            if rows is not None and self._slides is not None:
                about = self._slides(self.task.world.part(rows[number * size : (number + 1) * size])[: len(tiles)])
            group.append(Batch(number, tiles, masks, about))
            if len(group) == self.config.accumulate:
                yield group
                group = []
        if group:
            yield group

    def _save(self) -> None:
        """Weights first, the checkpoint last: a kill in between repeats the epoch, which writes its weights again.

        The timing comes before both: weights beside it and without a checkpoint are those of a killed first epoch.
        """
        folder = self.task.folder
        write_rows(folder / TIMING_FILE, self.state.timing)
        if history.best(self.state.history, self.config) is self.state.history[-1]:
            (folder / COUNTS_FILE).unlink(missing_ok=True)  # out-of-fold results of older weights
            self._write_model(_separate(self.evaluated))
        if self.config.keep_last:
            self.last.save(self.state.epoch, _separate(self.evaluated))
        checkpoint.save(
            folder / CHECKPOINT_FILE,
            {
                "settings": experiment.dump(self.settings),
                "store": self.task.store.meta["fingerprint"],
                "fold": self.task.fold,
                "slides": self._slide_facts(),
                "epoch": self.state.epoch,
                "history": self.state.history,
                "timing": self.state.timing,
                **self.learner.state_dict(),
                "rng": checkpoint.rng_state(self.task.device),
                "hard": self.hard.state() if self.hard is not None else None,
            },
        )
        write_rows(folder / METRICS_FILE, self.state.history)

    def _slide_facts(self) -> dict[str, Any]:
        ids = self.task.store.slides["id"]
        return checkpoint.facts_of(self.task.weights, (str(ids.iloc[row]) for row in self.task.valid))

    def _resume(self) -> None:
        path = self.task.folder / CHECKPOINT_FILE
        try:
            saved = checkpoint.load(
                path, experiment.dump(self.settings), str(self.task.store.meta["fingerprint"]), self._slide_facts()
            )
        except checkpoint.DamagedCheckpoint as error:
            if not self.task.degrade:
                raise
            log.warning(
                "fold %d: %s is DAMAGED and cannot be resumed from (%s)",
                self.task.fold,
                path,
                type(error.__cause__ or error).__name__,
            )
            self._salvage()
            return
        self.learner.load_state_dict(saved)
        if self.hard is not None:
            self.hard.restore(saved["hard"])
        self.state = _State(saved["epoch"], saved["history"], saved["timing"])
        checkpoint.restore_rng(saved["rng"], self.task.device)
        if self.task.world.first:
            write_rows(self.task.folder / METRICS_FILE, self.state.history)
        log.info("fold %d: resumed after epoch %d of %d", self.task.fold, self.state.epoch, self.config.epochs)

    def _salvage(self) -> None:
        """Without a checkpoint: go on after the best epoch with its weights and a fresh optimiser, or begin anew
        without those.
        """
        folder, fold = self.task.folder, self.task.fold
        try:
            rows = read_rows(folder / METRICS_FILE)
            best = history.best(rows, self.config)
            weights = load_network(self.settings, folder, self.task.device).state_dict()
        except CheckpointError as error:
            log.warning("fold %d: %s", fold, error)
            rows, best, weights = [], None, {}
        if best is None:
            log.warning("fold %d BEGINS ANEW, the epochs that it had are lost", fold)
            self._seed()
            self.learner.start_from(build(self.settings.model).state_dict())
            return
        if not history.is_over(rows, self.config):
            log.warning(
                "fold %d GOES ON FROM ITS BEST WEIGHTS after epoch %d; later epochs are repeated", fold, best["epoch"]
            )
            rows = rows[: rows.index(best) + 1]
        timing = [
            row for row in read_timing(folder.parent) if row.get("fold") == fold and row.get("epoch", 0) <= len(rows)
        ]
        self.state = _State(len(rows), rows, timing)
        self.learner.start_from(weights, len(rows))

    def _average_last(self) -> None:
        """Take the mean of the last epochs' weights where it is better than the best epoch's, once the last epoch is
        done.

        The first process does this alone; the others wait for its prediction of the held-out slides in any case.
        """
        paths, best = self.last.paths(), history.best(self.state.history, self.config)
        if len(paths) < 2 or best is None or (self.task.folder / COUNTS_FILE).is_file():
            return
        network = build(self.settings.model, pretrained=False).to(self.task.device)
        weights = average_files(paths)
        network.load_state_dict(weights)
        found = self._validated(network)
        better = history.best([best, {"epoch": math.inf, **found}], self.config) is not best
        log.info(
            "fold %d: the mean of the last %d epochs has Dice %.4f, loss %.4f; the best epoch has %.4f, %.4f; %s",
            self.task.fold,
            len(paths),
            found["dice"],
            found["val_loss"],
            best["dice"],
            best["val_loss"],
            "the mean is kept" if better else "the best epoch stays",
        )
        if better:
            self._write_model({name: value.contiguous() for name, value in weights.items()})

    def _write_model(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with atomic_path(self.task.folder / MODEL_FILE) as temporary:
            save_file(dict(tensors), temporary)

    def _timing(self, epoch: int, train_seconds: float, seconds: float) -> Row:
        tiles = len(self.dataset)
        row = {
            "fold": self.task.fold,
            "epoch": epoch,
            "seconds": round(seconds, 3),
            "validation_seconds": round(seconds - train_seconds, 3),
            "tiles_per_second": round(tiles / train_seconds, 2),
            "tiles_in_pass": -(-self.config.batch_size // self.learner.parts),
            "session": self.task.session,
        }
        if self.task.device.type == "cuda":
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.task.device) / 2**30, 3)
        return row

    def _report(self, row: Row) -> None:
        best, timing = history.best(self.state.history, self.config), self.state.timing[-1]
        scores = f", val loss {row['val_loss']:.4f}, Dice {row['dice']:.4f}" if "dice" in row else ""
        card = ", " + gpu_line(row) if gpu_line(row) else ""
        standing = f" (best {best['dice']:.4f} in epoch {best['epoch']})" if best is not None and "dice" in row else ""
        log.info(
            "fold %d epoch %d/%d: train loss %.4f%s%s, %.1f s, %.1f tiles/s%s",
            self.task.fold,
            row["epoch"],
            self.config.epochs,
            row["train_loss"],
            scores,
            standing,
            timing["seconds"],
            timing["tiles_per_second"],
            card,
        )


def _separate(network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's tensors in memory of their own each: safetensors refuses those that share some, as timm's plain CoaT
    has.
    """
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in network.state_dict().items()
    }
