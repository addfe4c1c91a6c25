"""Slides that are missing, truncated, damaged or of no supported layout are refused in one sentence, without other
output.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_pictures import HAS_IMAGECODECS, NO_CODECS, picture

from hubmap_kit.errors import SlideError

RGBA = picture(samples=4)
RGB = RGBA[..., :3]
PLANES = np.ascontiguousarray(np.moveaxis(RGB, -1, 0))


def refusal(slides: ModuleType, path: Path) -> str:
    """The message of read's refusal; a warning on the way is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(SlideError) as caught:
            slides.read(path)
    message = str(caught.value)
    assert str(path) in message and message.endswith(".") and "\n" not in message
    return message


def test_what_is_no_file_or_no_image(slides: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "empty.tiff").touch()
    (tmp_path / "text.tiff").write_text("id,rle\n10078,12 34\n")
    assert "no such file" in refusal(slides, tmp_path / "missing.tiff")
    assert "folder" in refusal(slides, tmp_path)
    assert "empty" in refusal(slides, tmp_path / "empty.tiff")
    assert "expected a TIFF, PNG or JPEG" in refusal(slides, tmp_path / "text.tiff")
    for name in ("missing.tiff", "empty.tiff", "text.tiff"):
        with pytest.raises(SlideError):
            slides.size(tmp_path / name)


