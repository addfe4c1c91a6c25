"""What happens to a training tile before it is mixed with others, by organ: its scale, its stains, its detail."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np

from hubmap_kit.augment.stain import Reference, StainChange, needs_references, read_references
from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.config import AugmentConfig
from hubmap_kit.sample.slide import SlideSpec, draw

# Drawn slides as stain references, for where nobody has real ones: HuBMAP's spleen in haematoxylin and eosin, its
# kidney in PAS.

UM_PER_PX = 1.0  # the embedded slides show a few units each at this scale
STAIN_OF_ORGAN = {"spleen": "eosin", "kidney": "PAS"}
SIDE, SEED, EACH = 480, 0, 4  # of the references that are drawn where no folder is named
MEMBER = 9  # of the draws of one seed, so that no reference is also a picture that is drawn beside it


def drawn(organ: str, source: str, size: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An embedded slide (S, S, 3) uint8 of an organ and its mask (S, S)."""
    return draw(SlideSpec(organ, source, size, size, UM_PER_PX), np.random.default_rng(seed))


def embedded_references(size: int, seed: int, each: int = 1) -> list[Reference]:
    """`each` references of either stain, measured on drawn slides of `size` pixels; strengths vary as between
    laboratories.
    """
    made = []
    for number in range(each):
        words = f" {number + 1}" if each > 1 else ""
        for organ, stain in STAIN_OF_ORGAN.items():
            made.append(
                Reference.of(drawn(organ, "Hubmap", size, (seed, MEMBER + number))[0], f"embedded {stain}{words}")
            )
    return made


def references_or_drawn(folder: str | Path) -> list[Reference]:
    """The references of a folder, or, for an empty name, several drawn ones of either stain.

    Raises ConfigError and SlideError.
    """
    return read_references(folder) if str(folder) else embedded_references(SIDE, SEED, EACH)


# Detail that a coarser scanner would not have seen: a tile made small and large again. Its size and its mask stay.

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


class Changes:
    """The changes of an experiment.

    True where there are any; without one, nothing is drawn from the generator either.
    """

    def __init__(self, config: AugmentConfig) -> None:
        """Raises ConfigError and SlideError for stain references that are none."""
        choices = {organ: config.of(organ) for organ in ORGANS}
        self._zoom = {organ: each.zoom for organ, each in choices.items() if each.zoom != (1.0, 1.0)}
        self._resolution = Resolution(config)
        # The batched engine shakes stains where the network is, if it is to do so in all organs alike.
        on_device = config.engine == "batched" and jitter_on_device(config) > 0
        stained = (
            {}
            if on_device
            else {organ: each for organ, each in choices.items() if each.stain != "none" and each.stain_probability}
        )
        references = (
            references_or_drawn(config.stain_references)
            if any(needs_references(each.stain) for each in stained.values())
            else []
        )
        self._stain = {
            organ: StainChange(each.stain, each.stain_probability, references) for organ, each in stained.items()
        }

    def __bool__(self) -> bool:
        return bool(self._zoom or self._stain or self._resolution)

    def side(self, organ: str, size: int, random: np.random.Generator) -> int:
        """Pixels along the square that becomes a tile of `size`: even in the logarithm, so that twice and half are
        equally frequent.
        """
        if organ not in self._zoom:
            return size
        least, most = self._zoom[organ]
        return max(1, round(size / math.exp(random.uniform(math.log(least), math.log(most)))))

    def __call__(self, image: np.ndarray, organ: str, um_per_px: float, random: np.random.Generator) -> np.ndarray:
        """A tile (S, S, 3) uint8 whose pixels are `um_per_px` wide, with other stains and less detail; or as it was."""
        if organ in self._stain:
            image = self._stain[organ](image, random)
        return self._resolution(image, organ, um_per_px, random) if self._resolution else image


def jitter_on_device(config: AugmentConfig) -> float:
    """The share of tiles whose stains the batched engine shakes: where that is the method for all organs, in equal
    shares.
    """
    ways = {(each.stain, each.stain_probability) for each in (config, *config.organs.values())}
    return config.stain_probability if ways == {("jitter", config.stain_probability)} else 0.0
