"""A U-Net decoder with pixel-shuffle upsampling and self-attention, the two traits of fastai's DynamicUnet that the
kidney notebooks of 2021 used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import interpolate

from hubmap_kit.models.layers import PixelShuffleUp, SelfAttention, convolution

ATTENDED = 3  # self-attention follows the block at stride 8: a large side there would cost too much at stride 4


class ShuffleBlock(nn.Module):
    """One step up: enlarge, join with the encoder's map of that size, two convolutions."""

    def __init__(self, inputs: int, skip: int, outputs: int, pixel_shuffle: bool) -> None:
        super().__init__()
        up = max(8, inputs // 2) if pixel_shuffle else inputs
        self.up = PixelShuffleUp(inputs, up) if pixel_shuffle else None
        self.norm = nn.BatchNorm2d(skip) if skip else None
        self.conv1, self.conv2 = convolution(up + skip, outputs), convolution(outputs, outputs)
        self.attention: nn.Module = nn.Identity()

    def forward(self, inputs: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
        large = self.up(inputs) if self.up is not None else interpolate(inputs, scale_factor=2.0, mode="nearest")
        if self.norm is not None and skip is not None:
            large = torch.cat([large, torch.relu(self.norm(skip))], dim=1)
        return self.attention(self.conv2(self.conv1(large)))


class ShuffleDecoder(nn.Module):
    """Feature maps, finest first, each half the size of the one before -> (N, decoder_channels[-1], H, W)."""

    def __init__(
        self,
        encoder_channels: Sequence[int],
        decoder_channels: Sequence[int],
        pixel_shuffle: bool,
        self_attention: bool,
    ) -> None:
        super().__init__()
        depth = len(encoder_channels) - 1
        if len(decoder_channels) != depth:
            raise ValueError(
                f"decoder_channels has {len(decoder_channels)} numbers, but the encoder has {depth} stages"
            )
        inputs = [encoder_channels[-1], *decoder_channels[:-1]]
        skips = [*reversed(encoder_channels[1:-1]), 0]
        self.blocks = nn.ModuleList(
            ShuffleBlock(*sides, pixel_shuffle) for sides in zip(inputs, skips, decoder_channels, strict=True)
        )
        if self_attention:
            number = max(0, depth - ATTENDED - 1)  # block number n ends at stride 2 ** (depth - 1 - n)
            self.blocks[number].attention = SelfAttention(decoder_channels[number])

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        found, skips = features[-1], [*reversed(features[1:-1]), None]
        for block, skip in zip(self.blocks, skips, strict=True):
            found = block(found, skip)
        return found
