"""Arteries and veins: round, ringed and hollow like some units, and never part of the mask."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from hubmap_kit.sample.fields import at, blob, depth, fill, place, soft_step
from hubmap_kit.sample.layers import Layers

Circle = tuple[float, float, float]  # x, y, radius in pixels


def draw_vessel(layers: Layers, centre: tuple[float, float], radius_um: float, wall_um: float, filled: bool) -> None:
    """Draw one vessel: a wall of muscle, `wall_um` thick, around a pale lumen with or without red cells."""
    outline = np.zeros(layers.shape, np.uint8)
    fill(outline, blob(layers.rng, centre, layers.px(radius_um), 0.05, float(layers.rng.uniform(1.0, 1.6))))
    inner = depth(outline) * np.float32(layers.um_per_px)
    layers.clear(soft_step(inner, 1.5))
    wall = soft_step(inner, 1.5) * soft_step(wall_um - inner, 1.5)
    layers.add("fibre", wall * (0.75 + 0.25 * np.sin(inner * 1.3)))
    layers.add("cytoplasm", 0.25 * wall)
    slope_y, slope_x = np.gradient(cv2.GaussianBlur(inner, (0, 0), 2))
    along = np.degrees(np.arctan2(slope_x, -slope_y)).astype(np.float32)
    points = layers.points(9, (inner > 1) & (inner < wall_um), 0.6)
    layers.draw_nuclei(points, 2.2, 2.6, at(along, points))
    if filled:
        layers.draw_red_cells(layers.points(6.5, inner > wall_um + 3, 0.8))


def scatter_vessels(
    layers: Layers,
    radii_um: tuple[float, float],
    walls_um: tuple[float, float],
    count: int,
    units: Sequence[Circle],
    gap_um: float,
) -> None:
    """Draw up to `count` vessels that stay `gap_um` away from the units."""
    rng = layers.rng
    small, large = layers.px(radii_um[0]), layers.px(radii_um[1])
    area = count * np.pi * ((small + large) / 2) ** 2
    for x, y, radius in place(rng, layers.room(), (small, large), area, layers.px(80))[:count]:
        wall, filled = float(rng.uniform(*walls_um)), bool(rng.random() < 0.6)
        if all(np.hypot(x - a, y - b) > radius + r + layers.px(gap_um) for a, b, r in units):
            draw_vessel(layers, (x, y), radius * layers.um_per_px, wall, filled)
