"""Random fields and outlines from which the tissue is drawn: noise, fibres, packed cells, wobbly blobs.

Lengths are pixels.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Shape = tuple[int, int]

SUBPIXEL_BITS = 4  # OpenCV draws outlines in fixed point; 1/16 pixel keeps small nuclei round


def smooth_noise(rng: np.random.Generator, shape: Shape, period: float, octaves: int = 2) -> Array:
    """Smooth random field `(H, W)` with mean 0 and deviation 1 whose blobs are about `period` pixels wide."""
    height, width = shape
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        step = max(period / 2**octave, 1.0)
        grid = rng.standard_normal((int(height / step) + 4, int(width / step) + 4), dtype=np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * np.float32(0.5**octave)
    total -= total.mean()
    return total / max(float(total.std()), 1e-6)


def soft_step(distance: Array, softness: float = 1.0) -> Array:
    """0 up to zero, then a linear ramp `softness` wide up to 1, so that no outline is a hard stair."""
    return np.clip(distance / np.float32(softness), 0, 1)


def hex_points(rng: np.random.Generator, shape: Shape, spacing: float, jitter: float = 0.28) -> Array:
    """Points `(n, 2)` as x, y on a shaken hexagonal grid: evenly packed like cells, never two on one spot."""
    height, width = shape
    rows = np.arange(0.0, height, spacing * 0.866)
    columns = np.arange(0.0, width, spacing)
    x = columns[None, :] + (np.arange(len(rows)) % 2)[:, None] * spacing / 2
    y = np.repeat(rows[:, None], len(columns), axis=1)
    points = np.stack([x.ravel(), y.ravel()], axis=1) + rng.normal(0, jitter * spacing, (x.size, 2))
    points = points.astype(np.float32)  # before the bounds are checked, because rounding can reach the far edge
    inside = (points >= 0).all(axis=1) & (points[:, 0] < width) & (points[:, 1] < height)
    return points[inside]


def at(field: NDArray, points: Array) -> NDArray:
    """Values of a field `(H, W)` at points `(n, 2)` given as x, y."""
    return field[points[:, 1].astype(np.intp), points[:, 0].astype(np.intp)]


def packed_cells(
    rng: np.random.Generator, shape: Shape, spacing: float, length: float, bend: float
) -> tuple[NDArray[np.int32], Array]:
    """Irregular cells that fill the plane: labels `(H, W)` and the distance of each pixel to its cell's border.

    Each cell is the region nearest to one short stick of up to `length` pixels, so cells are round or long; `bend`
    moves borders.
    """
    seeds = np.full(shape, 255, np.uint8)
    for x, y in hex_points(rng, shape, spacing):
        angle, half = rng.uniform(0, np.pi), rng.uniform(0, length) / 2
        dx, dy = half * np.cos(angle), half * np.sin(angle)
        cv2.line(
            seeds, (round(float(x - dx)), round(float(y - dy))), (round(float(x + dx)), round(float(y + dy))), 0, 1
        )
    labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP)[1]
    labels = _bent(rng, labels.astype(np.float32), spacing, bend).astype(np.int32)
    inside = np.full(shape, 255, np.uint8)
    inside[:, 1:][labels[:, 1:] != labels[:, :-1]] = 0
    inside[1:, :][labels[1:, :] != labels[:-1, :]] = 0
    return labels, depth(inside)


def _bent(rng: np.random.Generator, labels: Array, spacing: float, bend: float) -> Array:
    y, x = np.mgrid[: labels.shape[0], : labels.shape[1]].astype(np.float32)
    x += np.float32(bend) * smooth_noise(rng, labels.shape, spacing * 0.7)
    y += np.float32(bend) * smooth_noise(rng, labels.shape, spacing * 0.7)
    return cv2.remap(labels, x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)


def fibres(rng: np.random.Generator, shape: Shape, thickness: float, length: float, bend: float) -> tuple[Array, Array]:
    """Wavy parallel strands: a texture `(H, W)` from 0 to 1 and the local direction in degrees, for nuclei to lie
    along.
    """
    height, width = shape
    turn = rng.uniform(0, np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    across = x * np.float32(np.sin(turn)) + y * np.float32(np.cos(turn))
    across += np.float32(bend) * smooth_noise(rng, shape, max(bend * 5, 8), 1)
    along = x * np.float32(np.cos(turn)) - y * np.float32(np.sin(turn))
    tile = cv2.GaussianBlur(
        rng.standard_normal((512, 512), dtype=np.float32), (0, 0), 1.1, borderType=cv2.BORDER_REFLECT
    )
    tile = np.clip(0.5 + tile / (4 * tile.std()), 0, 1)
    u, v = along * np.float32(2 / length), across * np.float32(2 / thickness)
    texture = cv2.remap(tile, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    slope_y, slope_x = np.gradient(cv2.GaussianBlur(across, (0, 0), 2))
    return texture, np.degrees(np.arctan2(-slope_x, slope_y)).astype(np.float32)


def blob(
    rng: np.random.Generator, centre: tuple[float, float], radius: float, wobble: float = 0.06, stretch: float = 1.0
) -> Array:
    """A closed wobbly outline `(n, 2)` as x, y around `centre`; `stretch` is the ratio of the long to the short
    axis.
    """
    theta = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    radii = np.ones_like(theta)
    for harmonic in range(2, 8):
        radii += wobble * rng.normal() / (harmonic - 1) * np.cos(harmonic * theta + rng.uniform(0, 2 * np.pi))
    radii = np.maximum(radii, 0.4) * radius
    turn = rng.uniform(0, np.pi)
    a, b = radii * np.cos(theta) * np.sqrt(stretch), radii * np.sin(theta) / np.sqrt(stretch)
    x = centre[0] + a * np.cos(turn) - b * np.sin(turn)
    y = centre[1] + a * np.sin(turn) + b * np.cos(turn)
    return np.stack([x, y], axis=1).astype(np.float32)


def fill(mask: NDArray[np.uint8], outline: Array) -> None:
    """Fill a closed outline `(n, 2)` with ones, in place."""
    cv2.fillPoly(mask, [np.round(outline * 2**SUBPIXEL_BITS).astype(np.int32)], 1, shift=SUBPIXEL_BITS)


def depth(mask: NDArray[np.uint8]) -> Array:
    """Distance in pixels from each pixel of a mask `(H, W)`, nonzero = inside, to the nearest pixel outside it; 0
    outside.
    """
    distance = cv2.distanceTransform(np.ascontiguousarray(mask, np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # OpenCV's last bits depend on the number of threads; true squared distances are whole numbers, so rounding them is
    # exact.
    return np.sqrt(np.rint(np.square(distance, dtype=np.float64))).astype(np.float32)


def place(
    rng: np.random.Generator, room: Array, radii: tuple[float, float], area: float, gap: float, inside: float = 0.5
) -> list[tuple[float, float, float]]:
    """Circles (x, y, radius) that do not overlap, until together they cover `area` square pixels; always at least one.

    `room` is the distance to the edge of the tissue: a centre needs `inside` times its radius, so an edge may cut a
    unit.
    """
    placed: list[tuple[float, float, float]] = []
    covered = 0.0
    for _ in range(600):
        radius = float(rng.uniform(*radii))
        x, y = float(rng.uniform(0, room.shape[1])), float(rng.uniform(0, room.shape[0]))
        if covered >= area or (placed and covered + np.pi * radius**2 > 1.4 * area):
            continue
        apart = all((x - a) ** 2 + (y - b) ** 2 > (radius + r + gap) ** 2 for a, b, r in placed)
        if apart and room[int(y), int(x)] >= inside * radius:
            placed.append((x, y, radius))
            covered += np.pi * radius**2
    if not placed:  # the tissue is too small for the rule: a slide is never without a unit
        y, x = np.unravel_index(int(np.argmax(room)), room.shape)
        placed.append((float(x), float(y), radii[0]))
    return placed
