"""Run-length strings of the competition: "start length start length ...", pixels counted down the columns.

Pixel (y, x) of a slide with `height` rows has the number `x * height + y` (column-major), and the numbers begin at
`origin`: 0 in the competition's own train.csv (its page says 1, its data say 0, and shifting by one pixel costs about
half a percent of Dice). The whole kit uses `origin=0`; `parse` and `format_runs` are the only two places that read or
write that number.

In memory, runs are always 0-based, sorted, and no pixel is in two runs. The empty string is the empty mask.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

from hubmap_kit.errors import RleError

if TYPE_CHECKING:
    import torch

Mask = npt.NDArray[np.integer] | npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]

_LIMIT = 2**52  # no slide has so many pixels; floats count sums of two such numbers exactly
_NUMBERS = re.compile(r"[0-9\s]*", re.ASCII)
_STRIP_ROWS = 256  # rows that are packed at once: small enough for the fast caches
_BITS = (1 << np.arange(8)).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of set pixels: `starts` (N,) int64, 0-based and column-major, and `lengths` (N,) int64, each at least 1."""

    starts: Numbers
    lengths: Numbers

    @property
    def stops(self) -> Numbers:
        """One past the last pixel of each run, (N,) int64."""
        return self.starts + self.lengths

    def __len__(self) -> int:
        return len(self.starts)


def parse(text: str, origin: int = 0) -> Runs:
    """Read a run-length string whose first pixel has the number `origin`.

    Raises RleError when the text is not an even count of whole numbers, a length is 0, a start is below `origin`, or
    runs are out of order or overlap. Runs that touch are allowed.
    """
    text = text.strip()  # NumPy reads a text of blanks as one number
    if not _NUMBERS.fullmatch(text):
        odd = next((word for word in text.split() if not (word.isascii() and word.isdigit())), "an odd blank")
        raise RleError(
            f"The run-length text {_excerpt(text)} holds {_excerpt(odd)}, but starts and lengths are whole numbers of 0"
            " or more; look for a wrong column or a damaged file"
        )
    values = np.fromstring(text, dtype=np.int64, sep=" ") if text else np.empty(0, np.int64)
    if values.size % 2:
        raise RleError(
            f"The run-length text {_excerpt(text)} holds {values.size} numbers, but starts and lengths come in"
            " pairs; look for a cut-off string and write it again"
        )
    runs = Runs(values[0::2] - origin, values[1::2].copy())
    _check_runs(runs, origin)
    return runs


def format_runs(runs: Runs, origin: int = 0) -> str:
    """Write runs as a run-length string whose first pixel has the number `origin`."""
    numbers = np.stack([runs.starts + origin, runs.lengths], axis=1).ravel().tolist()
    return str(numbers)[1:-1].replace(",", "")  # in half the time of joining them one by one


def encode(mask: Mask | torch.Tensor, origin: int = 0) -> str:
    """The run-length string of a mask (H, W) of integers or booleans, nonzero = inside, any memory order.

    A tensor of another device is searched there, and only the ends of its runs travel. Raises ValueError for a mask
    that is not two-dimensional or holds floats (threshold probabilities first).
    """
    return format_runs(runs_of(mask), origin)


def runs_of(mask: Mask | torch.Tensor) -> Runs:
    """The maximal runs of a mask (H, W) of integers or booleans, nonzero = inside; takes and raises what `encode`
    does.
    """
    edges = _boundaries(mask)
    return Runs(edges[0::2].copy(), edges[1::2] - edges[0::2])