@pytest.mark.parametrize("head", [b"II*\0", b"MM\0*", b"II+\0", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_magic_number_followed_by_garbage(slides: ModuleType, tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "slide.bin"
    for seed in range(20):
        path.write_bytes(head + np.random.default_rng(seed).bytes(seed * 7))
        refusal(slides, path)
        with pytest.raises(SlideError):
            slides.size(path)


WHOLE_FILES: dict[str, dict[str, Any]] = {
    "rgb plain": {},
    "rgb deflate": {"compression": "zlib", "rowsperstrip": 8},
    "rgb lzw tiles": {"compression": "lzw", "predictor": 2, "tile": (16, 16)},
    "three pages": {"photometric": "minisblack", "compression": "lzw"},
    "three plain pages": {"photometric": "minisblack"},
    "planar": {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"},
    "bigtiff": {"bigtiff": True, "compression": "lzw"},
}


@pytest.mark.parametrize("name", WHOLE_FILES)
def test_a_truncation_anywhere_is_refused(
    slides: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    path, cut = tmp_path / "whole.tiff", tmp_path / "cut.tiff"
    options = {"photometric": "rgb"} | WHOLE_FILES[name]
    planes = "planarconfig" in options or options["photometric"] == "minisblack"
    tifffile.imwrite(path, PLANES if planes else RGB, **options)
    assert np.array_equal(slides.read(path), RGB)
    data = path.read_bytes()
    for length in [*range(1, 400, 13), *range(400, len(data), max(1, len(data) // 40)), len(data) - 1]:
        cut.write_bytes(data[:length])
        # The last bytes may be a resolution or a date of the last page; without them every pixel is still there.
        if length > len(data) - 32 and name == "three plain pages":
            assert np.array_equal(slides.read(cut), RGB)
        else:
            refusal(slides, cut)
    captured = capfd.readouterr()
    assert captured.err == "" and captured.out == ""


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_truncated_png_or_jpeg_is_refused(slides: ModuleType, tmp_path: Path, suffix: str) -> None:
    path, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    Image.fromarray(RGB).save(path)
    data = path.read_bytes()
    for length in range(1, len(data), max(1, len(data) // 60)):
        cut.write_bytes(data[:length])
        refusal(slides, cut)


@pytest.mark.parametrize("compression", ["zlib", "lzw", "jpeg"])
def test_wiped_compressed_data_is_refused(
    slides: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str], compression: str
) -> None:
    if compression == "jpeg" and not HAS_IMAGECODECS:
        pytest.skip(NO_CODECS)
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, picture(96, 96), photometric="rgb", compression=compression, rowsperstrip=32)
    with tifffile.TiffFile(path) as tif:
        offset, count = tif.pages[0].dataoffsets[1], tif.pages[0].databytecounts[1]
    data = bytearray(path.read_bytes())
    data[offset : offset + count] = b"\xa5" * count
    path.write_bytes(bytes(data))
    assert "damaged" in refusal(slides, path)
    assert capfd.readouterr().err == ""


def test_a_flipped_byte_of_a_png_is_refused(slides: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "slide.png"
    Image.fromarray(RGB).save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))
    assert "checksum" in refusal(slides, path)


def test_a_strip_without_bytes_is_refused(slides: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, RGB, photometric="rgb", rowsperstrip=8, compression="zlib")
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags["StripByteCounts"]
        where, width = tag.valueoffset, 2 if tag.dtype == 3 else 4
    data = bytearray(path.read_bytes())
    data[where + width : where + 2 * width] = b"\0" * width
    path.write_bytes(bytes(data))
    assert "empty" in refusal(slides, path)


def test_unsupported_shapes_say_what_was_found(slides: ModuleType, tmp_path: Path) -> None:
    cases = {
        "(5, 20, 30)": np.zeros((5, 20, 30), np.uint8),
        "(2, 20, 30)": np.zeros((2, 20, 30), np.uint8),
        "(4, 20, 30, 3)": np.zeros((4, 20, 30, 3), np.uint8),
        "(20, 30, 7)": np.zeros((20, 30, 7), np.uint8),
    }
    for shape, array in cases.items():
        path = tmp_path / "slide.tiff"
        if array.shape[-1] == 7:
            tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig")
        else:
            tifffile.imwrite(path, array, photometric="rgb" if array.shape[-1] == 3 else "minisblack")
        message = refusal(slides, path)
        assert shape in message and "expected" in message
        with pytest.raises(SlideError):
            slides.size(path)


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint32", "int32", "complex64"])
def test_unsupported_types_are_named(slides: ModuleType, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, np.zeros((8, 9), dtype), photometric="minisblack")
    assert dtype in refusal(slides, path)


@pytest.mark.parametrize("value", [1.5, -0.1, 255.0, float("nan"), float("inf")])
def test_floats_outside_0_to_1_are_refused(slides: ModuleType, tmp_path: Path, value: float) -> None:
    array = np.full((8, 9, 3), 0.5, np.float32)
    array[3, 4, 1] = value
    tifffile.imwrite(tmp_path / "slide.tiff", array, photometric="rgb")
    assert "0..1" in refusal(slides, tmp_path / "slide.tiff")


def test_cmyk_is_refused(slides: ModuleType, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "slide.tiff", RGBA, photometric="separated")
    assert "SEPARATED" in refusal(slides, tmp_path / "slide.tiff")


def test_absurd_sizes_are_refused_before_memory_is_taken(slides: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, RGB, photometric="rgb", compression="zlib")
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
            tag = tif.pages[0].tags[name]
            data[tag.valueoffset : tag.valueoffset + 4] = struct.pack("<I", 2**30 if tag.dtype == 4 else 65535)
    path.write_bytes(bytes(data))
    assert "pixels" in refusal(slides, path)
    png = tmp_path / "slide.png"
    Image.fromarray(RGB).save(png)
    data = bytearray(png.read_bytes())
    data[16:24] = struct.pack(">II", 2**30, 2**30)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    png.write_bytes(bytes(data))
    assert "pixels" in refusal(slides, png)


def test_a_codec_that_is_missing_is_named(tmp_path: Path, slides: ModuleType) -> None:
    if not HAS_IMAGECODECS:
        pytest.skip(NO_CODECS)
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, RGB.astype(np.float32) / 255, photometric="rgb", compression="zlib", predictor=3)
    if 5 in slides.tifffile.TIFF.DECOMPRESSORS:
        assert np.array_equal(slides.read(path), RGB)
    else:
        assert "imagecodecs" in refusal(slides, path)


def test_what_was_silenced_for_a_read_speaks_again_after_it(slides: ModuleType, tmp_path: Path) -> None:
    logger, level = logging.getLogger("tifffile"), cv2.utils.logging.getLogLevel()
    filters = list(logger.filters)
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, RGB, photometric="rgb", compression="zlib")
    slides.read(path)
    path.write_bytes(path.read_bytes()[:300])
    refusal(slides, path)
    assert logger.filters == filters and cv2.utils.logging.getLogLevel() == level
