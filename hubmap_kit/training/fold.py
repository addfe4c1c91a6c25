"""One fold: a plain torch loop that can be killed at any moment and resumed; on a CPU, to the same numbers."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.augment.batched import from_settings
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, HubmapError
from hubmap_kit.files import atomic_path
from hubmap_kit.inference.ensemble import COUNTS_FILE, MODEL_FILE, load_network
from hubmap_kit.models.build import build, normalise
from hubmap_kit.models.device import autocast_dtype
from hubmap_kit.progress import bar
from hubmap_kit.tiles.store import TileStore
from hubmap_kit.training import checkpoint, history
from hubmap_kit.training.clock import SPARE, Clock, OutOfTime, longest, read_timing, was_told
from hubmap_kit.training.dataset import TileDataset, build_loader
from hubmap_kit.training.history import CHECKPOINT_FILE, METRICS_FILE, Row, read_rows, write_rows
from hubmap_kit.training.losses import build_loss
from hubmap_kit.training.optim import StepSchedule, build_optimizer
from hubmap_kit.training.validate import validate

log = logging.getLogger(__name__)
TIMING_FILE = "timing.csv"
OnEpoch = Callable[[int, Row], None]  # the fold, and the new row of its metrics.csv, which is on disk by then


@dataclass
class FoldTask:
    """What a fold is trained on: row numbers of `store.slides` to learn from and to validate on, and where its files go.

    `session` is a mark of this session, for the timing. `degrade`: a damaged checkpoint costs epochs, instead of being an error.
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


@dataclass
class _State:
    """What changes from epoch to epoch."""

    epoch: int = 0  # epochs done
    history: list[Row] = field(default_factory=list)
    timing: list[Row] = field(default_factory=list)


