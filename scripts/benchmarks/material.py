"""What is measured on: synthetic tissue of any size, and networks with random weights."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import nn

from hubmap_kit.config import ModelConfig
from hubmap_kit.models.build import build
from hubmap_kit.sample.slide import SlideSpec, draw

# The kit's default input statistics (RGB, in 0..1), by channel, as nearly all pretrained encoders want them.
MEAN, STD = (np.array(values, np.float32) for values in (ModelConfig().mean, ModelConfig().std))


@lru_cache(maxsize=4)
def tissue(side: int, organ: str = "kidney", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A slide (side, side, 3) uint8 full of tissue, no glass at its border, and its mask (side, side) 0/1.

    The middle of a drawn slide, mirrored until it is large enough: drawing thousands of pixels takes long, and the
    contents do not matter to what is measured.
    """
    drawn, mask = draw(SlideSpec(organ, "Hubmap", 768, 768, 0.5), np.random.default_rng(seed))
    middle, units = drawn[128:-128, 128:-128], mask[128:-128, 128:-128]
    grow = (0, max(0, side - 512), 0, max(0, side - 512))
    image, truth = (
        cv2.copyMakeBorder(np.ascontiguousarray(part), *grow, cv2.BORDER_REFLECT) for part in (middle, units)
    )
    return np.ascontiguousarray(image[:side, :side]), np.ascontiguousarray(truth[:side, :side])


class ChannelCopy(nn.Module):
    """A network that costs next to nothing: its logit is its first input channel."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) -> (N, 1, H, W)."""
        return inputs[:, :1].clone(memory_format=torch.contiguous_format)


B0 = ModelConfig(arch="unet", encoder="tu-efficientnet_b0")
# A few thousand weights: real code around next to no computation.
TINY = ModelConfig(arch="unet", encoder="tu-test_resnet", options={"encoder_depth": 3, "decoder_channels": [16, 8, 8]})


def network(model: ModelConfig) -> nn.Module:
    """A network of the kit with random but repeatable weights, in eval mode."""
    torch.manual_seed(0)
    return build(model, pretrained=False).eval()


def title(model: ModelConfig) -> str:
    """A model in words: its architecture and encoder."""
    return f"{model.arch} on {model.encoder.removeprefix('tu-')}"
