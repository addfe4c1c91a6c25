"""What a slide will cost, learned from the slides so far: seconds = rate * (fixed + passes)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
