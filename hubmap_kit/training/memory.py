"""How many tiles fit into a device's memory: tried out where there is one, estimated where there is none."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from hubmap_kit.config import Experiment, ModelConfig
from hubmap_kit.errors import ConfigError, HubmapError
from hubmap_kit.inference.on_device import is_out_of_memory
from hubmap_kit.models.build import build
from hubmap_kit.models.catalog import CONTEXT_GIB, GIB, SLACK, Size, measure

__all__ = ["is_out_of_memory", "largest_batch"]
log = logging.getLogger(__name__)
SPARE = 0.9  # of what fits: validation and the allocator want something too
STATES = {"adamw": 2, "adam": 2, "sgd": 1, "adan": 4, "ranger": 3}  # numbers that an optimiser keeps for each weight


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step on a card, an ESTIMATE: `weights` with gradients, the optimiser's numbers and averaged
    weights; what the forward pass of the batch `keeps`; `gradients` beside it in the backward pass; `spare` for CUDA
    and the allocator's idle blocks.
    """

    weights: int
    keeps: int
    gradients: int
    spare: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.keeps + self.gradients + self.spare


def size_of(settings: Experiment) -> Size:
    """What the network of an experiment costs for one of its tiles; counted once in a process. Raises ConfigError."""
    return _size_of(settings.model.model_dump_json(), settings.tiles.size)


@lru_cache(maxsize=16)
def _size_of(model: str, side: int) -> Size:
    return measure(lambda: build(ModelConfig.model_validate_json(model), pretrained=False), side)


def copies_of(settings: Experiment) -> int:
    """How many numbers a training holds for each weight: itself, its gradient, the optimiser's, and an average where
    there is one.
    """
    training = settings.training
    return 2 + STATES[training.optimizer] + bool(training.ema_decay or training.swa)


def step_memory(settings: Experiment, half: bool) -> StepMemory:
    """The memory of one step of `training.batch_size` tiles, in half precision (autocast) or float32.

    What the forward pass keeps is counted, by torch's hooks for saved tensors on tensors without data; two of the
    largest of them stand for gradients. The loss, a hundredth or so, is left out. Real steps of small networks on a CPU
    took 0.86 to 0.93 of it (without `spare`); no card has run one. Raises ConfigError.
    """
    size, batch = size_of(settings), settings.training.batch_size
    saved = size.saved(half)
    keeps, gradients = batch * saved.total, 2 * batch * saved.largest
    idle = (SLACK - 1) * (keeps + gradients)
    return StepMemory(size.weights(half, copies_of(settings)), keeps, gradients, int(idle + CONTEXT_GIB * GIB))


def batch_that_fits(settings: Experiment, half: bool, card_gib: float) -> int:
    """The largest batch of an experiment's tiles that should fit a card, by the same estimate; 0 where one tile is too
    much.
    """
    return size_of(settings).batch(half, card_gib, copies_of(settings))


def side_that_fits(settings: Experiment, half: bool, card_gib: float) -> int:
    """The largest side of a single tile that should fit a card, a multiple of 32; 0 where the weights alone are too
    much.
    """
    side = settings.tiles.size
    left = card_gib * GIB - size_of(settings).weights(half, copies_of(settings)) - CONTEXT_GIB * GIB
    tile = _size_of(settings.model.model_dump_json(), side).each(half)
    while tile > left:
        smaller = side // 64 * 32
        if smaller < 64:
            return 0
        less = _size_of(settings.model.model_dump_json(), smaller).each(half)
        if less <= left:
            # Attention over all tokens grows faster than the square of the side, so the power is taken from the two
            # that were counted.
            power = math.log(tile / less) / math.log(side / smaller)
            return max(smaller, int(smaller * (left / less) ** (1 / power)) // 32 * 32)
        side, tile = smaller, less
    return side


def with_largest_batch(settings: Experiment, device: torch.device) -> Experiment:
    """The experiment with the largest `training.batch_size` that trains on the device; `accumulate` shrinks so that a
    step stays about as large.

    Raises HubmapError, on a CPU always: there too large a batch takes the whole machine's memory, and is no faster.
    """
    if device.type != "cuda":
        raise HubmapError(
            "--auto-batch looks for the limit of a card's memory, and there is no card; set training.batch_size by hand"
        )
    training = settings.training
    size = largest_batch(settings, device)
    step = training.batch_size * training.accumulate
    changed = training.model_copy(update={"batch_size": size, "accumulate": max(1, round(step / size))})
    return settings.model_copy(update={"training": changed})


def largest_batch(
    settings: Experiment, device: torch.device, most: int = 256, fits: Callable[[int], bool] | None = None
) -> int:
    """The largest batch of tiles that trains on the device, less a spare tenth; found by doing it, doubling and then
    halving the gap.

    `fits` says whether a batch of a size does, by default by one step on random tiles. Raises HubmapError when not even
    two tiles fit.
    """
    fits = fits or (lambda size: _trains(settings, device, size))
    good, bad = 0, 2
    while bad <= most and fits(bad):
        good, bad = bad, bad * 2
    if not good:
        raise HubmapError(
            f"not even 2 tiles of {settings.tiles.size} px fit into the memory of {device}; set tiles.size smaller, or"
            " choose a smaller encoder"
        )
    bad = min(bad, most + 1)
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    chosen = max(2, int(good * SPARE)) if good < most else most
    log.info("%d tiles of %d px fit into %s; training.batch_size becomes %d", good, settings.tiles.size, device, chosen)
    return chosen


def _trains(settings: Experiment, device: torch.device, size: int) -> bool:
    """Whether two steps on `size` random tiles go well; the second one has the optimiser's moments too."""
    from hubmap_kit.training.learner import Batch, Learner
    from hubmap_kit.training.losses import About

    side = settings.tiles.size
    try:
        learner = Learner(settings, 10, device, pretrained=False)
        about = About(torch.zeros(size, dtype=torch.int64), torch.zeros(size))
        batch = Batch(
            0,
            torch.randint(256, (size, side, side, 3), dtype=torch.uint8),
            torch.zeros(size, side, side, dtype=torch.uint8),
            about,
        )
        learner.begin(0)
        for _ in range(2):
            learner.learn([batch], 0)
            if learner.parts > 1:
                return False
    except ConfigError:
        raise  # says what is wrong with the network or the loss, which no smaller batch mends
    except (HubmapError, RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # no GPU has run this line
    return True
