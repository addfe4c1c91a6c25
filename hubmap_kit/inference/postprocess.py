"""From a probability plane to a mask."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hubmap_kit.config import InferenceConfig


def threshold_for(organ: str, fitted: Mapping[str, float], config: InferenceConfig) -> float:
    """The threshold of an organ: the config's own table first, then the fitted one, then the config's default."""
    return config.thresholds.get(organ, fitted.get(organ, config.threshold))


def to_mask(plane: np.ndarray, threshold: float) -> np.ndarray:
    """Mask (H, W) uint8 0/1 of the pixels whose probability reaches the threshold."""
    return (plane >= threshold).astype(np.uint8)
