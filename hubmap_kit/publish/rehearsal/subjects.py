"""What a hidden slide shows: synthetic tissue, or a real training slide, brought to the size that is wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.sample.slide import SlideSpec, draw
from hubmap_kit.tiles.convert import decode_for

DRAWN_SIDE = 1536  # larger slides are drawn coarser and enlarged: drawing 4500 px takes half a minute and 2 GB


@dataclass(frozen=True)
class Subject:
    """Image `(H, W, 3)` uint8 RGB, its mask `(H, W)` uint8 0/1, and what they are."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    organ: str
    source: str
    um_per_px: float


class Wanted(Protocol):
    """The part of a hidden slide's plan that says what to show."""

    organ: str
    source: str
    height: int
    width: int
    um_per_px: float


def drawn(plan: Wanted, rng: np.random.Generator) -> Subject:
    """Synthetic tissue at the planned physical scale."""
    factor = max(1, -(-max(plan.height, plan.width) // DRAWN_SIDE))
    height, width = -(-plan.height // factor), -(-plan.width // factor)
    image, mask = draw(SlideSpec(plan.organ, plan.source, height, width, plan.um_per_px * factor), rng)
    image, mask = _resized(image, mask, plan.height, plan.width)
    return Subject(image, mask, plan.organ, plan.source, plan.um_per_px)


def real_subjects(data: Path, rng: np.random.Generator) -> Callable[[Wanted, np.random.Generator], Subject]:
    """A source of real slides with their masks, from the training table of `data`: of the planned organ where there is
    one.
    """
    slides = read_train(data / "train.csv")
    order = [slides[index] for index in rng.permutation(len(slides))]

    def subject(plan: Wanted, _: np.random.Generator) -> Subject:
        slide = next((slide for slide in order if slide.organ == plan.organ), order[0])
        order.append(order.pop(order.index(slide)))  # every slide comes once before any comes again
        return _real(slide, plan)

    return subject


def _real(slide: Slide, plan: Wanted) -> Subject:
    """The slide scaled until it covers the wanted size, and its middle: the aspect stays, and so does the meaning of a
    pixel size.
    """
    image = slide_files.read(slide.path)
    mask = decode_for(slide, *image.shape[:2])
    zoom = max(plan.height / image.shape[0], plan.width / image.shape[1])
    height, width = (
        max(wanted, round(side * zoom)) for wanted, side in zip((plan.height, plan.width), image.shape[:2], strict=True)
    )
    image, mask = _resized(image, mask, height, width)
    top, left = (height - plan.height) // 2, (width - plan.width) // 2
    image, mask = (array[top : top + plan.height, left : left + plan.width].copy() for array in (image, mask))
    mask[0, 0] = 0
    return Subject(image, mask, slide.organ, slide.source, round(slide.um_per_px / zoom, 4))


def _resized(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if image.shape[:2] == (height, width):
        return image, mask
    shrinks = height < image.shape[0]
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    mask[0, 0] = 0  # the scorer refuses a run that starts there
    return image, mask
