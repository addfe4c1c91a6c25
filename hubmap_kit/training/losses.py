"""Losses by name, from segmentation_models_pytorch, summed with weights: `bce+dice`, `0.25*bce+0.75*lovasz`,
`bce+3*lovasz-softmax`.

Of the two losses of Berman, Triki and Blaschko (The Lovasz-Softmax loss, CVPR 2018) `lovasz` is, for one class, the
hinge on its logit. It is 1 where a network is undecided, and more where it tries and errs: with much weight on it a
network that knows nothing yet can stay undecided. `lovasz-softmax` is the one on probabilities, of unit and background,
as networks with two classes have it.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from segmentation_models_pytorch import losses as smp_losses
from torch import nn

from hubmap_kit.competition.organs import FACTS
from hubmap_kit.config import LOSSES, Experiment
from hubmap_kit.errors import ConfigError, did_you_mean
from hubmap_kit.models.network import Outputs
from hubmap_kit.tiles.store import TileStore

BINARY, ORGANS = "binary", "organs"
KNOWN = ("organ", "pixel_size")  # auxiliary heads that are told about the slide
_MODES = {BINARY: smp_losses.BINARY_MODE, ORGANS: smp_losses.MULTICLASS_MODE}


class TwoClasses(nn.Module):
    """A loss of classes for logits of one: background has the logit 0."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Logits and masks (N, 1, H, W) -> the loss, a scalar."""
        return self.loss(torch.cat([torch.zeros_like(logits), logits], dim=1), masks[:, 0].long())


def cross_entropy(mode: str) -> nn.Module:
    """Cross entropy of one class (binary) or of several."""
    return smp_losses.SoftBCEWithLogitsLoss() if mode == smp_losses.BINARY_MODE else nn.CrossEntropyLoss()


def lovasz_softmax(mode: str) -> nn.Module:
    """The Lovasz loss on probabilities; for one class, on those of unit and background."""
    loss = smp_losses.LovaszLoss(smp_losses.MULTICLASS_MODE, per_image=True, from_logits=True)
    return TwoClasses(loss) if mode == smp_losses.BINARY_MODE else loss


class WeightedSum(nn.Module):
    """The weighted sum of losses. Binary: one logit a pixel, masks in 0..1; organs: six logits, background first, and
    masks that hold class indices, as floats.
    """

    def __init__(self, parts: list[tuple[float, nn.Module]], classes: str = BINARY) -> None:
        super().__init__()
        self.weights, self.classes = [weight for weight, _ in parts], classes
        self.losses = nn.ModuleList(loss for _, loss in parts)

    def forward(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Logits (N, 1 or 6, H, W) and masks (N, 1, H, W) float -> the weighted sum, a scalar in float32."""
        logits = logits.float()  # sums over whole pictures overflow half precision
        masks = masks[:, 0].long() if self.classes == ORGANS else masks
        return sum(weight * loss(logits, masks) for weight, loss in zip(self.weights, self.losses, strict=True))


def build_loss(text: str, classes: str = BINARY) -> WeightedSum:
    """The loss of a config line for `classes` binary or organs.

    Raises ConfigError for an unknown name or a weight that is not a positive number.
    """
    parts = []
    for term in text.replace(" ", "").lower().split("+"):
        weight_text, star, name = term.rpartition("*")
        weight = _weight(weight_text, text) if star else 1.0
        if name not in LOSSES:
            raise ConfigError(
                f"training.loss is '{text}', where '{name}' is unknown; known are {', '.join(LOSSES)}, joined as in"
                f" 0.5*bce+dice{did_you_mean(name, list(LOSSES))}"
            )
        maker, arguments = LOSSES[name]
        parts.append((weight, pkgutil.resolve_name(maker)(_MODES[classes], **arguments)))
    return WeightedSum(parts, classes)


def _weight(text: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise ConfigError(
            f"training.loss is '{whole}', where '{text}' is no positive weight; write for instance 0.5*bce+dice"
        )
    return weight


@dataclass(frozen=True)
class About:
    """What is known of a batch's tiles: organ (N,) int64 from 0, and log2 of the micrometres per network pixel (N,)
    float32.
    """

    organ: torch.Tensor
    log_um: torch.Tensor

    def to(self, device: torch.device) -> About:
        """The same on a device."""
        return About(self.organ.to(device, non_blocking=True), self.log_um.to(device, non_blocking=True))

    def __getitem__(self, part: slice) -> About:
        return About(self.organ[part], self.log_um[part])


class Slides:
    """The `About` of every slide of a store."""

    def __init__(self, store: TileStore) -> None:
        table = store.slides
        self._organ = torch.tensor([FACTS[organ].index - 1 for organ in table["organ"]])
        um = table["um_per_px"] * table["height"] / table["rows"]
        self._log_um = torch.from_numpy(np.log2(um.to_numpy(np.float32)))

    def __call__(self, rows: Sequence[int] | np.ndarray) -> About:
        """Row numbers of slides (N,) -> what is known of each."""
        where = torch.as_tensor(np.asarray(rows, np.int64))
        return About(self._organ[where], self._log_um[where])


class Objective(nn.Module):
    """The training loss of an experiment: `mask` is that of the mask, for which `plain` is the same on binary
    planes.
    """

    def __init__(self, settings: Experiment) -> None:
        super().__init__()
        self.weights: Mapping[Any, float] = settings.model.auxiliary
        self.mask = build_loss(settings.training.loss, settings.model.classes)
        self.plain = build_loss(settings.training.loss)
        self.needs_slides = any(name in self.weights for name in KNOWN)

    def forward(self, outputs: torch.Tensor | Outputs, masks: torch.Tensor, about: About | None = None) -> torch.Tensor:
        """The loss of a network's outputs in training against masks (N, 1, S, S) float; a scalar in float32."""
        if isinstance(outputs, torch.Tensor):
            return self.mask(outputs, masks)
        total = self.mask(outputs.logits, masks)
        for name, made in outputs.auxiliary.items():
            total = total + self.weights[name] * self._auxiliary(name, made, masks, about)
        return total

    def _auxiliary(
        self, name: str, made: torch.Tensor | list[torch.Tensor], masks: torch.Tensor, about: About | None
    ) -> torch.Tensor:
        if name in KNOWN:
            if about is None:
                raise ValueError(f"the head '{name}' needs to know the tiles' slides")
            assert isinstance(made, torch.Tensor)
            if name == "organ":
                return F.cross_entropy(made.float(), about.organ)
            return F.smooth_l1_loss(made.float().flatten(), about.log_um)
        # At the mask's own size: a mask that is made smaller loses thin units.
        planes = made if isinstance(made, list) else [made]
        scaled = (
            F.interpolate(plane.float(), masks.shape[2:], mode="bilinear", align_corners=False) for plane in planes
        )
        return sum(self.mask(plane, masks) for plane in scaled) / len(planes)


def logits_of(outputs: torch.Tensor | Outputs) -> torch.Tensor:
    """The mask's logits (N, C, H, W) among a network's outputs."""
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits
