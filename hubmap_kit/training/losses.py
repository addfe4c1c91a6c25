"""Losses by name, from segmentation_models_pytorch, summed with weights: `bce+dice`, `0.25*bce+0.75*lovasz`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from segmentation_models_pytorch import losses as smp_losses
from torch import nn

from hubmap_kit.errors import ConfigError

# Dice, Jaccard and Tversky have no gradient where a batch holds no foreground at all; add bce or focal to them.
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "bce": lambda: smp_losses.SoftBCEWithLogitsLoss(),
    "dice": lambda: smp_losses.DiceLoss("binary", from_logits=True),
    "lovasz": lambda: smp_losses.LovaszLoss("binary", per_image=True, from_logits=True),
    "focal": lambda: smp_losses.FocalLoss("binary"),
    "tversky": lambda: smp_losses.TverskyLoss("binary", from_logits=True, alpha=0.3, beta=0.7),
    "jaccard": lambda: smp_losses.JaccardLoss("binary", from_logits=True),
}


class WeightedSum(nn.Module):
    """The weighted sum of losses on logits (N, 1, H, W) and masks (N, 1, H, W) float 0/1; returns a scalar in float32."""

    def __init__(self, parts: list[tuple[float, nn.Module]]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in parts]
        self.losses = nn.ModuleList(loss for _, loss in parts)

    def forward(self, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        logits = logits.float()  # sums over whole pictures overflow half precision
        return sum(weight * loss(logits, masks) for weight, loss in zip(self.weights, self.losses, strict=True))


def build_loss(text: str) -> WeightedSum:
    """The loss of a config line. Raises ConfigError for an unknown name or a weight that is not a positive number."""
    parts = []
    for term in text.replace(" ", "").lower().split("+"):
        weight_text, star, name = term.rpartition("*")
        weight = _weight(weight_text, text) if star else 1.0
        if name not in LOSSES:
            raise ConfigError(f"training.loss is '{text}', where '{name}' is unknown; known are {', '.join(LOSSES)}, joined as in 0.5*bce+dice")
        parts.append((weight, LOSSES[name]()))
    return WeightedSum(parts)


def _weight(text: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise ConfigError(f"training.loss is '{whole}', where '{text}' is no positive weight; write for instance 0.5*bce+dice")
    return weight
