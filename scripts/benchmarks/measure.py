"""Timing of alternatives side by side, and what came of it.

All callables of a comparison run in one process in turn, the order rotated from round to round, so that whatever else
the machine does meets all of them. A ratio is the median over rounds of (rival's time / our time) within that round:
load that comes and goes over minutes cancels out. Milliseconds are for scale only.
"""

from __future__ import annotations

import gc
import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

from benchmarks.memory import peak_memory, peak_rss

__all__ = [
    "OURS",
    "Comparison",
    "Row",
    "check_equal",
    "compare",
    "limit",
    "one_thread",
    "optional",
    "peak_memory",
    "peak_rss",
    "to_markdown",
]
OURS = "ours"
LEAST_ROUND = 0.002  # seconds; quicker callables are called several times a round, or the clock would be measured
Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One alternative: median and quartiles in the comparison's unit, its ratio to ours, and the bound that was set, if
    any.

    `target` is the least ratio of a rival, or the largest value of ours where `ratio` is None.
    """

    name: str
    median: float
    low: float
    high: float
    ratio: float | None = None
    target: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target was met; None without one."""
        if self.target is None:
            return None
        return self.median <= self.target if self.ratio is None else self.ratio >= self.target


@dataclass(frozen=True)
class Comparison:
    """One thing measured: our row first, then the rivals'.

    `missing` are rivals that are not installed, `notes` anything else.
    """

    name: str
    rows: list[Row]
    unit: str = "ms"
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def one_thread() -> None:
    """Keep the libraries that are already loaded, or will be, to one thread (see also the package's `__init__`)."""
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def optional(module: str) -> ModuleType | None:
    """A rival's module, or None where it cannot be imported here."""
    try:
        return importlib.import_module(module)
    except (
        ImportError,
        AttributeError,
        OSError,
    ):  # a rival that does not fit its own dependencies counts as absent too
        return None


def compare(
    name: str,
    ours: Call,
    rivals: Mapping[str, Call | None],
    target: Mapping[str, float] | None = None,
    repeats: int = 9,
    notes: Sequence[str] = (),
) -> Comparison:
    """Time `ours` against `rivals` (name -> callable, None: not installed), `repeats` rounds after one that does not
    count.

    `target` is the least ratio rival/ours by rival. Raises ValueError for a target of a rival that was not named.
    """
    unknown = set(target or {}) - set(rivals)
    if unknown or OURS in rivals:
        raise ValueError(f"{name}: targets for {sorted(unknown)}, rivals are {sorted(rivals)}; '{OURS}' is no rival")
    calls = {OURS: ours} | {rival: call for rival, call in rivals.items() if call is not None}
    times = _alternate(list(calls.values()), repeats)
    rows = []
    for index, rival in enumerate(calls):
        low, median, high = np.quantile(times[index], (0.25, 0.5, 0.75)) * 1e3
        ratio = None if index == 0 else float(np.median(times[index] / times[0]))
        rows.append(Row(rival, float(median), float(low), float(high), ratio, (target or {}).get(rival)))
    return Comparison(name, rows, missing=[rival for rival, call in rivals.items() if call is None], notes=list(notes))


def limit(
    name: str,
    value: float | Sequence[float],
    unit: str,
    at_most: float | None = None,
    others: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """A figure that is not a time, such as megabytes: ours (one, or several of the same) with its bound, rivals'
    figures beside it.
    """
    low, median, high = map(float, np.quantile(np.atleast_1d(value), (0.25, 0.5, 0.75)))
    rows = [Row(OURS, median, low, high, None, at_most)]
    rows += [
        Row(rival, other, other, other, other / median if median > 0 else math.inf)
        for rival, other in (others or {}).items()
    ]
    return Comparison(name, rows, unit, notes=list(notes))


def check_equal(name: str, ours: np.ndarray, rival: np.ndarray, tolerance: float = 0.0) -> None:
    """Raise ArithmeticError unless both results agree: a faster answer to another question is no rival."""
    worst = (
        float(np.abs(np.asarray(ours, np.float64) - np.asarray(rival, np.float64)).max())
        if ours.shape == rival.shape
        else math.inf
    )
    if not worst <= tolerance:
        raise ArithmeticError(
            f"{name}: results of shapes {ours.shape} and {rival.shape} differ by {worst:g}, allowed is {tolerance:g}"
        )


def _alternate(calls: Sequence[Call], repeats: int) -> np.ndarray:
    """Seconds (calls, repeats); round i starts with callable i, so none of them always runs on another's warm or cold
    caches.
    """
    counts = [max(1, math.ceil(LEAST_ROUND / max(_seconds(call, 1), 1e-7))) for call in calls]
    times = np.zeros((len(calls), repeats))
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats):
            for place in range(len(calls)):
                index = (turn + place) % len(calls)
                times[index, turn] = _seconds(calls[index], counts[index])
    finally:
        if collects:
            gc.enable()
    return times


def _seconds(call: Call, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def to_markdown(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table of all comparisons, one row an alternative, then what there is to say about them."""
    lines = [
        "| what | who | median | quartiles | unit | ratio to ours | target | met |",
        "|---|---|---:|---:|---|---:|---:|---|",
    ]
    for comparison in comparisons:
        for place, row in enumerate(comparison.rows):
            lines.append(f"| {comparison.name if place == 0 else ''} | {' | '.join(cells(row, comparison.unit))} |")
    return (
        "\n".join(
            [*lines, *([""] if remarks(comparisons) else []), *(f"- {remark}" for remark in remarks(comparisons))]
        )
        + "\n"
    )


def remarks(comparisons: Sequence[Comparison]) -> list[str]:
    """Notes of all comparisons and rivals that are not installed, each once, in order."""
    missing = [f"not installed, so not measured: {rival}" for comparison in comparisons for rival in comparison.missing]
    return list(dict.fromkeys([note for comparison in comparisons for note in comparison.notes] + missing))


def cells(row: Row, unit: str) -> list[str]:
    """A row's cells after the first column, as text."""
    target = "" if row.target is None else f"{'<=' if row.ratio is None else '>='} {row.target:g}"
    spread = "" if row.low == row.high else f"{_figure(row.low)} - {_figure(row.high)}"
    met = {None: "", True: "yes", False: "**no**"}[row.met]
    return [row.name, _figure(row.median), spread, unit, "" if row.ratio is None else f"{row.ratio:.2f}", target, met]


def _figure(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
