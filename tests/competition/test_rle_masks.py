"""Masks to runs and back: sparse and dense, every layout, type and size, host and device."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from rle_oracle import text_of

from hubmap_kit.competition import rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools

LAYOUTS = {
    "by rows": lambda mask: mask,
    "by columns": np.asfortranarray,
    "rows upside down": lambda mask: mask[::-1].copy()[::-1],
    "rows backwards": lambda mask: mask[:, ::-1].copy()[:, ::-1],
    "columns backwards": lambda mask: np.asfortranarray(mask[::-1, ::-1])[::-1, ::-1],
    "every second pixel": lambda mask: np.repeat(np.repeat(mask, 2, axis=0), 3, axis=1)[::2, ::3],
    "part of rows": lambda mask: np.pad(mask, 3, constant_values=1)[3:-3, 3:-3],
    "part of columns": lambda mask: np.asfortranarray(np.pad(mask, 3, constant_values=1))[3:-3, 3:-3],
}


@st.composite
def drawings(draw: st.DrawFn) -> np.ndarray:
    """Rectangles, some of them striped or cut out again, on up to 150 x 150 pixels: few runs, of all lengths."""
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(draw(st.integers(0, 4))):
        top, bottom = sorted(draw(st.tuples(*[st.integers(0, height)] * 2)))
        left, right = sorted(draw(st.tuples(*[st.integers(0, width)] * 2)))
        down, across = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]))
        mask[top:bottom:down, left:right:across] = draw(st.sampled_from([1, 1, 0]))
    return 1 - mask if draw(st.booleans()) else mask


def found_edges(mask: np.ndarray | torch.Tensor) -> np.ndarray:
    runs = rle.runs_of(mask)
    return np.stack([runs.starts, runs.stops], axis=1).ravel()


def edges_of(mask: np.ndarray) -> np.ndarray:
    """The definition: where a pixel differs from the one before it, with a pixel outside at both ends."""
    return np.flatnonzero(np.diff(np.concatenate([[False], (mask != 0).T.reshape(-1), [False]]).astype(np.int8)))


@settings(deadline=None, max_examples=300)
@given(mask=drawings(), layout=st.sampled_from(list(LAYOUTS)), kind=st.sampled_from("?bBhHiQ"))
def test_runs_are_the_definition(mask: np.ndarray, layout: str, kind: str) -> None:
    variant = LAYOUTS[layout](mask.astype(kind))
    variant.flags.writeable = False
    np.testing.assert_array_equal(found_edges(variant), edges_of(mask))


@settings(deadline=None, max_examples=150)
@given(mask=drawings())
def test_runs_agree_with_pycocotools(mask: np.ndarray) -> None:
    assert {rle.encode(mask), rle.encode(np.asfortranarray(mask))} == {text_of(mask)}
    runs = rle.runs_of(mask)
    assert runs.starts.dtype == runs.lengths.dtype == np.int64
    counts = np.diff(np.concatenate([[0], np.stack([runs.starts, runs.stops], 1).ravel(), [mask.size]])).tolist()
    theirs = coco.encode(np.asfortranarray(mask))
    assert (
        coco.frPyObjects({"size": list(mask.shape), "counts": counts}, *mask.shape)["counts"] == theirs["counts"]
        or counts[-1] == 0
    )
    assert rle.area(runs) == int(coco.area(theirs))


@settings(deadline=None, max_examples=200)
@given(mask=drawings())
def test_decoding_gives_the_mask(mask: np.ndarray) -> None:
    back = rle.decode(text_of(mask), *mask.shape)
    assert back.dtype == np.uint8 and back.flags.c_contiguous and back.flags.writeable
    np.testing.assert_array_equal(back, mask)


@settings(deadline=None, max_examples=100)
@given(mask=drawings(), data=st.data())
def test_runs_that_touch_fill_like_one(mask: np.ndarray, data: st.DataObject) -> None:
    edges = edges_of(mask)
    runs = []
    for start, stop in zip(edges[0::2].tolist(), edges[1::2].tolist(), strict=True):
        cut = data.draw(st.integers(start, stop - 1))
        runs += [(start, cut - start)] * (cut > start) + [(cut, stop - cut)]
    text = " ".join(f"{start} {length}" for start, length in runs)
    np.testing.assert_array_equal(rle.decode(text, *mask.shape), mask)
    assert rle.dice(text, text_of(mask)) == rle.dice(text_of(mask), text) == 1.0


@pytest.mark.parametrize("density", [0.0, 0.001, 0.02, 0.06, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("shape", [(997, 1003), (64, 4096), (1, 70_000), (70_000, 1), (3, 70_001), (70_001, 3), (8, 8)])
def test_large_and_long_masks_of_any_density(shape: tuple[int, int], density: float) -> None:
    mask = (np.random.default_rng(1).random(shape) < density).astype(np.uint8)
    for variant in (mask, np.asfortranarray(mask), mask.astype(bool), mask.astype(np.int64)):
        np.testing.assert_array_equal(found_edges(variant), edges_of(mask))
    text = rle.encode(mask)
    assert text == text_of(mask)
    np.testing.assert_array_equal(rle.decode(text, *shape), mask)
    np.testing.assert_array_equal(rle.decode(rle.parse(text), *shape), mask)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_a_mask_without_pixels(shape: tuple[int, int]) -> None:
    assert rle.encode(np.zeros(shape, np.uint8)) == "" and rle.encode(torch.zeros(shape, dtype=torch.bool)) == ""
    assert rle.decode("", *shape).shape == shape


def test_more_than_a_hundred_million_pixels() -> None:
    height, width = 10_400, 10_000
    mask = np.zeros((height, width), np.bool_)
    mask[5, 3] = mask[-1, -1] = mask[7:9, 9_990] = mask[:, 200:310] = True
    expected = f"{3 * height + 5} 1 {200 * height} {110 * height} {9_990 * height + 7} 2 {height * width - 1} 1"
    assert rle.encode(mask) == rle.encode(mask.T.copy().T) == expected
    assert np.array_equal(rle.decode(expected, height, width), mask)


@settings(deadline=None, max_examples=100)
@given(mask=drawings(), kind=st.sampled_from([torch.bool, torch.uint8, torch.int16, torch.int64]), turned=st.booleans())
def test_tensors_have_the_runs_of_arrays(mask: np.ndarray, kind: torch.dtype, turned: bool) -> None:
    tensor = torch.from_numpy(mask).to(kind)
    tensor = tensor.t().contiguous().t() if turned else tensor
    assert rle.encode(tensor) == text_of(mask)
    np.testing.assert_array_equal(rle._boundaries_on_device(tensor), edges_of(mask))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_mask_on_the_gpu_is_encoded_there() -> None:
    mask = np.random.default_rng(2).random((301, 203)) < 0.3
    for variant in (torch.from_numpy(mask).cuda(), torch.from_numpy(mask.astype(np.uint8)).cuda().t().contiguous().t()):
        assert rle.encode(variant) == text_of(mask)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool), torch.zeros(1, 3, 3, dtype=torch.uint8)]
)
def test_tensors_that_are_no_masks_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="integers or booleans, found shape"):
        rle.encode(tensor)


def test_arrays_need_no_torch() -> None:
    code = (
        "import sys, numpy; from hubmap_kit.competition import rle; print(rle.encode(numpy.eye(2, dtype=int)), 'torch'"
        " in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 1 3 1 False"
