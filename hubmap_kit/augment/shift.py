"""Slides as HuBMAP might have made them: other stains, pixel sizes, section thickness and compression, the mask always
with them.

The contest trains on HPA (DAB and haematoxylin, 0.4 um per pixel, 4 um thick) and is judged on HuBMAP (PAS or
haematoxylin and eosin, an organ's own pixel size and thickness: competition.organs). These shifts imitate the second
from the first, for measuring, not for training: each is fixed by the slide's id and the shift's name, so that two
networks meet the same slides. How much a shift does is a choice, not a measurement, but for the pixel sizes and
thicknesses.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from hubmap_kit.augment.stain import TRANSFERS, Reference, density, keep_glass, light
from hubmap_kit.competition.organs import FACTS, HPA_THICKNESS_UM
from hubmap_kit.errors import ConfigError, did_you_mean

PLAIN, HUBMAP = "plain", "hubmap"
FORMAT = 1  # of what the shifts do: results of another number are not comparable
LOOKS = {"pas": ("pas",), "he": ("he", "h&e", "hne", "eosin")}  # words in a reference's name that tell its stain
LEAST_SIGMA, MOST_SIGMA = 0.6, 4.0  # of a blur, in pixels
QUALITY = (40, 76)  # of JPEG, from and below


class Shifted(NamedTuple):
    """A slide (H, W, 3) uint8 RGB, its mask (H, W) uint8 0/1, and the width of its pixels in micrometres."""

    image: np.ndarray
    mask: np.ndarray
    um_per_px: float


@dataclass(frozen=True)
class Looks:
    """Reference pictures by the stain that they show. A picture whose name tells no stain serves as both."""

    pas: tuple[Reference, ...]
    he: tuple[Reference, ...]

    @classmethod
    def of(cls, references: Iterable[Reference]) -> Looks:
        """Sort references by their names: "kidney_pas_1.tif", "target_HE.jpg"."""
        found: dict[str, list[Reference]] = {look: [] for look in LOOKS}
        for reference in references:
            words = set(re.split(r"[^a-z0-9&]+", Path(reference.name).stem.lower()))
            told = [look for look, names in LOOKS.items() if words & set(names)]
            for look in told or LOOKS:
                found[look].append(reference)
        return cls(tuple(found["pas"]), tuple(found["he"]))

    def check(self, shifts: Sequence[str]) -> None:
        """Raise ConfigError when a shift wants a stain that no reference shows."""
        for look, names in LOOKS.items():
            if not getattr(self, look) and {look, HUBMAP} & set(shifts):
                words = " or ".join(names)
                raise ConfigError(
                    f"no stain reference has {words} as a word of its name, but the shift {look} needs one; rename a"
                    " picture so"
                )


def names_of(text: str = "") -> list[str]:
    """Shifts from words such as "plain,scale,hubmap", in the battery's order; all of them when empty.

    Raises ConfigError.
    """
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if word not in SHIFTS:
            raise ConfigError(f"there is no shift '{word}'; known are {', '.join(SHIFTS)}{did_you_mean(word, SHIFTS)}")
    return [name for name in SHIFTS if name in wanted or not wanted]


def shifted(
    name: str, image: np.ndarray, mask: np.ndarray, organ: str, um_per_px: float, slide_id: str, looks: Looks
) -> Shifted:
    """A slide and its mask under the shift `name`; the input stays as it is.

    Raises ConfigError for a name that is no shift.

    The same id and name give the same result. "plain" changes nothing. "hubmap" is a stain (either, equally often),
    contrast, blur, the pixel size, then compression at that size.
    """
    if name not in SHIFTS:
        raise ConfigError(f"there is no shift '{name}'; known are {', '.join(SHIFTS)}{did_you_mean(name, SHIFTS)}")
    slide = Shifted(image, mask, um_per_px)
    for step in _steps_of(name, slide_id):
        slide = STEPS[step](slide, organ, _random(slide_id, name, step), looks)
    return slide


def _steps_of(name: str, slide_id: str) -> Sequence[str]:
    if name != HUBMAP:
        return () if name == PLAIN else (name,)
    return (("pas", "he")[int(_random(slide_id, name).integers(2))], "contrast", "blur", "scale", "jpeg")


def _random(*words: str) -> np.random.Generator:
    """Numbers that only these words decide; each step has its own, so that one step's draws do not move another's."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:8], "big"))


def restained(slide: Shifted, references: Sequence[Reference], random: np.random.Generator) -> Shifted:
    """The slide in the colours of one of the references, by one of the methods of augment.stain, all equally often."""
    reference = references[int(random.integers(len(references)))]
    method = list(TRANSFERS.values())[int(random.integers(len(TRANSFERS)))]
    image = method(slide.image, reference)
    if image is slide.image:  # Macenko's method leaves a picture alone that shows one stain
        image = TRANSFERS["reinhard"](slide.image, reference)
    return slide._replace(image=image)


