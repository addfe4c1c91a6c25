"""ERFNet (Romera et al.

2018, doi 10.1109/TITS.2017.2750080): two million weights, factorised residual blocks, no pretrained encoder needed.
"""

from __future__ import annotations

import torch
from torch import nn

EPS = 1e-3  # of the batch norms, as published
ERFNET_RATES = (2, 4, 8, 16)


class Downsample(nn.Module):
    """Half the side: a strided convolution beside a maximum, joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs - inputs, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(outputs, eps=EPS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(torch.cat([self.conv(inputs), nn.functional.max_pool2d(inputs, 2)], dim=1)))


class Factorised(nn.Module):
    """A residual block of 3x3 convolutions, each as a column and a row; the second pair is dilated."""

    def __init__(self, channels: int, dilation: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.column1, self.row1 = (
            nn.Conv2d(channels, channels, (3, 1), padding=(1, 0)),
            nn.Conv2d(channels, channels, (1, 3), padding=(0, 1)),
        )
        self.norm1 = nn.BatchNorm2d(channels, eps=EPS)
        self.column2 = nn.Conv2d(channels, channels, (3, 1), padding=(dilation, 0), dilation=(dilation, 1))
        self.row2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, dilation), dilation=(1, dilation))
        self.norm2 = nn.BatchNorm2d(channels, eps=EPS)
        self.drop = nn.Dropout2d(dropout)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found = torch.relu(self.norm1(self.row1(torch.relu(self.column1(inputs)))))
        return torch.relu(inputs + self.drop(self.norm2(self.row2(torch.relu(self.column2(found))))))


class ErfnetEncoder(nn.Module):
    """Images -> [the images, 16 channels at stride 2, 64 at stride 4, 128 at stride 8]."""

    out_channels = (3, 16, 64, 128)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                Downsample(3, 16),
                nn.Sequential(Downsample(16, 64), *(Factorised(64, dropout=0.03) for _ in range(5))),
                nn.Sequential(Downsample(64, 128), *(Factorised(128, rate, 0.3) for _ in range(2) for rate in ERFNET_RATES)),
            ]
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = [images]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features


class Enlarge(nn.Sequential):
    """Twice the side by a transposed convolution, batch norm, ReLU, two factorised blocks."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1),
            nn.BatchNorm2d(outputs, eps=EPS),
            nn.ReLU(inplace=True),
            Factorised(outputs),
            Factorised(outputs),
        )


class ErfnetDecoder(nn.Module):
    """The deepest map -> (N, 16, H/2, W/2); it reads no other one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Enlarge(128, 64), Enlarge(64, 16)])

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        found = features[-1]
        for block in self.blocks:
            found = block(found)
        return found
