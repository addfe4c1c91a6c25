"""How much is spent on a slide: what a deadline may take away, and nothing that it may not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hubmap_kit.config import InferenceConfig

VIEW_COUNTS = {"none": 1, "flips": 4, "d4": 8}
FEWER_VIEWS = {"d4": "flips", "flips": "none"}
OVERLAPS = (0.5, 0.25, 0.125, 0.0)  # where a step down may lead
MAX_REDUCE = 4


@dataclass(frozen=True)
class Effort:
    """How one slide is predicted: least `overlap` of windows, `views` by name, number of `folds`, and how many times coarser than
    the network's own scale (`reduce`, 1: not at all)."""

    overlap: float
    views: str
    folds: int
    reduce: int = 1

    def __str__(self) -> str:
        return f"overlap {self.overlap:g}, {VIEW_COUNTS[self.views]} views, {self.folds} folds" + (f", reduced {self.reduce}x" if self.reduce > 1 else "")


def full_effort(config: InferenceConfig, folds: int) -> Effort:
    """What the config asks for, with the `folds` networks that there are."""
    return Effort(config.overlap, config.views, folds)


def ladder(config: InferenceConfig, folds: int) -> list[Effort]:
    """All efforts from the config's own down to the cheapest, each giving up one thing more, in the order of `inference.ladder`."""
    steps = [full_effort(config, folds)]
    for name in config.ladder:
        while (lower := _lower(steps[-1], name)) is not None:
            steps.append(lower)
    return steps


def _lower(effort: Effort, name: str) -> Effort | None:
    if name == "overlap":
        below = next((overlap for overlap in OVERLAPS if overlap < effort.overlap), None)
        return None if below is None else replace(effort, overlap=below)
    if name == "views":
        return replace(effort, views=FEWER_VIEWS[effort.views]) if effort.views in FEWER_VIEWS else None
    if name == "folds":
        return replace(effort, folds=effort.folds // 2) if effort.folds > 1 else None
    return replace(effort, reduce=effort.reduce * 2) if effort.reduce < MAX_REDUCE else None
