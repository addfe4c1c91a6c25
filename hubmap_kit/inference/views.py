"""Test-time views: ttach's flips and rotations, undone and averaged as probabilities."""

from __future__ import annotations

import torch
import ttach
from torch import nn

VIEWS = {
    "none": lambda: ttach.Compose([]),
    "flips": lambda: ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip()]),
    "d4": ttach.aliases.d4_transform,
}


def view_transforms(name: str) -> ttach.Compose:
    """The views of a name: none (1), flips (4: as it is, both flips, both at once) or d4 (8: all symmetries of the square)."""
    if name not in VIEWS:
        raise ValueError(f"inference.views is '{name}'; known are {', '.join(VIEWS)}")
    return VIEWS[name]()


def mean_probability(networks: list[nn.Module], inputs: torch.Tensor, views: ttach.Compose) -> torch.Tensor:
    """Mean probability (N, H, W) float32 over all networks and views of `inputs` (N, 3, H, W).

    Probabilities are averaged, never logits: one very sure view would outvote the rest. One view is in memory at a time.
    """
    total = torch.zeros(inputs.shape[0], *inputs.shape[2:], device=inputs.device)
    for view in views:
        seen = view.augment_image(inputs)
        for network in networks:
            probability = torch.sigmoid(network(seen).float())
            total += view.deaugment_mask(probability)[:, 0]
    return total / (len(views) * len(networks))
