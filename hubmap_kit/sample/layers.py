"""The unstained slide: how much of each tissue component lies at each pixel, and the mask of the units."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from hubmap_kit.sample.fields import SUBPIXEL_BITS, Array, Shape, at, depth, hex_points, smooth_noise

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
        angles = self.rng.uniform(0, 180, count) if angles is None else angles + self.rng.normal(0, 12, count)
        size = self.px(radius_um) * self.rng.lognormal(0, 0.16, count)
        ratio = np.sqrt(stretch * self.rng.lognormal(0, 0.12, count))
        tone = (255 * self.rng.uniform(*dark, count)).astype(int)
        scale = 2**SUBPIXEL_BITS
        centres = np.round(points * scale).astype(int)
        axes = np.maximum(np.round(np.stack([size * ratio, size / ratio], 1) * scale), 4).astype(int)
        for centre, axis, angle, colour in zip(
            centres.tolist(), axes.tolist(), angles.tolist(), tone.tolist(), strict=True
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