def at_hubmap_size(slide: Shifted, organ: str) -> Shifted:
    """The slide at the pixel size of its organ's HuBMAP slides: a prostate of 3000 px at 0.4 um becomes one of 192 px
    at 6.263 um.

    A pixel of the new mask is inside when half of it was; where no unit is that large, the pixels that hold most of one
    are.
    """
    target = FACTS[organ].um_per_px["Hubmap"]
    height, width = (max(1, round(length * slide.um_per_px / target)) for length in slide.mask.shape)
    shape = height, width
    mask = _resized(slide.mask * np.uint8(255), shape) >= 128
    if slide.mask.any() and not mask.any():
        share = _resized(slide.mask.astype(np.float32), shape)
        mask = share == share.max()
    return Shifted(_resized(slide.image, shape), mask.view(np.uint8), target)


def _resized(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Area averages where it shrinks and bilinear where it grows, as everywhere in the kit (tiles.scaling)."""
    old = array.shape[:2]
    if old == shape:
        return array
    return cv2.resize(
        array, shape[::-1], interpolation=cv2.INTER_AREA if shape[0] * shape[1] < old[0] * old[1] else cv2.INTER_LINEAR
    )


def contrasted(slide: Shifted, organ: str, random: np.random.Generator) -> Shifted:
    """Denser tissue where HuBMAP's sections are thicker, and now and then paler tissue; glass stays.

    By the law of Beer and Lambert density grows with the thickness; stains do not reach as deep, so only a part of it
    counts.
    """
    factor = _thickness(organ) ** random.uniform(0.2, 0.5) * 2 ** random.uniform(-0.35, 0.35)
    changed = light(density(slide.image) * np.float32(factor))
    return slide._replace(image=keep_glass(slide.image, changed))


def blurred(slide: Shifted, organ: str, random: np.random.Generator) -> Shifted:
    """Less sharp, the more the thicker HuBMAP's sections are: what lies above and below the focus is seen with it."""
    micrometres = random.uniform(0.3, 0.6) + 0.05 * (_thickness(organ) - 1) * HPA_THICKNESS_UM
    sigma = min(max(micrometres / slide.um_per_px, LEAST_SIGMA), MOST_SIGMA)
    return slide._replace(image=cv2.GaussianBlur(slide.image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101))


def compressed(slide: Shifted, random: np.random.Generator) -> Shifted:
    """The slide after JPEG."""
    quality = int(random.integers(*QUALITY))
    done, data = cv2.imencode(".jpg", cv2.cvtColor(slide.image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if done else None
    if image is None:
        raise ValueError(f"OpenCV could not write a picture of shape {slide.image.shape} as JPEG")
    return slide._replace(image=cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


def _thickness(organ: str) -> float:
    """How many times as thick HuBMAP's sections are as HPA's."""
    return FACTS[organ].thickness_um["Hubmap"] / HPA_THICKNESS_UM


Step = Callable[[Shifted, str, np.random.Generator, Looks], Shifted]
STEPS: dict[str, Step] = {
    "pas": lambda slide, organ, random, looks: restained(slide, looks.pas, random),
    "he": lambda slide, organ, random, looks: restained(slide, looks.he, random),
    "scale": lambda slide, organ, random, looks: at_hubmap_size(slide, organ),
    "contrast": lambda slide, organ, random, looks: contrasted(slide, organ, random),
    "blur": lambda slide, organ, random, looks: blurred(slide, organ, random),
    "jpeg": lambda slide, organ, random, looks: compressed(slide, random),
}
SHIFTS = (PLAIN, *STEPS, HUBMAP)
IN_WORDS = {
    PLAIN: "as it is",
    "pas": "in the colours of a PAS reference",
    "he": "in the colours of a haematoxylin and eosin reference",
    "scale": "at the pixel size of the organ's HuBMAP slides, the truth with it, Dice counted there",
    "contrast": "tissue denser where HuBMAP's sections are thicker, or paler",
    "blur": "out of focus, more so for thicker sections",
    "jpeg": f"JPEG of quality {QUALITY[0]} to {QUALITY[1] - 1}",
    HUBMAP: "one of the two stains, contrast, blur, pixel size and JPEG, in this order",
}


def preview_shift(
    image: np.ndarray,
    mask: np.ndarray,
    organ: str,
    um_per_px: float,
    slide_id: str,
    looks: Looks,
    shifts: Sequence[str] = SHIFTS,
) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """The pictures of a contact sheet: image (H, W, 3), mask (H, W) and title of the slide under each shift."""
    items = []
    for name in shifts:
        made = shifted(name, image, mask, organ, um_per_px, slide_id, looks)
        height, width = made.mask.shape
        items.append((made.image, made.mask, f"{name}: {height} x {width} px at {made.um_per_px:g} um"))
    return items
