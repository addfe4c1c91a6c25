"""Layers that several of the kit's own decoders share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention


def convolution(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU, at the same size."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def separable(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    """A 3x3 convolution of each channel by itself, then one across channels, each with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=dilation, dilation=dilation, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        *convolution(inputs, outputs, kernel=1),
    )


class PixelShuffleUp(nn.Module):
    """Twice the side by sub-pixel convolution (Shi et al.

    2016), blurred over 2x2 pixels against checkerboards (Sugawara et al. 2018).

    The weights start as those of a nearest-neighbour enlargement (ICNR, Aitken et al. 2017).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, 4 * outputs, 1)
        self.shuffle = nn.PixelShuffle(2)
        kernel = nn.init.kaiming_normal_(torch.empty(outputs, inputs, 1, 1))
        # PixelShuffle puts four neighbouring channels into one square of pixels; equal ones give one colour.
        self.expand.weight.data.copy_(kernel.repeat_interleave(4, dim=0))
        nn.init.zeros_(self.expand.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        large = self.shuffle(torch.relu(self.expand(inputs)))
        return nn.functional.avg_pool2d(pad(large, (1, 0, 1, 0), mode="replicate"), 2, stride=1)


class SelfAttention(nn.Module):
    """Every place looks at every other one (SAGAN, Zhang et al.

    2019); starts as the identity. (N, C, H, W) -> the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = max(1, channels // 8)
        self.project = nn.Conv1d(channels, 2 * self.inner + channels, 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        places = inputs.flatten(2)
        query, key, value = (
            self.project(places).transpose(1, 2).unsqueeze(1).split([self.inner, self.inner, places.shape[1]], dim=-1)
        )
        seen = scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1).transpose(1, 2)
        return inputs + self.strength * seen.reshape(inputs.shape)


class Upsample(nn.Module):
    """Bilinear enlargement by a whole factor."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(inputs, scale_factor=float(self.factor), mode="bilinear", align_corners=False)
