"""The learning-rate range test: train for a few steps while the rate rises from nothing to too much, and look at the
loss.

Leslie Smith's test (arXiv 1506.01186), with the smoothing, the end and the two suggestions that fastai's `lr_find` made
usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hubmap_kit.errors import HubmapError
from hubmap_kit.training.checkpoint import restore_rng, rng_state

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
