"""How much of a session is left, and how a training says that it stopped because of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hubmap_kit.errors import HubmapError

SPARE = 1.3  # work may take this much longer than the longest of its kind so far
LARGEST_MARGIN_S = 300.0
MARGIN_SHARE = 0.05
BELIEVED_S = 900.0  # an older process on its first question is in a container that shows another machine's time
_STAT = Path("/proc/self/stat")


class Clock(Protocol):
    """Counts down to the moment when everything must be saved."""

    def fits(self, seconds: float) -> bool:
        """Whether work of that many seconds would end in time."""


@dataclass(frozen=True)
class SessionClock:
    """A limit in seconds, counted from the start of the process, and a margin at its end for saving and the tables.

    `started` is in seconds of `time.monotonic()`, which all processes of a machine share, so a clock may be sent to a
    worker process. A process that seems older than its limit counts from now.
    """

    limit_s: float
    started: float = field(default_factory=lambda: process_start())
    margin_s: float = -1.0  # below 0: a twentieth of the limit, five minutes at most

    def __post_init__(self) -> None:
        now = time.monotonic()
        if now - self.started >= self.limit_s:
            object.__setattr__(self, "started", now)
        if self.margin_s < 0:
            object.__setattr__(self, "margin_s", min(LARGEST_MARGIN_S, MARGIN_SHARE * self.limit_s))

    def left(self) -> float:
        """Seconds left before the margin begins; below 0 when it has begun."""
        return self.started + self.limit_s - self.margin_s - time.monotonic()

    def fits(self, seconds: float) -> bool:
        """Whether work of that many seconds would end before the margin begins."""
        return seconds <= self.left()


@dataclass(frozen=True)
class Stoppable:
    """A session's clock, if any, that also stops once a signal or the parent process told the training to."""

    clock: Clock | None
    told: Callable[[], bool]

    def fits(self, seconds: float) -> bool:
        """Whether nobody said to stop, and the work would end in time."""
        return not self.told() and (self.clock is None or self.clock.fits(seconds))


def was_told(clock: Clock | None) -> bool:
    """Whether the training was told to stop, which takes effect at once, not only where the next work does not fit."""
    return isinstance(clock, Stoppable) and clock.told()


class OutOfTime(HubmapError):
    """A training stopped itself before its session ends. Everything up to the last finished epoch is on disk.

    `where` says how far it came, such as "fold 1 after epoch 3 of 5"; `cause` why it stopped.
    """

    def __init__(self, where: str, advice: str = "", cause: str = "the time is up") -> None:
        super().__init__(f"{cause}: {where}" + (f"; {advice}" if advice else ""))
        self.where, self.cause = where, cause


def process_start(stat: Path = _STAT) -> float:
    """When this process started, in seconds of `time.monotonic()`; now where the system's answer is missing or
    implausible.
    """
    now = time.monotonic()
    try:
        # Field 22 counts clock ticks since the machine started; the name of the program before it may hold blanks.
        ticks = int(stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if 0 <= age <= BELIEVED_S else now
