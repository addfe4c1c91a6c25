"""The kit's own decoders: DAFormer, Segmenter, a U-Net with pixel shuffle, UneXt50, ERFNet; and what they share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn.functional import interpolate, normalize, pad, scaled_dot_product_attention


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
    """Twice the side by sub-pixel convolution, blurred over 2x2 pixels against checkerboards.

    Shi et al. 2016; the blur is of Sugawara et al. 2018.

    The weights start as those of a nearest-neighbour enlargement (ICNR, Aitken et al. 2017).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(inputs, 4 * outputs, 1)
        self.shuffle = nn.PixelShuffle(2)
        kernel = nn.init.kaiming_normal_(torch.empty(outputs, inputs, 1, 1))
        # PixelShuffle puts four neighbouring channels into one square of pixels; equal ones give one colour.
        self.expand.weight.data.copy_(kernel.repeat_interleave(4, dim=0))
        assert self.expand.bias is not None
        nn.init.zeros_(self.expand.bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features (N, C, h, w) -> (N, outputs, 2h, 2w)."""
        large = self.shuffle(torch.relu(self.expand(inputs)))
        return nn.functional.avg_pool2d(pad(large, (1, 0, 1, 0), mode="replicate"), 2, stride=1)


class SelfAttention(nn.Module):
    """Every place looks at every other one (SAGAN, Zhang et al. 2019); starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = max(1, channels // 8)
        self.project = nn.Conv1d(channels, 2 * self.inner + channels, 1, bias=False)
        self.strength = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features (N, C, h, w) -> the same shape."""
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
        """Maps (N, C, h, w) -> (N, C, factor * h, factor * w)."""
        return nn.functional.interpolate(inputs, scale_factor=float(self.factor), mode="bilinear", align_corners=False)


# DAFormer (Hoyer et al. 2022, arXiv:2111.14887): levels embedded alike, joined by separable atrous convolutions.


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
        """Feature maps of the encoder, finest first -> (N, channels, H/4, W/4)."""
        size = features[2].shape[-2:]
        levels = [
            interpolate(embed(each), size=size, mode="bilinear", align_corners=False)
            for embed, each in zip(self.embed, features[2:], strict=True)
        ]
        joined = torch.cat(levels, dim=1)
        return self.join(torch.cat([view(joined) for view in self.views], dim=1))


# Segmenter (Strudel et al. 2021, arXiv:2105.05633): classes are tokens among the patches, masks their products.


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
        """Feature maps, of which the last (N, C, h, w) is read -> (N, classes, h, w)."""
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
        """Values of any shape -> the same shape."""
        return self.scale * inputs + self.shift


# A U-Net decoder with pixel-shuffle upsampling and self-attention, the two traits of fastai's DynamicUnet that the
# kidney notebooks of 2021 used.

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
        """A map (N, C, h, w) and the encoder's map at twice the side -> (N, outputs, 2h, 2w)."""
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
        """Feature maps, finest first -> (N, decoder_channels[-1], H, W)."""
        found, skips = features[-1], [*reversed(features[1:-1]), None]
        for block, skip in zip(self.blocks, skips, strict=True):
            found = block(found, skip)
        return found


# UneXt50: a ResNeXt U-Net with an atrous pyramid at the bottom and a feature pyramid beside the decoder, as in the
# kidney notebooks of 2020/21.

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
        """The deepest map (N, inputs, h, w) -> (N, outputs, h, w)."""
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
        """Feature maps, finest first -> (N, out_channels, H/2, W/2)."""
        maps = [self.bottom(features[-1])]
        for block, skip in zip(self.blocks, reversed(features[1:-1]), strict=True):
            maps.append(block(maps[-1], skip))
        size = maps[-1].shape[-2:]
        seen = [
            interpolate(view(each), size=size, mode="bilinear", align_corners=False)
            for view, each in zip(self.pyramid, maps[:-1], strict=True)
        ]
        return self.drop(torch.cat([*seen, maps[-1]], dim=1))


# ERFNet (Romera et al. 2018, doi 10.1109/TITS.2017.2750080): two million weights, factorised residual blocks, no
# pretrained encoder needed.

EPS = 1e-3  # of the batch norms, as published
ERFNET_RATES = (2, 4, 8, 16)


class Downsample(nn.Module):
    """Half the side: a strided convolution beside a maximum, joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs - inputs, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(outputs, eps=EPS)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features (N, inputs, h, w) -> (N, outputs, h/2, w/2)."""
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
        """Features (N, C, h, w) -> the same shape."""
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
                nn.Sequential(
                    Downsample(64, 128), *(Factorised(128, rate, 0.3) for _ in range(2) for rate in ERFNET_RATES)
                ),
            ]
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (N, 3, H, W) -> [images, maps at strides 2, 4, 8]."""
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
        """Feature maps, of which the last (N, 128, h, w) is read -> (N, 16, 4h, 4w)."""
        found = features[-1]
        for block in self.blocks:
            found = block(found)
        return found
