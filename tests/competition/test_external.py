"""Masks of every kind of picture file, ids by content, and tables that meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from hubmap_kit.competition import external, rle
from hubmap_kit.errors import SlideError, TableError

LABELS = np.zeros((7, 11), np.uint16)
LABELS[1:3, 2:5], LABELS[4:6, 6:10], LABELS[0, 0] = 1, 3, 256  # 256 is nothing in its lower byte
INSIDE = LABELS > 0


def _palette(path: Path) -> None:
    picture = Image.fromarray((LABELS % 255).astype(np.uint8))
    picture.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9, 1, 2, 3])  # 0 is shown white, and is background all the same
    picture.save(path)


def _colours(path: Path) -> None:
    pixels = np.zeros((*LABELS.shape, 4), np.uint8)
    pixels[..., 3] = 255  # opaque everywhere
    pixels[INSIDE, 2] = 7
    Image.fromarray(pixels).save(path)


KINDS = {
    "16-bit.png": lambda path: Image.fromarray(LABELS).save(path),
    "16-bit.tif": lambda path: tifffile.imwrite(path, LABELS),
    "deflate.tif": lambda path: tifffile.imwrite(path, LABELS, compression="zlib"),
    "palette.png": _palette,
    "rgba.png": _colours,
    "grey.png": lambda path: Image.fromarray(INSIDE.astype(np.uint8) * 255).save(path),
    "bit.png": lambda path: Image.fromarray(INSIDE).save(path),
    "one.png": lambda path: Image.fromarray(INSIDE.astype(np.uint8)).save(path),
    "32-bit.tif": lambda path: tifffile.imwrite(path, LABELS.astype(np.int32)),
}


@pytest.mark.parametrize("name", KINDS)
def test_whatever_is_not_background_is_inside(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    np.testing.assert_array_equal(rle.decode(external.mask_text(tmp_path / name, 7, 11), 7, 11) > 0, INSIDE)


def test_a_jpeg_mask_is_cut_in_the_middle(tmp_path: Path) -> None:
    mask = np.zeros((64, 96), np.uint8)
    mask[13:45, 21:77] = 255  # not along the blocks of 8 pixels
    Image.fromarray(mask).save(tmp_path / "m.jpg", quality=75)
    assert (np.asarray(Image.open(tmp_path / "m.jpg")) % 255 != 0).any(), "this JPEG has values in between"
    np.testing.assert_array_equal(rle.decode(external.mask_text(tmp_path / "m.jpg", 64, 96), 64, 96), mask // 255)


def test_masks_that_cannot_be(tmp_path: Path) -> None:
    Image.fromarray(INSIDE).save(tmp_path / "m.png")
    with pytest.raises(SlideError, match=r"mask of 7 x 11 pixels, but its slide has 11 x 7 \(height x width\)"):
        external.mask_text(tmp_path / "m.png", 11, 7)
    (tmp_path / "t.png").write_bytes((tmp_path / "m.png").read_bytes()[:40])
    with pytest.raises(SlideError, match=r"t\.png cannot be read as a mask"):
        external.mask_text(tmp_path / "t.png", 7, 11)


@given(arrays(np.uint8, (4, 6, 3)))
def test_ids_depend_on_pixels_and_shape_alone(pixels: np.ndarray) -> None:
    name = external.content_id(pixels)
    assert name == external.content_id(np.asfortranarray(pixels)) and len(name) == 16 and name[0] == "x"
    assert name != external.content_id(pixels.reshape(6, 4, 3))
    other = pixels.copy()
    other[3, 5, 2] ^= 1
    assert name != external.content_id(other)


@given(st.lists(st.sampled_from("abcd"), unique=True), st.lists(st.sampled_from("cdef"), unique=True))
def test_joined_tables_hold_every_slide_once(first: list[str], second: list[str]) -> None:
    one = [{"id": name, "organ": "lung", "rle": "1 2"} for name in first]
    two = [{"id": name, "organ": "lung", "rle": "1 2", "weight": "0.5"} for name in second]
    found = external.joined({Path("one"): one, Path("two"): two})
    assert list(found) == [*first, *(name for name in second if name not in first)]
    assert all(path == Path("one" if name in first else "two") for name, (path, _) in found.items())
    other = [{**row, "rle": "3 4"} for row in two]
    replaced = external.joined({Path("one"): one, Path("two"): other}, replace=True)
    assert all((row["rle"] == "3 4") == (name in second) for name, (_, row) in replaced.items())
    if set(first) & set(second):
        with pytest.raises(TableError, match="with another rle than one; let the later table win"):
            external.joined({Path("one"): one, Path("two"): other})


def test_a_written_table_keeps_every_column(tmp_path: Path) -> None:
    rows = [{"id": "a", "extra": "1,2\n3"}, {"id": "b", "weight": "0.5"}]
    external.write_table(tmp_path / "t.csv", rows, ("id", "rle"))
    assert external.read_table(tmp_path / "t.csv", ("id",)) == [
        {"id": "a", "rle": "", "extra": "1,2\n3", "weight": "1"},
        {"id": "b", "rle": "", "extra": "", "weight": "0.5"},
    ]
    external.write_table(tmp_path / "t.csv", [*rows, rows[0]], ("id",))
    with pytest.raises(TableError, match="repeats the id a"):
        external.read_table(tmp_path / "t.csv", ("id",))
