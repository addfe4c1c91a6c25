"""Run-length strings against pycocotools, against a definition in plain Python, and on every mask of the
competition.
"""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from hubmap_kit.competition import rle
from hubmap_kit.errors import RleError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # inside pycocotools

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=17)
MASKS = hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 1))
MASK_PAIRS = SHAPES.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.uint8, shape, elements=st.integers(0, 1))] * 2))
no_deadline = settings(deadline=None, max_examples=200)


def plain_encode(mask: np.ndarray, origin: int) -> str:
    """The definition: walk down each column, open a run at each first inside pixel, count it to its end."""
    height, width = mask.shape
    words: list[int] = []
    previous = False
    for x in range(width):
        for y in range(height):
            inside = bool(mask[y, x])
            if inside and not previous:
                words += [x * height + y + origin, 0]
            if inside:
                words[-1] += 1
            previous = inside
    return " ".join(str(word) for word in words)


def coco_counts(text: str, height: int, width: int) -> dict:
    """A 0-based string in the form of pycocotools: counts alternate gap and run, down the columns."""
    counts, position = [], 0
    numbers = [int(word) for word in text.split()]
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        counts += [start - position, length]
        position = start + length
    counts.append(height * width - position)
    return coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)


@no_deadline
@given(mask=MASKS, origin=st.sampled_from([0, 1]))
def test_encode_is_the_plain_definition(mask: np.ndarray, origin: int) -> None:
    assert rle.encode(mask, origin=origin) == plain_encode(mask, origin)


@no_deadline
@given(mask=MASKS, origin=st.sampled_from([0, 1]))
def test_decode_gives_back_what_was_encoded(mask: np.ndarray, origin: int) -> None:
    back = rle.decode(rle.encode(mask, origin=origin), *mask.shape, origin=origin)
    assert back.dtype == np.uint8 and back.flags.c_contiguous and back.shape == mask.shape
    np.testing.assert_array_equal(back, mask)


@no_deadline
@given(
    mask=hnp.arrays(
        np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=17), elements=st.integers(0, 1)
    )
)
def test_decode_and_area_agree_with_pycocotools(mask: np.ndarray) -> None:
    text = rle.encode(mask)
    np.testing.assert_array_equal(coco.decode(coco_counts(text, *mask.shape)), mask)
    np.testing.assert_array_equal(rle.decode(text, *mask.shape), coco.decode(coco_counts(text, *mask.shape)))
    assert rle.area(text) == rle.area(rle.parse(text)) == int(coco.area(coco.encode(np.asfortranarray(mask))))


@no_deadline
@given(mask=MASKS, kind=st.sampled_from([np.bool_, np.int8, np.uint16, np.int64]), value=st.integers(1, 5))
def test_type_value_and_memory_order_do_not_matter(mask: np.ndarray, kind: type, value: int) -> None:
    expected = plain_encode(mask, 0)
    typed = (mask * value).astype(kind)
    doubled = np.repeat(np.repeat(typed, 2, axis=0), 2, axis=1)
    for variant in (typed, np.asfortranarray(typed), doubled[::2, ::2], np.flipud(np.flipud(typed).copy())):
        assert rle.encode(variant) == expected


