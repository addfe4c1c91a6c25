"""From a probability plane to a mask: the organ's threshold, and what happens to a mask after it.

`hubmap tune-thresholds` leaves its choices in the run: thresholds.json and, beside it, postprocess.json. A config that
says something itself always goes before them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import ValidationError

from hubmap_kit.config import InferenceConfig, PostprocessChoices
from hubmap_kit.errors import CheckpointError

# Steps on a mask: fill holes, open, drop small parts, shrink. All of them work on the whole mask at its full size.

# Vertical edges per pixel above which a mask is ragged (noise, not units): it has so many outlines that labels are
# faster then.
RAGGED = 0.04
LARGEST_KERNEL = 12  # above this radius two distance transforms are faster than the window of an erosion and a dilation


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """A new mask (H, W) uint8 0/1 without holes; what a part and the slide's border enclose together is no hole."""
    if _is_ragged(mask):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4, ltype=cv2.CV_32S)
        left, top, width, height = stats[:, :4].T
        inside = (left > 0) & (top > 0) & (left + width < mask.shape[1]) & (top + height < mask.shape[0])
        inside[0] = True  # label 0 is the mask itself
        return inside.astype(np.uint8).take(labels)
    outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return cv2.drawContours(np.zeros_like(mask), outlines, -1, 1, cv2.FILLED)


def drop_small(mask: np.ndarray, pixels: float) -> np.ndarray:
    """A new mask without the parts that have fewer than `pixels` pixels; the holes of a part do not count."""
    if _is_ragged(mask):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8, ltype=cv2.CV_32S)
        large = (stats[:, cv2.CC_STAT_AREA] >= pixels).astype(np.uint8)
        large[0] = 0  # label 0 is the background
        return large[np.asarray(labels)]
    outlines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if not outlines:
        return np.zeros_like(mask)
    parents = tree[0][:, 3]  # -1: the outline of a part, otherwise that of a hole in the part `parents[i]`
    areas = np.array(
        [_pixels_inside(outline, hole=parent >= 0) for outline, parent in zip(outlines, parents, strict=True)]
    )
    holes = parents >= 0
    own = np.where(holes, 0, areas)
    np.subtract.at(own, parents[holes], areas[holes])
    keep = own[np.where(holes, parents, np.arange(len(parents)))] >= pixels
    return cv2.drawContours(np.zeros_like(mask), [outlines[index] for index in np.flatnonzero(keep)], -1, 1, cv2.FILLED)


def _pixels_inside(outline: np.ndarray, hole: bool) -> int:
    """The number of pixels that an outline (N, 1, 2) encloses: with itself for a part, without itself for a hole.

    Pick's theorem (1899): a polygon through N lattice points with I points inside has the area I + N / 2 - 1. It also
    holds for outlines that run over a pixel twice, as they do along lines of a single pixel.
    """
    steps = len(outline) if len(outline) > 1 else 0  # one pixel alone is a walk of no steps
    return round(cv2.contourArea(outline) + (1 - steps / 2 if hole else 1 + steps / 2))


def erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """A new mask of the pixels from which no background lies within `radius` pixels (in a disk).

    Beyond the slide's border nothing is known, and it does not count as background: a unit that is cut off there keeps
    its pixels along the border and is taken off on its other sides only.
    """
    if radius > LARGEST_KERNEL:
        return (cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) > radius).view(np.uint8)
    return cv2.erode(mask, _disk(radius))


def opening(mask: np.ndarray, radius: int) -> np.ndarray:
    """A new mask of all disks of `radius` pixels that find room in it: bridges and specks that are thinner are gone.

    At the slide's border half a disk is enough, for the reason that `erode` gives.
    """
    core = erode(mask, radius)
    if radius > LARGEST_KERNEL and core.any():
        return (cv2.distanceTransform(1 - core, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) <= radius).view(np.uint8)
    return cv2.dilate(core, _disk(min(radius, LARGEST_KERNEL)))


def _is_ragged(mask: np.ndarray) -> bool:
    return int(np.count_nonzero(mask[1:] != mask[:-1])) > RAGGED * mask.size


def _disk(radius: int) -> np.ndarray:
    line = np.arange(-radius, radius + 1) ** 2
    return (line[:, None] + line <= radius**2).astype(np.uint8)


log = logging.getLogger(__name__)
FITTED_FILE = "postprocess.json"
LEAST = 0.01  # the lowest threshold that a rescue tries; below it a network tells tissue from tissue no more


