"""Bits in 64-bit words, many words an operation: how many are set, and which."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Whole = TypeVar("Whole", bound=np.signedinteger)

_ROUNDS = 5  # words of a drawn outline seldom hold more changes than this
_ONE = np.uint64(1)


def popcount(values: Words) -> npt.NDArray[Any]:
    """How many bits are set in each word (N,)."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(values)
    return np.unpackbits(values.view(np.uint8)).reshape(-1, 64).sum(axis=1, dtype=np.uint8)


def set_bits(values: Words, first: npt.NDArray[Whole]) -> npt.NDArray[Whole]:
    """The numbers of the set bits of nonzero words (N,), in no order; `first` (N,) holds the number of each word's
    lowest bit.

    Takes the lowest bit of every word, then the next of those that have one, and so on; what few words are left, bit by
    bit.
    """
    # A power of two is exact as a float64, and its exponent, in the bits from 52 on, is the bit's number and 1023 more.
    first = first - first.dtype.type(1023)
    found = []
    for _ in range(_ROUNDS):
        others = values & (values - _ONE)
        exponents = (values ^ others).astype(np.float64).view(np.int64) >> 52
        found.append(exponents.astype(first.dtype) + first)
        left = np.flatnonzero(others != 0)
        values, first = others.take(left), first.take(left)
    little = values.astype("<u8", copy=False).view(np.uint8)
    bits = np.flatnonzero(np.unpackbits(little, bitorder="little").view(np.bool_))
    found.append(first.take(bits >> 6) + (bits & 63).astype(first.dtype) + first.dtype.type(1023))
    return np.concatenate(found)
