"""The mask of runs, row by row or column by column in memory."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Order = Literal["C", "F"]
Numbers = npt.NDArray[np.int64]

_FEW = 400  # runs that are painted one by one
_LARGE = 16  # the share of a mask, one part in so many, from which on its runs touch most of its memory
_PIXELS = 2**13  # that are marked at once: small enough for the fast caches


def fill(starts: Numbers, stops: Numbers, height: int, width: int, order: Order = "C") -> npt.NDArray[np.uint8]:
    """The mask (height, width) uint8 0/1 of the runs from `starts` to before `stops`, contiguous by rows ("C") or
    columns ("F").

    Runs are 0-based, sorted, share no pixel and stay inside the mask.
    """
    if order == "F":
        return _columns(starts, stops, height * width).reshape(width, height).T
    if len(starts) <= _FEW or not height * width:
        return _paint(starts, stops, height, width)
    return _rows(*_merged(starts, stops), height, width)


def _columns(starts: Numbers, stops: Numbers, pixels: int) -> npt.NDArray[np.uint8]:
    if len(starts) <= _FEW:
        flat = _outside(pixels, starts, stops)
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            flat[start:stop] = 1
        return flat
    edges = np.empty(2 * len(starts) + 2, np.int64)  # 0, then where a run begins or ends, then the end
    edges[0], edges[1:-1:2], edges[2:-1:2], edges[-1] = 0, starts, stops, pixels
    values = (np.arange(edges.size - 1) % 2).astype(np.uint8)
    return np.repeat(values, np.diff(edges))


def _paint(starts: Numbers, stops: Numbers, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Each run as the lower part of its first column, the upper part of its last one, and all of those between."""
    mask = _outside(height * width, starts, stops).reshape(height, width)
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        (left, top), (right, bottom) = divmod(start, height), divmod(stop, height)
        if left == right:
            mask[top:bottom, left] = 1
            continue
        mask[top:, left] = 1
        mask[:, left + 1 : right] = 1
        if bottom:
            mask[:bottom, right] = 1
    return mask


def _outside(pixels: int, starts: Numbers, stops: Numbers) -> npt.NDArray[np.uint8]:
    """Zeros to paint runs on.

    Where little is painted, pages that stay untouched cost nothing; else larger pages are cheaper.
    """
    if _LARGE * int((stops - starts).sum()) < pixels:
        return np.zeros(pixels, np.uint8)
    mask = np.empty(pixels, np.uint8)
    mask.fill(0)
    return mask


def _merged(starts: Numbers, stops: Numbers) -> tuple[Numbers, Numbers]:
    """Runs that touch as one run."""
    apart = starts[1:] != stops[:-1]
    return (starts, stops) if apart.all() else (starts[np.append(True, apart)], stops[np.append(apart, True)])


def _rows(starts: Numbers, stops: Numbers, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Mark the changes in a plane of bits, let each row take on what the row above it is, and unpack the bits once."""
    block = math.isqrt(height) + 1
    plane = np.zeros(
        (-(-height // block) * block, -(-width // 64) * 8), np.uint8
    )  # whole blocks of rows of whole words
    _mark(plane, starts, height)
    _mark(plane, stops[:-1] if stops[-1] == height * width else stops, height)
    tops = np.arange(width) * height  # a column begins as the one on its left ends
    before = np.searchsorted(starts, tops) != np.searchsorted(stops, tops)
    plane[0, : -(-width // 8)] ^= np.packbits(before, bitorder="little")
    _xor_down(plane.view(np.uint64).reshape(-1, block, plane.shape[1] // 8))
    return np.unpackbits(plane[:height], axis=1, count=width, bitorder="little")


def _mark(plane: npt.NDArray[np.uint8], pixels: Numbers, height: int) -> None:
    """Set the bits of pixels, none of which is set yet.

    They share bytes; adding, unlike `|=`, counts every one of them.
    """
    flat = plane.reshape(-1)
    for begin in range(0, len(pixels), _PIXELS):
        part = pixels[begin : begin + _PIXELS]
        x = part // height
        y = part - x * height
        bits = np.left_shift(1, x & 7, dtype=np.uint8, casting="unsafe")
        x >>= 3
        y *= plane.shape[1]
        y += x
        np.add.at(flat, y, bits)


def _xor_down(blocks: npt.NDArray[np.uint64]) -> None:
    """In place: every row becomes the XOR of itself and all rows above it; (blocks, rows a block, words a row).

    The rows of all blocks first, side by side, then the last row of each block into the blocks below: about twice the
    root of the number of rows in operations, and each word is written twice.
    """
    for row in range(1, blocks.shape[1]):
        blocks[:, row] ^= blocks[:, row - 1]
    blocks[1:] ^= np.bitwise_xor.accumulate(blocks[:-1, -1], axis=0)[:, None]
