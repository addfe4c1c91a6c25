"""Scoring one network on whole slides out of the store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from hubmap_kit.config import Experiment
from hubmap_kit.inference.ensemble import Ensemble
from hubmap_kit.tiles.store import TileStore
from hubmap_kit.training.counts import HALF, dice_curve, mean_curves, threshold_counts
from hubmap_kit.training.world import ALONE, World

T = TypeVar("T")


@dataclass(frozen=True)
class Validation:
    """One validation.

    `dice` is the mean over slides, each organ at its best threshold; `dice_at_half` at 0.5 for all.
    """

    loss: float
    dice: float
    dice_at_half: float
    organs: dict[str, float]


def validate(
    network: nn.Module,
    loss: nn.Module,
    store: TileStore,
    slides: Sequence[int],
    settings: Experiment,
    device: torch.device,
    check: Callable[[], None] | None = None,
    world: World = ALONE,
) -> Validation:
    """Predict whole slides at the store's scale, one view, and score them there; leaves the network in eval mode.

    `loss` is that of binary planes. Several processes share the slides and all get the scores of all. `check` is called
    before every slide; what it raises ends the validation.
    """
    inference = settings.inference.model_copy(update={"views": "none"})
    single = Ensemble(settings.model_copy(update={"inference": inference}), [network.eval()], {}, device)
    curves, losses = [], []
    organs = store.slides["organ"].to_numpy()[list(slides)]
    for slide, organ in world.part(list(zip(slides, organs, strict=True))):
        if check is not None:
            check()
        plane, truth = single.plane(store.image(slide), organ=organ), store.mask(slide)
        losses.append(_plane_loss(loss, plane, truth))
        curves.append(dice_curve(threshold_counts(plane, truth)))
    losses, curves = (_in_order(world.gathered(found), len(slides)) for found in (losses, curves))
    by_organ = {organ: float(curve.max()) for organ, curve in mean_curves(np.stack(curves), organs).items()}
    mean = float(np.mean([by_organ[organ] for organ in organs]))
    return Validation(float(np.mean(losses)), mean, float(np.mean([curve[HALF] for curve in curves])), by_organ)


def _in_order(found: list[list[T]], count: int) -> list[T]:
    """What the processes found for every `len(found)`-th slide each, for all `count` slides in their order."""
    return [found[number % len(found)][number // len(found)] for number in range(count)]


def _plane_loss(loss: nn.Module, plane: np.ndarray, truth: np.ndarray) -> float:
    """The training loss of a whole slide, from the stitched probabilities turned back into logits."""
    with torch.inference_mode():
        logits = torch.logit(torch.from_numpy(plane), eps=1e-6)
        return float(loss(logits[None, None], torch.from_numpy(truth)[None, None].float()))
