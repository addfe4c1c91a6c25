"""Session clocks that run out after so many questions instead of seconds, so that a test decides where a training
stops.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Countdown:
    """A clock that says yes to `questions` questions; a batch asks once, so does whatever is begun."""

    questions: int

    def fits(self, seconds: float) -> bool:
        self.questions -= 1
        return self.questions >= 0


@dataclass
class Nearly:
    """A clock with a fixed number of seconds left, whatever the time."""

    seconds: float

    def fits(self, seconds: float) -> bool:
        return seconds <= self.seconds
