"""Keeping a deadline: how much effort each slide may take, so that all of them get a mask in time.

The governor measures the slides as they come, predicts the rest and gives up quality only as far as needed: it sets how
many network passes a slide may take at most, so dear slides step down the ladder first and small ones keep what the
config asks for. It steps back up when time turns out ample, never past the config. Before a slide begins, its own cost
must fit as well. Where even the cheapest effort does not fit for all, the cheapest slides are done first, and the
others get an empty mask.

What it cannot do is to interrupt a slide that has begun: a machine that stalls within the last slide is late by that
much.
"""

from __future__ import annotations

import csv
import io
import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import ConfigError
from hubmap_kit.files import write_text

# What a slide will cost, learned from the slides so far: seconds = rate * (fixed + passes).

HALF_LIFE = 8  # slides after which an observation counts half
MEMORY = 200  # observations that are kept
RECENT = 12  # the slides whose worst surprise is expected again
OUTLIER = 3.0  # a stall counts as this many times the usual, so that one of them does not change the plan
LEAST_SPREAD, GREATEST_SPREAD = 1.25, 4.0
FIXED_GRID = np.concatenate([[0.0], np.logspace(-3, 2, 41)])


@dataclass
class CostModel:
    """Learns seconds of a slide from the network passes it took (`effort.network_passes`).

    `fixed` is what a slide costs beside its passes, counted in passes; it comes from neighbouring slides of different
    size, so a machine that changes its speed does not disturb it. `rate` is seconds a pass, and follows the machine.
    """

    _passes: list[float] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    fixed: float = 0.0
    rate: float = float("nan")
    spread: float = GREATEST_SPREAD  # how many times its expected seconds a single slide may well take

    def __len__(self) -> int:
        return len(self._seconds)

    def observe(self, passes: float, seconds: float) -> None:
        """A slide (or a probe) of that many passes took `seconds`."""
        self._passes = [*self._passes, passes][-MEMORY:]
        self._seconds = [*self._seconds, max(seconds, 1e-6)][-MEMORY:]
        x, y = np.array(self._passes), np.array(self._seconds)
        self.fixed = _fixed(x, y)
        each = y / (self.fixed + x)
        usual = np.median(each[-9:])
        weights = (self.fixed + x) * 0.5 ** (np.arange(len(x))[::-1] / HALF_LIFE)
        self.rate = float(np.average(np.minimum(each, OUTLIER * usual), weights=weights))
        # The first slides tell little about how far the next may differ.
        surprise = max(1.1 * float((each / self.rate)[-RECENT:].max()), LEAST_SPREAD + 1.5 / len(x))
        self.spread = min(surprise, GREATEST_SPREAD)

    def forget(self) -> None:
        """Another machine from here on."""
        self._passes, self._seconds = [], []
        self.fixed, self.rate, self.spread = 0.0, float("nan"), GREATEST_SPREAD

    def seconds(self, passes: np.ndarray) -> np.ndarray:
        """Expected seconds of slides of that many passes; not a number before anything was observed."""
        return self.rate * (self.fixed + passes)


def _fixed(x: np.ndarray, y: np.ndarray) -> float:
    """The fixed part under which the ratios between neighbouring slides come out best (least absolute error of
    logarithms).

    Where all slides are alike nothing tells it, and it is 0.
    """
    differ = x[1:] != x[:-1]
    if not differ.any():
        return 0.0
    grid = FIXED_GRID[:, None] * np.median(x)
    found = np.log(grid + x[1:][differ]) - np.log(grid + x[:-1][differ])
    error = np.abs(found - np.log(y[1:] / y[:-1])[differ]).sum(axis=1)
    return float(grid[np.argmin(error + 0.02 * np.arange(len(grid)) / len(grid)), 0])


