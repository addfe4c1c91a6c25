"""How many pixels a slide has for the network, and the resampling there and back.

Training (the store) and inference (the windows) ask the same two functions, so a network never sees two different
scales.
"""

from __future__ import annotations

import cv2
import numpy as np

from hubmap_kit.config import ScaleConfig

FINEST_SLIDE_UM = 0.229  # HuBMAP's large intestine


def scaled_shape(height: int, width: int, um_per_px: float, scale: ScaleConfig, organ: str = "") -> tuple[int, int]:
    """(height, width) of a slide of an organ in network pixels, at least 1 x 1.

    `um_per_px` is the slide's own pixel size in micrometres. Policy `reduce` divides the pixel count; policy `physical`
    brings every slide to `um_per_px`, enlarging by `max_zoom` at most (prostate of HuBMAP is 16 times coarser than
    HPA); policy `fit` brings the longer side to `fit` pixels, as most winners did.
    """
    choices = scale.of(organ)
    if choices.policy == "reduce":
        zoom = 1.0 / choices.reduce
    elif choices.policy == "fit":
        zoom = choices.fit / max(height, width)
    else:
        zoom = min(um_per_px / choices.um_per_px, choices.max_zoom)
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def reduced_shape(shape: tuple[int, int], reduce: int) -> tuple[int, int]:
    """(height, width) of a scaled slide that is predicted `reduce` times coarser than it is trained, at least 1 x 1."""
    return max(1, round(shape[0] / reduce)), max(1, round(shape[1] / reduce))


def finest_um(scale: ScaleConfig, organ: str = "") -> float:
    """The smallest width in micrometres that a network pixel can have; with policies that count pixels, on the finest
    slides there are.
    """
    choices = scale.of(organ)
    if choices.policy == "physical":
        return choices.um_per_px
    return FINEST_SLIDE_UM * (choices.reduce if choices.policy == "reduce" else 1)


def resize_image(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resample an image (H, W, 3) uint8 to `shape` (h, w): area averages when it shrinks, bilinear when it grows."""
    if image.shape[:2] == shape:
        return image
    return cv2.resize(image, shape[::-1], interpolation=_interpolation(image.shape, shape))


def resize_mask(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resample a mask (H, W) of 0/1 to `shape` (h, w): a pixel is inside when at least half of it is."""
    if mask.shape == shape:
        return mask
    share = cv2.resize(mask * np.uint8(255), shape[::-1], interpolation=_interpolation(mask.shape, shape))
    return (share >= 128).astype(np.uint8)


def resize_plane(plane: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resample a probability plane (h, w) float32 to `shape` (H, W)."""
    if plane.shape == shape:
        return plane
    return cv2.resize(plane, shape[::-1], interpolation=_interpolation(plane.shape, shape))


def _interpolation(old: tuple[int, ...], new: tuple[int, int]) -> int:
    # INTER_AREA averages the covered pixels only when shrinking; when growing it is nearest neighbour in disguise.
    return cv2.INTER_AREA if new[0] * new[1] < old[0] * old[1] else cv2.INTER_LINEAR
