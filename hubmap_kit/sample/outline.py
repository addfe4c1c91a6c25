"""Where the tissue lies in the frame: a punched core as in HPA, or a section with a cut edge as in HuBMAP."""

from __future__ import annotations

import cv2
import numpy as np

from hubmap_kit.sample.fields import Array, Shape, smooth_noise, soft_step


def core(rng: np.random.Generator, shape: Shape) -> Array:
    """Coverage `(H, W)`, 0 to 1, of a tissue microarray core: a disc with a frayed rim and sometimes a bite out of
    it.
    """
    height, width = shape
    side = min(shape)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    centre_x, centre_y = width / 2 + rng.normal(0, 0.012) * side, height / 2 + rng.normal(0, 0.012) * side
    reach = np.hypot((x - centre_x) / (width / side) ** 0.7, (y - centre_y) / (height / side) ** 0.7)
    radius = side * rng.uniform(0.425, 0.455)
    frayed = 0.008 * smooth_noise(rng, shape, side / 5) + 0.0045 * smooth_noise(rng, shape, side / 60, 3)
    inside = radius - reach + side * frayed
    if rng.random() < 0.5:
        angle, bite = rng.uniform(0, 2 * np.pi), side * rng.uniform(0.04, 0.09)
        from_bite = np.hypot(x - centre_x - radius * np.cos(angle), y - centre_y - radius * np.sin(angle))
        inside = np.minimum(inside, from_bite - bite + 3 * side * frayed)
    return soft_step(inside, max(side / 300, 1.0))


def section(rng: np.random.Generator, shape: Shape) -> Array:
    """Coverage `(H, W)`, 0 to 1, of a section that runs out of the frame on most sides and ends in one or two cut
    edges.
    """
    height, width = shape
    side = min(shape)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    frayed = 0.017 * smooth_noise(rng, shape, side / 3) + 0.004 * smooth_noise(rng, shape, side / 50, 3)
    inside = np.full(shape, side, np.float32)
    first = rng.uniform(0, 2 * np.pi)
    for angle in [first, first + rng.uniform(1.2, 2.2)][: int(rng.integers(1, 3))]:
        outward = (x - width / 2) * np.float32(np.cos(angle)) + (y - height / 2) * np.float32(np.sin(angle))
        inside = np.minimum(inside, side * rng.uniform(0.36, 0.44) - outward + side * frayed)
    return soft_step(inside, max(side / 300, 1.0))


def debris(rng: np.random.Generator, shape: Shape) -> Array:
    """A few dust specks and shreds on the glass, 0 to 1."""
    specks = np.zeros(shape, np.uint8)
    side = min(shape)
    for _ in range(int(rng.integers(8, 24))):
        x, y = int(rng.uniform(0, shape[1])), int(rng.uniform(0, shape[0]))
        size = max(int(rng.exponential(side / 500)), 1)
        cv2.ellipse(
            specks, (x, y), (size, max(size // 2, 1)), float(rng.uniform(0, 180)), 0, 360, int(rng.uniform(60, 200)), -1
        )
    return cv2.GaussianBlur(specks, (0, 0), 0.8).astype(np.float32) / 255
