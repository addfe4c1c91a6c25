"""Random fields and outlines from which the tissue is drawn: noise, fibres, packed cells, wobbly blobs.

Lengths are pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

Array = np.ndarray  # float32 unless a docstring says otherwise
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
    return np.asarray(labels, np.int32), depth(inside)


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


def depth(mask: np.ndarray) -> Array:
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
        row, column = np.unravel_index(int(np.argmax(room)), room.shape)
        placed.append((float(column), float(row), radii[0]))
    return placed


# The unstained slide: how much of each tissue component lies at each pixel, and the mask of the units.

COMPONENTS = ("nuclei", "cytoplasm", "fibre", "mucin", "blood", "marker")


@dataclass
class Layers:
    """Component maps `(H, W)` float32, about 0 to 1, on one physical grid.

    `nuclei` chromatin; `cytoplasm` cell bodies; `fibre` collagen, muscle and basement membranes; `mucin` what PAS turns
    magenta; `blood` red cells; `marker` what this slide's antibody binds besides; `tissue` 0..1 coverage; `mask` 1
    inside a unit; `grain` clumps of chromatin inside every nucleus.
    """

    rng: np.random.Generator
    tissue: Array
    um_per_px: float
    components: dict[str, Array] = field(default_factory=dict)
    mask: NDArray[np.uint8] = field(init=False)
    grain: Array = field(init=False)

    def __post_init__(self) -> None:
        self.mask = np.zeros(self.shape, np.uint8)
        self.grain = smooth_noise(self.rng, self.shape, self.px(1.6), 1)
        for name in COMPONENTS:
            self.components[name] = np.zeros(self.shape, np.float32)

    @property
    def shape(self) -> Shape:
        """Height and width in pixels."""
        return self.tissue.shape[0], self.tissue.shape[1]

    @property
    def inside(self) -> NDArray[np.bool_]:
        """Where there is tissue rather than glass."""
        return self.tissue > 0.5

    def px(self, um: float) -> float:
        """Micrometres as pixels."""
        return um / self.um_per_px

    def room(self) -> Array:
        """Distance of each pixel to the edge of the tissue, in pixels."""
        return depth(self.inside.astype(np.uint8))

    def clear(self, where: Array) -> None:
        """Take every component away where `where` is 1."""
        keep = 1 - where
        for name in COMPONENTS:
            self.components[name] *= keep

    def add(self, name: str, amount: Array) -> None:
        """Add an amount of a component."""
        self.components[name] += amount.astype(np.float32, copy=False)

    def points(self, spacing_um: float, where: NDArray[np.bool_], keep: float = 1.0) -> Array:
        """Packed points `(n, 2)` that lie where `where` holds, each kept with probability `keep`."""
        points = hex_points(self.rng, self.shape, self.px(spacing_um))
        return points[at(where, points) & (self.rng.random(len(points)) < keep)]

    def draw_nuclei(
        self,
        points: Array,
        radius_um: float,
        stretch: float = 1.25,
        angles: Array | None = None,
        dark: tuple[float, float] = (0.55, 1.0),
    ) -> None:
        """Draw one oval nucleus of about `radius_um` at each point, along `angles` (degrees) or turned at random."""
        ink = np.zeros(self.shape, np.uint8)
        count = len(points)
        turned = self.rng.uniform(0, 180, count) if angles is None else angles + self.rng.normal(0, 12, count)
        size = self.px(radius_um) * self.rng.lognormal(0, 0.16, count)
        ratio = np.sqrt(stretch * self.rng.lognormal(0, 0.12, count))
        tone = (255 * self.rng.uniform(*dark, count)).astype(int)
        scale = 2**SUBPIXEL_BITS
        centres = np.round(points * scale).astype(int)
        axes = np.maximum(np.round(np.stack([size * ratio, size / ratio], 1) * scale), 4).astype(int)
        for centre, axis, angle, colour in zip(
            centres.tolist(), axes.tolist(), turned.tolist(), tone.tolist(), strict=True
        ):
            cv2.ellipse(ink, centre, axis, angle, 0, 360, colour, -1, cv2.LINE_AA, SUBPIXEL_BITS)
        drawn = cv2.GaussianBlur(ink, (0, 0), max(self.px(0.35), 0.3)).astype(np.float32) / 255
        drawn *= 1 + np.float32(0.14) * self.grain
        np.maximum(self.components["nuclei"], drawn, out=self.components["nuclei"])

    def draw_red_cells(self, points: Array) -> None:
        """Draw a disc of about 6 um at each point into the blood map."""
        ink = np.zeros(self.shape, np.uint8)
        radius = max(int(self.px(2.9) * 16), 6)
        for x, y in np.round(points * 16).astype(int).tolist():
            cv2.circle(ink, (x, y), radius, 210, -1, cv2.LINE_AA, 4)
        beside = 1 - np.minimum(
            self.components["nuclei"], 1
        )  # red cells have no nucleus and lie between those that have
        self.add("blood", beside * cv2.GaussianBlur(ink, (0, 0), 0.7).astype(np.float32) / 255)


# Where the tissue lies in the frame: a punched core as in HPA, or a section with a cut edge as in HuBMAP.


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
