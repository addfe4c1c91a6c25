"""Kidney cortex: glomeruli (the units) among proximal and distal tubules, and a vessel or two."""

from __future__ import annotations

import cv2
import numpy as np

from hubmap_kit.sample.fields import Array, blob, depth, fill, packed_cells, place, smooth_noise, soft_step
from hubmap_kit.sample.layers import Layers
from hubmap_kit.sample.vessels import scatter_vessels

TUBULE_SPACING_UM = 54.0


def paint_kidney(layers: Layers) -> None:
    """Fill the layers with kidney; the mask is each glomerulus up to Bowman's capsule (150 to 200 um across)."""
    rng = layers.rng
    _tubules(layers)
    area = layers.mask.size * rng.uniform(0.035, 0.065)
    circles = place(rng, layers.room(), (layers.px(72), layers.px(98)), area, layers.px(60), inside=0.7)
    scatter_vessels(layers, (22, 45), (8, 12), int(rng.integers(1, 3)), circles, 20)
    for x, y, radius in circles:
        _glomerulus(layers, x, y, radius)


def _tubules(layers: Layers) -> None:
    rng, um = layers.rng, layers.um_per_px
    labels, border = packed_cells(rng, layers.shape, layers.px(TUBULE_SPACING_UM), layers.px(42), layers.px(6))
    count = int(labels.max()) + 1
    distal = rng.random(count) < 0.35
    wall = np.where(distal, rng.uniform(7, 9.5, count), rng.uniform(11, 16, count)).astype(np.float32)[labels]
    tone = np.where(distal, rng.uniform(0.35, 0.6, count), rng.uniform(0.75, 1.0, count)).astype(np.float32)[labels]
    loose = np.clip(1.4 + 1.5 * smooth_noise(rng, layers.shape, layers.px(60)), 0.5, 6)
    rounded = cv2.GaussianBlur(border * np.float32(um), (0, 0), layers.px(4))  # cells meet in corners, tubules do not
    inner = rounded - loose - np.float32(1.7)
    grain = smooth_noise(rng, layers.shape, layers.px(3.2))
    brush = wall + 2.0 * smooth_noise(rng, layers.shape, layers.px(7)) - inner
    body = soft_step(inner, 1.2) * soft_step(brush, 2.5)
    layers.add("cytoplasm", body * tone * (0.85 + 0.13 * grain))
    layers.add("marker", body * (distal & (rng.random(count) < 0.6))[labels])
    basement = np.exp(-np.square(inner / np.float32(1.1)))
    layers.add("fibre", 0.55 * basement + soft_step(-inner, 1.5) * (0.42 + 0.12 * grain))
    layers.add(
        "mucin", 0.25 * basement + 0.35 * np.exp(-np.square((brush - 1.0) / np.float32(1.6))) * body * (tone > 0.7)
    )
    layers.draw_nuclei(layers.points(7.6, (inner > 3) & (inner < 7.5), 0.55), 2.9, 1.1, dark=(0.5, 0.9))
    layers.draw_nuclei(layers.points(6.5, inner < -0.2, 0.3), 1.9, 2.2)
    layers.draw_red_cells(layers.points(6.5, inner < -2.2, 0.5))


def _glomerulus(layers: Layers, x: float, y: float, radius: float) -> None:
    rng, um = layers.rng, layers.um_per_px
    capsule = np.zeros(layers.shape, np.uint8)
    fill(capsule, blob(rng, (x, y), radius, 0.05, float(rng.uniform(1.0, 1.25))))
    inner = depth(capsule) * um
    layers.clear(soft_step(inner, 1))
    layers.mask |= capsule
    layers.add("fibre", 0.75 * np.exp(-np.square((inner - 1.2) / np.float32(1.1))) * capsule)
    layers.draw_nuclei(layers.points(13, (inner > 0.5) & (inner < 3.5), 0.7), 1.9, 2.2)
    tuft = np.zeros(layers.shape, np.uint8)
    shift = radius * 0.05 * rng.normal(size=2)
    fill(tuft, blob(rng, (x + float(shift[0]), y + float(shift[1])), radius * float(rng.uniform(0.86, 0.94)), 0.12))
    within = depth(tuft) * um * (inner > 3)
    _tuft(layers, within)


def _tuft(layers: Layers, within: Array) -> None:
    rng, shape = layers.rng, layers.shape
    lobes = smooth_noise(rng, shape, layers.px(26), 1)
    loops = smooth_noise(rng, shape, layers.px(9), 1)
    clefts = np.exp(-np.square(lobes / np.float32(0.16))) * (within < 30)
    open_loops = soft_step(loops - 0.35, 0.5)
    body = soft_step(within - 1, 2) * (1 - 0.85 * clefts) * (1 - 0.8 * open_loops)
    layers.add("cytoplasm", 0.30 * body)
    membranes = np.exp(-np.square((loops - 0.55) / np.float32(0.22))) * body
    layers.add("fibre", 0.28 * body + 0.35 * membranes)
    layers.add("mucin", 0.3 * membranes)
    layers.draw_nuclei(layers.points(8.4, (within > 2) & (body > 0.35), 0.74), 2.6, 1.4, dark=(0.5, 0.95))
    layers.draw_red_cells(layers.points(6.0, (open_loops > 0.8) & (within > 3), 0.35))
