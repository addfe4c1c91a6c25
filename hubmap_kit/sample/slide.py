"""One synthetic slide: an organ at a physical scale, cut and stained as one source does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray

from hubmap_kit.sample import fields, intestine, organs
from hubmap_kit.sample.fields import Array, Layers, Shape, smooth_noise

# From components to colour by optical density: haematoxylin with DAB, eosin or PAS.

Vector = tuple[float, float, float]
HAEMATOXYLIN: Vector = (0.650, 0.704, 0.286)
DAB: Vector = (0.268, 0.570, 0.776)
EOSIN: Vector = (0.072, 0.990, 0.105)
RED_DAB: Vector = (0.335, 0.590, 0.735)
RED_EOSIN: Vector = (0.21, 0.82, 0.53)
PAS: Vector = (0.175, 0.972, 0.155)
Uptake = dict[str, float]  # component -> optical density at full concentration


@dataclass(frozen=True)
class Recipe:
    """One slide's staining, light and lens.

    `second` absorbance of the stain beside haematoxylin; `blue`, `other` optical density of either stain per component;
    `light` RGB of bare glass, 0 to 255; `blur_px` and `noise` (grey levels) of the scanner; `tilt` of the lamp from top
    to bottom.
    """

    second: Vector
    blue: Uptake
    other: Uptake
    light: tuple[float, float, float]
    blur_px: float
    noise: float
    tilt: float


def recipe(rng: np.random.Generator, stain: str) -> Recipe:
    """One slide's recipe for `stain` "dab", "eosin" or "pas"; strengths vary from slide to slide as between
    laboratories.
    """
    blue, other = {"dab": _dab, "eosin": _eosin, "pas": _pas}[stain](rng)
    red, green, violet = np.clip(rng.normal(243, 2.5) + rng.normal(0, 1.2, 3), 232, 250).tolist()
    first, last = {"dab": (DAB, RED_DAB), "eosin": (EOSIN, RED_EOSIN), "pas": (PAS, PAS)}[stain]
    return Recipe(
        second=_between(first, last, float(rng.uniform(0.5, 1.0))),
        blue=blue,
        other=other,
        light=(red, green, violet),
        blur_px=float(rng.uniform(0.45, 0.8)),
        noise=1.1,
        tilt=float(rng.normal(0, 0.05)),
    )


def _between(first: Vector, last: Vector, share: float) -> Vector:
    red, green, violet = ((1 - share) * a + share * b for a, b in zip(first, last, strict=True))
    return red, green, violet


def _scaled(uptake: Uptake, factor: float) -> Uptake:
    return {name: value * factor for name, value in uptake.items()}


def _dab(rng: np.random.Generator) -> tuple[Uptake, Uptake]:
    # Each HPA slide shows another antibody: in cell bodies, in connective tissue, in nuclei, or hardly anywhere.
    blue = _scaled(
        {"nuclei": 0.50, "cytoplasm": 0.14, "fibre": 0.17, "mucin": 0.03, "blood": 0.10}, rng.uniform(0.8, 1.15)
    )
    targets: list[Uptake] = [
        {"cytoplasm": 0.42, "fibre": 0.08, "marker": 0.5},
        {"cytoplasm": 0.10, "fibre": 0.34, "marker": 0.3},
        {"nuclei": 0.34, "cytoplasm": 0.14, "fibre": 0.06, "marker": 0.2},
        {"cytoplasm": 0.15, "fibre": 0.05, "marker": 0.9},
    ]
    target = {"nuclei": 0.05, "blood": 0.15} | targets[int(rng.integers(len(targets)))]
    return blue, _scaled(target, rng.uniform(0.6, 1.1))


def _eosin(rng: np.random.Generator) -> tuple[Uptake, Uptake]:
    blue = _scaled(
        {"nuclei": 0.62, "cytoplasm": 0.09, "fibre": 0.03, "mucin": 0.08, "blood": 0.02}, rng.uniform(0.85, 1.2)
    )
    pink = {"nuclei": 0.16, "cytoplasm": 0.30, "fibre": 0.42, "mucin": 0.04, "blood": 0.62}
    return blue, _scaled(pink, rng.uniform(0.8, 1.15))


def _pas(rng: np.random.Generator) -> tuple[Uptake, Uptake]:
    blue = _scaled({"nuclei": 0.58, "cytoplasm": 0.18, "fibre": 0.12, "blood": 0.08}, rng.uniform(0.85, 1.2))
    magenta = {"nuclei": 0.10, "cytoplasm": 0.13, "fibre": 0.31, "mucin": 0.58, "blood": 0.12}
    return blue, _scaled(magenta, rng.uniform(0.8, 1.15))


def _taken_up(layers: Layers, uptake: Uptake, evenness: Array) -> Array:
    total = np.zeros(layers.shape, np.float32)
    for name, density in uptake.items():
        total += np.float32(density) * layers.components[name]
    return total * np.maximum(evenness, 0.2)


def _turned(rng: np.random.Generator, vector: Vector) -> Array:
    turned = np.clip(np.array(vector) + rng.normal(0, 0.025, 3), 0.01, None)
    return (turned / np.linalg.norm(turned)).astype(np.float32)


def stained(layers: Layers, how: Recipe, dirt: Array) -> Array:
    """Light `(H, W, 3)` float32 RGB, 0 to 255, through the layers under one recipe; `dirt` is grey density on the
    glass.
    """
    rng, shape = layers.rng, layers.shape
    amounts = []
    for uptake in (how.blue, how.other):
        evenness = 1 + np.float32(0.07) * smooth_noise(rng, shape, min(shape) / 3)
        # Granules and fibrils are too fine to draw one by one, but without them the tissue looks like plastic.
        evenness += np.float32(0.20) * smooth_noise(rng, shape, layers.px(5), 3)
        amounts.append(_taken_up(layers, uptake, evenness) * layers.tissue)
    vectors = [_turned(rng, HAEMATOXYLIN), _turned(rng, how.second)]
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None]
    lamp = 1 - np.float32(0.02) * (y * y + np.float32(how.tilt) * y)
    image = np.empty((*shape, 3), np.float32)
    for channel in range(3):
        density = amounts[0] * vectors[0][channel] + amounts[1] * vectors[1][channel] + np.float32(0.4) * dirt
        image[..., channel] = np.float32(how.light[channel]) * lamp * np.exp(density * np.float32(-np.log(10)))
    return image


def exposed(rng: np.random.Generator, image: Array, how: Recipe) -> NDArray[np.uint8]:
    """What the scanner records: `image` slightly blurred, with sensor noise, rounded to uint8 RGB."""
    image = cv2.GaussianBlur(image, (0, 0), how.blur_px)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(np.rint(image + np.float32(how.noise) * grain), 0, 255).astype(np.uint8)


PAINTERS: Mapping[str, Callable[[Layers], None]] = MappingProxyType(
    {
        "kidney": organs.paint_kidney,
        "prostate": organs.paint_prostate,
        "largeintestine": intestine.paint_largeintestine,
        "spleen": organs.paint_spleen,
        "lung": organs.paint_lung,
    }
)
# The competition's page says "PAS or H&E" for HuBMAP without naming organs: PAS is the usual stain of kidney, H&E of
# the rest.
HUBMAP_STAINS: Mapping[str, str] = MappingProxyType(
    {"kidney": "pas", "prostate": "eosin", "largeintestine": "eosin", "spleen": "eosin", "lung": "eosin"}
)
COARSEST_UM_PER_PX = (
    1.7  # a nucleus is about 5 um; coarser slides are painted finer and then shrunk, as a scanner averages light
)

SMALLEST_UNIT_UM2 = 300.0  # a disc of 20 um


@dataclass(frozen=True)
class SlideSpec:
    """What to draw: organ and source spelled as in train.csv, size in pixels, and micrometres per pixel."""

    organ: str
    source: str
    height: int
    width: int
    um_per_px: float


def draw(spec: SlideSpec, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The slide `(H, W, 3)` uint8 RGB and its mask `(H, W)` uint8 0/1, the union of the units clipped to the tissue."""
    finer = max(math.ceil(spec.um_per_px / COARSEST_UM_PER_PX), 1)
    shape: Shape = (spec.height * finer, spec.width * finer)
    is_hpa = spec.source == "HPA"
    tissue = (fields.core if is_hpa else fields.section)(rng, shape)
    layers = Layers(rng, tissue, spec.um_per_px / finer)
    PAINTERS[spec.organ](layers)
    how = recipe(rng, "dab" if is_hpa else HUBMAP_STAINS[spec.organ])
    light = stained(layers, how, fields.debris(rng, shape))
    small = (spec.width, spec.height)
    image = exposed(rng, cv2.resize(light, small, interpolation=cv2.INTER_AREA), how)
    covered = (layers.mask * layers.inside).astype(np.float32)
    mask = (cv2.resize(covered, small, interpolation=cv2.INTER_AREA) >= 0.5).astype(np.uint8)
    mask[0, 0] = 0  # the scorer refuses a run that starts at pixel 0
    return image, _without_slivers(mask, spec.um_per_px)


def _without_slivers(mask: NDArray[np.uint8], um_per_px: float) -> NDArray[np.uint8]:
    """Drop the crumbs that a frayed edge cuts off a unit: no person would outline them."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] * um_per_px**2 >= SMALLEST_UNIT_UM2
    return (mask * large[labels]).astype(np.uint8)