class FoldTrainer:
    """Network, optimiser, schedule, averaged weights and scaler of one fold, and their checkpoint."""

    def __init__(self, settings: Experiment, task: FoldTask) -> None:
        self.settings, self.task, self.config = settings, task, settings.training
        if task.device.type == "cuda":
            # A one-cycle optimiser holds itself in a reference cycle; without this the last fold's moments stay on the card.
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(task.device)
            torch.backends.cudnn.benchmark = True  # every batch has one shape
        self._seed()
        self.network = build(settings.model, pretrained=not (task.folder / CHECKPOINT_FILE).is_file())
        self.network.to(task.device, memory_format=torch.channels_last)
        self.loss = build_loss(self.config.loss)
        self.loader = build_loader(TileDataset(task.store, task.train, settings), settings, pin_memory=task.device.type == "cuda")
        self.batched = from_settings(settings.augment, settings.model.mean, settings.model.std, self.config.seed)
        self.hard = self.loader.sampler.hard  # type: ignore[attr-defined]
        self.optimizer = build_optimizer(self.network, self.config)
        self.schedule = StepSchedule(self.optimizer, self.config, self.config.epochs * self._steps)
        self.ema = ModelEmaV3(self.network, decay=self.config.ema_decay, use_warmup=True) if self.config.ema_decay else None
        self.dtype = autocast_dtype(self.config.precision, task.device)
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=self.dtype is torch.float16)
        self.state = _State()
        self._saving_s = 0.0

    def _seed(self) -> None:
        torch.manual_seed(self.config.seed * 1000 + self.task.fold)

    @property
    def _steps(self) -> int:
        """Steps of the optimiser in an epoch."""
        return math.ceil(len(self.loader) / self.config.accumulate)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and kept: the averaged one where there is one."""
        return self.ema.module if self.ema is not None else self.network

    def run(self, on_epoch: OnEpoch | None = None) -> list[Row]:
        """Train to the last epoch or the early stop; returns the rows of metrics.csv.

        Raises OutOfTime before an epoch that would not end in time, and in the middle of one when there is none left: that epoch
        is then begun anew by the next session.
        """
        if (self.task.folder / CHECKPOINT_FILE).is_file():
            self._resume()
        self._tell_guess()
        while not history.is_over(self.state.history, self.config):
            # Epochs of earlier sessions do not count: one that was slow, elsewhere, could keep this fold from ever going on.
            expected = longest(self.state.timing, "seconds", self.task.session) or self.task.expected_epoch_s
            self._check_time(SPARE * expected + self._saving_s)
            self._epoch()
            started = time.perf_counter()
            self._save()
            if on_epoch is not None:
                on_epoch(self.task.fold, self.state.history[-1])
            self._saving_s = max(self._saving_s, time.perf_counter() - started)
        if self.state.epoch < self.config.epochs:
            since = history.validations_since_best(self.state.history, self.config)
            log.info("fold %d: no better epoch in %d validations, stopped at epoch %d", self.task.fold, since, self.state.epoch)
        return self.state.history

    def _tell_guess(self) -> None:
        earlier = longest(self.state.timing, "seconds")
        if earlier and not history.is_over(self.state.history, self.config):
            log.info("fold %d: an epoch took up to %.1f s in earlier sessions", self.task.fold, earlier)

    def _where(self) -> str:
        return f"fold {self.task.fold} after epoch {self.state.epoch} of {self.config.epochs}"

    def _check_time(self, seconds: float = 0.0) -> None:
        if self.task.clock is not None and not self.task.clock.fits(seconds):
            raise OutOfTime(self._where())

    def _check_told(self) -> None:
        if was_told(self.task.clock):
            raise OutOfTime(self._where())

    def _epoch(self) -> None:
        epoch, started = self.state.epoch, time.perf_counter()
        train_loss, lr = self._train(epoch), self.schedule.lr
        seconds = time.perf_counter() - started
        row: Row = {"fold": self.task.fold, "epoch": epoch + 1, "lr": lr, "train_loss": train_loss}
        if (epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.config.epochs:
            found = validate(self.evaluated, self.loss, self.task.store, self.task.valid, self.settings, self.task.device, self._check_told)
            row |= {"val_loss": found.loss, "dice": found.dice, "dice@0.5": found.dice_at_half}
            row |= {f"dice_{organ}": value for organ, value in found.organs.items()}
        self.state.epoch += 1
        self.state.history.append(row)
        self.state.timing.append(self._timing(epoch + 1, seconds, time.perf_counter() - started))
        self._report(row)

    def _train(self, epoch: int) -> float:
        """One pass over the epoch's tiles; returns the mean loss."""
        self.network.train()
        self.loader.sampler.epoch = epoch  # type: ignore[attr-defined]
        total = torch.zeros((), dtype=torch.float64, device=self.task.device)
        with bar(len(self.loader), f"fold {self.task.fold} epoch {epoch + 1}/{self.config.epochs}", "batch") as progress:
            for number, (tiles, masks) in enumerate(self.loader):
                self._check_time()
                loss = self._forward(tiles, masks, number)
                total += loss.detach()
                self.scaler.scale(loss / self._group_size(number)).backward()
                if (number + 1) % self.config.accumulate == 0 or number + 1 == len(self.loader):
                    self._step()
                progress.update(1)
        mean = float(total) / len(self.loader)
        if not math.isfinite(mean):
            raise HubmapError(
                f"fold {self.task.fold}: the loss became {mean} in epoch {epoch + 1}; train into another --out with a lower "
                f"training.lr (now {self.config.lr:g}) or with training.precision=fp32"
            )
        if self.hard is not None:
            self.hard.learn(self.loader.dataset.places(self.loader.sampler.draws()))  # type: ignore[attr-defined]
        return mean

    def _group_size(self, number: int) -> int:
        """How many batches share the step of batch `number`: the last group of an epoch may be smaller."""
        first = number - number % self.config.accumulate
        return min(self.config.accumulate, len(self.loader) - first)

    def _forward(self, tiles: torch.Tensor, masks: torch.Tensor, number: int) -> torch.Tensor:
        device = self.task.device
        tiles, masks = tiles.to(device, non_blocking=True), masks.to(device, non_blocking=True)
        if self.batched is None:
            inputs = normalise(tiles, self.settings.model)
        else:
            inputs, masks = self.batched(tiles, masks, self.state.epoch, number)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits = self.network(inputs)
        # With mixup masks are shares of 255.
        scale = self.loader.dataset.mixing.mask_scale  # type: ignore[attr-defined]
        targets = masks[:, None].float() / scale
        if self.hard is not None:
            self.hard.note(self.loss, logits, targets)
        return self.loss(logits, targets)

    def _step(self) -> None:
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() < before:
            return  # fp16 gradients overflowed: the scaler skipped this step, so the schedule and the average skip it too
        self.schedule.step()
        if self.ema is not None:
            self.ema.update(self.network, step=self.schedule.done)

    def _save(self) -> None:
        """Weights first, the checkpoint last: a kill in between repeats the epoch, which writes its weights again."""
        folder = self.task.folder
        if history.best(self.state.history, self.config) is self.state.history[-1]:
            (folder / COUNTS_FILE).unlink(missing_ok=True)  # out-of-fold results of older weights
            tensors = {name: value.contiguous() for name, value in self.evaluated.state_dict().items()}
            with atomic_path(folder / MODEL_FILE) as temporary:
                save_file(tensors, temporary)
        write_rows(folder / TIMING_FILE, self.state.timing)
        checkpoint.save(
            folder / CHECKPOINT_FILE,
            {
                "settings": experiment.dump(self.settings), "store": self.task.store.meta["fingerprint"], "fold": self.task.fold,
                "epoch": self.state.epoch, "history": self.state.history, "timing": self.state.timing,
                "network": self.network.state_dict(), "ema": self.ema.module.state_dict() if self.ema is not None else None,
                "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(),
                "rng": checkpoint.rng_state(self.task.device), "hard": self.hard.state() if self.hard is not None else None,
            },
        )  # fmt: skip
        write_rows(folder / METRICS_FILE, self.state.history)

    def _resume(self) -> None:
        path = self.task.folder / CHECKPOINT_FILE
        try:
            saved = checkpoint.load(path, experiment.dump(self.settings), str(self.task.store.meta["fingerprint"]))
        except checkpoint.DamagedCheckpoint as error:
            if not self.task.degrade:
                raise
            log.warning("fold %d: %s is DAMAGED and cannot be resumed from (%s)", self.task.fold, path, type(error.__cause__ or error).__name__)
            self._salvage()
            return
        self.network.load_state_dict(saved["network"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if bool(saved["scaler"]) != self.scaler.is_enabled():
            log.warning("fold %d: resumed in another precision than it was trained in so far; its numbers will differ a little", self.task.fold)
        elif saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.hard is not None:
            self.hard.restore(saved["hard"])
        self.state = _State(saved["epoch"], saved["history"], saved["timing"])
        checkpoint.restore_rng(saved["rng"], self.task.device)
        write_rows(self.task.folder / METRICS_FILE, self.state.history)
        log.info("fold %d: resumed after epoch %d of %d", self.task.fold, self.state.epoch, self.config.epochs)

    def _salvage(self) -> None:
        """Without a checkpoint: go on after the best epoch with its weights and a fresh optimiser, or begin anew without those."""
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
            self._set_weights(build(self.settings.model).state_dict())
            return
        self._set_weights(weights)
        if not history.is_over(rows, self.config):
            log.warning("fold %d GOES ON FROM ITS BEST WEIGHTS after epoch %d; later epochs are repeated", fold, best["epoch"])
            rows = rows[: rows.index(best) + 1]
        timing = [row for row in read_timing(folder.parent) if row.get("fold") == fold and row.get("epoch", 0) <= len(rows)]
        self.state = _State(len(rows), rows, timing)
        self.schedule.skip(len(rows) * self._steps)

    def _set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        self.network.load_state_dict(weights)
        if self.ema is not None:
            self.ema.module.load_state_dict(weights)

    def _timing(self, epoch: int, train_seconds: float, seconds: float) -> Row:
        tiles = len(self.loader.dataset)  # type: ignore[arg-type]
        row = {
            "fold": self.task.fold, "epoch": epoch, "seconds": round(seconds, 3), "validation_seconds": round(seconds - train_seconds, 3),
            "tiles_per_second": round(tiles / train_seconds, 2), "session": self.task.session,
        }  # fmt: skip
        if self.task.device.type == "cuda":
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.task.device) / 2**30, 3)
        return row

    def _report(self, row: Row) -> None:
        best, timing = history.best(self.state.history, self.config), self.state.timing[-1]
        scores = f", val loss {row['val_loss']:.4f}, Dice {row['dice']:.4f}" if "dice" in row else ""
        standing = f" (best {best['dice']:.4f} in epoch {best['epoch']})" if best is not None and "dice" in row else ""
        log.info(
            "fold %d epoch %d/%d: train loss %.4f%s%s, %.1f s, %.1f tiles/s", self.task.fold, row["epoch"], self.config.epochs,
            row["train_loss"], scores, standing, timing["seconds"], timing["tiles_per_second"],
        )  # fmt: skip
