"""One fold: a plain torch loop that can be killed at any moment and resumed; on a CPU, to the same numbers."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.config import Experiment
from hubmap_kit.errors import HubmapError
from hubmap_kit.files import atomic_path
from hubmap_kit.inference.ensemble import COUNTS_FILE, MODEL_FILE
from hubmap_kit.models.build import build, normalise
from hubmap_kit.models.device import autocast_dtype
from hubmap_kit.progress import bar
from hubmap_kit.tiles.store import TileStore
from hubmap_kit.training import checkpoint
from hubmap_kit.training.clock import SPARE, Clock, OutOfTime, longest
from hubmap_kit.training.dataset import TileDataset, build_loader
from hubmap_kit.training.losses import build_loss
from hubmap_kit.training.optim import StepSchedule, build_optimizer
from hubmap_kit.training.validate import validate

log = logging.getLogger(__name__)
Row = dict[str, Any]
OnEpoch = Callable[[int, list[Row]], None]


@dataclass
class FoldTask:
    """What a fold is trained on: row numbers of `store.slides` to learn from and to validate on, and where its files go."""

    fold: int
    store: TileStore
    train: Sequence[int]
    valid: Sequence[int]
    folder: Path
    device: torch.device
    clock: Clock | None = None
    expected_epoch_s: float = 0.0  # what an epoch took elsewhere, for the first one here


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
        torch.manual_seed(self.config.seed * 1000 + task.fold)
        self.network = build(settings.model, pretrained=not (task.folder / "last.ckpt").is_file())
        self.network.to(task.device, memory_format=torch.channels_last)
        self.loss = build_loss(self.config.loss)
        self.loader = build_loader(TileDataset(task.store, task.train, settings), settings, pin_memory=task.device.type == "cuda")
        self.optimizer = build_optimizer(self.network, self.config)
        self.schedule = StepSchedule(self.optimizer, self.config, self.config.epochs * math.ceil(len(self.loader) / self.config.accumulate))
        self.ema = ModelEmaV3(self.network, decay=self.config.ema_decay, use_warmup=True) if self.config.ema_decay else None
        self.dtype = autocast_dtype(self.config.precision, task.device)
        self.scaler = torch.amp.GradScaler(task.device.type, enabled=self.dtype is torch.float16)
        self.state = _State()
        self._saving_s = 0.0

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and kept: the averaged one where there is one."""
        return self.ema.module if self.ema is not None else self.network

    def run(self, on_epoch: OnEpoch | None = None) -> list[Row]:
        """Train to the last epoch or the early stop; returns the rows of metrics.csv.

        Raises OutOfTime before an epoch that would not end in time, and in the middle of one when there is none left: that epoch
        is then begun anew by the next session.
        """
        if (self.task.folder / "last.ckpt").is_file():
            self._resume()
        while self.state.epoch < self.config.epochs and not self._stale():
            self._check_time(SPARE * (longest(self.state.timing, "seconds") or self.task.expected_epoch_s) + self._saving_s)
            self._epoch()
            started = time.perf_counter()
            self._save()
            if on_epoch is not None:
                on_epoch(self.task.fold, self.state.history)
            self._saving_s = max(self._saving_s, time.perf_counter() - started)
        return self.state.history

    def _check_time(self, seconds: float = 0.0) -> None:
        if self.task.clock is not None and not self.task.clock.fits(seconds):
            raise OutOfTime(f"fold {self.task.fold} after epoch {self.state.epoch} of {self.config.epochs}")

    def _epoch(self) -> None:
        epoch, started = self.state.epoch, time.perf_counter()
        train_loss, lr = self._train(epoch), self.schedule.lr
        seconds = time.perf_counter() - started
        row: Row = {"fold": self.task.fold, "epoch": epoch + 1, "lr": lr, "train_loss": train_loss}
        if (epoch + 1) % self.config.validate_every == 0 or epoch + 1 == self.config.epochs:
            found = validate(self.evaluated, self.loss, self.task.store, self.task.valid, self.settings, self.task.device)
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
                loss = self._forward(tiles, masks)
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
        return mean

    def _group_size(self, number: int) -> int:
        """How many batches share the step of batch `number`: the last group of an epoch may be smaller."""
        first = number - number % self.config.accumulate
        return min(self.config.accumulate, len(self.loader) - first)

    def _forward(self, tiles: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        device = self.task.device
        inputs = normalise(tiles.to(device, non_blocking=True), self.settings.model)
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None):
            logits = self.network(inputs)
        return self.loss(logits, masks.to(device, non_blocking=True)[:, None].float())

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

    def _best(self) -> Row | None:
        """The best validated row so far; the earlier one of equals."""
        validated = [row for row in self.state.history if "dice" in row]
        if not validated:
            return None
        return min(validated, key=lambda row: row["val_loss"]) if self.config.monitor == "loss" else max(validated, key=lambda row: row["dice"])

    def _stale(self) -> bool:
        validated, best = [row for row in self.state.history if "dice" in row], self._best()
        if not self.config.patience or best is None:
            return False
        since = sum(row["epoch"] > best["epoch"] for row in validated)
        if since >= self.config.patience:
            log.info("fold %d: no better epoch in %d validations, stopping at epoch %d", self.task.fold, since, self.state.epoch)
        return since >= self.config.patience

    def _save(self) -> None:
        """Weights first, the checkpoint last: a kill in between repeats the epoch, which writes its weights again."""
        folder = self.task.folder
        if self._best() is self.state.history[-1]:
            (folder / COUNTS_FILE).unlink(missing_ok=True)  # out-of-fold results of older weights
            tensors = {name: value.contiguous() for name, value in self.evaluated.state_dict().items()}
            with atomic_path(folder / MODEL_FILE) as temporary:
                save_file(tensors, temporary)
        write_rows(folder / "timing.csv", self.state.timing)
        checkpoint.save(
            folder / "last.ckpt",
            {
                "settings": experiment.dump(self.settings), "store": self.task.store.meta["fingerprint"], "fold": self.task.fold,
                "epoch": self.state.epoch, "history": self.state.history, "timing": self.state.timing,
                "network": self.network.state_dict(), "ema": self.ema.module.state_dict() if self.ema is not None else None,
                "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(),
                "rng": checkpoint.rng_state(self.task.device),
            },
        )  # fmt: skip
        write_rows(folder / "metrics.csv", self.state.history)

    def _resume(self) -> None:
        saved = checkpoint.load(self.task.folder / "last.ckpt", experiment.dump(self.settings), str(self.task.store.meta["fingerprint"]))
        self.network.load_state_dict(saved["network"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if bool(saved["scaler"]) != self.scaler.is_enabled():
            log.warning("fold %d: resumed in another precision than it was trained in so far; its numbers will differ a little", self.task.fold)
        elif saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.state = _State(saved["epoch"], saved["history"], saved["timing"])
        checkpoint.restore_rng(saved["rng"], self.task.device)
        write_rows(self.task.folder / "metrics.csv", self.state.history)
        log.info("fold %d: resumed after epoch %d of %d", self.task.fold, self.state.epoch, self.config.epochs)

    def _timing(self, epoch: int, train_seconds: float, seconds: float) -> Row:
        tiles = len(self.loader.dataset)  # type: ignore[arg-type]
        row = {
            "fold": self.task.fold, "epoch": epoch, "seconds": round(seconds, 3), "validation_seconds": round(seconds - train_seconds, 3),
            "tiles_per_second": round(tiles / train_seconds, 2),
        }  # fmt: skip
        if self.task.device.type == "cuda":
            row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.task.device) / 2**30, 3)
        return row

    def _report(self, row: Row) -> None:
        best, timing = self._best(), self.state.timing[-1]
        scores = f", val loss {row['val_loss']:.4f}, Dice {row['dice']:.4f}" if "dice" in row else ""
        standing = f" (best {best['dice']:.4f} in epoch {best['epoch']})" if best is not None and "dice" in row else ""
        log.info(
            "fold %d epoch %d/%d: train loss %.4f%s%s, %.1f s, %.1f tiles/s", self.task.fold, row["epoch"], self.config.epochs,
            row["train_loss"], scores, standing, timing["seconds"], timing["tiles_per_second"],
        )  # fmt: skip


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write a list of rows as CSV, atomically; columns in order of first appearance, empty where a row lacks one."""
    with atomic_path(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
