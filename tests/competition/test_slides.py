"""Slides by three independent writers, in many layouts, come back as the array that went in, with and without
imagecodecs.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_pictures import HAS_IMAGECODECS, NO_CODECS, picture

RGBA = picture(samples=4)
RGB = RGBA[..., :3]
GREY = RGBA[..., 0]
AS_RGB = np.repeat(GREY[..., None], 3, axis=2)
PLANES = np.ascontiguousarray(np.moveaxis(RGB, -1, 0))

# name: (array that is written, arguments of tifffile.imwrite, array expected from the reader)
LAYOUTS: dict[str, tuple[np.ndarray, dict[str, Any], np.ndarray]] = {
    "rgb": (RGB, {"photometric": "rgb"}, RGB),
    "rgba": (RGBA, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, RGB),
    "rgba premultiplied": (RGBA, {"photometric": "rgb", "extrasamples": ["assocalpha"]}, RGB),
    "grey": (GREY, {"photometric": "minisblack"}, AS_RGB),
    "grey + alpha": (
        RGBA[..., :2],
        {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]},
        AS_RGB,
    ),
    "three grey samples": (RGB, {"photometric": "minisblack", "planarconfig": "contig"}, RGB),
    "planar": (PLANES, {"photometric": "rgb", "planarconfig": "separate"}, RGB),
    "(1, 1, 3, H, W) planar": (PLANES[None, None], {"photometric": "rgb", "planarconfig": "separate"}, RGB),
    "(3, H, W) grey pages": (PLANES, {"photometric": "minisblack"}, RGB),
    "(1, 1, 3, H, W) grey pages": (PLANES[None, None], {"photometric": "minisblack"}, RGB),
    "pages without metadata": (PLANES, {"photometric": "minisblack", "metadata": None}, RGB),
    "16-bit": (RGB.astype(np.uint16) * 257, {"photometric": "rgb"}, RGB),
    "16-bit planar": (PLANES.astype(np.uint16) * 257, {"photometric": "rgb", "planarconfig": "separate"}, RGB),
    "16-bit big endian": (RGB.astype(np.uint16) * 257, {"photometric": "rgb", "byteorder": ">"}, RGB),
    "12-bit in 16": (RGB.astype(np.uint16) * 16 + 7, {"photometric": "rgb"}, RGB),
    "8-bit in 16": (RGB.astype(np.uint16), {"photometric": "rgb"}, RGB),
    "inverted": (255 - GREY, {"photometric": "miniswhite"}, AS_RGB),
    "16-bit inverted": (65535 - GREY.astype(np.uint16) * 257, {"photometric": "miniswhite"}, AS_RGB),
    "1-bit": (GREY > 128, {"photometric": "minisblack"}, np.where(AS_RGB > 128, 255, 0).astype(np.uint8)),
    "1-bit inverted": (GREY <= 128, {"photometric": "miniswhite"}, np.where(AS_RGB > 128, 255, 0).astype(np.uint8)),
    "float": (RGB.astype(np.float32) / 255, {"photometric": "rgb"}, RGB),
    "bigtiff": (RGB, {"photometric": "rgb", "bigtiff": True}, RGB),
}
STORAGE: dict[str, dict[str, Any]] = {
    "one strip": {},
    "strips of 5 rows": {"rowsperstrip": 5},
    "strips of 1 row": {"rowsperstrip": 1},
    "tiles": {"tile": (16, 32)},
}
PACKING: dict[str, dict[str, Any]] = {
    "plain": {},
    "deflate": {"compression": "zlib"},
    "deflate + predictor": {"compression": "zlib", "predictor": 2},
    "lzw": {"compression": "lzw"},
    "lzw + predictor": {"compression": "lzw", "predictor": 2},
    "packbits": {"compression": "packbits"},
}


def check(slides: ModuleType, path: Path, expected: np.ndarray, tolerance: int = 0) -> None:
    found = slides.read(path)
    assert found.shape == expected.shape and found.dtype == np.uint8 and found.flags.c_contiguous
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    assert slides.size(path) == expected.shape[:2]


# The horizontal predictor is defined for integers of whole bytes only.
CASES = [
    (layout, storage, packing)
    for layout in LAYOUTS
    for storage in STORAGE
    for packing in PACKING
    if not ("predictor" in packing and layout.startswith(("1-bit", "float")))
]


@pytest.mark.parametrize(("layout", "storage", "packing"), CASES)
def test_tiff_layouts(slides: ModuleType, tmp_path: Path, layout: str, storage: str, packing: str) -> None:
    if not HAS_IMAGECODECS and "lzw" in packing:
        pytest.skip(NO_CODECS)
    array, options, expected = LAYOUTS[layout]
    path = tmp_path / "slide.tiff"
    tifffile.imwrite(path, array, **options, **STORAGE[storage], **PACKING[packing])
    check(slides, path, expected)


@pytest.mark.parametrize("storage", ["one strip", "strips of 16 rows", "tiles"])
@pytest.mark.parametrize("colour", ["rgb", "ycbcr", "grey", "planes"])
def test_jpeg_in_tiff(slides: ModuleType, tmp_path: Path, storage: str, colour: str) -> None:
    if not HAS_IMAGECODECS:
        pytest.skip(NO_CODECS)
    path = tmp_path / "slide.tiff"
    arguments = {"level": 95} | ({"outcolorspace": colour} if colour in ("rgb", "ycbcr") else {})
    array = {"grey": GREY, "planes": PLANES}.get(colour, RGB)
    options = {
        "photometric": "minisblack" if colour == "grey" else "rgb",
        "rowsperstrip": 16 if "16" in storage else None,
    }
    options |= {"planarconfig": "separate"} if colour == "planes" else {}
    options |= {"tile": (16, 32)} if storage == "tiles" else {}
    tifffile.imwrite(path, array, compression="jpeg", compressionargs=arguments, **options)
    # Pillow has no planar JPEG; OpenCV reads the whole file by libtiff's own colour conversion, another way than the
    # reader's.
    whole = cv2.imread(str(path))[..., ::-1] if colour == "planes" else np.array(Image.open(path).convert("RGB"))
    check(slides, path, whole, tolerance=4)
    assert np.abs(slides.read(path).astype(int) - (AS_RGB if colour == "grey" else RGB)).mean() < 8


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "raw"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_pillow_tiffs(slides: ModuleType, tmp_path: Path, mode: str, compression: str) -> None:
    if mode == "I;16":
        image, expected = Image.fromarray(GREY.astype(np.uint16) * 257), AS_RGB
    elif mode == "P":
        image = Image.fromarray(RGB).convert("P", palette=Image.Palette.ADAPTIVE)
        expected = np.array(image.convert("RGB"))
    else:
        image = Image.fromarray(RGBA).convert("RGB" if mode == "1" else "RGBA").convert(mode)
        expected = np.array(image.convert("RGB") if mode != "RGBA" else image)[..., :3]
    image.save(tmp_path / "slide.tiff", compression=compression)
    check(slides, tmp_path / "slide.tiff", expected)


def test_pillow_jpeg_tiff_equals_pillows_decode(slides: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "slide.tiff"
    Image.fromarray(RGB).save(path, compression="jpeg", quality=90)
    check(slides, path, np.array(Image.open(path).convert("RGB")), tolerance=3)


@pytest.mark.parametrize("array", [RGB, GREY, RGB.astype(np.uint16) * 257], ids=["rgb", "grey", "16-bit"])
@pytest.mark.parametrize("suffix", [".tiff", ".png"])
def test_opencv_files(slides: ModuleType, tmp_path: Path, array: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"slide{suffix}"
    assert cv2.imwrite(str(path), array[..., ::-1] if array.ndim == 3 else array)
    check(slides, path, AS_RGB if array.ndim == 2 else RGB)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_files(slides: ModuleType, tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode) if mode in ("P", "1") else Image.fromarray(RGBA).convert(mode)
    image.save(tmp_path / "slide.png")
    expected = np.array(image)[..., :3] if mode == "RGBA" else np.array(image.convert("RGB"))
    check(slides, tmp_path / "slide.png", expected)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}], ids=["baseline", "progressive", "4:4:4"]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_files(slides: ModuleType, tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    path = tmp_path / "slide.jpg"
    exif = Image.Exif()
    exif[274] = 6  # orientation: to be ignored, because masks are in stored pixels
    Image.fromarray(RGB).convert(mode).save(path, quality=90, exif=exif, **options)
    check(slides, path, np.array(Image.open(path).convert("RGB")), tolerance=3)


def test_pyramid_gives_its_largest_level(slides: ModuleType, tmp_path: Path) -> None:
    for name, subfile in (("subifds", False), ("pages", True)):
        path = tmp_path / f"{name}.tiff"
        with tifffile.TiffWriter(path) as writer:
            writer.write(RGB, photometric="rgb", subifds=0 if subfile else 1, metadata=None)
            writer.write(RGB[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
        check(slides, path, RGB)


def test_imagej_and_ome_metadata_do_not_change_the_picture(slides: ModuleType, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "imagej.tiff", PLANES, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "slide.ome.tiff", PLANES, photometric="minisblack", metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "rgb.ome.tiff", RGB, photometric="rgb", metadata={"axes": "YXS"})
    for name in ("imagej.tiff", "slide.ome.tiff", "rgb.ome.tiff"):
        check(slides, tmp_path / name, RGB)


def test_a_dark_12_bit_rule_is_about_the_largest_value(slides: ModuleType, tmp_path: Path) -> None:
    array = np.zeros((4, 5, 3), np.uint16)
    array[0, 0] = (4095, 2048, 16)
    tifffile.imwrite(tmp_path / "twelve.tiff", array, photometric="rgb")
    array[1, 1] = (4096, 0, 0)
    tifffile.imwrite(tmp_path / "sixteen.tiff", array, photometric="rgb")
    assert slides.read(tmp_path / "twelve.tiff")[0, 0].tolist() == [255, 128, 1]
    assert slides.read(tmp_path / "sixteen.tiff")[0, 0].tolist() == [15, 8, 0]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_size_any_storage(slides: ModuleType, tmp_path: Path, data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    samples = data.draw(st.sampled_from([1, 3, 4]))
    array = np.random.default_rng(0).integers(0, 256, (height, width, samples)).astype(np.uint8)
    usable = [options for name, options in PACKING.items() if HAS_IMAGECODECS or "lzw" not in name]
    options = data.draw(st.sampled_from(usable)) | data.draw(st.sampled_from(list(STORAGE.values())))
    options = options | ({"extrasamples": ["unassalpha"]} if samples == 4 else {})
    path = tmp_path / "slide.tiff"
    stored, photometric = (array, "rgb") if samples > 1 else (array[..., 0], "minisblack")
    tifffile.imwrite(path, stored, photometric=photometric, metadata=None, **options)
    check(slides, path, array[..., :3] if samples > 1 else np.repeat(array, 3, axis=2))


# ---------------------------------------------------------------- real files


def test_every_real_mini_slide_and_its_size(slides: ModuleType, shared_data: Path) -> None:
    folder = shared_data / "hubmap-mini"
    table = pd.read_csv(folder / "train.csv")
    assert len(table) == 26
    for row in table.itertuples():
        path = folder / "train_images" / f"{row.id}.tiff"
        expected = cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]
        assert expected.shape == (row.img_height, row.img_width, 3)
        check(slides, path, expected)
    check(
        slides, folder / "test_images" / "10078.tiff", cv2.imread(str(folder / "test_images" / "10078.tiff"))[..., ::-1]
    )


def test_a_real_slide_that_is_not_square(slides: ModuleType, shared_data: Path) -> None:
    table = pd.read_csv(shared_data / "glas" / "train.csv")
    row = table[table.img_height != table.img_width].iloc[0]
    path = shared_data / "glas" / "train_images" / f"{row.id}.tiff"
    assert slides.size(path) == (row.img_height, row.img_width)
    check(slides, path, np.array(Image.open(path).convert("RGB")))


def test_real_lzw_slides_and_jpeg_targets(slides: ModuleType, shared_data: Path) -> None:
    paths = sorted((shared_data / "stain-references").glob("*.tif"))
    assert len(paths) == 8
    for path in paths:
        check(slides, path, np.array(Image.open(path).convert("RGB")))
    for path in sorted((shared_data / "stain-references").glob("*.jpg")):
        check(slides, path, np.array(Image.open(path).convert("RGB")), tolerance=3)
