"""The mask transformer of Segmenter (Strudel et al.

2021, arXiv:2105.05633): classes are tokens among the patches, masks their products.
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.functional import normalize


class MaskTransformer(nn.Module):
    """Feature maps of a ViT, of which it reads the last (N, channels, h, w) -> masks (N, classes, h, w)."""

    def __init__(self, channels: int, classes: int, layers: int, drop_path: float = 0.1) -> None:
        super().__init__()
        self.classes = classes
        heads = max(1, channels // 64)
        if channels % heads:
            raise ValueError(f"the encoder's {channels} channels do not divide by {heads} heads")
        self.project = nn.Linear(channels, channels)
        self.tokens = nn.Parameter(trunc_normal_(torch.zeros(1, classes, channels), std=0.02))
        rates = torch.linspace(0, drop_path, layers).tolist()
        self.blocks = nn.ModuleList(Block(channels, heads, qkv_bias=True, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(channels)
        self.of_patches, self.of_classes = (
            nn.Linear(channels, channels, bias=False),
            nn.Linear(channels, channels, bias=False),
        )
        # A layer norm over the classes, as published, would make a single class constant: that one has a scale and a
        # shift instead.
        self.mask_norm: nn.Module = nn.LayerNorm(classes) if classes > 1 else ScaleShift()
        for layer in (self.project, self.of_patches, self.of_classes):
            trunc_normal_(layer.weight, std=channels**-0.5 if layer is not self.project else 0.02)
        nn.init.zeros_(self.project.bias)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        batch, _, height, width = features[-1].shape
        patches = self.project(features[-1].flatten(2).transpose(1, 2))
        tokens = torch.cat([patches, self.tokens.expand(batch, -1, -1).to(patches.dtype)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        patches, classes = self.norm(tokens).split([height * width, self.classes], dim=1)
        patches, classes = normalize(self.of_patches(patches), dim=-1), normalize(self.of_classes(classes), dim=-1)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks.transpose(1, 2).reshape(batch, self.classes, height, width)


class ScaleShift(nn.Module):
    """A learnt scale and shift.

    The products that it sees are cosines, so it starts with a scale that reaches real logits.
    """

    def __init__(self, scale: float = 5.0) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.tensor(0.0))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.scale * inputs + self.shift
