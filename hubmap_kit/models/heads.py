"""Heads that only training has: their losses pull the encoder and the decoder's inner stages towards what the last
layer needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

ORGAN_COUNT = 5


class Outputs(NamedTuple):
    """What a network with auxiliary heads gives in train mode.

    `logits` (N, C, H, W) is what it gives in eval mode. `auxiliary` by head: fcn (N, C, h, w) at the encoder's own
    scale; deep, a list of such, coarsest first; organ (N, 5), logits in the order of competition.organs; pixel_size
    (N,), log2 of the micrometres per pixel.
    """

    logits: torch.Tensor
    auxiliary: dict[str, torch.Tensor | list[torch.Tensor]]


class PlainHead(nn.Sequential):
    """A convolution and a classifier on a feature map (N, channels, h, w) -> (N, classes, h, w)."""

    def __init__(self, channels: int, classes: int) -> None:
        middle = max(16, min(256, channels // 4))
        super().__init__(
            nn.Conv2d(channels, middle, 3, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
            nn.Conv2d(middle, classes, 1),
        )


class StageHeads(nn.ModuleList):
    """A classifier on each stage of a decoder: maps in, a list of logit maps out."""

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__(nn.Conv2d(each, classes, 1) for each in channels)

    def forward(self, stages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [head(stage) for head, stage in zip(self, stages, strict=True)]


class PooledHead(nn.Module):
    """A linear layer on the mean of the deepest features: (N, channels, h, w) -> (N, outputs), or (N,) for one
    output.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        found = self.linear(features.mean(dim=(2, 3)))
        return found.squeeze(1) if self.linear.out_features == 1 else found
