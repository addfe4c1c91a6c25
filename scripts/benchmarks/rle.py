"""Run-length strings: encode, decode, Dice and memory, against the usual notebook functions, pycocotools and
RLEMaskLib.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pycocotools import mask as coco

from benchmarks import measure
from benchmarks.measure import Comparison
from hubmap_kit.competition import rle

SIDE = 3000  # pixels, as most slides of the competition
USUAL, COCO, COCO_TEXT, MASKLIB = (
    "the usual function",
    "pycocotools, no string",
    "pycocotools, from/to the string",
    "RLEMaskLib, from/to the string",
)
MEGABYTE = 1e6


def run(quick: bool = False) -> list[Comparison]:
    """All comparisons; `quick` takes fewer rounds and leaves out the mask of noise."""
    repeats = 5 if quick else 15
    outlines, zeros = blobs(SIDE), np.zeros((SIDE, SIDE), np.uint8)
    masks = {"60 blobs": (outlines, 8.0), "an empty mask": (zeros, 8.0), "a full mask": (zeros + 1, 8.0)}
    if not quick:
        masks["noise"] = (np.random.default_rng(0).integers(0, 2, (SIDE, SIDE), np.uint8), 2.0)
    found = []
    for name, (mask, target) in masks.items():
        rounds = repeats if name != "noise" else 3
        found += [_encode(name, mask, target, rounds), _decode(name, mask, 4.0 if name == "60 blobs" else None, rounds)]
    found += [
        _encode_columns(outlines, repeats),
        _dice(outlines, repeats),
        _memory(outlines),
    ]
    return found


def _encode(name: str, mask: np.ndarray, target: float, repeats: int) -> Comparison:
    _same(f"encode {name}", rle.encode(mask), usual_encode(mask))
    rivals = {
        USUAL: lambda: usual_encode(mask),
        COCO: lambda: coco.encode(np.asfortranarray(mask)),
        MASKLIB: _masklib_encode(mask),
    }
    targets = {USUAL: target} | ({COCO: 2.0} if name == "60 blobs" else {})
    return measure.compare(
        f"encode {name}, {SIDE} x {SIDE}, to a string", lambda: rle.encode(mask), rivals, targets, repeats
    )


def _encode_columns(mask: np.ndarray, repeats: int) -> Comparison:
    mask = np.asfortranarray(mask)
    rivals = {USUAL: lambda: usual_encode(mask), COCO: lambda: coco.encode(mask)}
    return measure.compare(
        "encode 60 blobs that lie by columns in memory", lambda: rle.encode(mask), rivals, None, repeats
    )


def _decode(name: str, mask: np.ndarray, target: float | None, repeats: int) -> Comparison:
    text = rle.encode(mask)
    measure.check_equal(f"decode {name}", rle.decode(text, *mask.shape), usual_decode(text, mask.shape))
    rivals = {
        USUAL: lambda: np.ascontiguousarray(usual_decode(text, mask.shape)),
        COCO_TEXT: lambda: np.ascontiguousarray(_coco_decode(text, mask.shape)),
        MASKLIB: _masklib_decode(text, mask.shape),
    }
    targets = {} if target is None else {USUAL: target}
    return measure.compare(
        f"decode {name}, by rows in memory", lambda: rle.decode(text, *mask.shape), rivals, targets, repeats
    )


def _dice(mask: np.ndarray, repeats: int) -> Comparison:
    other = np.roll(mask, (5, 7), (0, 1))
    a, b = rle.encode(mask), rle.encode(other)
    measure.check_equal("dice", np.array(rle.dice(a, b)), np.array(_usual_dice(a, b, mask.shape)), 1e-12)
    rivals = {USUAL: lambda: _usual_dice(a, b, mask.shape), COCO_TEXT: lambda: _coco_dice(a, b, mask.shape)}
    notes = ["the usual way decodes both, multiplies and sums"]
    return measure.compare(
        "Dice of two strings of 60 blobs", lambda: rle.dice(a, b), rivals, {USUAL: 10.0}, repeats, notes
    )


def _memory(mask: np.ndarray) -> Comparison:
    ours, usual = (
        measure.peak_memory(call) / MEGABYTE for call in (lambda: rle.encode(mask), lambda: usual_encode(mask))
    )
    return measure.limit("peak extra memory of encoding 60 blobs", ours, "MB", 8.0, {USUAL: usual})


def blobs(side: int, count: int = 60) -> np.ndarray:
    """A mask (side, side) of up to 64 wavy outlines that do not touch, from a fixed seed."""
    generator = np.random.default_rng(0)
    mask = np.zeros((side, side), np.uint8)
    cell = side // 8
    rows, columns = np.mgrid[:cell, :cell].astype(np.float32) - cell / 2
    angle, distance = np.arctan2(rows, columns), np.hypot(rows, columns)
    for place in generator.permutation(64)[:count]:
        phase = generator.uniform(0, 2 * np.pi, 3)
        waves = (
            1
            + 0.09 * np.sin(3 * angle + phase[0])
            + 0.04 * np.sin(9 * angle + phase[1])
            + 0.01 * np.sin(40 * angle + phase[2])
        )
        top, left = place // 8 * cell, place % 8 * cell
        mask[top : top + cell, left : left + cell] = distance < generator.uniform(0.38, 0.44) * cell * waves
    return mask


def usual_encode(mask: np.ndarray) -> str:
    """What notebooks do: lay the columns end to end, put a zero at both ends, compare neighbours, join the numbers."""
    pixels = np.concatenate([[0], mask.T.flatten(), [0]])
    edges = np.where(pixels[1:] != pixels[:-1])[0]
    edges[1::2] -= edges[::2]
    return " ".join(str(number) for number in edges)


def usual_decode(text: str, shape: tuple[int, int]) -> np.ndarray:
    """What notebooks do: split, make two arrays of numbers, set a slice for each run, and turn the result."""
    words = text.split()
    starts, lengths = (np.asarray(part, dtype=int) for part in (words[0::2], words[1::2]))
    flat = np.zeros(shape[0] * shape[1], np.uint8)
    for start, stop in zip(starts, starts + lengths, strict=True):
        flat[start:stop] = 1
    return flat.reshape(shape[::-1]).T


def _usual_dice(a: str, b: str, shape: tuple[int, int]) -> float:
    one, two = usual_decode(a, shape), usual_decode(b, shape)
    return 2 * (one * two).sum() / (one.sum() + two.sum())


def _coco_runs(text: str, shape: tuple[int, int]) -> dict:
    numbers = np.array(text.split(), np.int64)
    counts = np.diff(
        np.concatenate(
            [[0], np.stack([numbers[0::2], numbers[0::2] + numbers[1::2]], 1).ravel(), [shape[0] * shape[1]]]
        )
    )
    return coco.frPyObjects({"size": list(shape), "counts": counts.tolist()}, *shape)


def _coco_decode(text: str, shape: tuple[int, int]) -> np.ndarray:
    return coco.decode(_coco_runs(text, shape))


def _coco_dice(a: str, b: str, shape: tuple[int, int]) -> float:
    pair = [_coco_runs(text, shape) for text in (a, b)]
    return 2 * float(coco.area(coco.merge(pair, intersect=True))) / float(coco.area(pair[0]) + coco.area(pair[1]))


def _masklib_encode(mask: np.ndarray) -> Callable[[], object] | None:
    library = measure.optional("rlemasklib")
    if library is None:
        return None

    def encode() -> str:
        counts = np.asarray(library.RLEMask.from_array(mask).counts, np.int64)
        ends = np.cumsum(counts)
        return " ".join(map(str, np.stack([ends[: counts.size // 2 * 2 : 2], counts[1::2]], 1).ravel().tolist()))

    _same("RLEMaskLib", encode(), rle.encode(mask))
    return encode


def _masklib_decode(text: str, shape: tuple[int, int]) -> Callable[[], object] | None:
    library = measure.optional("rlemasklib")
    if library is None:
        return None

    def decode() -> np.ndarray:
        numbers = np.fromstring(text, np.int64, sep=" ")
        ends = np.stack([numbers[0::2], numbers[0::2] + numbers[1::2]], 1).ravel()
        counts = np.diff(np.concatenate([[0], ends, [shape[0] * shape[1]]])).astype(np.uint32)
        return library.RLEMask.from_counts(counts, shape).to_array(order="C")

    measure.check_equal("RLEMaskLib", decode(), rle.decode(text, *shape))
    return decode


def _same(name: str, ours: str, rival: str) -> None:
    if ours != rival:
        raise ArithmeticError(f"{name}: the strings differ")
