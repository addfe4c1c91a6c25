"""How many tiles fit into a device's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError, HubmapError
from hubmap_kit.inference.on_device import is_out_of_memory

__all__ = ["is_out_of_memory", "largest_batch"]
log = logging.getLogger(__name__)
SPARE = 0.9  # of what fits: validation and the allocator want something too


def with_largest_batch(settings: Experiment, device: torch.device) -> Experiment:
    """The experiment with the largest `training.batch_size` that trains on the device; `accumulate` shrinks so that a step stays about as large.

    Raises HubmapError, on a CPU always: there too large a batch takes the whole machine's memory, and is no faster.
    """
    if device.type != "cuda":
        raise HubmapError("--auto-batch looks for the limit of a card's memory, and there is no card; set training.batch_size by hand")
    training = settings.training
    size = largest_batch(settings, device)
    step = training.batch_size * training.accumulate
    changed = training.model_copy(update={"batch_size": size, "accumulate": max(1, round(step / size))})
    return settings.model_copy(update={"training": changed})


def largest_batch(settings: Experiment, device: torch.device, most: int = 256, fits: Callable[[int], bool] | None = None) -> int:
    """The largest batch of tiles that trains on the device, less a spare tenth; found by doing it, doubling and then halving the gap.

    `fits` says whether a batch of a size does, by default by one step on random tiles. Raises HubmapError when not even two tiles fit.
    """
    fits = fits or (lambda size: _trains(settings, device, size))
    good, bad = 0, 2
    while bad <= most and fits(bad):
        good, bad = bad, bad * 2
    if not good:
        raise HubmapError(f"not even 2 tiles of {settings.tiles.size} px fit into the memory of {device}; set tiles.size smaller, or choose a smaller encoder")
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
    from hubmap_kit.training.objective import About

    side = settings.tiles.size
    try:
        learner = Learner(settings, 10, device, pretrained=False)
        about = About(torch.zeros(size, dtype=torch.int64), torch.zeros(size))
        batch = Batch(0, torch.randint(256, (size, side, side, 3), dtype=torch.uint8), torch.zeros(size, side, side, dtype=torch.uint8), about)
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