def decode(text: str | Runs, height: int, width: int, origin: int = 0) -> npt.NDArray[np.uint8]:
    """The mask (height, width) uint8 0/1 of a run-length string, or of runs.

    Raises RleError when the text is malformed (see `parse`) or a run leaves the slide.
    """
    runs = parse(text, origin) if isinstance(text, str) else text
    check_inside(runs, height, width)
    if not len(runs):
        return np.zeros((height, width), np.uint8)
    # A plane of bits: mark where each column changes, then let every row take on what the row above it is.
    plane = np.zeros((height, -(-width // 64) * 8), np.uint8)
    for pixels in (runs.starts, runs.stops):
        x, y = np.divmod(pixels[pixels < height * width], height)
        np.bitwise_xor.at(plane.reshape(-1), y * plane.shape[1] + (x >> 3), _BITS[x & 7])
    tops = np.arange(width) * height  # a column begins as the one on its left ends
    before = np.searchsorted(runs.starts, tops) != np.searchsorted(runs.stops, tops)
    plane[0, : -(-width // 8)] ^= np.packbits(before, bitorder="little")
    words = plane.view(np.uint64)
    np.bitwise_xor.accumulate(words, axis=0, out=words)
    return np.unpackbits(plane, axis=1, count=width, bitorder="little")


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
    return 2.0 * _shared_pixels(a, b) / total


def _as_runs(runs: Runs | str) -> Runs:
    return parse(runs) if isinstance(runs, str) else runs


def _shared_pixels(a: Runs, b: Runs) -> int:
    if not len(a) or not len(b):
        return 0
    # How many pixels of b have a number below a position rises by one a pixel inside a run and stays level outside:
    # linear between edges, and every step of it is exact.
    counts = np.zeros(2 * len(b))
    counts[1::2] = np.cumsum(b.lengths)
    counts[2::2] = counts[1:-1:2]
    below = np.interp(_edges(a), _edges(b), counts)
    return int(below[1::2].sum() - below[0::2].sum())


def _edges(runs: Runs) -> npt.NDArray[np.float64]:
    """Start, stop, start, stop, ... of runs, (2 N,)."""
    return np.stack([runs.starts, runs.stops], axis=1).ravel().astype(np.float64)


def _boundaries(mask: Mask | torch.Tensor) -> Numbers:
    """Where the runs of a mask begin and end, alternating: the numbers of pixels that differ from the one before them.

    The first pixel is compared with outside, and a run that reaches the last one ends after it.
    """
    torch = sys.modules.get("torch")  # a tensor comes from whoever has imported torch; this module need not
    if torch is not None and isinstance(mask, torch.Tensor):
        _check_mask(mask, not (mask.is_floating_point() or mask.is_complex()))
        if mask.device.type != "cpu":
            return _boundaries_on_device(mask)
        mask = mask.numpy()
    mask = np.asarray(mask)
    _check_mask(mask, mask.dtype.kind in "bui")
    if not mask.size:
        return np.empty(0, np.int64)
    height, width = mask.shape
    if mask.flags.f_contiguous:
        mask = cv2.transpose((mask.T != 0).view(np.uint8))
    pixels = mask if mask.itemsize == 1 else mask != 0
    # Comparing rows as bits, eight pixels a byte, costs a fraction of turning the pixels into columns first.
    bits = np.zeros((height + 1, -(-width // 64) * 8), np.uint8)
    for top in range(0, height, _STRIP_ROWS):
        packed = np.packbits(pixels[top : top + _STRIP_ROWS], axis=1, bitorder="little")
        bits[1 + top : 1 + top + len(packed), : packed.shape[1]] = packed
    # A column begins after the end of the one on its left, so a run that goes on there has no boundary.
    left = np.packbits(np.concatenate([[False], mask[-1, :-1] != 0]), bitorder="little")
    bits[0, : len(left)] = left
    words = bits.view(np.uint64)
    changes = (words[1:] ^ words[:-1]).view(np.uint8)
    where = np.flatnonzero(changes)
    place, bit = np.nonzero(np.unpackbits(changes.reshape(-1)[where, None], axis=1, bitorder="little"))
    y, byte = np.divmod(where[place], changes.shape[1])
    found = (8 * byte + bit) * height + y
    found.sort()
    return np.append(found, height * width) if mask[-1, -1] else found


def _boundaries_on_device(mask: torch.Tensor) -> Numbers:
    import torch

    height, width = mask.shape
    pixels = torch.zeros(height * width + 2, dtype=torch.bool, device=mask.device)
    pixels[1:-1].view(width, height).copy_((mask != 0).t())
    return torch.nonzero(pixels[1:] != pixels[:-1]).view(-1).cpu().numpy()


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


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
