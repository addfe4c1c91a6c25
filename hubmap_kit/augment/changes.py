"""What happens to a training tile before it is mixed with others, by organ: its scale, its stains, its detail."""

from __future__ import annotations

import math

import numpy as np

from hubmap_kit.augment.embedded import references_or_drawn
from hubmap_kit.augment.resolution import Resolution
from hubmap_kit.augment.stain import StainChange, needs_references
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import AugmentConfig


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
