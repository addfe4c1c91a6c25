"""Run-length strings of the competition: "start length start length ...", pixels counted down the columns.

Pixel (y, x) of a slide with `height` rows has the number `x * height + y` (column-major), and the numbers begin at
`origin`: 0 in the competition's own train.csv (its page says 1, its data say 0, and shifting by one pixel costs about
half a percent of Dice). The whole kit uses `origin=0`; `parse` and `format_runs` are the only two places that read or
write that number.

In memory, runs are always 0-based, sorted, and no pixel is in two runs. The empty string is the empty mask.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hubmap_kit.competition import rle_boundaries, rle_fill, rle_overlap, rle_text
from hubmap_kit.competition.rle_boundaries import Mask
from hubmap_kit.errors import RleError

if TYPE_CHECKING:
    import torch

_LIMIT = 2**52  # no slide has so many pixels; floats count sums of two such numbers exactly


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

    Raises RleError when the text is not an even count of whole numbers, a length is 0, a start is below `origin`, or
    runs are out of order or overlap. Runs that touch are allowed.
    """
    values = rle_text.read(text)
    if values.size % 2:
        raise RleError(
            f"The run-length text {rle_text.excerpt(text)} holds {values.size} numbers, but starts and lengths come in"
            " pairs; look for a cut-off string and write it again"
        )
    runs = Runs(values[0::2] - origin, values[1::2].copy())
    _check_runs(runs, origin)
    return runs


def format_runs(runs: Runs, origin: int = 0) -> str:
    """Write runs as a run-length string whose first pixel has the number `origin`."""
    return rle_text.write(runs.starts + origin, runs.lengths)


def encode(mask: Mask | torch.Tensor, origin: int = 0) -> str:
    """The run-length string of a mask (H, W) of integers or booleans, nonzero = inside, any memory order.

    A tensor of another device is searched there, and only the ends of its runs travel. Raises ValueError for a mask
    that is not two-dimensional or holds floats (threshold probabilities first).
    """
    edges = _boundaries(mask)
    starts = edges[0::2]
    return rle_text.write(starts + origin, edges[1::2] - starts)


def runs_of(mask: Mask | torch.Tensor) -> Runs:
    """The maximal runs of a mask (H, W) of integers or booleans, nonzero = inside; takes and raises what `encode`
    does.
    """
    edges = _boundaries(mask).astype(np.int64, copy=False)
    return Runs(edges[0::2].copy(), edges[1::2] - edges[0::2])


def decode(
    text: str | Runs, height: int, width: int, origin: int = 0, order: rle_fill.Order = "C"
) -> npt.NDArray[np.uint8]:
    """The mask (height, width) uint8 0/1 of a run-length string, or of runs; in memory by rows ("C") or by columns
    ("F").

    Columns are how the string counts, so "F" costs less. Raises RleError when the text is malformed (see `parse`) or a
    run leaves the slide, and ValueError for another order.
    """
    if order not in ("C", "F"):
        raise ValueError(f"a mask is laid out in the order C (by rows) or F (by columns), found {order!r}")
    runs = parse(text, origin) if isinstance(text, str) else text
    check_inside(runs, height, width)
    return rle_fill.fill(runs.starts, runs.stops, height, width, order)


def check_inside(runs: Runs, height: int, width: int) -> None:
    """Raise RleError when a run leaves a slide of height x width pixels."""
    if len(runs) and runs.stops[-1] > height * width:
        start, length = int(runs.starts[-1]), int(runs.lengths[-1])
        raise RleError(
            f"The run of {length} pixels from pixel {start} (0-based) goes beyond the {height}x{width} ="
            f" {height * width} pixels (height x width) of its slide; check that the mask belongs to this slide"
        )


def area(runs: Runs | str) -> int:
    """The number of set pixels of runs, or of a run-length string of any origin up to 1."""
    return int(_as_runs(runs).lengths.sum())


def dice(a: Runs | str, b: Runs | str) -> float:
    """Dice of two masks of one slide from their runs, without decoding: 2 |A and B| / (|A| + |B|), and 1 when both are
    empty.

    Both must share one origin and the slide's height; strings are read with origin 0.
    """
    a, b = sorted((_as_runs(a), _as_runs(b)), key=len)
    total = area(a) + area(b)
    if total == 0:
        return 1.0
    return 2.0 * rle_overlap.common(a.starts, a.stops, b.starts, b.stops) / total


def _as_runs(runs: Runs | str) -> Runs:
    return parse(runs) if isinstance(runs, str) else runs


def _boundaries(mask: Mask | torch.Tensor) -> npt.NDArray[np.signedinteger]:
    torch = sys.modules.get("torch")  # a tensor comes from whoever has imported torch; this module need not
    if torch is not None and isinstance(mask, torch.Tensor):
        return _tensor_boundaries(mask)
    mask = np.asarray(mask)
    _check_mask(mask, mask.dtype.kind in "bui")
    return rle_boundaries.boundaries(mask)


def _tensor_boundaries(mask: torch.Tensor) -> npt.NDArray[np.signedinteger]:
    _check_mask(mask, not (mask.is_floating_point() or mask.is_complex()))
    if mask.device.type == "cpu":
        return rle_boundaries.boundaries(mask.numpy())
    return rle_boundaries.boundaries_on_device(mask)


def _check_mask(mask: Mask | torch.Tensor, whole: bool) -> None:
    if mask.ndim != 2 or not whole:
        raise ValueError(
            f"a mask must be (H, W) of integers or booleans, found shape {tuple(mask.shape)} of {mask.dtype}"
        )


def _check_runs(runs: Runs, origin: int) -> None:
    starts, lengths = runs.starts, runs.lengths
    if not len(runs):
        return
    if starts.max() >= _LIMIT or lengths.max() >= _LIMIT:
        raise RleError("The run-length text holds a number above 2^52, which no slide reaches; look for missing blanks")
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
            f"The run at start {after} comes before the end of the run at start {before}, but runs must be sorted and"
            " share no pixel; sort and merge them"
        )