log = logging.getLogger(__name__)
E = TypeVar("E")
AIM = 0.97  # of the time left that a plan may fill
STEP_DOWN_TO = 0.94  # a new plan fills less, so that the next slide does not change it again
STEP_UP_TO = 0.88  # and a step up must leave more, or the two would alternate
STEADY = 4  # slides between a change and a step up
EXPLORE_SHARE = 0.05  # of the time left, that one slide may cost while nothing but a probe is known
EXPLORE_SPREAD = 1.5  # and how much more than its probe the cheapest effort may take
NO_STEP = "it might not be done in time even at the cheapest effort"
_CLOCK = re.compile(r"(\d{1,3}):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True)
class Record:
    """One decision: what was chosen for a slide and why, and what it took.

    Seconds; `effort` is empty for an empty mask.
    """

    slide: str
    effort: str
    step: int | None  # on the ladder, 0: as configured
    predicted_s: float | None
    measured_s: float | None
    left_s: float
    reason: str


class Governor(Generic[E]):
    """Chooses an effort for each slide so that all of them end before `left()` is 0.

    `ladder` goes from the config's own effort down to the cheapest; `passes(slide, effort)` tells what one costs, in
    any unit. `devices` work side by side. Pure logic and safe to ask from several threads; ask for slides in the order
    they begin.
    """

    def __init__(
        self,
        slides: Sequence[Slide],
        ladder: Sequence[E],
        left: Callable[[], float],
        passes: Callable[[Slide, E], float],
        devices: int = 1,
        describe: Callable[[E], str] = str,
    ) -> None:
        self.ladder, self.records = list(ladder), dict[str, Record]()
        self._left, self._devices, self._describe = left, devices, describe
        self._place = {slide.id: place for place, slide in enumerate(slides)}
        # A step that saves nothing for a slide, such as less overlap of a single window, must not look dearer either.
        table = np.array([[passes(slide, effort) for effort in self.ladder] for slide in slides], np.float64).reshape(
            len(slides), len(self.ladder)
        )
        self._passes = np.minimum.accumulate(table, axis=1)
        self._waiting = np.ones(len(slides), bool)
        self._begun: dict[str, tuple[float, float]] = {}  # id: (seconds left when it began, seconds expected)
        self._model, self._slides_seen = CostModel(), 0
        self._most, self._last_change = float("inf"), 0
        self._lock = threading.Lock()

    @property
    def probe_effort(self) -> E | None:
        """The effort of a first trial on a device whose speed is unknown, or None when there is nothing to choose
        from.
        """
        return self.ladder[-1] if len(self.ladder) > 1 else None

    def hopeless(self) -> bool:
        """Whether no slide can be done any more, so that none need even be read."""
        return self._left() <= 0

    def observe_probe(self, slide: Slide, seconds: float) -> None:
        """A trial of `slide` at the cheapest effort took that long; its mask is not used."""
        with self._lock:
            self._model.observe(self._passes[self._place[slide.id], -1], seconds)

    def skip(self, slide: Slide, reason: str) -> None:
        """That slide takes no device time, because of a fault of its own."""
        with self._lock:
            self._waiting[self._place[slide.id]] = False
            self.records[slide.id] = Record(slide.id, "", None, None, None, self._left(), reason)

    def forget_speed(self) -> None:
        """The device changed: what was measured no longer holds."""
        with self._lock:
            self._model.forget()
            self._slides_seen = 0

    def effort_for(self, slide: Slide) -> E | None:
        """The effort for a slide that begins now, or None when it must get an empty mask."""
        with self._lock:
            place, left = self._place[slide.id], self._left()
            self._waiting[place] = True  # again, where it is asked anew after a fault
            step, reason = self._choose(place, left)
            self._waiting[place] = False
            expected = (
                None if step is None or not len(self._model) else float(self._model.seconds(self._passes[place, step]))
            )
            if step is not None:
                self._begun[slide.id] = (left, expected or 0.0)
            effort = None if step is None else self.ladder[step]
            text = "" if effort is None else self._describe(effort)
            self.records[slide.id] = Record(slide.id, text, step, expected, None, left, reason)
            return effort

    def observe(self, slide: Slide, effort: E, seconds: float, worked: bool = True) -> None:
        """That slide took `seconds` of one device, waiting for its neighbours included; `worked` False: it failed
        half-way.
        """
        with self._lock:
            self._begun.pop(slide.id, None)
            self.records[slide.id] = replace(self.records[slide.id], measured_s=seconds)
            if worked:
                self._model.observe(self._passes[self._place[slide.id], self.ladder.index(effort)], seconds)
                self._slides_seen += 1

    # ---------------------------------------------------------------- the decision

    def _choose(self, place: int, left: float) -> tuple[int | None, str]:
        if left <= 0:
            return None, "the time is up"
        if not len(self._model):
            return 0, "nothing measured yet"
        seconds = self._model.seconds(self._passes)
        if not self._slides_seen:
            return self._explore(seconds[place], left)
        free = self._free(left)
        if self._seconds_of_rest(-1.0, seconds) > free * AIM and not self._among_cheapest(place, seconds, free * AIM):
            return None, "even the cheapest effort takes too long for all slides, and others take less time"
        self._plan(seconds, free)
        step = self._step(place)
        reason = (
            "as configured"
            if step == 0
            else "time is short: "
            + (f"at most {self._most:.6g} network passes" if self._most > 0 else "the least for all")
        )
        worst = seconds[place] * self._model.spread
        if worst[step] <= left:
            return step, reason
        fitting = np.flatnonzero(worst <= left)
        if not len(fitting):
            return None, NO_STEP
        return int(fitting[0]), "this slide alone might pass the deadline with more"

    def _explore(self, seconds: np.ndarray, left: float) -> tuple[int | None, str]:
        # A probe is far cheaper than a slide, so what it says of one is too much rather than too little.
        may_take = min(left / 2, max(EXPLORE_SHARE * left, 2 * left * self._devices / max(1, self._waiting.sum())))
        if seconds[-1] * EXPLORE_SPREAD > left:
            return None, NO_STEP
        fitting = np.flatnonzero(seconds <= may_take)
        step = int(fitting[0]) if len(fitting) else len(self.ladder) - 1
        return (
            step,
            "as configured, after a probe"
            if step == 0
            else "the first slide: a probe says that more may take too long",
        )

    def _free(self, left: float) -> float:
        """Seconds of all devices together that are not yet spoken for."""
        return self._devices * left - sum(max(0.0, expected - (then - left)) for then, expected in self._begun.values())

    def _among_cheapest(self, place: int, seconds: np.ndarray, free: float) -> bool:
        """Whether this slide is done when the waiting ones are done from the cheapest on, equal ones in their order."""
        cheapest = seconds[:, -1]
        before = (cheapest < cheapest[place]) | ((cheapest == cheapest[place]) & (np.arange(len(cheapest)) <= place))
        return float(cheapest[self._waiting & before].sum()) <= free

    def _plan(self, seconds: np.ndarray, free: float) -> None:
        """Move the most that a slide may take, if the rest does not fit or would still fit with clearly more."""
        begun = len(self.records)
        if self._seconds_of_rest(self._most, seconds) > free * AIM:
            most, word = self._greatest(seconds, free * STEP_DOWN_TO), "down"
        elif np.isfinite(self._most) and begun - self._last_change >= STEADY:
            most, word = max(self._most, self._greatest(seconds, free * STEP_UP_TO)), "up"
        else:
            return
        if most == self._most:
            return
        self._most, self._last_change = most, begun
        rest = np.flatnonzero(self._waiting)
        steps = Counter(self._step(place) for place in rest)
        usual = steps.most_common(1)[0][0]
        log.info(
            "governor, step %s: %.0f s left for %d slides, %.0f s expected; most of them get %s",
            word,
            free / self._devices,
            len(rest),
            self._seconds_of_rest(most, seconds) / self._devices,
            self._describe(self.ladder[usual]),
        )

    def _greatest(self, seconds: np.ndarray, free: float) -> float:
        """The greatest number of passes that every waiting slide may take for their sum to fit; -1 (the cheapest there
        is) where none does.
        """
        for end in (float("inf"), -1.0):  # everything as configured, everything at its cheapest
            fits = self._seconds_of_rest(end, seconds) <= free
            if fits == (end > 0):
                return end
        choices = np.unique(self._passes[self._waiting])
        low, high = 0, len(choices) - 1  # the sum grows with the choice
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._seconds_of_rest(choices[middle], seconds) <= free else (low, middle - 1)
        return float(choices[low])

    def _steps(self, most: float) -> np.ndarray:
        # The first step that is cheap enough, or as cheap as any: where one window is all there is, reducing it would
        # gain nothing.
        return (self._passes <= np.maximum(most, self._passes[:, -1:])).argmax(axis=1)

    def _step(self, place: int) -> int:
        return int(self._steps(self._most)[place])

    def _seconds_of_rest(self, most: float, seconds: np.ndarray) -> float:
        chosen = seconds[np.arange(len(seconds)), self._steps(most)]
        return float(chosen[self._waiting].sum())

    # ---------------------------------------------------------------- what it did

    def report(self) -> list[str]:
        """How many slides got which effort, one line each, from the config's own down; then how many got none, by
        reason.
        """
        counts = Counter((record.step, record.effort) for record in self.records.values())
        named = sorted(
            ((step, text, count) for (step, text), count in counts.items() if step is not None), key=lambda row: row[0]
        )
        lines = [
            f"{count} slides with {'all that is configured' if step == 0 else text}" for step, text, count in named
        ]
        none = Counter(record.reason for record in self.records.values() if record.step is None)
        return lines + [f"{count} slides without a mask: {reason}" for reason, count in none.items()]

    def write(self, path: Path) -> None:
        """Write every decision as a table, in the order in which they were made."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Record)], lineterminator="\n")
        writer.writeheader()
        for record in self.records.values():
            writer.writerow(
                {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(record).items()}
            )
        write_text(path, text.getvalue())


def parse_deadline(text: str) -> float:
    """Seconds of a text such as 00:10:00 or 8:30:00 (hours:minutes:seconds). Raises ConfigError."""
    found = _CLOCK.fullmatch(text.strip())
    seconds = sum(int(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    if not seconds:
        raise ConfigError(
            f"--deadline is '{text}', but hours:minutes:seconds above zero were expected; write ten minutes as 00:10:00"
        )
    return float(seconds)
