"""Run-length text to whole numbers and back, thousands of numbers an operation."""

from __future__ import annotations

import functools
import re

import numpy as np
import numpy.typing as npt

from hubmap_kit.errors import RleError

_NUMBERS = re.compile(r"[0-9\s]*", re.ASCII)
_DIGITS = 8  # of a number that fits one machine word as text; longer ones are read and written one by one
_CHARACTERS = 2**16  # that are read at once, and
_RUNS = 2**13  # that are written at once: small enough for the fast caches
_SPACES = np.uint64(0x20_00_00_00_00_00_00_20)  # a blank as the first and as the last of eight characters
_HALVES = np.uint64(0x000000FF000000FF)


def read(text: str) -> npt.NDArray[np.int64]:
    """The whole numbers of a text, (N,) int64; raises RleError when it holds anything but digits and ASCII blanks."""
    text = text.strip()  # NumPy reads a text of blanks as one number
    if not text:
        return np.empty(0, np.int64)
    values = _read_regular(text)
    if values is not None:
        return values
    if not _NUMBERS.fullmatch(text):
        odd = next((word for word in text.split() if not (word.isascii() and word.isdigit())), "an odd blank")
        raise RleError(
            f"The run-length text {excerpt(text)} holds {excerpt(odd)}, but starts and lengths are whole numbers of 0"
            " or more; look for a wrong column or a damaged file"
        )
    return np.fromstring(text, dtype=np.int64, sep=" ")


def write(starts: npt.NDArray[np.signedinteger], lengths: npt.NDArray[np.signedinteger]) -> str:
    """The text "start length start length ..." of two arrays (N,)."""
    if not starts.size:
        return ""
    if min(starts.min(), lengths.min()) < 0 or starts.max() >= 10**_DIGITS or lengths.max() >= 10 ** (_DIGITS - 2):
        return " ".join(map(str, np.stack([starts, lengths], axis=1).ravel().tolist()))
    parts = [_write_some(starts[at : at + _RUNS], lengths[at : at + _RUNS]) for at in range(0, starts.size, _RUNS)]
    parts[-1] = parts[-1][:-1]  # the blank at the end
    return "".join(parts)


def excerpt(text: str) -> str:
    """A text as errors quote it."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _read_regular(text: str) -> npt.NDArray[np.int64] | None:
    """The numbers of a text with one space between every two and at most eight digits each; None for any other text."""
    if not text.isascii():
        return None
    parts, at = [], 0
    while at < len(text):
        stop = len(text) if len(text) - at <= _CHARACTERS else text.rfind(" ", at, at + _CHARACTERS)
        part = _read_words(text[at:stop]) if stop > at else None
        if part is None:
            return None
        parts.append(part)
        at = stop + 1
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _read_words(text: str) -> npt.NDArray[np.int64] | None:
    raw = f"{'':{_DIGITS}}{text} ".encode("ascii")
    characters = np.frombuffer(raw, np.uint8)[_DIGITS:]
    blanks = np.flatnonzero(characters - np.uint8(ord("0")) > 9)  # unsigned: what is below "0" wraps round
    if np.count_nonzero(characters == ord(" ")) != blanks.size:
        return None
    # The eight characters that end before each blank, as one little-endian word: the number's last digit is its highest
    # byte.
    overlapping = np.ndarray((len(raw) - 7,), "<u8", buffer=raw, strides=(1,))
    words = overlapping[blanks].astype(np.uint64, copy=False)  # `take` would first copy all that overlaps
    foreign = np.empty_like(
        blanks
    )  # the bits of what stands before the number: 64 less 8 a digit, as far as from blank to blank
    foreign[0] = -1 - blanks[0]
    np.subtract(blanks[:-1], blanks[1:], out=foreign[1:])
    foreign += _DIGITS + 1
    foreign <<= 3
    foreign = foreign.view(np.uint64)
    if foreign.max() >= 64:  # no digit; with more than fit, it wraps round
        return None
    words >>= foreign
    words <<= foreign
    return _value(words).view(np.int64)


def _value(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The numbers of words of eight digits: neighbours are joined to pairs, pairs to fours, fours to the eight;
    overwrites them.
    """
    words &= np.uint64(0x0F0F0F0F0F0F0F0F)
    right = words >> np.uint64(8)
    words *= np.uint64(10)
    words += right
    low = words >> np.uint64(16)
    low &= _HALVES
    low *= np.uint64(1 + (10_000 << 32))
    words &= _HALVES
    words *= np.uint64(100 + (1_000_000 << 32))
    words += low
    words >>= np.uint64(32)
    return words


def _write_some(starts: npt.NDArray[np.signedinteger], lengths: npt.NDArray[np.signedinteger]) -> str:
    """Sixteen bytes a run, without leading zeros: start, blank, length, blank; what they leave free is NUL and
    dropped.
    """
    words = np.empty((starts.size, 2), "<u8")
    words[:, 0] = _as_digits(starts)
    words[:, 1] = (_as_digits(lengths) >> np.uint64(8)) | _SPACES
    return words.tobytes().translate(None, b"\0").decode("ascii")


def _as_digits(numbers: npt.NDArray[np.signedinteger]) -> npt.NDArray[np.uint64]:
    """Eight characters a number, as little-endian words: its digits, and NUL for leading zeros."""
    leading, short, padded = _tables()
    if numbers.max() < 10_000:
        return short.take(numbers)
    high = numbers // 10_000
    words = leading.take(high) | padded.take(numbers - high * 10_000)
    small = np.flatnonzero(numbers < 10_000)
    words[small] = short.take(numbers[small])
    return words


@functools.cache
def _tables() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """The words of the numbers below 10,000: in the first half without leading zeros, in the second without, and
    with.
    """
    short = "".join(str(number).rjust(4, "\0") for number in range(10_000)).encode()
    padded = "".join(f"{number:04d}" for number in range(10_000)).encode()
    low, full = (np.frombuffer(text, "<u4").astype(np.uint64) for text in (short, padded))
    return low, low << np.uint64(32), full << np.uint64(32)
