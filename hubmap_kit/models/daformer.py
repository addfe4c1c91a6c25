"""The decoder of DAFormer (Hoyer et al.

2022, arXiv:2111.14887): each level embedded alike, all fused with context by separable atrous convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import interpolate

from hubmap_kit.models.layers import convolution, separable


class DaformerDecoder(nn.Module):
    """Feature maps -> (N, channels, H/4, W/4). The first two levels, at strides 1 and 2, are not read."""

    def __init__(self, encoder_channels: Sequence[int], channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        levels = list(encoder_channels[2:])
        if len(levels) < 2 or 0 in levels:
            raise ValueError(
                f"daformer joins levels at strides 4 and below, of which the encoder has the channels {levels}; it"
                " needs two or more"
            )
        self.embed = nn.ModuleList(nn.Conv2d(each, channels, 1) for each in levels)
        joined = channels * len(levels)
        self.views = nn.ModuleList(
            convolution(joined, channels, kernel=1) if rate == 1 else separable(joined, channels, rate)
            for rate in rates
        )
        self.join = nn.Sequential(convolution(channels * len(rates), channels), nn.Dropout2d(0.1))

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        size = features[2].shape[-2:]
        levels = [
            interpolate(embed(each), size=size, mode="bilinear", align_corners=False)
            for embed, each in zip(self.embed, features[2:], strict=True)
        ]
        joined = torch.cat(levels, dim=1)
        return self.join(torch.cat([view(joined) for view in self.views], dim=1))