@no_deadline
@given(masks=MASK_PAIRS)
def test_dice_on_runs_is_dice_on_pixels(masks: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = masks
    total = int(a.sum()) + int(b.sum())
    expected = 1.0 if total == 0 else 2 * int((a & b).sum()) / total
    assert rle.dice(rle.encode(a), rle.encode(b)) == pytest.approx(expected, abs=1e-12)
    assert rle.dice(rle.parse(rle.encode(b)), rle.encode(a)) == pytest.approx(expected, abs=1e-12)


@no_deadline
@given(mask=MASKS, origin=st.sampled_from([0, 1]))
def test_formatting_undoes_parsing(mask: np.ndarray, origin: int) -> None:
    text = plain_encode(mask, origin)
    assert rle.format_runs(rle.parse(text, origin=origin), origin=origin) == text


def test_pixels_are_numbered_down_the_columns_from_zero() -> None:
    mask = rle.decode("1 2 5 1", height=3, width=2)
    np.testing.assert_array_equal(mask, [[0, 0], [1, 0], [1, 1]])
    np.testing.assert_array_equal(rle.decode("2 2 6 1", height=3, width=2, origin=1), mask)


def test_runs_that_touch_and_odd_blanks_are_read() -> None:
    np.testing.assert_array_equal(rle.decode(" 0 2\t2  1\n", 2, 2), [[1, 1], [1, 0]])
    assert rle.encode(rle.decode("0 2 2 1", 2, 2)) == "0 3"


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_no_text_is_the_empty_mask(text: str) -> None:
    assert rle.area(text) == 0
    assert rle.decode(text, 4, 3).shape == (4, 3) and not rle.decode(text, 4, 3).any()
    assert rle.dice(text, "") == 1.0 and rle.dice(text, "0 1") == 0.0


def test_full_mask_of_the_largest_slide() -> None:
    text = f"0 {4500 * 4500}"
    mask = rle.decode(text, 4500, 4500)
    assert mask.all() and rle.encode(mask) == text


@pytest.mark.parametrize("mask", [np.zeros(4, np.uint8), np.zeros((2, 2, 1), np.uint8), np.full((2, 2), 0.3)])
def test_encode_refuses_what_is_no_mask(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="integers or booleans"):
        rle.encode(mask)


BAD = {
    "odd count": ("1 2 3", 0, "3 numbers"),
    "one number": ("7", 0, "1 numbers"),
    "negative start": ("-1 2", 0, "'-1'"),
    "negative length": ("1 -2", 0, "'-2'"),
    "float": ("1.5 2", 0, "'1.5'"),
    "words": ("nan", 0, "'nan'"),
    "other digits": ("١ ٢", 0, "whole numbers"),
    "odd blank": ("1\u00a02", 0, "whole numbers"),
    "semicolon": ("1 2;3 4", 0, "'2;3'"),
    "zero length": ("5 0", 0, "start 5 has length 0"),
    "unsorted": ("9 1 3 1", 0, "start 3 comes before the end of the run at start 9"),
    "overlap": ("1 4 3 2", 0, "start 3 comes before the end of the run at start 1"),
    "same start twice": ("3 2 3 2", 0, "sorted"),
    "start 0 in 1-based text": ("0 2", 1, "counted from 1"),
    "blanks lost": ("123456789012345678901234567890 2", 0, "missing blanks"),
    "huge length": ("1 9223372036854775807", 0, "missing blanks"),
}


@pytest.mark.parametrize(("text", "origin", "says"), BAD.values(), ids=BAD.keys())
def test_malformed_text_is_refused_in_words(text: str, origin: int, says: str) -> None:
    for read in (lambda: rle.parse(text, origin=origin), lambda: rle.decode(text, 10, 10, origin=origin)):
        with pytest.raises(RleError) as caught:
            read()
        assert says in str(caught.value)


@pytest.mark.parametrize(("text", "height", "width"), [("11 2", 3, 4), ("12 1", 4, 3), ("0 1", 0, 5), ("0 13", 3, 4)])
def test_a_run_beyond_the_slide_is_refused(text: str, height: int, width: int) -> None:
    with pytest.raises(RleError, match=f"{height}x{width}"):
        rle.decode(text, height, width)


def test_the_last_pixel_is_inside() -> None:
    np.testing.assert_array_equal(rle.decode("11 1", 3, 4).nonzero(), [[2], [3]])


@no_deadline
@given(text=st.text(alphabet="0123456789 -.x\n", max_size=12))
def test_any_text_is_read_or_refused_by_our_error(text: str) -> None:
    try:
        runs = rle.parse(text)
    except RleError:
        return
    assert rle.format_runs(runs).split() == [str(int(word)) for word in text.split()]


def real_rows(folder: Path) -> list[dict[str, str]]:
    text = gzip.decompress((folder / "hubmap-2022" / "train.csv.gz").read_bytes()).decode()
    before = csv.field_size_limit(10**9)
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    finally:
        csv.field_size_limit(before)


def test_all_real_strings_survive_decoding(shared_data: Path) -> None:
    rows = real_rows(shared_data)
    assert len(rows) == 351
    for row in rows:
        height, width = int(row["img_height"]), int(row["img_width"])
        assert rle.encode(rle.decode(row["rle"], height, width)) == row["rle"], row["id"]


def test_real_areas_agree_with_pycocotools(shared_data: Path) -> None:
    for row in real_rows(shared_data):
        height, width = int(row["img_height"]), int(row["img_width"])
        assert rle.area(row["rle"]) == int(coco.area(coco_counts(row["rle"], height, width))), row["id"]


def test_real_masks_agree_with_pycocotools(shared_data: Path) -> None:
    for row in real_rows(shared_data)[::20]:
        height, width = int(row["img_height"]), int(row["img_width"])
        np.testing.assert_array_equal(
            rle.decode(row["rle"], height, width),
            coco.decode(coco_counts(row["rle"], height, width)),
            err_msg=row["id"],
        )
