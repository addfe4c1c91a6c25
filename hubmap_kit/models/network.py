"""The common frame of all networks: encoder, decoder, head, sides of any length, and heads that only training has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from hubmap_kit.errors import ConfigError

# Heads that only training has: their losses pull the encoder and the decoder's inner stages towards what the last layer
# needs.

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
        """Maps (N, C, h, w) of each stage -> logits (N, classes, h, w) of each."""
        return [head(stage) for head, stage in zip(self, stages, strict=True)]


class PooledHead(nn.Module):
    """A linear layer on the mean of the deepest features: (N, channels, h, w) -> (N, outputs), or (N,) for one
    output.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, outputs)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, C, h, w) -> (N, outputs), or (N,) for one output."""
        found = self.linear(features.mean(dim=(2, 3)))
        return found.squeeze(1) if self.linear.out_features == 1 else found


PLAIN_LEVEL = 4  # of the encoder's feature maps: the one at stride 16, where nothing is dilated


class Network(nn.Module):
    """Images (N, 3, H, W), normalised, to logits (N, C, H, W), for all H and W of 32 and more.

    Names in the state dict are those of smp: encoder, decoder, segmentation_head. Sides that are no multiple of
    `multiple`, or shorter than `least`, are continued by mirror images at the right and the bottom, and the logits are
    cut back. `stages` names the parts of the decoder that a deep auxiliary head can read. With auxiliary heads train
    mode gives Outputs; eval mode always gives the logits.
    """

    encoder: Any  # of smp, timm or the kit: a module with out_channels

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        segmentation_head: nn.Module,
        *,
        multiple: int = 32,
        least: int = 32,
        stages: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.segmentation_head = encoder, decoder, segmentation_head
        self.auxiliary = nn.ModuleDict()
        self.multiple, self.least, self.stages = multiple, least, tuple(stages)

    def forward(self, images: torch.Tensor) -> torch.Tensor | Outputs:
        """Images (N, 3, H, W) -> logits (N, C, H, W); Outputs in train mode with auxiliary heads."""
        height, width = images.shape[-2:]
        padded = pad_by_mirror(images, self.multiple, self.least)
        features = list(self.encoder(padded))
        with _outputs_of(self._tapped()) as stages:
            decoded = self._decode(features)
        logits = self.segmentation_head(decoded)[..., :height, :width]
        if not (self.training and len(self.auxiliary)):
            return logits
        return Outputs(logits, self._auxiliary(features, stages, (height / padded.shape[-2], width / padded.shape[-1])))

    def add_heads(self, names: Sequence[str], classes: int) -> None:
        """Give the network auxiliary heads. Raises ConfigError for deep where the decoder has no stages."""
        channels = self.encoder.out_channels
        for name in sorted(names):
            if name == "fcn":
                self.auxiliary[name] = PlainHead(channels[self._plain_level()], classes)
            elif name == "deep":
                if not self.stages:
                    raise ConfigError(
                        "model.auxiliary has deep, which reads the stages of a decoder; this model.arch has none, take"
                        " fcn or a unet"
                    )
                self.auxiliary[name] = StageHeads(self._stage_channels(), classes)
            else:
                self.auxiliary[name] = PooledHead(channels[-1], ORGAN_COUNT if name == "organ" else 1)

    def _decode(self, features: list[torch.Tensor]) -> torch.Tensor:
        try:
            return self.decoder(features)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                "this model.arch has a batch norm on one value per tile, which cannot learn from a batch of one; "
                "use training.batch_size=2 or more, or model.options={decoder_norm: group}"
            ) from error

    def _tapped(self) -> list[nn.Module]:
        return (
            [self.decoder.get_submodule(name) for name in self.stages]
            if self.training and "deep" in self.auxiliary
            else []
        )

    def _auxiliary(
        self, features: list[torch.Tensor], stages: list[torch.Tensor], kept: tuple[float, float]
    ) -> dict[str, torch.Tensor | list[torch.Tensor]]:
        found: dict[str, torch.Tensor | list[torch.Tensor]] = {}
        for name, head in self.auxiliary.items():
            if name == "fcn":
                found[name] = _cut(head(features[self._plain_level()]), kept)
            elif name == "deep":
                found[name] = [_cut(each, kept) for each in head(stages)]
            else:
                found[name] = head(features[-1])
        return found

    def _plain_level(self) -> int:
        return min(PLAIN_LEVEL, len(self.encoder.out_channels) - 1)

    @torch.no_grad()
    def _stage_channels(self) -> list[int]:
        """Seen in one pass: decoders keep no list of them. In eval mode, so that no statistics change."""
        was_training, image = self.training, torch.zeros(1, 3, 64, 64)
        self.eval()
        with _outputs_of([self.decoder.get_submodule(name) for name in self.stages]) as stages:
            self(image)
        self.train(was_training)
        return [stage.shape[1] for stage in stages]


def pad_by_mirror(images: torch.Tensor, multiple: int, least: int = 0) -> torch.Tensor:
    """Images (N, C, H, W) continued at the right and the bottom to the next multiple, and to `least`, by mirroring as
    often as that takes.
    """
    height, width = (-(-max(side, least) // multiple) * multiple for side in images.shape[-2:])
    while images.shape[-2:] != (height, width):
        # One reflection can add at most one pixel less than the image has; of a single pixel there is none, and torch
        # says so.
        more = [
            min(target - side, max(1, side - 1))
            for side, target in zip(images.shape[-2:], (height, width), strict=True)
        ]
        images = pad(images, (0, more[1], 0, more[0]), mode="reflect")
    return images


def use_group_norm(module: nn.Module) -> None:
    """Replace every batch norm in a module by a group norm: up to 32 groups of eight channels or more, so that a batch
    of one can teach it.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            channels = child.num_features
            setattr(module, name, nn.GroupNorm(gcd(32, max(1, channels // 8)) if channels % 8 == 0 else 1, channels))
        else:
            use_group_norm(child)


def _cut(logits: torch.Tensor, kept: tuple[float, float]) -> torch.Tensor:
    height, width = (max(1, round(side * share)) for side, share in zip(logits.shape[-2:], kept, strict=True))
    return logits[..., :height, :width]


@contextmanager
def _outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """The outputs of modules in the order in which they run inside the block."""
    outputs: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)) for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
