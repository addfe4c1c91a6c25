"""Detail that a coarser scanner would not have seen: a tile made small and large again. Its size and its mask stay.

The contest trains on slides at 0.4 um per pixel and is judged on others, of prostate down to 6.263 um per pixel.
"""

from __future__ import annotations

import cv2
import numpy as np

from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.config import AugmentConfig

COARSEST, FINEST = 0.06, 0.4  # factors by which the first place made prostates smaller, about
SMALLEST = 4  # pixels of a side that is left


def coarsened(image: np.ndarray, factor: float) -> np.ndarray:
    """An image (H, W, 3) uint8 with the detail of one that is `factor` times as large; unchanged for factors of 1 and
    more.
    """
    height, width = image.shape[:2]
    small = max(SMALLEST, round(width * factor)), max(SMALLEST, round(height * factor))
    if small[0] >= width or small[1] >= height:
        return image
    return cv2.resize(
        cv2.resize(image, small, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_LINEAR
    )


class Resolution:
    """The coarsening of an experiment: now and then to the pixel size of the organ's HuBMAP slides, prostates further
    still.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.hubmap = {organ: config.of(organ).hubmap_scale for organ in ORGANS}
        self.prostate = config.coarse_prostate

    def __bool__(self) -> bool:
        return any(self.hubmap.values()) or self.prostate > 0

    def __call__(self, image: np.ndarray, organ: str, um_per_px: float, random: np.random.Generator) -> np.ndarray:
        """A tile (H, W, 3) uint8 of an organ, whose pixels are `um_per_px` wide now.

        The same numbers are drawn for every organ.
        """
        hubmap, prostate = random.random(2)
        factor = random.uniform(COARSEST, FINEST)
        if organ == "prostate" and prostate < self.prostate:
            return coarsened(image, factor)
        if hubmap < self.hubmap[organ]:
            return coarsened(image, um_per_px / FACTS[organ].um_per_px["Hubmap"])
        return image
