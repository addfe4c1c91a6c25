"""Mixing tiles: CutMix, copy-paste of whole units, MixUp. Pure functions of their arrays and a random generator.

A tile is an image (S, S, 3) uint8 and a mask (S, S) uint8 of 0 and 1, or of 0 and an organ's index; both tiles of a
pair have one size, and neither is changed. Whether the partner comes from the same organ is the caller's choice, who
draws it (`Mixing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np

from hubmap_kit.augment.mosaic import mosaic
from hubmap_kit.augment.stain import STAINED, amount
from hubmap_kit.errors import ConfigError, did_you_mean

Tile = tuple[np.ndarray, np.ndarray]
Draw = Callable[[], Tile]
FULL = 255  # a soft mask is uint8, of this where all is unit
COARSE = 4  # pixels along a cell of the map on which a place for a unit is sought
TRIES = 20  # places near those of that map that are tried before a unit is left out
ON_TISSUE = 0.95  # share of a pasted unit that must lie on tissue
SOFT = 1.5  # pixels: standard deviation of the edge of a pasted unit
SMALLEST = 30  # pixels of a unit that is worth pasting


def cutmix(tile: Tile, other: Tile, random: np.random.Generator, alpha: float = 1.0) -> Tile:
    """A rectangle of `other` laid over the same place of `tile`, its mask with it.

    Yun et al., CutMix, ICCV 2019: the tile keeps a share drawn from Beta(alpha, alpha), the rectangle has the tile's
    proportions and any centre, and what reaches over the edge is cut off. Unlike labels of classes, masks need no mean.
    """
    (image, mask), side = (tile[0].copy(), tile[1].copy()), (1 - random.beta(alpha, alpha)) ** 0.5
    spans = []
    for length in mask.shape:
        centre, half = random.integers(length), side * length / 2
        spans.append(slice(max(0, round(centre - half)), min(length, round(centre + half))))
    image[spans[0], spans[1]], mask[spans[0], spans[1]] = (part[spans[0], spans[1]] for part in other)
    return image, mask


def mixup(tile: Tile, other: Tile, random: np.random.Generator, alpha: float = 0.4) -> Tile:
    """Both tiles on top of each other, the first with a weight from Beta(alpha, alpha) of at least one half.

    Zhang et al., mixup, ICLR 2018. The mask comes back soft: (S, S) uint8, 0 to 255 for a share of 0 to 1, so that it
    stays as small as a hard one. Training divides by 255 where a run uses mixup at all (`Mixing.mask_scale`). Binary
    cross entropy, Dice, focal, Tversky and Jaccard take soft masks; the Lovasz loss is only defined for hard ones.
    """
    weight = float(random.beta(alpha, alpha))
    weight = max(weight, 1 - weight)
    image = cv2.addWeighted(tile[0], weight, other[0], 1 - weight, 0)
    return image, np.rint((tile[1] * weight + other[1] * (1 - weight)) * FULL).astype(np.uint8)


def copy_paste(tile: Tile, other: Tile, random: np.random.Generator, most: int = 4) -> Tile:
    """Up to `most` whole units of `other`, turned by quarters or mirrored, pasted on free tissue of `tile` with soft
    edges.

    Ghiasi et al., Simple copy-paste is a strong data augmentation method for instance segmentation, CVPR 2021. A unit
    is a connected part (8 neighbours) of the mask; those that the tile's border cuts are not whole and stay behind. A
    unit goes where it covers no other and 95 % of it lie on tissue; where there is no such place it is left out.
    """
    image, mask = tile[0].copy(), tile[1].copy()
    units = whole_units(other[1])
    if not units:
        return image, mask
    chosen = random.permutation(len(units))[: random.integers(1, most + 1)]
    ground = tissue_ground(image)
    for number in chosen:
        cut = _turned(*_cut_out(other[0], units[number]), random)
        place = _free_place(cut[1], ground, mask, random)
        if place is not None:
            _paste(image, mask, *cut, place, int(other[1].max()))
    return image, mask


def whole_units(mask: np.ndarray) -> list[np.ndarray]:
    """The units (bool planes as large as the mask) that are not cut by the border, in the order of their first pixels'
    rows.
    """
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    rows, cols = mask.shape
    units = []
    for number in range(1, count):
        left, top, width, height, area = stats[number]
        if area >= SMALLEST and left > 0 and top > 0 and left + width < cols and top + height < rows:
            units.append(labels == number)
    return units


def tissue_ground(image: np.ndarray) -> np.ndarray:
    """Where an image shows tissue (H, W) bool, the small holes in it included: a gland's lumen is inside the tissue."""
    stained = (amount(image) >= STAINED).astype(np.float32)
    reach = max(3, min(image.shape[:2]) // 16)
    return cv2.blur(stained, (reach, reach), borderType=cv2.BORDER_REFLECT_101) >= 0.4


def _cut_out(image: np.ndarray, unit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The unit's surroundings (h, w, 3) and how much of each pixel is unit (h, w) float32, with a margin for the soft
    edge.
    """
    left, top, width, height = cv2.boundingRect(unit.view(np.uint8))
    margin = int(np.ceil(3 * SOFT))
    rows, cols = slice(max(0, top - margin), top + height + margin), slice(max(0, left - margin), left + width + margin)
    soft = cv2.GaussianBlur(unit[rows, cols].astype(np.float32), (0, 0), SOFT, borderType=cv2.BORDER_CONSTANT)
    return image[rows, cols], soft


def _turned(image: np.ndarray, soft: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    quarters, mirrored = int(random.integers(4)), bool(random.integers(2))
    parts = [np.rot90(part, quarters)[:, :: -1 if mirrored else 1] for part in (image, soft)]
    return parts[0], parts[1]


def _free_place(
    soft: np.ndarray, ground: np.ndarray, mask: np.ndarray, random: np.random.Generator
) -> tuple[int, int] | None:
    """A place (top, left) where the unit fits, or None."""
    inside, room = soft >= 0.5, (mask.shape[0] - soft.shape[0], mask.shape[1] - soft.shape[1])
    if min(room) < 0:
        return None
    needed = ON_TISSUE * np.count_nonzero(inside)
    fitting = _fitting(inside, ground & (mask == 0))
    for place in random.integers(len(fitting), size=TRIES if len(fitting) else 0):
        # A fit on the coarse map is a good guess; every pixel decides.
        top, left = np.clip(fitting[place] * COARSE + random.integers(-COARSE, COARSE, 2), 0, room).tolist()
        here = slice(top, top + soft.shape[0]), slice(left, left + soft.shape[1])
        if not ((mask[here] > 0) & (soft > 0)).any() and np.count_nonzero(ground[here] & inside) >= needed:
            return top, left
    return None


def _fitting(inside: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Places (N, 2) on a map of COARSE pixels a cell where a unit's shape covers free ground alone, or nearly."""
    small = [
        cv2.resize(part.astype(np.float32), None, fx=1 / COARSE, fy=1 / COARSE, interpolation=cv2.INTER_AREA)
        for part in (free, inside)
    ]
    if min(np.subtract(small[0].shape, small[1].shape)) < 0:
        return np.zeros((0, 2), np.int64)
    covered = cv2.matchTemplate(small[0], small[1], cv2.TM_CCORR)
    return np.argwhere(covered >= ON_TISSUE * float(small[1].sum()))


def _paste(
    image: np.ndarray, mask: np.ndarray, unit: np.ndarray, soft: np.ndarray, place: tuple[int, int], label: int
) -> None:
    here = slice(place[0], place[0] + soft.shape[0]), slice(place[1], place[1] + soft.shape[1])
    share = soft[..., None]
    image[here] = np.rint(image[here] * (1 - share) + unit * share).astype(np.uint8)
    mask[here][soft >= 0.5] = label


def _mosaic(tile: Tile, draw: Draw, random: np.random.Generator) -> Tile:
    return mosaic([tile, draw(), draw(), draw()], random)


METHODS: dict[str, Callable[[Tile, Draw, np.random.Generator], Tile]] = {
    "mosaic": _mosaic,
    "copy_paste": lambda tile, draw, random: copy_paste(tile, draw(), random),
    "cutmix": lambda tile, draw, random: cutmix(tile, draw(), random),
    "mixup": lambda tile, draw, random: mixup(tile, draw(), random),
}


class Mixing:
    """The mixing of an experiment: each method with its own probability, at most one for a tile.

    `mask_scale` is what a mask must be divided by to be 0..1: 255 with mixup, whose masks are soft, else 1.
    """

    def __init__(self, probabilities: Mapping[Any, float]) -> None:
        """Raises ConfigError for an unknown method and for probabilities outside 0..1 or above 1 together."""
        for name, probability in probabilities.items():
            if name not in METHODS:
                raise ConfigError(
                    f"augment.mixing names '{name}'; known are {', '.join(METHODS)}{did_you_mean(name, METHODS)}"
                )
            if not 0 <= probability <= 1:
                raise ConfigError(f"augment.mixing.{name} is {probability:g}; a probability between 0 and 1 is needed")
        if sum(probabilities.values()) > 1 + 1e-9:
            raise ConfigError(
                f"augment.mixing has probabilities of {sum(probabilities.values()):g} together; a tile is mixed one"
                " way, so at most 1 is left"
            )
        self.names = [name for name, probability in probabilities.items() if probability > 0]
        self.bounds = np.cumsum([probabilities[name] for name in self.names])
        self.mask_scale = FULL if "mixup" in self.names else 1

    def __call__(self, tile: Tile, draw: Draw, random: np.random.Generator) -> Tile:
        """`draw()` gives another tile, of any organ or of the same as the caller has it; it is called only when
        needed.
        """
        place = int(np.searchsorted(self.bounds, random.random(), side="right")) if self.names else 0
        name = self.names[place] if place < len(self.names) else ""
        image, mask = METHODS[name](tile, draw, random) if name else tile
        return image, mask if name == "mixup" or self.mask_scale == 1 else mask * np.uint8(FULL)
