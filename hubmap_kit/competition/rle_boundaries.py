"""Where the runs of a mask begin and end, found without turning the pixels of a row-major mask into columns.

A boundary is the number `x * H + y` of a pixel (y, x) that differs from the pixel before it down the columns, counted
from 0; before the first pixel and after the last one is outside. Boundaries alternate: a run begins, that run ends, the
next begins.

Pixels are compared as bits, 64 an operation, and block by block: fresh memory costs more than the work that is done in
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hubmap_kit.competition.rle_bits import Words, popcount, set_bits

if TYPE_CHECKING:
    import torch

Mask = npt.NDArray[np.integer] | npt.NDArray[np.bool_]
Boundaries = npt.NDArray[np.int32] | npt.NDArray[np.int64]

_DENSE = 18  # with more than one boundary in so many pixels, comparing pixel by pixel costs less than taking bits apart
_PIXELS = 2**17  # that are compared at once one by one, and
_BYTES = 2**17  # of bits, where they are compared as bits; both small enough for the fast caches
_SMALL = 2**31 - 2**12  # numbers up to this and a little beyond take half the memory
_ONE, _TOP = np.uint64(1), np.uint64(63)


def boundaries(mask: Mask) -> Boundaries:
    """The boundaries of a mask (H, W) of integers or booleans, nonzero = inside, any memory order: sorted, an even
    count.
    """
    if not mask.size:
        return np.empty(0, np.int32)
    if mask.flags.f_contiguous:
        found = _along(mask.T.reshape(-1))
    elif abs(mask.strides[0]) < abs(mask.strides[1]):
        found = None
    else:
        found = _across(mask)
    return _one_by_one(mask) if found is None else found


def boundaries_on_device(mask: torch.Tensor) -> Boundaries:
    """The boundaries of a tensor (H, W) of integers or booleans, found on its device; nothing else travels to the
    host.
    """
    import torch

    height, width = mask.shape
    pixels = torch.zeros(height * width + 2, dtype=torch.bool, device=mask.device)
    pixels[1:-1].view(width, height).copy_((mask != 0).t())
    found = torch.nonzero(pixels[1:] != pixels[:-1]).view(-1)
    return (found.to(torch.int32) if mask.numel() < _SMALL else found).cpu().numpy()


def _one_by_one(mask: Mask) -> Boundaries:
    """Compare the pixels down the columns, a block of columns at a time."""
    height, width = mask.shape
    step = max(1, _PIXELS // height)
    pixels = np.zeros(1 + min(step, width) * height, np.bool_)  # the pixel before the block, then the block
    kind = np.int32 if mask.size < _SMALL else np.int64
    found = []
    for left in range(0, width, step):
        block = mask[:, left : left + step]
        used = pixels[: 1 + block.size]
        np.not_equal(block.T, 0, out=used[1:].reshape(block.shape[::-1]))
        found.append(np.flatnonzero(used[1:] != used[:-1]).astype(kind) + kind(left * height))
        pixels[0] = used[-1]
    return np.concatenate([*found, np.array([mask.size] if pixels[0] else [], kind)])


def _along(pixels: Mask) -> Boundaries | None:
    """Of columns that lie end to end in memory, (H * W,): each word of bits against itself moved on by one; None where
    dense.
    """
    step = 8 * _BYTES
    words = np.zeros(min(step, pixels.size) // 64 + 1, "<u8")  # with room for the end after a run that reaches it
    carried = np.uint64(0)
    where, values = [], []
    for start in range(0, pixels.size, step):
        bits = _packed(pixels[start : start + step])
        last = start + step >= pixels.size
        words.view(np.uint8)[: bits.size] = bits
        words.view(np.uint8)[bits.size :] = 0
        used = words if last else words[: step // 64]
        changes = used << _ONE
        changes[1:] |= used[:-1] >> _TOP
        changes[0] |= carried
        changes ^= used
        carried = used[-1] >> _TOP
        here = np.flatnonzero(changes != 0)
        values.append(changes.take(here))
        where.append(here + start // 64)
    found = _numbered(where, values, pixels.size, pixels.size)
    if found is not None:
        found.sort()
    return found


def _across(mask: Mask) -> Boundaries | None:
    """Of a row-major mask: each row of bits against the row above it; only what differs is put into order.

    None where dense.
    """
    height, width = mask.shape
    across = -(-width // 8)  # bytes a row
    step = max(8, _BYTES // across // 8 * 8)  # eight rows are whole words
    changes = np.empty(-(-min(step, height) * across // 8) * 8, np.uint8)
    # A column begins after the end of the one on its left, so a run that goes on there has no boundary.
    above = _packed(np.concatenate([[False], mask[-1, :-1] != 0]))
    where, values = [], []
    for top in range(0, height, step):
        bits = _packed(mask[top : top + step]).reshape(-1)
        np.bitwise_xor(bits[:across], above, out=changes[:across])
        np.bitwise_xor(bits[across:], bits[:-across], out=changes[across : bits.size])
        changes[bits.size :] = 0
        above = bits[-across:].copy()
        words = changes.view("<u8")
        here = np.flatnonzero(words != 0)
        values.append(words.take(here))
        where.append(here + top * across // 8)
    found = _numbered(where, values, 8 * across * height, mask.size)
    return None if found is None else _turned(found, 8 * across, mask)


def _turned(bits: Boundaries, stride: int, mask: Mask) -> Boundaries:
    """Numbers of bits in rows of `stride` to the numbers of pixels, by columns and in order; overwrites `bits`."""
    kind = bits.dtype.type
    y = bits // kind(stride)
    bits -= y * kind(stride)
    bits *= kind(len(mask))
    bits += y
    bits.sort()
    return np.append(bits, kind(mask.size)) if mask[-1, -1] else bits


def _numbered(where: list[npt.NDArray[np.int64]], values: list[Words], largest: int, pixels: int) -> Boundaries | None:
    """The numbers of the bits set in words, from the words' numbers and values by block; None for more than pays."""
    words = np.concatenate(values).astype(np.uint64, copy=False)
    if int(popcount(words).sum(dtype=np.int64)) * _DENSE > pixels:
        return None
    kind = np.int32 if largest < _SMALL else np.int64
    return set_bits(words, np.concatenate(where).astype(kind) * kind(64))


def _packed(pixels: Mask) -> npt.NDArray[np.uint8]:
    """The last axis as bits, eight a byte, lowest first."""
    plain = pixels.itemsize == 1 and pixels.strides[-1] == 1
    return np.packbits(pixels.view(np.uint8) if plain else pixels != 0, axis=-1, bitorder="little")
