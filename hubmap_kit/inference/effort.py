"""How much is spent on a slide: what a deadline may take away, and nothing that it may not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import Experiment, InferenceConfig
from hubmap_kit.inference.normalise import is_normalised
from hubmap_kit.tiles.scaling import reduced_shape, scaled_shape

VIEW_COUNTS = {"none": 1, "flips": 4, "d4": 8}
FEWER_VIEWS = {"d4": "flips", "flips": "none"}
OVERLAPS = (0.5, 0.25, 0.125, 0.0)  # where a step down may lead
MAX_REDUCE = 4


@dataclass(frozen=True)
class Effort:
    """How one slide is predicted: least `overlap` of windows, `views` by name, number of `folds`, how many times
    coarser than the network's own scale (`reduce`, 1: not at all), and the methods by which it is predicted once more
    with other stains (`normalise`; slides of HPA are not).
    """

    overlap: float
    views: str
    folds: int
    reduce: int = 1
    normalise: tuple[str, ...] = ()

    def __str__(self) -> str:
        reduced = f", reduced {self.reduce}x" if self.reduce > 1 else ""
        stains = f", normalised by {' and '.join(self.normalise)}" if self.normalise else ""
        return f"overlap {self.overlap:g}, {VIEW_COUNTS[self.views]} views, {self.folds} folds{reduced}{stains}"


def full_effort(config: InferenceConfig, folds: int) -> Effort:
    """What the config asks for, with the `folds` networks that there are."""
    return Effort(config.overlap, config.views, folds, normalise=tuple(dict.fromkeys(config.normalise)))


def ladder(config: InferenceConfig, folds: int) -> list[Effort]:
    """All efforts from the config's own down to the cheapest, each giving up one thing more, in the order of
    `inference.ladder`.
    """
    steps = [full_effort(config, folds)]
    for name in config.ladder:
        while (lower := _lower(steps[-1], name)) is not None:
            steps.append(lower)
    return steps


def _lower(effort: Effort, name: str) -> Effort | None:
    if name == "normalise":
        return replace(effort, normalise=effort.normalise[:-1]) if effort.normalise else None
    if name == "overlap":
        below = next((overlap for overlap in OVERLAPS if overlap < effort.overlap), None)
        return None if below is None else replace(effort, overlap=below)
    if name == "views":
        return replace(effort, views=FEWER_VIEWS[effort.views]) if effort.views in FEWER_VIEWS else None
    if name == "folds":
        return replace(effort, folds=effort.folds // 2) if effort.folds > 1 else None
    return replace(effort, reduce=effort.reduce * 2) if effort.reduce < MAX_REDUCE else None


def team_ladder(ladders: Sequence[Sequence[Effort]]) -> list[tuple[Effort, ...]]:
    """The ladders of several runs that predict together as one: all step down at once, each no further than its own
    last step.
    """
    return [tuple(each[min(step, len(each) - 1)] for each in ladders) for step in range(max(map(len, ladders)))]


def windows_along(length: int, size: int, overlap: float) -> int:
    """How many windows of `size` an axis of `length` pixels takes, as `windows.plan_axis` places them."""
    return math.ceil(max(0, length - size) / max(1, math.floor(size * (1 - overlap)))) + 1


def network_passes(slide: Slide, settings: Experiment, effort: Effort) -> float:
    """What a slide costs the device: window-sized passes of one network with one view.

    Windows of glass and views with other stains count, though they may be skipped. The table's size is believed; a file
    that differs is measured all the same.
    """
    config = settings.inference
    height, width = reduced_shape(
        scaled_shape(slide.height, slide.width, slide.um_per_px, settings.scale, slide.organ), effort.reduce
    )
    if max(height, width) <= config.whole_slide:
        windows = height * width / config.window**2
    else:
        windows = windows_along(height, config.window, effort.overlap) * windows_along(
            width, config.window, effort.overlap
        )
    stains = 1 + len(effort.normalise) if is_normalised(slide.source) else 1
    return windows * VIEW_COUNTS[effort.views] * effort.folds * stains
