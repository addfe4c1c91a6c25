"""Spleen: white pulp (the units) in red pulp, with trabeculae and a vein."""

from __future__ import annotations

import numpy as np

from hubmap_kit.sample.fields import Array, at, blob, depth, fibres, fill, place, smooth_noise, soft_step
from hubmap_kit.sample.layers import Layers
from hubmap_kit.sample.vessels import draw_vessel


def paint_spleen(layers: Layers) -> None:
    """Fill the layers with spleen; the mask is the white pulp (200 to 600 um across) at the middle of its fuzzy
    edge.
    """
    rng, um = layers.rng, layers.um_per_px
    area = layers.mask.size * rng.uniform(0.08, 0.14)
    circles = place(rng, layers.room(), (layers.px(80), layers.px(155)), area, layers.px(40), inside=0.6)
    pulp = np.zeros(layers.shape, np.uint8)
    for x, y, radius in circles:
        fill(pulp, blob(rng, (x, y), radius, 0.12, float(rng.uniform(1.0, 1.7))))
    signed = (depth(pulp) - depth(1 - pulp)) * np.float32(um)
    layers.mask |= pulp
    fuzzy = soft_step(signed + 5 * smooth_noise(rng, layers.shape, layers.px(14)), 14)
    _red_pulp(layers, 1 - fuzzy)
    _white_pulp(layers, fuzzy, signed)
    for x, y, radius in circles:
        turn = rng.uniform(0, 2 * np.pi)
        spot = (x + float(np.cos(turn)) * radius * 0.45, y + float(np.sin(turn)) * radius * 0.45)
        draw_vessel(layers, spot, float(rng.uniform(9, 15)), 5, False)
    _trabeculae(layers, signed)


def _red_pulp(layers: Layers, red: Array) -> None:
    rng, shape = layers.rng, layers.shape
    cords = smooth_noise(rng, shape, layers.px(26))
    sinus = soft_step(cords - 1.0, 0.6) * red
    grain = smooth_noise(rng, shape, layers.px(4))
    body = red * (1 - 0.9 * sinus)
    layers.add("cytoplasm", body * np.clip(0.5 + 0.16 * grain, 0.1, 1))
    layers.add("fibre", body * np.clip(0.3 + 0.15 * smooth_noise(rng, shape, layers.px(9)), 0.05, 0.8))
    layers.add("marker", 0.6 * body * soft_step(smooth_noise(rng, shape, layers.px(12)) - 1.0, 0.5))
    layers.draw_nuclei(
        layers.points(7.4, (red > rng.uniform(0.3, 0.7, shape)) & (sinus < 0.5), 0.66), 2.4, 1.3, dark=(0.4, 0.85)
    )
    bloody = smooth_noise(rng, shape, layers.px(28))
    layers.draw_red_cells(layers.points(6.3, (red > 0.6) & (bloody > -0.2), 0.62))


def _white_pulp(layers: Layers, white: Array, signed: Array) -> None:
    rng, shape = layers.rng, layers.shape
    pale = soft_step(signed - 45, 20) * soft_step(smooth_noise(rng, shape, layers.px(120)) - 0.2, 0.6)
    layers.add("cytoplasm", white * (0.34 + 0.1 * pale + 0.05 * smooth_noise(rng, shape, layers.px(5))))
    layers.add("fibre", white * 0.14)
    chance = white * (1 - 0.45 * pale)
    layers.draw_nuclei(layers.points(5.3, chance > rng.uniform(0.25, 0.75, shape), 0.9), 2.3, 1.1, dark=(0.5, 0.95))
    layers.draw_nuclei(layers.points(7.5, (pale > 0.5), 0.5), 3.2, 1.2, dark=(0.4, 0.6))


def _trabeculae(layers: Layers, signed: Array) -> None:
    """Bands of collagen that cross the red pulp, and one vein in it."""
    rng, shape = layers.rng, layers.shape
    course = smooth_noise(rng, shape, layers.px(420), 1)
    slope = np.hypot(*np.gradient(course)) + 1e-6
    away = np.abs(course - float(rng.uniform(-0.6, 0.6))) / slope * layers.um_per_px
    width = np.clip(9 + 7 * smooth_noise(rng, shape, layers.px(200), 1), 0, 26)
    band = soft_step(width - away, 3) * soft_step(-signed - 25, 10)
    strands, angles = fibres(rng, shape, layers.px(5), layers.px(60), layers.px(25))
    layers.clear(band)
    layers.add("fibre", band * (0.5 + 0.35 * strands))
    points = layers.points(10, band > 0.7, 0.5)
    layers.draw_nuclei(points, 1.9, 3.0, at(angles, points))
    free = layers.room() * (signed < -60)
    y, x = np.unravel_index(int(np.argmax(free * rng.uniform(0.3, 1, shape))), shape)
    draw_vessel(layers, (float(x), float(y)), float(rng.uniform(20, 40)), 7, bool(rng.random() < 0.5))
