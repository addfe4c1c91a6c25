"""Run-length strings of the competition: "start length start length ...", pixels counted down the columns.

Pixel (y, x) of a slide with `height` rows has the number `x * height + y` (column-major), and the numbers begin at `origin`:
0 in the competition's own train.csv (its page says 1, its data say 0, and shifting by one pixel costs about half a percent of
Dice). The whole kit uses `origin=0`; `parse` and `format_runs` are the only two places that read or write that number.

In memory, runs are always 0-based, sorted, and no pixel is in two runs. The empty string is the empty mask.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hubmap_kit.errors import RleError

_NUMBERS = re.compile(r"[0-9\s]*", re.ASCII)
_LIMIT = 2**62  # no slide has so many pixels; larger numbers would overflow when a start and a length are added


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of set pixels: `starts` (N,) int64, 0-based and column-major, and `lengths` (N,) int64, each at least 1."""

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    @property
    def stops(self) -> npt.NDArray[np.int64]:
        """One past the last pixel of each run, (N,) int64."""
        return self.starts + self.lengths

    def __len__(self) -> int:
        return len(self.starts)


def parse(text: str, origin: int = 0) -> Runs:
    """Read a run-length string whose first pixel has the number `origin`.

    Raises RleError when the text is not an even count of whole numbers, a length is 0, a start is below `origin`, or runs are
    out of order or overlap. Runs that touch are allowed.
    """
    values = _numbers(text)
    if values.size % 2:
        raise RleError(
            f"The run-length text {_excerpt(text)} holds {values.size} numbers, but starts and lengths come in pairs; "
            "look for a cut-off string and write it again"
        )
    runs = Runs(values[0::2] - origin, values[1::2].copy())
    _check_runs(runs, origin)
    return runs


def format_runs(runs: Runs, origin: int = 0) -> str:
    """Write runs as a run-length string whose first pixel has the number `origin`."""
    pairs = np.stack([runs.starts + origin, runs.lengths], axis=1)
    return " ".join(map(str, pairs.ravel().tolist()))


def encode(mask: npt.NDArray[np.integer] | npt.NDArray[np.bool_], origin: int = 0) -> str:
    """The run-length string of a mask (H, W) of integers or booleans, nonzero = inside, any memory order.

    Raises ValueError for a mask that is not two-dimensional or holds floats (threshold probabilities first).
    """
    return format_runs(runs_of(mask), origin)


def runs_of(mask: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Runs:
    """The maximal runs of a mask (H, W) of integers or booleans, nonzero = inside; raises ValueError like `encode`."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype.kind not in "bui":
        raise ValueError(f"a mask must be (H, W) of integers or booleans, found shape {mask.shape} of {mask.dtype}")
    inside = mask if mask.dtype == np.bool_ else mask != 0  # one byte a pixel, whatever the mask's own type
    pixels = inside.ravel(order="F")
    if not pixels.size:
        return Runs(np.empty(0, np.int64), np.empty(0, np.int64))
    edges = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    first = [0] if pixels[0] else []
    last = [pixels.size] if pixels[-1] else []
    edges = np.concatenate([np.array(first, np.int64), edges.astype(np.int64, copy=False), np.array(last, np.int64)])
    return Runs(edges[0::2], edges[1::2] - edges[0::2])


def decode(text: str, height: int, width: int, origin: int = 0) -> npt.NDArray[np.uint8]:
    """The mask (height, width) uint8 0/1, C-contiguous, of a run-length string.

    Raises RleError when the text is malformed (see `parse`) or a run leaves the slide.
    """
    runs = parse(text, origin)
    check_inside(runs, height, width)
    pixels = height * width
    spans = np.empty(2 * len(runs) + 1, np.int64)  # gap, run, gap, run, ..., gap
    spans[1::2] = runs.lengths
    spans[0] = runs.starts[0] if len(runs) else pixels
    spans[2:-1:2] = runs.starts[1:] - runs.stops[:-1]
    if len(runs):
        spans[-1] = pixels - runs.stops[-1]
    values = (np.arange(spans.size) % 2).astype(np.uint8)
    return np.ascontiguousarray(np.repeat(values, spans).reshape(width, height).T)


def check_inside(runs: Runs, height: int, width: int) -> None:
    """Raise RleError when a run leaves a slide of height x width pixels."""
    if len(runs) and runs.stops[-1] > height * width:
        start, length = int(runs.starts[-1]), int(runs.lengths[-1])
        raise RleError(
            f"The run of {length} pixels from pixel {start} (0-based) goes beyond the {height}x{width} = {height * width} pixels "
            "(height x width) of its slide; check that the mask belongs to this slide"
        )


def area(runs: Runs | str) -> int:
    """The number of set pixels of runs, or of a run-length string of any origin up to 1."""
    return int(_as_runs(runs).lengths.sum())


def dice(a: Runs | str, b: Runs | str) -> float:
    """Dice of two masks of one slide from their runs, without decoding: 2 |A and B| / (|A| + |B|), and 1 when both are empty.

    Both must share one origin and the slide's height; strings are read with origin 0.
    """
    a, b = _as_runs(a), _as_runs(b)
    total = area(a) + area(b)
    if total == 0:
        return 1.0
    common = int((_pixels_below(b, a.stops) - _pixels_below(b, a.starts)).sum())
    return 2.0 * common / total


def _pixels_below(runs: Runs, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many set pixels of `runs` have a number below each position."""
    if not len(runs):
        return np.zeros(len(positions), np.int64)
    cumulative = np.concatenate([[0], np.cumsum(runs.lengths)])
    index = np.searchsorted(runs.starts, positions, side="right") - 1  # -1: before the first run
    inside = np.clip(positions - runs.starts[index], 0, runs.lengths[index])
    return np.where(index >= 0, cumulative[index] + inside, 0)


def _as_runs(runs: Runs | str) -> Runs:
    return parse(runs) if isinstance(runs, str) else runs


def _numbers(text: str) -> npt.NDArray[np.int64]:
    text = text.strip()  # NumPy reads a text of blanks as one number
    if not text:
        return np.empty(0, np.int64)
    if not _NUMBERS.fullmatch(text):
        odd = next((word for word in text.split() if not (word.isascii() and word.isdigit())), "an odd blank")
        raise RleError(
            f"The run-length text {_excerpt(text)} holds {_excerpt(odd)}, but starts and lengths are whole numbers of 0 or more; "
            "look for a wrong column or a damaged file"
        )
    return np.fromstring(text, dtype=np.int64, sep=" ")


def _check_runs(runs: Runs, origin: int) -> None:
    starts, lengths = runs.starts, runs.lengths
    if not len(runs):
        return
    if starts.max() >= _LIMIT or lengths.max() >= _LIMIT:
        raise RleError("The run-length text holds a number above 2^62, which no slide reaches; look for missing blanks")
    if lengths.min() < 1:
        start = int(starts[lengths < 1][0]) + origin
        raise RleError(f"The run at start {start} has length 0, but every run holds at least one pixel; drop that pair")
    if starts[0] < 0:
        raise RleError(
            f"The first start is {int(starts[0]) + origin}, but pixels are counted from {origin} here; "
            f"read the text with origin={origin - 1} or mend it"
        )
    late = np.flatnonzero(starts[1:] < runs.stops[:-1])
    if late.size:
        before, after = int(starts[late[0]]) + origin, int(starts[late[0] + 1]) + origin
        raise RleError(
            f"The run at start {after} comes before the end of the run at start {before}, but runs must be sorted and share no "
            "pixel; sort and merge them"
        )


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
