"""One synthetic slide: an organ at a physical scale, cut and stained as one source does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray

from hubmap_kit.sample import intestine, kidney, lung, outline, prostate, spleen, stains
from hubmap_kit.sample.fields import Shape
from hubmap_kit.sample.layers import Layers

PAINTERS: Mapping[str, Callable[[Layers], None]] = MappingProxyType(
    {
        "kidney": kidney.paint_kidney,
        "prostate": prostate.paint_prostate,
        "largeintestine": intestine.paint_largeintestine,
        "spleen": spleen.paint_spleen,
        "lung": lung.paint_lung,
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
    tissue = (outline.core if is_hpa else outline.section)(rng, shape)
    layers = Layers(rng, tissue, spec.um_per_px / finer)
    PAINTERS[spec.organ](layers)
    how = stains.recipe(rng, "dab" if is_hpa else HUBMAP_STAINS[spec.organ])
    light = stains.stained(layers, how, outline.debris(rng, shape))
    small = (spec.width, spec.height)
    image = stains.exposed(rng, cv2.resize(light, small, interpolation=cv2.INTER_AREA), how)
    covered = (layers.mask * layers.inside).astype(np.float32)
    mask = (cv2.resize(covered, small, interpolation=cv2.INTER_AREA) >= 0.5).astype(np.uint8)
    mask[0, 0] = 0  # the scorer refuses a run that starts at pixel 0
    return image, _without_slivers(mask, spec.um_per_px)


def _without_slivers(mask: NDArray[np.uint8], um_per_px: float) -> NDArray[np.uint8]:
    """Drop the crumbs that a frayed edge cuts off a unit: no person would outline them."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    large = stats[:, cv2.CC_STAT_AREA] * um_per_px**2 >= SMALLEST_UNIT_UM2
    return (mask * large[labels]).astype(np.uint8)
