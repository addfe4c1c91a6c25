"""Large intestine: crypts (the units) with goblet cells in the lamina propria, a muscle layer beneath, lymphoid
aggregates.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from hubmap_kit.sample.fields import (
    SUBPIXEL_BITS,
    Array,
    Layers,
    at,
    blob,
    depth,
    fibres,
    fill,
    hex_points,
    smooth_noise,
    soft_step,
)

CRYPT_SPACING_UM = 98.0


def paint_largeintestine(layers: Layers) -> None:
    """Fill the layers with mucosa; the mask is each crypt up to its basement membrane (50 to 100 um across)."""
    muscle = _layers_of_the_wall(layers)
    _lamina_propria(layers, muscle)
    _muscle(layers, muscle)
    _crypts(layers, _sites(layers, muscle))


def _layers_of_the_wall(layers: Layers) -> Array:
    """1 in the muscle and submucosa at one side of the frame, 0 in the mucosa."""
    rng, (height, width) = layers.rng, layers.shape
    angle, side = rng.uniform(0, 2 * np.pi), min(layers.shape)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    outward = (x - width / 2) * np.float32(np.cos(angle)) + (y - height / 2) * np.float32(np.sin(angle))
    reach = side * rng.uniform(0.22, 0.42)
    return soft_step(outward - reach + side * 0.03 * smooth_noise(rng, layers.shape, side / 4), layers.px(8))


def _sites(layers: Layers, muscle: Array) -> list[tuple[float, float]]:
    """Crypt centres in packs, not in the muscle, the one deepest in the tissue first so that a slide is never without a
    unit.
    """
    rng = layers.rng
    points = hex_points(rng, layers.shape, layers.px(CRYPT_SPACING_UM), 0.09)
    packs = smooth_noise(rng, layers.shape, layers.px(260), 1)
    room = np.minimum(layers.room(), depth((muscle < 0.2).astype(np.uint8)))
    kept = points[(at(packs, points) > -0.75) & (at(room, points) > layers.px(14))]
    y, x = np.unravel_index(int(np.argmax(room)), room.shape)
    return [(a, b) for a, b in kept.tolist()] if len(kept) else [(float(x), float(y))]


def _lamina_propria(layers: Layers, muscle: Array) -> None:
    rng, shape = layers.rng, layers.shape
    mucosa = 1 - muscle
    web = smooth_noise(rng, shape, layers.px(11))
    gaps = soft_step(web - 0.75, 0.7)
    cells = smooth_noise(rng, shape, layers.px(55))
    strands, _ = fibres(rng, shape, layers.px(5), layers.px(35), layers.px(25))
    layers.add("fibre", mucosa * (1 - 0.9 * gaps) * (0.12 + 0.5 * strands))
    layers.add("cytoplasm", mucosa * (1 - 0.9 * gaps) * np.clip(0.25 + 0.1 * cells, 0.1, 0.5))
    layers.draw_nuclei(
        layers.points(6.6, (muscle < 0.5) & (gaps < 0.7) & (cells > -0.2), 0.62), 2.2, 1.2, dark=(0.5, 0.95)
    )
    layers.draw_nuclei(
        layers.points(8.5, (muscle < 0.5) & (gaps < 0.7) & (cells <= -0.2), 0.45), 1.9, 2.0, dark=(0.45, 0.9)
    )
    plasma = layers.points(17, (muscle < 0.5) & (cells > 0.3), 0.3)
    spots = np.zeros(shape, np.uint8)
    for x, y in plasma.tolist():
        fill(spots, blob(rng, (x, y), layers.px(3.8), 0.15))
    layers.add("marker", cv2.GaussianBlur(spots.astype(np.float32), (0, 0), 0.8))
    layers.draw_red_cells(layers.points(6.5, (muscle < 0.3) & (smooth_noise(rng, shape, layers.px(30)) > 1.9), 0.8))


def _muscle(layers: Layers, muscle: Array) -> None:
    strands, angles = fibres(layers.rng, layers.shape, layers.px(7), layers.px(90), layers.px(20))
    split = soft_step(strands - 0.86, 0.1)
    layers.add("fibre", muscle * (1 - split) * (0.5 + 0.4 * strands))
    layers.add("cytoplasm", 0.25 * muscle * (1 - split))
    points = layers.points(10, (muscle > 0.6) & (split < 0.3), 0.5)
    layers.draw_nuclei(points, 2.0, 3.2, at(angles, points))


def _crypts(layers: Layers, sites: list[tuple[float, float]]) -> None:
    rng, um, shape = layers.rng, layers.um_per_px, layers.shape
    crypts, outlines = np.zeros(shape, np.uint8), []
    for (x, y), free in zip(sites, _free_radii(sites), strict=True):
        stretch = float(rng.choice([1.0, 1.15, 1.4, 1.8], p=[0.35, 0.35, 0.2, 0.1]))
        radius = min(layers.px(float(rng.uniform(28, 48))), 0.93 * free / np.sqrt(stretch))
        outlines.append(blob(rng, (x, y), radius, 0.04, stretch))
        fill(crypts, outlines[-1])
    inner = depth(crypts) * np.float32(um)
    layers.clear(soft_step(inner, 1.5))
    layers.mask |= crypts
    deepest = _deepest(crypts, inner)
    body = soft_step(inner, 1.2)
    layers.add("fibre", 0.3 * np.exp(-np.square((inner - 0.4) / np.float32(0.9))) * crypts)
    layers.add("cytoplasm", body * (0.8 + 0.1 * smooth_noise(rng, shape, layers.px(5))))
    layers.add("nuclei", 0.1 * body)  # the cell bodies of this epithelium take up some blue
    slope_y, slope_x = np.gradient(cv2.GaussianBlur(inner, (0, 0), 2))
    points = layers.points(5.2, (inner > 2.4) & (inner < 6.6), 0.85)
    layers.draw_nuclei(points, 2.25, 1.7, at(np.degrees(np.arctan2(slope_y, slope_x)), points), dark=(0.7, 1.0))
    goblets = np.zeros(shape, np.uint8)
    for site, crypt in zip(sites, outlines, strict=True):
        _goblets(layers, goblets, crypt, site)
    drops = (
        cv2.GaussianBlur(goblets, (0, 0), max(layers.px(0.5), 0.5)).astype(np.float32)
        / 255
        * soft_step(inner - 5.5, 1.5)
    )
    lumen = soft_step(inner - deepest * (0.83 + 0.05 * smooth_noise(rng, shape, layers.px(40))), 2)
    for name in ("nuclei", "cytoplasm"):
        layers.components[name] *= 1 - 0.93 * np.maximum(drops, lumen)
    layers.add("mucin", 0.55 * drops + 0.1 * lumen)


def _free_radii(sites: list[tuple[float, float]]) -> list[float]:
    """Half the way from each crypt to the next one, so that two never melt into one."""
    if len(sites) < 2:
        return [np.inf]
    near = cKDTree(sites).query(sites, k=2)[0][:, 1]
    return (near / 2).tolist()


def _deepest(crypts: NDArray[np.uint8], inner: Array) -> Array:
    """For each pixel of a crypt, the depth of that crypt's middle in um."""
    labels, count = ndimage.label(crypts)
    middles = ndimage.maximum(inner, labels, np.arange(count + 1))
    middles[0] = np.inf  # outside the crypts nothing is deep enough to be a lumen
    return np.asarray(middles, np.float32)[labels]


