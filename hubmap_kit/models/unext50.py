"""UneXt50: a ResNeXt U-Net with an atrous pyramid at the bottom and a feature pyramid beside the decoder, as in the
kidney notebooks of 2020/21.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import interpolate

from hubmap_kit.models.layers import convolution
from hubmap_kit.models.shuffle_unet import ShuffleBlock

ATROUS_RATES = (1, 2, 3, 4)


class AtrousPyramid(nn.Module):
    """The deepest map seen at several rates of dilation, and as a whole; (N, inputs, h, w) -> (N, outputs, h, w)."""

    def __init__(self, inputs: int, outputs: int, rates: Sequence[int] = ATROUS_RATES) -> None:
        super().__init__()
        inner = max(8, outputs // 2)
        self.views = nn.ModuleList(
            [convolution(inputs, inner, kernel=1), *(convolution(inputs, inner, dilation=rate) for rate in rates)]
        )
        # Without a norm: one value a channel has no spread within a tile.
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, inner, 1), nn.ReLU(inplace=True))
        self.join = nn.Sequential(convolution(inner * (len(rates) + 2), outputs, kernel=1), nn.Dropout2d(0.5))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        seen = [view(features) for view in self.views]
        return self.join(torch.cat([*seen, self.whole(features).expand_as(seen[0])], dim=1))


class UnextDecoder(nn.Module):
    """Five feature maps below the image -> (N, decoder_channels[-1] + 4 * pyramid_channels, H/2, W/2)."""

    def __init__(self, encoder_channels: Sequence[int], decoder_channels: Sequence[int], pyramid_channels: int) -> None:
        super().__init__()
        skips = list(reversed(encoder_channels[1:-1]))
        if len(decoder_channels) != len(skips):
            raise ValueError(
                f"decoder_channels has {len(decoder_channels)} numbers, but the decoder has {len(skips)} stages"
            )
        bottom = 2 * decoder_channels[0]
        self.bottom = AtrousPyramid(encoder_channels[-1], bottom)
        inputs = [bottom, *decoder_channels[:-1]]
        self.blocks = nn.ModuleList(
            ShuffleBlock(*sides, True) for sides in zip(inputs, skips, decoder_channels, strict=True)
        )
        self.pyramid = nn.ModuleList(
            nn.Sequential(
                convolution(each, 2 * pyramid_channels), nn.Conv2d(2 * pyramid_channels, pyramid_channels, 3, padding=1)
            )
            for each in inputs
        )
        self.drop = nn.Dropout2d(0.1)
        self.out_channels = decoder_channels[-1] + len(inputs) * pyramid_channels

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        maps = [self.bottom(features[-1])]
        for block, skip in zip(self.blocks, reversed(features[1:-1]), strict=True):
            maps.append(block(maps[-1], skip))
        size = maps[-1].shape[-2:]
        seen = [
            interpolate(view(each), size=size, mode="bilinear", align_corners=False)
            for view, each in zip(self.pyramid, maps[:-1], strict=True)
        ]
        return self.drop(torch.cat([*seen, maps[-1]], dim=1))
