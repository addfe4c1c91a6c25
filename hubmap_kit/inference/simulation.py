"""A competition rerun on a virtual clock: the governor against machines of any speed, in a second instead of nine
hours.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.competition.tables import Slide
from hubmap_kit.inference.governor import Governor

E = TypeVar("E")
# The organisers' metric files count 529 rows, 239 of them private, which are all HuBMAP; the private counts are
# inferred from winners' figures.
PRIVATE = {"kidney": 42, "prostate": 50, "largeintestine": 24, "spleen": 52, "lung": 71}
PUBLIC_ROWS = 290  # how many of these are HuBMAP is not known; here none is, which is the dearer case
TRAIN_SHARES = {"kidney": 99, "prostate": 93, "largeintestine": 58, "spleen": 53, "lung": 48}
HPA_SIDE = 3000
# HuBMAP slides are 160 to 4500 px; at their pixel sizes both ends, and the one public slide, are squares of about 1 mm.
HUBMAP_UM = (1000.0, 1035.0)


def real_mix(seed: int = 0) -> list[Slide]:
    """529 slides in random order with the organs and sizes of the hidden test as far as they are known; there are no
    files.
    """
    random = np.random.default_rng(seed)
    rows = [
        (organ, "Hubmap", round(random.uniform(*HUBMAP_UM) / FACTS[organ].um_per_px["Hubmap"]))
        for organ in ORGANS
        for _ in range(PRIVATE[organ])
    ]
    shares = np.array([TRAIN_SHARES[organ] for organ in ORGANS], float)
    rows += [(str(organ), "HPA", HPA_SIDE) for organ in random.choice(ORGANS, PUBLIC_ROWS, p=shares / shares.sum())]
    return [
        Slide(
            str(place),
            organ,
            source,
            side,
            side,
            FACTS[organ].um_per_px[source],
            FACTS[organ].thickness_um[source],
            Path(f"{place}.tiff"),
            None,
        )
        for place, (organ, source, side) in enumerate(rows[index] for index in random.permutation(len(rows)))
    ]


@dataclass(frozen=True)
class Machine:
    """A device: seconds of a network pass and of a slide beside them; `changes` by that factor half-way; `noise` is the
    standard deviation of the logarithm of a slide's seconds.
    """

    pass_s: float
    slide_s: float = 0.2
    changes: float = 1.0
    noise: float = 0.0


@dataclass(frozen=True)
class Simulated:
    """What a run did: when its last slide ended, the step of each slide (None: empty mask) in the table's order, and
    the governor.
    """

    ended_s: float
    steps: list[int | None]
    governor: Governor


def simulate(
    slides: Sequence[Slide],
    ladder: Sequence[E],
    passes: Callable[[Slide, E], float],
    machine: Machine,
    deadline_s: float,
    devices: int = 1,
    seed: int = 0,
) -> Simulated:
    """Run all slides on a virtual clock that starts at 0, with `devices` machines of the kind side by side, as
    `predict_slides` does.
    """
    return _Rerun(slides, ladder, passes, machine, deadline_s, devices, seed).run()


class _Rerun(Generic[E]):
    def __init__(
        self,
        slides: Sequence[Slide],
        ladder: Sequence[E],
        passes: Callable[[Slide, E], float],
        machine: Machine,
        deadline_s: float,
        devices: int,
        seed: int,
    ) -> None:
        self.now = 0.0
        self.slides, self.passes, self.machine, self.deadline_s, self.devices = (
            slides,
            passes,
            machine,
            deadline_s,
            devices,
        )
        self.random = np.random.default_rng(seed)
        self.governor: Governor[E] = Governor(slides, ladder, lambda: deadline_s - self.now, passes, devices)

    def seconds(self, slide: Slide, effort: E) -> float:
        speed = self.machine.changes if self.now > self.deadline_s / 2 else 1.0
        return (
            (self.machine.slide_s + self.passes(slide, effort) * self.machine.pass_s)
            * speed
            * float(np.exp(self.random.normal(0, self.machine.noise)))
        )

    def run(self) -> Simulated:
        waiting = deque(self.slides)
        # Each device: when it is free, its number, what it was busy with (slide, effort or None for a probe, seconds).
        busy: list[tuple[float, int, tuple[Slide, E | None, float] | None]] = [
            (0.0, device, None) for device in range(self.devices)
        ]
        ended = 0.0
        while busy:
            self.now, device, done = heapq.heappop(busy)
            slide, effort, seconds = done or (None, None, 0.0)
            if slide is not None and effort is not None:
                ended = self.now
                self.governor.observe(slide, effort, seconds)
            elif slide is not None:
                self.governor.observe_probe(slide, seconds)
            if slide is None or effort is not None:
                if not waiting:
                    continue
                slide = waiting.popleft()
                if done is None and (cheapest := self.governor.probe_effort) is not None:
                    warm_up, seconds = self.seconds(slide, cheapest), self.seconds(slide, cheapest)
                    heapq.heappush(busy, (self.now + warm_up + seconds, device, (slide, None, seconds)))
                    continue
            while (effort := self.governor.effort_for(slide)) is None and waiting:
                slide = waiting.popleft()
            if effort is not None:
                seconds = self.seconds(slide, effort)
                heapq.heappush(busy, (self.now + seconds, device, (slide, effort, seconds)))
        return Simulated(ended, [self.governor.records[slide.id].step for slide in self.slides], self.governor)


def best_possible(
    slides: Sequence[Slide],
    ladder: Sequence[E],
    passes: Callable[[Slide, E], float],
    machine: Machine,
    deadline_s: float,
    worth: Sequence[float],
    devices: int = 1,
) -> float:
    """More than any planner can reach: the sum of `worth` (of each step of the ladder; 0 without a mask) that a
    deadline allows at most.

    Lagrange's bound: for any price of a second, the best choice for each slide alone, plus what the deadline's seconds
    are worth. For a machine without noise.
    """
    speed = machine.changes if machine.changes < 1 else 1.0  # the faster of its two speeds: still a bound
    cost = (
        np.array(
            [
                [0.0, *(machine.slide_s + passes(slide, effort) * machine.pass_s for effort in ladder)]
                for slide in slides
            ]
        )
        * speed
    )
    value = np.array([0.0, *worth])
    prices = np.concatenate([[0.0], np.logspace(-8, 2, 2001)])
    return float(min((value - price * cost).max(axis=1).sum() + price * deadline_s * devices for price in prices))