def _goblets(layers: Layers, ink: NDArray[np.uint8], outline: Array, centre: tuple[float, float]) -> None:
    """Draw pale drops of mucin side by side around one crypt, longer towards its lumen."""
    rng = layers.rng
    spokes = outline - np.array(centre, np.float32)
    around = float(np.hypot(*np.diff(outline, axis=0, append=outline[:1]).T).sum())
    count = max(int(around / layers.px(19)), 4)
    for place in np.linspace(0, len(spokes), count, endpoint=False) + rng.uniform(0, len(spokes)):
        spoke = spokes[int(place + rng.uniform(-1.5, 1.5)) % len(spokes)]
        if rng.random() < 0.07:
            continue
        spot = np.array(centre) + spoke * rng.uniform(0.50, 0.66)
        reach = float(np.hypot(*spoke))
        long, wide = reach * rng.uniform(0.17, 0.27), around * 0.6 / count * rng.uniform(0.34, 0.5)
        axes = (max(int(long * 16), 8), max(int(wide * 16), 8))
        angle = float(np.degrees(np.arctan2(spoke[1], spoke[0])))
        cv2.ellipse(
            ink, (int(spot[0] * 16), int(spot[1] * 16)), axes, angle, 0, 360, 255, -1, cv2.LINE_AA, SUBPIXEL_BITS
        )
