"""The session clock: how much of a session is left, counted from the start of the process."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

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
