"""Lung: air spaces between thin walls; the closed small alveoli are the units, torn and merged spaces are not."""

from __future__ import annotations

import numpy as np

from hubmap_kit.sample.fields import Array, at, blob, depth, fill, packed_cells, place, smooth_noise, soft_step
from hubmap_kit.sample.layers import Layers
from hubmap_kit.sample.vessels import scatter_vessels

ALVEOLUS_SPACING_UM = 98.0


def paint_lung(layers: Layers) -> None:
    """Fill the layers with lung; the mask is each intact alveolus, its air space with the wall around it (80 to 150 um
    across).

    The competition's own lung labels are sparse and of two kinds (wall only, wall and space); this sample has the
    second.
    """
    rng, um = layers.rng, layers.um_per_px
    _, border = packed_cells(rng, layers.shape, layers.px(ALVEOLUS_SPACING_UM), layers.px(90), layers.px(16))
    area = layers.mask.size * rng.uniform(0.032, 0.06)
    circles = place(rng, layers.room(), (layers.px(40), layers.px(68)), area, layers.px(70), inside=1.3)
    rings = np.zeros(layers.shape, np.uint8)
    for x, y, radius in circles:
        fill(rings, blob(rng, (x, y), radius, 0.13, float(rng.uniform(1, 1.4))))
    signed = (depth(rings) - depth(1 - rings)) * np.float32(um)
    layers.mask |= rings
    wall = _walls(layers, border * um, signed)
    _septa(layers, wall)
    scatter_vessels(layers, (22, 60), (9, 18), 3, circles, 45)


def _walls(layers: Layers, border: Array, signed: Array) -> Array:
    """Signed depth in um inside the walls: torn septa everywhere, whole ones around the intact alveoli."""
    rng, shape = layers.rng, layers.shape
    torn = smooth_noise(rng, shape, layers.px(70)) > 0.4
    keep = ((border < 1.5 * layers.um_per_px) & ~torn).astype(np.uint8)
    away = depth(1 - keep) * np.float32(layers.um_per_px)
    swollen = np.clip(smooth_noise(rng, shape, layers.px(170)) - 0.9, 0, None)
    half = np.clip(5 + 1.6 * smooth_noise(rng, shape, layers.px(30)), 2.6, 10) + 26 * swollen
    septa = half - away
    septa = np.where(signed > 0, -20, septa)
    ripple = np.clip(1.3 * smooth_noise(rng, shape, layers.px(25)), -2.2, 4)
    ring = np.minimum(signed + 0.5, 9 + 1.6 * ripple - signed)
    return np.maximum(septa, ring).astype(np.float32)


def _septa(layers: Layers, wall: Array) -> None:
    rng, shape = layers.rng, layers.shape
    body = soft_step(wall, 1.6)
    grain = smooth_noise(rng, shape, layers.px(4))
    layers.add("fibre", body * np.clip(0.42 + 0.12 * grain, 0.1, 1))
    layers.add("cytoplasm", body * np.clip(0.38 + 0.1 * grain, 0.1, 1))
    layers.add("marker", 0.5 * body * soft_step(smooth_noise(rng, shape, layers.px(40)) - 0.6, 0.8))
    slope_y, slope_x = np.gradient(wall)
    angle = np.degrees(np.arctan2(slope_x, -slope_y)).astype(np.float32)
    points = layers.points(7.2, wall > 1.0, 0.75)
    layers.draw_nuclei(points, 2.4, 1.7, at(angle, points))
    layers.draw_red_cells(layers.points(6.0, (wall > 1.5) & (wall < 5), 0.25))
    _macrophages(layers, layers.points(45, wall < -14, 0.08))


def _macrophages(layers: Layers, points: Array) -> None:
    cells = np.zeros(layers.shape, np.uint8)
    for x, y in points.tolist():
        fill(cells, blob(layers.rng, (x, y), layers.px(float(layers.rng.uniform(5, 7.5))), 0.08))
    body = soft_step(depth(cells) * layers.um_per_px, 1.5)
    layers.add("cytoplasm", 0.6 * body)
    layers.add("marker", 0.8 * body)
    layers.draw_nuclei(points, 2.8)
