"""What a training minimises: the loss of the mask, and of whatever else a network with auxiliary heads gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from hubmap_kit.competition.organs import FACTS
from hubmap_kit.config import Experiment
from hubmap_kit.models.heads import Outputs
from hubmap_kit.tiles.store import TileStore
from hubmap_kit.training.losses import build_loss

KNOWN = ("organ", "pixel_size")  # auxiliary heads that are told about the slide


@dataclass(frozen=True)
class About:
    """What is known of a batch's tiles: organ (N,) int64 from 0, and log2 of the micrometres per network pixel (N,)
    float32.
    """

    organ: torch.Tensor
    log_um: torch.Tensor

    def to(self, device: torch.device) -> About:
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
        where = torch.as_tensor(np.asarray(rows, np.int64))
        return About(self._organ[where], self._log_um[where])


class Objective(nn.Module):
    """The training loss of an experiment: `mask` is that of the mask, for which `plain` is the same on binary
    planes.
    """

    def __init__(self, settings: Experiment) -> None:
        super().__init__()
        self.weights = settings.model.auxiliary
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
            return (
                F.cross_entropy(made.float(), about.organ)
                if name == "organ"
                else F.smooth_l1_loss(made.float().flatten(), about.log_um)
            )
        # At the mask's own size: a mask that is made smaller loses thin units.
        planes = made if isinstance(made, list) else [made]
        scaled = (
            F.interpolate(plane.float(), masks.shape[2:], mode="bilinear", align_corners=False) for plane in planes
        )
        return sum(self.mask(plane, masks) for plane in scaled) / len(planes)


def logits_of(outputs: torch.Tensor | Outputs) -> torch.Tensor:
    """The mask's logits (N, C, H, W) among a network's outputs."""
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits
