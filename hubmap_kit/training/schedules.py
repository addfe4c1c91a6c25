"""The learning rate over the optimiser's steps, for every group of weights at its own height."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from torch.optim.lr_scheduler import OneCycleLR

from hubmap_kit.config import TrainingConfig

FLAT = 0.75  # share of the steps after which flat-cosine falls
CYCLES = 3  # cosines of `restarts`, 1 + 2 + 4 parts long: a training of 30 epochs has a first one of 4
POWER = 0.9  # of the falling side of `poly`


class StepSchedule:
    """A learning rate per optimiser step. Contract: call `step()` once after every `optimizer.step()`, never per epoch.

    A group's rate when the schedule is made is its peak, so groups keep their proportions on every step. The rate
    begins at a 25th of the peak, but for `constant` (always the peak) and where `warmup` is 0, and falls to a 1000th
    (onecycle: to next to nothing).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> None:
        self.optimizer, self.done = optimizer, 0
        self._shares = [group["lr"] / config.lr for group in optimizer.param_groups]
        self._cycle = self._shape = None
        if config.schedule == "onecycle":
            # torch divides by the length of each phase: both need a step at least.
            share = min(max(config.warmup, 1 / total_steps), 1 - 1 / total_steps) if total_steps > 2 else 0.75
            peaks = [group["lr"] for group in optimizer.param_groups]
            self._cycle = OneCycleLR(
                optimizer, peaks, total_steps=total_steps + 1, pct_start=share, cycle_momentum=_has_momentum(optimizer)
            )
        elif config.schedule != "constant":
            self._shape = _Shape(config, total_steps)
            self._set()

    def step(self) -> None:
        self.done += 1
        if self._cycle is not None:
            self._cycle.step()
        else:
            self._set()

    def skip(self, steps: int) -> None:
        """Go where that many steps would have led, without the optimiser."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(steps):
                self.step()

    @property
    def lr(self) -> float:
        """The rate of the next step, of the group that learns fastest, which is what `training.lr` is about."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    def state_dict(self) -> dict[str, object]:
        return {"done": self.done, "cycle": self._cycle.state_dict() if self._cycle is not None else None}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue where `state_dict()` was taken. All schedules but onecycle have no state but the step count."""
        self.done = int(state["done"])  # type: ignore[call-overload]
        if self._cycle is not None:
            self._cycle.load_state_dict(state["cycle"])  # type: ignore[arg-type]
        else:
            self._set()

    def _set(self) -> None:
        if self._shape is None:
            return
        rate = self._shape.at(self.done)
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            group["lr"] = rate * share


class _Shape:
    """The rate of a step, without the optimiser: timm's schedules know absolute rates only, so they drive a stand-in of
    one group.
    """

    def __init__(self, config: TrainingConfig, total: int) -> None:
        self._warmup = min(round(config.warmup * total), total - 1)
        self._hold = max(int(FLAT * total) - self._warmup, 0) if config.schedule == "flat-cosine" else 0
        self._stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.lr)
        falling = total - self._warmup - self._hold
        common: dict[str, Any] = {
            "lr_min": config.lr / 1000,
            "warmup_t": self._warmup,
            "warmup_lr_init": config.lr / 25,
            "warmup_prefix": True,
            "t_in_epochs": False,
        }
        if config.schedule == "poly":
            self._schedule = PolyLRScheduler(self._stand_in, t_initial=falling, power=POWER, **common)
        elif config.schedule == "restarts":
            first = falling / (2**CYCLES - 1)  # no whole number as a rule: the last cosine ends with the training
            self._schedule = CosineLRScheduler(
                self._stand_in, t_initial=first, cycle_mul=2.0, cycle_limit=CYCLES, **common
            )
        else:
            self._schedule = CosineLRScheduler(self._stand_in, t_initial=falling, **common)

    def at(self, step: int) -> float:
        self._schedule.step_update(step - min(max(step - self._warmup, 0), self._hold))
        return float(self._stand_in.param_groups[0]["lr"])


def _has_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether onecycle has a momentum to lower while the rate rises.

    The first of Adan's three betas plays another part.
    """
    return "momentum" in optimizer.defaults or len(optimizer.defaults.get("betas", ())) == 2
