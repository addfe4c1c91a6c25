"""The pixels that two lists of runs share, counted without a mask."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]
Exact = npt.NDArray[np.float64]  # whole numbers below 2^53, which floats hold exactly

_RUNS = 4096  # that are compared at once: small enough for the fast caches


def common(starts: Numbers, stops: Numbers, other_starts: Numbers, other_stops: Numbers) -> int:
    """The number of pixels that runs from `starts` to before `stops` share with the others.

    Both lists are sorted, without shared pixels within a list, and end below 2^53. Fastest with the shorter list first.
    """
    shared = 0
    for begin in range(0, len(starts), _RUNS):
        first, last = starts[begin], stops[begin : begin + _RUNS][-1]
        near = slice(np.searchsorted(other_stops, first, side="right"), np.searchsorted(other_starts, last))
        if near.start < near.stop:
            edges = _edges(starts[begin : begin + _RUNS], stops[begin : begin + _RUNS])
            below = _pixels_below(edges, other_starts[near], other_stops[near])
            shared += int(below[1::2].sum() - below[0::2].sum())
    return shared


def _pixels_below(positions: Exact, starts: Numbers, stops: Numbers) -> Exact:
    """How many pixels of runs, of which there are some, have a number below each position.

    It rises by one a pixel inside a run and stays level outside: linear between edges, and every step of it is exact.
    """
    counts = np.zeros(2 * len(starts))
    counts[1::2] = np.cumsum(stops - starts)
    counts[2::2] = counts[1:-1:2]
    return np.interp(positions, _edges(starts, stops), counts)


def _edges(starts: Numbers, stops: Numbers) -> Exact:
    """Start, stop, start, stop, ... of runs, (2 N,)."""
    edges = np.empty(2 * len(starts))
    edges[0::2], edges[1::2] = starts, stops
    return edges
