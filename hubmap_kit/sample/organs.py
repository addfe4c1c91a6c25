"""Arteries and veins: round, ringed and hollow like some units, and never part of the mask."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from hubmap_kit.sample.fields import (
    Array,
    Layers,
    at,
    blob,
    depth,
    fibres,
    fill,
    packed_cells,
    place,
    smooth_noise,
    soft_step,
)

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


# Kidney cortex: glomeruli (the units) among proximal and distal tubules, and a vessel or two.

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


# Prostate: lobed glandular acini (the units) in a stroma of muscle and collagen, with vessels and corpora amylacea.


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


# Spleen: white pulp (the units) in red pulp, with trabeculae and a vein.


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


# Lung: air spaces between thin walls; the closed small alveoli are the units, torn and merged spaces are not.

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
