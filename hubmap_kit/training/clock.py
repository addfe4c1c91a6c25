"""What training asks of a session clock, and how it says that the time is up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from hubmap_kit.errors import HubmapError

SPARE = 1.3  # work may take this much longer than the longest of its kind so far


class Clock(Protocol):
    """Counts down to the moment when everything must be saved."""

    def fits(self, seconds: float) -> bool:
        """Whether work of that many seconds would end in time."""


@dataclass(frozen=True)
class Stoppable:
    """A session's clock, or none, that is also up once the training was told to stop: by a signal, or by its parent
    process.
    """

    clock: Clock | None
    told: Callable[[], bool]

    def fits(self, seconds: float) -> bool:
        return not self.told() and (self.clock is None or self.clock.fits(seconds))


def was_told(clock: Clock | None) -> bool:
    """Whether somebody told the training to stop, which does not even wait for what a clock leaves a margin for."""
    return isinstance(clock, Stoppable) and clock.told()


class OutOfTime(HubmapError):
    """A training stopped itself before its session ends. Everything up to the last finished epoch is on disk.

    `where` says how far it came, such as "fold 1 after epoch 3 of 5"; `cause` why it stopped.
    """

    def __init__(self, where: str, advice: str = "", cause: str = "the time is up") -> None:
        super().__init__(f"{cause}: {where}" + (f"; {advice}" if advice else ""))
        self.where, self.cause = where, cause


def longest(timing: Sequence[Mapping[str, Any]], key: str, session: str | None = None) -> float:
    """The largest value of a column of timing rows, in seconds, of one session if it is named; 0 without any.

    Another session may have run on another machine: what it measured says little about this one.
    """
    chosen = [row for row in timing if session is None or row.get("session") == session]
    return max((float(row.get(key) or 0.0) for row in chosen), default=0.0)


def read_timing(run: Path) -> list[dict[str, Any]]:
    """The timing rows of all folds of a run; those that cannot be read are left out, they only serve a guess."""
    rows: list[dict[str, Any]] = []
    for path in sorted(run.glob("fold*/timing.csv")):
        try:
            rows += pd.read_csv(path).fillna(0.0).to_dict("records")
        except (OSError, ValueError):
            continue
    return rows


# The session clock: how much of a session is left, counted from the start of the process.

LARGEST_MARGIN_S = 300.0
MARGIN_SHARE = 0.05
BELIEVED_S = (
    900.0  # a kernel that is older than this when it first asks is in a container that tells another machine's time
)
_STAT = Path("/proc/self/stat")


def process_start(stat: Path = _STAT) -> float:
    """When this process started, in seconds of `time.monotonic()`; now, where the system does not tell or is not to be
    believed.
    """
    now = time.monotonic()
    try:
        # Field 22 counts clock ticks since the machine started; the name of the program before it may hold blanks.
        ticks = int(stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return now
    return now - age if 0 <= age <= BELIEVED_S else now


@dataclass(frozen=True)
class SessionClock:
    """A limit in seconds, and a margin at its end for saving and for the tables.

    `started` is in seconds of `time.monotonic()`, which all processes of a machine share, so a clock may travel to a
    worker process. A process that is older than its limit is one whose age is not to be believed: it counts from now.
    """

    limit_s: float
    started: float = field(default_factory=process_start)
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
