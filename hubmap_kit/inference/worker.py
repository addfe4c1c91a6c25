"""What one device does with a slide: effort, mean plane, and what to do when the device itself fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hubmap_kit.competition.tables import Slide
from hubmap_kit.inference.blend import shares
from hubmap_kit.inference.ensemble import Effort, Ensemble, ladder, network_passes, team_ladder
from hubmap_kit.inference.governor import Governor

log = logging.getLogger(__name__)
Team = Sequence[
    Ensemble
]  # all runs on one device; their planes are averaged, by the weights of a blend where the team is one
Efforts = tuple[Effort, ...]  # one for each ensemble of a team
DEVICE_FAULTS = (
    "CUDA error",
    "cuDNN error",
    "CUDNN_STATUS",
    "CUBLAS_STATUS",
    "device-side assert",
)  # short memory is none of them


class NoTime(Exception):
    """The governor has no time left for a slide."""


@dataclass(frozen=True)
class Predicted:
    """The mean plane (H, W) float32 of a slide, and its pixels where somebody still wants them."""

    plane: np.ndarray
    pixels: np.ndarray | None


def mean_plane(slide: Slide, pixels: Any, team: Team, efforts: Efforts | None = None) -> np.ndarray:
    """The mean probability (H, W) float32 of all ensembles for a slide's pixels (H, W, 3) uint8; weighted where the
    team is a blend.
    """
    each = efforts or (None,) * len(team)
    if (weights := shares(team, slide.organ)) is not None:
        return _weighted_plane(slide, pixels, team, each, weights)
    plane = team[0].probability(pixels, slide.um_per_px, each[0], slide.organ, slide.source)
    for ensemble, effort in zip(team[1:], each[1:], strict=True):
        plane += ensemble.probability(pixels, slide.um_per_px, effort, slide.organ, slide.source)
    if len(team) > 1:
        plane /= len(team)
    return plane


def _weighted_plane(
    slide: Slide, pixels: np.ndarray, team: Team, efforts: Sequence[Effort | None], weights: Sequence[float]
) -> np.ndarray:
    """The weighted mean; a run that counts nothing for this organ is not asked."""
    total: np.ndarray | None = None
    for ensemble, effort, weight in zip(team, efforts, weights, strict=True):
        if weight:
            plane = ensemble.probability(pixels, slide.um_per_px, effort, slide.organ, slide.source)
            plane *= np.float32(weight)
            total = plane if total is None else np.add(total, plane, out=total)
    assert total is not None  # weights sum to 1
    return total


def govern(slides: Sequence[Slide], team: Team, left: Callable[[], float], devices: int) -> Governor[Efforts]:
    """A governor for the ensembles of a team, which step down the ladder together."""

    def passes(slide: Slide, efforts: Efforts) -> float:
        weights = shares(team, slide.organ) or (1.0,) * len(team)
        return sum(
            network_passes(slide, each.experiment, effort)
            for each, effort, weight in zip(team, efforts, weights, strict=True)
            if weight
        )

    def describe(efforts: Efforts) -> str:
        return " + ".join(dict.fromkeys(map(str, efforts)))

    ladders = [ladder(ensemble.experiment.inference, len(ensemble.networks)) for ensemble in team]
    return Governor(slides, team_ladder(ladders), left, passes, devices, describe)


class Worker:
    """Predicts slides on one device. Call it with a slide and its pixels (None: there was no time to read them).

    `spare`, if given, makes a team for another device (the CPU as a rule), for when this device fails twice in a row
    with a fault of its own, from which a process does not recover. Raises NoTime, and what the network raises.
    """

    def __init__(
        self, team: Team, governor: Governor[Efforts] | None, keep_pixels: bool, spare: Callable[[], Team] | None
    ) -> None:
        self._team, self._governor, self._keep_pixels, self._spare = team, governor, keep_pixels, spare
        self._ready = False
        self._free_since = 0.0
        self._network_s_before = -_network_seconds(team)

    @property
    def network_s(self) -> float:
        """Seconds that this worker has spent in networks."""
        return self._network_s_before + _network_seconds(self._team)

    def __call__(self, slide: Slide, pixels: np.ndarray | None) -> Predicted:
        """Predict a slide of `pixels` (H, W, 3) uint8; where this device fails, the spare one takes over."""
        try:
            return self._predict(slide, pixels)
        except RuntimeError as error:
            if self._spare is None or not _is_device_fault(error):
                raise
            log.warning(
                "slide %s: %s failed (%s) and is tried again", slide.id, self._team[0].device, first_line(error)
            )
        try:
            return self._predict(slide, pixels)
        except RuntimeError as error:
            if not _is_device_fault(error):
                raise
            self._replace(error)
        return self._predict(slide, pixels)

    def _replace(self, error: Exception) -> None:
        # Never run on a broken card: written after CUDA's documentation, tried with a network that raises the same
        # error.
        assert self._spare is not None
        former, self._network_s_before = self._team[0].device, self.network_s
        self._team, self._spare, self._ready = self._spare(), None, False
        self._network_s_before -= _network_seconds(self._team)
        log.warning("%s is given up (%s); its slides go on on %s", former, first_line(error), self._team[0].device)
        if self._governor is not None:
            self._governor.forget_speed()

    def _predict(self, slide: Slide, pixels: np.ndarray | None) -> Predicted:
        efforts = None
        if self._governor is not None:
            if pixels is not None and not self._ready:
                self._probe(slide, pixels)
            efforts = self._governor.effort_for(slide)
            if efforts is None or pixels is None:
                raise NoTime
        self._use_device()
        worked = False
        try:
            plane = mean_plane(slide, pixels, self._team, efforts)
            worked = True
        finally:
            # Counted from the slide before, so that waiting for the reader or the writer is part of what a slide costs.
            seconds, self._free_since = time.monotonic() - self._free_since, time.monotonic()
            if self._governor is not None and efforts is not None:
                self._governor.observe(slide, efforts, seconds, worked)
        return Predicted(plane, pixels if self._keep_pixels else None)

    def _probe(self, slide: Slide, pixels: np.ndarray) -> None:
        """Learn the device's speed at the cheapest effort, warmed up; on a machine that is fast enough that is
        nothing.
        """
        assert self._governor is not None
        cheapest = self._governor.probe_effort
        self._use_device()
        if cheapest is None or self._governor.hopeless():
            return
        mean_plane(slide, pixels, self._team, cheapest)
        started = time.monotonic()
        mean_plane(slide, pixels, self._team, cheapest)
        self._free_since = time.monotonic()
        self._governor.observe_probe(slide, self._free_since - started)

    def _use_device(self) -> None:
        if not self._ready:
            if self._team[0].device.type == "cuda":
                torch.cuda.set_device(self._team[0].device)  # the current card is each thread's own
            self._ready, self._free_since = True, time.monotonic()


def _network_seconds(team: Team) -> float:
    return sum(ensemble.seconds_in_network for ensemble in team)


def _is_device_fault(error: Exception) -> bool:
    return any(sign in str(error) for sign in DEVICE_FAULTS)


def first_line(error: Exception) -> str:
    """What an error says, as far as it fits a line; CUDA's errors go on for several."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
