"""What learns: network, objective, optimiser, schedule, averaged weights, scaler; one step of it, and what a checkpoint
keeps.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from hubmap_kit.augment.batched import from_settings
from hubmap_kit.config import Experiment
from hubmap_kit.errors import HubmapError
from hubmap_kit.models.build import build, normalise
from hubmap_kit.models.device import autocast_dtype
from hubmap_kit.training.averaging import EqualAverage, is_averaged
from hubmap_kit.training.losses import About, Objective, logits_of
from hubmap_kit.training.memory import is_out_of_memory
from hubmap_kit.training.optim import StepSchedule, build_optimizer, set_frozen
from hubmap_kit.training.world import ALONE, World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One batch of an epoch: its number, tiles (N, S, S, 3) uint8, masks (N, S, S) uint8, and their slides' facts, if
    asked for.
    """

    number: int
    tiles: torch.Tensor
    masks: torch.Tensor
    about: About | None = None


class Learner:
    """A network in training on one device.

    `steps` are the optimiser's in an epoch, `mask_scale` is what masks are divided by.
    """

    def __init__(
        self,
        settings: Experiment,
        steps: int,
        device: torch.device,
        pretrained: bool,
        mask_scale: int = 1,
        world: World = ALONE,
    ) -> None:
        self.settings, self.config, self.device, self.world, self.mask_scale = (
            settings,
            settings.training,
            device,
            world,
            mask_scale,
        )
        self.steps = steps
        network: Any = world.synchronised(build(settings.model, pretrained), device)
        self.network = network.to(device, memory_format=torch.channels_last)
        self.objective = Objective(settings).to(device)
        self.optimizer = build_optimizer(self.network, self.config)
        self.schedule = StepSchedule(self.optimizer, self.config, self.config.epochs * steps)
        self.ema = (
            ModelEmaV3(self.network, decay=self.config.ema_decay, use_warmup=True) if self.config.ema_decay else None
        )
        self.swa = EqualAverage(self.network) if self.config.swa else None
        self.batched = from_settings(settings.augment, settings.model.mean, settings.model.std, self.config.seed)
        self.dtype = autocast_dtype(self.config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)
        self.parts = 1  # forward passes that a batch takes; more than one where memory was short
        self._model = world.wrapped(self.network, device)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and kept: the averaged one where there is one."""
        if self.swa is not None and self.swa.count:
            return self.swa.module
        return self.ema.module if self.ema is not None else self.network

    def begin(self, epoch: int) -> None:
        """Make ready for the batches of an epoch."""
        self.network.train()
        if self.config.freeze_epochs:
            set_frozen(self.network, epoch < self.config.freeze_epochs)

    def end(self, epoch: int) -> None:
        """After the last batch of an epoch: average its weights where the config says so."""
        if self.swa is not None and is_averaged(epoch + 1, self.config):
            self.swa.update(self.network)

    def learn(
        self, group: Sequence[Batch], epoch: int, note: Callable[[torch.Tensor, torch.Tensor], None] | None = None
    ) -> torch.Tensor:
        """One optimiser step on a group of batches; returns the sum of their losses, on the device.

        `note` gets logits and masks (N, 1, S, S) of every pass. Where memory is short each batch is halved from then
        on, and the group done again. Raises HubmapError when a pass is too small to be halved.
        """
        while (total := self._gradients(group, epoch, note)) is None:
            self._halve(max(len(batch.tiles) for batch in group))
        self._step()
        return total

    def inputs(self, batch: Batch, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Network input (N, 3, S, S) and masks (N, 1, S, S) float of a batch, on the device, augmented there if the
        config says so.
        """
        tiles, masks = (part.to(self.device, non_blocking=True) for part in (batch.tiles, batch.masks))
        if self.batched is None:
            made = normalise(tiles, self.settings.model)
        else:
            # Every process has tiles of its own, which change in their own way.
            made, masks = self.batched(tiles, masks, epoch, batch.number * self.world.size + self.world.rank)
        return made, masks[:, None].float() / self.mask_scale

    def _gradients(self, group: Sequence[Batch], epoch: int, note: Callable[..., None] | None) -> torch.Tensor | None:
        """Add up the gradients of a group and return the sum of its losses; None when memory is short."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        noted: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for place, batch in enumerate(group):
                inputs, masks = self.inputs(batch, epoch)
                about = None if batch.about is None else batch.about.to(self.device)
                for part, last in self._parts(len(inputs)):
                    # Processes exchange gradients once a step, with the last pass.
                    with nullcontext() if last and place + 1 == len(group) else self._apart():
                        loss, logits = self.forward(inputs[part], masks[part], None if about is None else about[part])
                        share = len(logits) / len(inputs)
                        self.scaler.scale(loss * share / len(group)).backward()
                    total += loss.detach() * share
                    if note is not None:
                        noted.append((logits.detach(), masks[part]))
        except RuntimeError as error:
            if not is_out_of_memory(error) or self.world.size > 1:
                raise
            return None
        for logits, masks in noted:
            note(logits, masks)  # type: ignore[misc]
        return total

    def forward(
        self, inputs: torch.Tensor, masks: torch.Tensor, about: About | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and logits of one pass of `inputs` (N, 3, S, S) against masks (N, 1, S, S), with gradients."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            outputs = self._model(inputs)
        return self.objective(outputs, masks, about), logits_of(outputs)

    def _parts(self, count: int) -> Iterator[tuple[slice, bool]]:
        """The passes of a batch of `count` tiles, about equally long, and whether each is the last one."""
        passes = math.ceil(count / self._pass_size(count))
        ends = [count * number // passes for number in range(passes + 1)]
        for start, end in itertools.pairwise(ends):
            yield slice(start, end), end == count

    def _pass_size(self, count: int) -> int:
        """How many tiles go through at once.

        A last, smaller batch takes fewer passes, not smaller ones: norms want more than one tile.
        """
        return math.ceil(max(count, self.config.batch_size) / self.parts) if self.parts > 1 else count

    def _apart(self) -> AbstractContextManager[Any]:
        return self._model.no_sync() if isinstance(self._model, nn.parallel.DistributedDataParallel) else nullcontext()

    def _halve(self, size: int) -> None:
        """Twice as many passes for a batch from now on.

        Outside of the `except`: the error would hold on to the pass's memory.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # no GPU has run this line
        before = self._pass_size(size)
        now = math.ceil(before / 2)
        if now < 2:
            # Batch norms that see one value a channel, as in pooling branches, cannot train.
            raise HubmapError(
                f"memory is short on {self.device} even for {before} tiles at once; set tiles.size smaller, choose a"
                " smaller encoder, or set training.batch_size=1 with training.accumulate where the network takes"
                " single tiles"
            )
        self.parts *= 2
        log.warning(
            "MEMORY IS SHORT on %s: from now on %d tiles in one pass and %d passes in a step; what the loss and batch"
            " norms see at once is smaller, all else stays",
            self.device,
            now,
            self.parts * self.config.accumulate,
        )

    def _step(self) -> None:
        if self.config.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler.get_scale() < before:
            # fp16 gradients overflowed: the scaler skipped this step, so the schedule and the average skip it too.
            return
        self.schedule.step()
        if self.ema is not None:
            self.ema.update(self.network, step=self.schedule.done)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "swa": self.swa.state_dict() if self.swa is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "parts": self.parts,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.network.load_state_dict(saved["network"])
        if self.ema is not None:
            self.ema.module.load_state_dict(saved["ema"])
        if self.swa is not None and saved.get("swa") is not None:
            self.swa.load_state_dict(saved["swa"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.parts = int(saved.get("parts", 1))
        if bool(saved["scaler"]) != self.scaler.is_enabled():
            log.warning("resumed in another precision than it was trained in so far; its numbers will differ a little")
        elif saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])

    def start_from(self, weights: dict[str, torch.Tensor], epochs: int = 0) -> None:
        """Take these weights, as after `epochs` epochs, with a fresh optimiser."""
        self.network.load_state_dict(weights)
        if self.ema is not None:
            self.ema.module.load_state_dict(weights)
        self.schedule.skip(epochs * self.steps)