def threshold_for(organ: str, source: str, fitted: Mapping[str, float], config: InferenceConfig) -> float:
    """The threshold of a slide of `organ` from `source`.

    The first of: the config's own for source and organ, the config's own for the organ, the one fitted for organ and
    source (key "kidney/HPA"), the one fitted for the organ ("kidney"), the config's default.
    """
    by_organ: Mapping[Any, float] = config.thresholds
    by_source: Mapping[Any, Mapping[Any, float]] = config.source_thresholds
    own = by_source.get(source, {}).get(organ, by_organ.get(organ))
    if own is not None:
        return own
    return fitted.get(f"{organ}/{source}", fitted.get(organ, config.threshold))


def choices_for(organ: str, config: InferenceConfig) -> PostprocessChoices:
    """What happens to the masks of an organ."""
    by_organ: Mapping[Any, PostprocessChoices] = config.postprocess.organs
    return by_organ.get(organ, config.postprocess)


def to_mask(plane: np.ndarray, threshold: float, organ: str, config: InferenceConfig) -> np.ndarray:
    """Mask (H, W) uint8 0/1 of a probability plane (H, W) float32, after everything that the config wants for this
    organ.

    With a default config these are exactly the pixels that reach the threshold.
    """
    choices = choices_for(organ, config)
    mask = after_steps(plane, threshold, choices)
    return rescue(plane, threshold, choices) if choices.rescue and not mask.any() else mask


def after_steps(plane: np.ndarray, threshold: float, choices: PostprocessChoices) -> np.ndarray:
    """The mask of the pixels that reach the threshold after every step but the rescue."""
    mask = (plane >= np.float32(threshold)).view(np.uint8)
    if choices.fill_holes:
        mask = fill_holes(mask)
    if choices.opening:
        mask = opening(mask, choices.opening)
    if choices.min_area:
        mask = drop_small(mask, choices.min_area * mask.size)
    return erode(mask, choices.shrink) if choices.shrink else mask


def rescue(plane: np.ndarray, threshold: float, choices: PostprocessChoices) -> np.ndarray:
    """The mask of a plane whose mask at `threshold` is empty: every slide has a unit, so an empty mask scores 0 for
    certain.

    The threshold is halved, down to LEAST, until the steps leave something. At last it is the part around the highest
    probability that reaches half of it, as it is: steps that took everything so far would take that too. A plane of
    zeros says nothing, and stays empty.
    """
    top = float(plane.max(initial=0.0))
    while (threshold := threshold / 2) >= LEAST:
        if top >= threshold and (mask := after_steps(plane, threshold, choices)).any():
            return mask
    if not top > 0:
        return np.zeros(plane.shape, np.uint8)
    _, labels = cv2.connectedComponents((plane >= np.float32(top / 2)).view(np.uint8), connectivity=8)
    return (labels == labels.flat[int(plane.argmax())]).view(np.uint8)


def read_fitted(run: Path, thresholds: Mapping[str, float]) -> dict[str, PostprocessChoices]:
    """The choices by organ that were fitted for a run; empty when there are none, or when they belong to other
    thresholds.

    `thresholds` are those of the run's thresholds.json. A threshold and what follows it are fitted together; where the
    thresholds were fitted anew since, as 'hubmap evaluate' does, the choices no longer fit them. Raises CheckpointError
    when the file is damaged.
    """
    path = run / FITTED_FILE
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        fitted_with = {str(key): float(value) for key, value in values["thresholds"].items()}
        choices = {str(organ): PostprocessChoices.model_validate(value) for organ, value in values["organs"].items()}
    except (ValueError, AttributeError, TypeError, KeyError, ValidationError) as error:
        raise CheckpointError(
            f"{path} is not what tune-thresholds writes; fit it again with 'hubmap tune-thresholds {run}' or delete it"
        ) from error
    if fitted_with != dict(thresholds):
        log.warning(
            "%s was fitted with other thresholds than those of thresholds.json now and is left out; run 'hubmap"
            " tune-thresholds' again",
            path,
        )
        return {}
    return choices


def with_fitted(config: InferenceConfig, fitted: Mapping[str, PostprocessChoices]) -> InferenceConfig:
    """`config` with the fitted choices wherever it has none of its own.

    Its own are: those of an organ that it names under `postprocess.organs` (an empty entry switches everything off),
    and, as soon as one of the choices for all organs is not the default, those for all.
    """
    own = config.postprocess
    if any(getattr(own, key) != field.default for key, field in PostprocessChoices.model_fields.items()):
        return config
    organs = {organ: choices for organ, choices in fitted.items() if organ not in own.organs}
    return config.model_copy(update={"postprocess": own.model_copy(update={"organs": organs | own.organs})})
