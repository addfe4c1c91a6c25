"""Networks whose every number differs from a fresh one's, for tests of what a weights file brings."""

from __future__ import annotations

import torch
from torch import nn

from hubmap_kit.config import ModelConfig
from hubmap_kit.models.build import build


def encoder(name: str) -> nn.Module:
    """The encoder of a U-Net, at random, in eval mode."""
    return build(ModelConfig(encoder=name)).encoder.eval()


def shaken(network: nn.Module) -> nn.Module:
    """Other running statistics and norms than a fresh network has, so that a tensor left behind shows in the output."""
    torch.manual_seed(1)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) * (0.1 if "running_var" not in name else 0.5))
    return network.eval()
