"""AdamW and its learning rate over the steps."""

from __future__ import annotations

import warnings

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from hubmap_kit.config import TrainingConfig


class StepSchedule:
    """A learning rate per optimiser step. Contract: call `step()` once after every `optimizer.step()`, never per epoch."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> None:
        self.optimizer, self.done = optimizer, 0
        warmup = min(round(config.warmup * total_steps), total_steps - 1)
        self._cycle = self._cosine = None
        if config.schedule == "onecycle":
            # torch divides by the length of each phase: both need a step at least.
            share = min(max(config.warmup, 1 / total_steps), 1 - 1 / total_steps) if total_steps > 2 else 0.75
            self._cycle = OneCycleLR(optimizer, config.lr, total_steps=total_steps + 1, pct_start=share)
        elif config.schedule == "cosine":
            self._cosine = CosineLRScheduler(
                optimizer, t_initial=total_steps - warmup, lr_min=config.lr / 1000, warmup_t=warmup, warmup_lr_init=config.lr / 25,
                warmup_prefix=True, t_in_epochs=False,
            )  # fmt: skip
            self._cosine.step_update(0)

    def step(self) -> None:
        self.done += 1
        if self._cycle is not None:
            self._cycle.step()
        elif self._cosine is not None:
            self._cosine.step_update(self.done)

    def skip(self, steps: int) -> None:
        """Go where that many steps would have led, without the optimiser."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            for _ in range(steps):
                self.step()

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, object]:
        return {"done": self.done, "cycle": self._cycle.state_dict() if self._cycle is not None else None}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue where `state_dict()` was taken. timm's schedules have no state but the step count."""
        self.done = int(state["done"])  # type: ignore[call-overload]
        if self._cycle is not None:
            self._cycle.load_state_dict(state["cycle"])  # type: ignore[arg-type]
        elif self._cosine is not None:
            self._cosine.step_update(self.done)


def build_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW over all parameters; biases and norm weights (one dimension) have no weight decay."""
    return create_optimizer_v2(network, opt="adamw", lr=config.lr, weight_decay=config.weight_decay, filter_bias_and_bn=True)
