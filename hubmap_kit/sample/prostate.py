"""Prostate: lobed glandular acini (the units) in a stroma of muscle and collagen, with vessels and corpora amylacea."""

from __future__ import annotations

import numpy as np

from hubmap_kit.sample.fields import Array, at, blob, depth, fibres, fill, place, smooth_noise, soft_step
from hubmap_kit.sample.layers import Layers
from hubmap_kit.sample.vessels import Circle, scatter_vessels


def paint_prostate(layers: Layers) -> None:
    """Fill the layers with prostate; the mask is each acinus, lumen and epithelium (100 to 400 um across)."""
    rng = layers.rng
    _stroma(layers)
    area = layers.mask.size * rng.uniform(0.19, 0.27)
    acini = place(rng, layers.room(), (layers.px(48), layers.px(150)), area, layers.px(14), inside=0.75)
    scatter_vessels(layers, (14, 32), (5, 7), 4, acini, 12)
    _acini(layers, acini)


def _stroma(layers: Layers) -> None:
    rng = layers.rng
    strands, angles = fibres(rng, layers.shape, layers.px(6), layers.px(48), layers.px(26))
    fine, _ = fibres(rng, layers.shape, layers.px(3), layers.px(22), layers.px(26))
    muscle = soft_step(smooth_noise(rng, layers.shape, layers.px(120)) + 0.2, 0.9)
    torn = soft_step(strands - 0.83, 0.12) * soft_step(smooth_noise(rng, layers.shape, layers.px(70)) - 0.3, 0.8)
    layers.add("fibre", (0.35 + 0.55 * strands + 0.5 * (fine - 0.5)) * (0.65 + 0.35 * muscle) * (1 - torn))
    layers.add("cytoplasm", 0.55 * muscle * strands * (1 - torn))
    layers.add("marker", 0.6 * muscle * soft_step(strands - 0.5, 0.4) * (1 - torn))
    points = layers.points(10, torn < 0.4, 0.5)
    layers.draw_nuclei(points, 1.75, 3.2, at(angles, points), dark=(0.4, 0.85))
    layers.draw_nuclei(
        layers.points(11, smooth_noise(rng, layers.shape, layers.px(50)) > 1.3, 0.7), 2.3, 1.1, dark=(0.8, 1.0)
    )


def _acini(layers: Layers, circles: list[Circle]) -> None:
    rng, um, shape = layers.rng, layers.um_per_px, layers.shape
    glands = np.zeros(shape, np.uint8)
    for x, y, radius in circles:
        fill(glands, blob(rng, (x, y), radius * 0.68, 0.09, float(rng.uniform(1, 1.5))))
        start, lobes = rng.uniform(0, 2 * np.pi), int(rng.integers(3, 7))
        for lobe in range(lobes):
            angle = start + 2 * np.pi * (lobe + rng.uniform(-0.3, 0.3)) / lobes
            reach, size = radius * rng.uniform(0.40, 0.58), radius * rng.uniform(0.34, 0.48)
            fill(glands, blob(rng, (x + float(np.cos(angle) * reach), y + float(np.sin(angle) * reach)), size, 0.08))
    inner = depth(glands) * um
    layers.clear(soft_step(inner, 1))
    layers.mask |= glands
    ripple = smooth_noise(rng, shape, layers.px(22))
    papillae = np.exp(-np.square(smooth_noise(rng, shape, layers.px(75), 1) / np.float32(0.17))) * soft_step(
        42 - inner, 16
    )
    surface = np.clip(15 + 4.5 * ripple, 9, 30) + 30 * papillae - inner
    body = soft_step(surface, 3) * soft_step(inner, 1.5)
    layers.add("cytoplasm", body * (0.62 + 0.1 * smooth_noise(rng, shape, layers.px(4))))
    layers.add(
        "fibre", 0.5 * np.exp(-np.square((inner - 0.8) / np.float32(1.0))) * glands + 0.35 * (papillae > 0.9) * body
    )
    layers.add("marker", 0.35 * body)
    layers.draw_nuclei(layers.points(6.4, (inner > 2.5) & (inner < 10.5), 0.75), 2.7, 1.25)
    layers.draw_nuclei(layers.points(6.8, (surface > 4) & (inner > 12), 0.7), 2.7, 1.25)
    secretion = soft_step(-surface - 3, 4) * soft_step(smooth_noise(rng, shape, layers.px(130)) - 0.7, 0.5) * glands
    layers.add("mucin", 0.30 * secretion)
    layers.add("cytoplasm", 0.14 * secretion)
    _corpora(layers, -surface)


def _corpora(layers: Layers, into_lumen: Array) -> None:
    """Layered stones in some lumina; DAB often stains them dark."""
    rng = layers.rng
    spots = layers.points(70, into_lumen > 22, 0.14)
    for x, y in spots[:4].tolist():
        stone = np.zeros(layers.shape, np.uint8)
        fill(stone, blob(rng, (x, y), layers.px(rng.uniform(9, 20)), 0.05))
        inner = depth(stone) * layers.um_per_px
        rings = soft_step(inner, 1.5) * (0.8 + 0.2 * np.sin(inner * 1.5))
        layers.add("fibre", 0.8 * rings)
        layers.add("marker", rings)
