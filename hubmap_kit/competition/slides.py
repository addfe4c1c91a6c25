"""Slides: any TIFF (or PNG, JPEG) that the competition or a public archive may hold, read as `(H, W, 3)` uint8 RGB.

tifffile reads TIFF. Where it would need the codec package `imagecodecs`, which Kaggle's image lacks, OpenCV unpacks the
compressed segments (`tiff_segments`); the layout stays tifffile's, because OpenCV's own layout rules are wrong for some
files (it multiplies colours by alpha, and reads 16-bit planar files as garbage without a word).
"""

from __future__ import annotations

import html
import logging
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

from hubmap_kit.competition import tiff_segments
from hubmap_kit.errors import SlideError

MAX_PIXELS = (
    500_000_000  # 1.5 GB of RGB; the largest competition slide has 20 million pixels, so more means a damaged header
)
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start-of-frame markers: ITU-T T.81, table B.1
MICROSCOPIC_UM = (0.05, 10.0)  # the competition's pixels are 0.229 to 6.263 um wide; 1200 dpi would be 21 um
TIFF_UNITS_UM = {2: 25_400.0, 3: 10_000.0}  # inch, centimetre
OME_UNITS_UM = {"nm": 1e-3, "um": 1.0, "\u00b5m": 1.0, "\u03bcm": 1.0, "mm": 1e3}
PHOTOMETRICS = {"MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR"}


def read(path: str | Path) -> np.ndarray:
    """Read a slide as `(H, W, 3)` uint8 RGB, C-contiguous; height and width come from the file, never from a table.

    Layouts: stripped, tiled, planar, grey, grey + alpha, RGBA (alpha is dropped), palette, 1-bit, MinIsWhite, `(3, H,
    W)` as planes or as three grey pages, any number of length-1 axes. A pyramid gives its largest level. EXIF
    orientation is ignored, because masks are in stored pixels.

    Depth: 16-bit files are taken as 8-, 12- or 16-bit by their largest value (up to 255, 4095, 65535) and shifted to 8
    bits: scanners store 12-bit values in 16-bit samples without saying so, and the bright background of a slide reaches
    full scale. Float files must lie in 0..1 and are scaled by 255; 1-bit files become 0 and 255.

    Raises `SlideError` when the file is missing, truncated, damaged, not an image, or of a layout or type not listed
    here.
    """
    path = Path(path)
    kind = _kind(path)
    with _quiet():
        if kind == "tiff":
            with _tiff(path) as series:
                pixels = _finish(_tiff_pixels(path, series), series.keyframe, path)
        else:
            pixels = _flat_pixels(path, kind)
    return np.ascontiguousarray(pixels)


def size(path: str | Path) -> tuple[int, int]:
    """Height and width in pixels of `read(path)`, from the header alone; raises `SlideError` as `read` does for the
    header.
    """
    path = Path(path)
    kind = _kind(path)
    if kind != "tiff":
        return _flat_size(path, path.read_bytes(), kind)
    with _quiet(), _tiff(path) as series:
        return series.shape[series.axes.index("Y")], series.shape[series.axes.index("X")]


def stated_um_per_px(path: str | Path) -> float | None:
    """The width of a pixel in um that a TIFF states in its header; None where it states none, or none that a slide can
    have.

    OME's PhysicalSizeX goes before XResolution with ResolutionUnit. What writers put there by themselves (1:1, 72 to
    1200 dpi) is no pixel size of a slide and lies beyond `MICROSCOPIC_UM`. Only the first directory of the file is
    read, and nothing is raised.
    """
    try:
        if _kind(Path(path)) != "tiff":
            return None
        with _quiet(), tifffile.TiffFile(path, is_ome=False) as tif:
            tags = tif.pages.first.tags
            found = _ome_um(str(tags.valueof(270, ""))) or _resolution_um(tags.valueof(282), tags.valueof(296, 2))
    except Exception:  # a damaged file is told by `read`, which comes sooner or later
        return None
    return found if found is not None and MICROSCOPIC_UM[0] <= found <= MICROSCOPIC_UM[1] else None


def _ome_um(description: str) -> float | None:
    """PhysicalSizeX of OME-XML in um (its unit where none is given, as in the OME schema)."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", description)
    if pixels is None:
        return None
    values = dict(re.findall(r'\b(PhysicalSizeX(?:Unit)?)\s*=\s*"([^"]*)"', pixels[0]))
    factor = OME_UNITS_UM.get(html.unescape(values.get("PhysicalSizeXUnit", "um")))
    return float(values["PhysicalSizeX"]) * factor if factor and "PhysicalSizeX" in values else None


def _resolution_um(resolution: tuple[int, int] | None, unit: int) -> float | None:
    """XResolution (pixels per unit as a fraction) and ResolutionUnit in um per pixel: TIFF 6.0, section 8."""
    if resolution is None or not all(resolution) or unit not in TIFF_UNITS_UM:
        return None
    return TIFF_UNITS_UM[unit] * resolution[1] / resolution[0]


def _kind(path: Path) -> str:
    if not path.exists():
        raise SlideError(f"{path}: no such file; check the id and the folder of the slides.")
    if not path.is_file():
        raise SlideError(
            f"{path}: this is a folder, expected one slide file; give the path of a TIFF, PNG or JPEG file."
        )
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise SlideError(f"{path}: the file cannot be opened ({error.strerror}); check its permissions.") from error
    if not head:
        raise SlideError(f"{path}: the file is empty, expected an image; copy or download it again.")
    if head[:4] in TIFF_MAGICS:
        return "tiff"
    if head == PNG_MAGIC:
        return "png"
    if head[:3] == JPEG_MAGIC:
        return "jpeg"
    found = head.hex(" ")
    raise SlideError(
        f"{path}: starts with the bytes {found}, expected a TIFF, PNG or JPEG file; convert it or fetch it again."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep tifffile and OpenCV from printing beside the one sentence of a `SlideError`."""
    logger, level = logging.getLogger("tifffile"), cv2.utils.logging.getLogLevel()

    def silence(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(silence)
    # Whoever finds OpenCV silent already leaves it alone, so that threads that overlap never restore a wrong level.
    if level > 0:
        cv2.utils.logging.setLogLevel(0)
    try:
        yield
    finally:
        logger.removeFilter(silence)
        if level > 0:
            cv2.utils.logging.setLogLevel(level)


def _damaged(path: Path, found: object) -> SlideError:
    return SlideError(f"{path}: the file is truncated or damaged ({found}); copy or download it again.")


def _checked_size(path: Path, height: int, width: int) -> tuple[int, int]:
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise SlideError(
            f"{path}: declares {height} x {width} pixels, expected 1 to {MAX_PIXELS} in all; the header is wrong, fetch"
            " it again."
        )
    return height, width


# ---------------------------------------------------------------- TIFF


@contextmanager
def _tiff(path: Path) -> Iterator[Any]:
    """Open a TIFF and yield the largest level of its first series, checked against the size of the file."""
    try:
        # OME metadata may point into other files; the pages alone say all that one slide needs.
        tif = tifffile.TiffFile(path, is_ome=False)
    except Exception as error:  # tifffile raises struct, value, key and its own errors for a damaged header
        raise _damaged(path, _reason(error)) from error
    with tif:
        try:
            levels = [level for series in tif.series[:1] for level in series.levels]
            series = max(levels, key=lambda level: prod(level.shape), default=None)
            _check_layout(path, series)
            tiff_segments.check_chain(tif)
            _check_segments(path, series)
        except SlideError:
            raise
        except Exception as error:  # as above: a header that parses may still hold nonsense
            raise _damaged(path, _reason(error)) from error
        yield series


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:117] + "...") if len(text) > 120 else (text or type(error).__name__)


def _check_layout(path: Path, series: Any) -> None:
    if series is None:
        raise _damaged(path, "no picture in it")
    page, axes, shape = series.keyframe, series.axes, series.shape
    found = f"{path}: holds an array of shape {shape} (axes {axes}, {page.dtype}, {page.photometric.name})"
    others = [(axis, length) for axis, length in zip(axes, shape, strict=True) if axis not in "YX" and length > 1]
    samples = others[0] if others else ("S", 1)
    if not {"Y", "X"} <= set(axes) or len(others) > 1 or samples[1] > 4:
        raise SlideError(
            f"{found}, expected one picture with 1 to 4 samples per pixel; export that picture alone as RGB."
        )
    if samples[0] != "S" and samples[1] not in (1, 3):
        raise SlideError(f"{found}, expected one page, or three as red, green and blue; export one picture as RGB.")
    if page.photometric.name not in PHOTOMETRICS or (
        page.photometric.name == "YCBCR" and page.compression != tiff_segments.JPEG
    ):
        raise SlideError(f"{found}, expected grey, RGB or palette colours; convert it to RGB.")
    if page.dtype is None or page.dtype not in ("bool", "uint8", "uint16", "float16", "float32", "float64"):
        raise SlideError(
            f"{found}, expected samples of type bool, uint8, uint16 or float in 0..1; convert it to uint8."
        )
    if page.photometric.name == "PALETTE" and (page.dtype != "uint8" or page.colormap is None or samples[1] != 1):
        raise SlideError(f"{found}, expected a palette with 8-bit indices and a colour map; convert it to RGB.")
    if page.dtype == "bool" and page.predictor != 1:
        raise SlideError(
            f"{found} with a predictor, which TIFF defines only for whole bytes; save it without a predictor."
        )
    _checked_size(path, shape[axes.index("Y")], shape[axes.index("X")])


def _check_segments(path: Path, series: Any) -> None:
    """Compare every declared strip or tile with the size of the file: the decoders return partial pictures without a
    word.
    """
    on_disk = path.stat().st_size
    key = series.keyframe
    if key.samplesperpixel > 1 and 258 not in key.tags:
        raise _damaged(path, "its bits per sample are unreadable")
    if series.dataoffset is not None and series.dataoffset + series.nbytes > on_disk:
        raise _damaged(
            path, f"its pixels end at byte {series.dataoffset + series.nbytes}, but the file has {on_disk} bytes"
        )
    pages = [page for page in series.pages if page is not None]
    if series.dataoffset is None and len(pages) * prod(key.shape) != prod(series.shape):
        raise _damaged(path, "some of its pages are missing")
    for page in pages:
        offsets, counts = page.dataoffsets, page.databytecounts
        if len(offsets) < prod(key.chunked) or len(counts) < prod(key.chunked):
            raise _damaged(path, f"{len(offsets)} of {prod(key.chunked)} strips or tiles are declared")
        if min(offsets) < 8 or min(counts) < 1:
            raise _damaged(path, "a strip or tile is empty")
        end = max(offset + count for offset, count in zip(offsets, counts, strict=False))
        if end > on_disk:
            raise _damaged(path, f"its pixels end at byte {end}, but the file has {on_disk} bytes")


def _tiff_pixels(path: Path, series: Any) -> np.ndarray:
    """The stored samples as `(H, W)` or `(H, W, samples)`, in the stored type."""
    try:
        if tiff_segments.needed(series.keyframe):
            array = tiff_segments.decode_series(series)
        else:
            array = series.asarray(maxworkers=1)  # beside the reader, a network needs the cores
    except tiff_segments.NeedsImagecodecs as error:
        raise SlideError(f"{path}: {error}; install it, or save the slide as 8-bit RGB with deflate.") from error
    except Exception as error:  # zlib, codec, OpenCV and tifffile errors: all of them mean bytes that do not decode
        raise _damaged(path, _reason(error)) from error
    axes = series.axes
    others = [axis for axis, name in enumerate(axes) if name not in "YX"]
    array = np.transpose(array, [axes.index("Y"), axes.index("X"), *others])
    return array.reshape(array.shape[0], array.shape[1], -1)


def _finish(array: np.ndarray, page: Any, path: Path) -> np.ndarray:
    if page.photometric.name == "PALETTE":
        colours = (
            page.colormap if page.colormap.max() < 256 else page.colormap >> 8
        )  # some writers fill only the low byte
        return colours.T.astype(np.uint8)[array[..., 0]]
    inverted = page.photometric.name == "MINISWHITE"
    array = _to_uint8(array, path, page.bitspersample, full_scale=inverted)
    return _to_rgb(255 - array if inverted else array)


# ---------------------------------------------------------------- samples


def _to_uint8(array: np.ndarray, path: Path, bits: int = 16, full_scale: bool = False) -> np.ndarray:
    """Samples of any accepted type as uint8; `full_scale` takes 16-bit samples as 16-bit whatever their largest
    value.
    """
    if array.dtype == np.uint8:
        return array if bits >= 8 else (array.astype(np.uint16) * 255 // (2**bits - 1)).astype(np.uint8)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        if bits == 16:
            bits = 16 if full_scale else next(depth for depth in (8, 12, 16) if array.max() < 2**depth)
        return (array >> (bits - 8)).astype(np.uint8)
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise SlideError(
            f"{path}: holds {array.dtype} values outside 0..1, expected 0..1 or integers; rescale it to uint8."
        )
    return np.rint(array * np.float32(255)).astype(np.uint8)


def _to_rgb(array: np.ndarray) -> np.ndarray:
    # Alpha is dropped, not applied: scanners write it as a constant or as a tissue flag, and the pixels under it are
    # real.
    return array[..., :3] if array.shape[2] >= 3 else np.repeat(array[..., :1], 3, axis=2)


# ---------------------------------------------------------------- PNG and JPEG


def _flat_pixels(path: Path, kind: str) -> np.ndarray:
    data = path.read_bytes()
    expected = _flat_size(path, data, kind)
    if kind == "jpeg" and b"\xff\xd9" not in data[data.find(b"\xff\xda") :]:
        raise _damaged(path, "its end-of-image marker is missing")
    try:
        array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise _damaged(path, _reason(error)) from error
    if array is None or array.shape[:2] != expected:
        raise _damaged(path, "its pixels do not decode")
    array = array.reshape(*expected, -1)
    if array.shape[2] >= 3:
        array = array[..., 2::-1]  # OpenCV gives BGR(A)
    return _to_rgb(_to_uint8(array, path))


def _flat_size(path: Path, data: bytes, kind: str) -> tuple[int, int]:
    try:
        height, width = _png_size(data) if kind == "png" else _jpeg_size(data)
    except (ValueError, struct.error, IndexError) as error:
        raise _damaged(path, _reason(error)) from error
    return _checked_size(path, height, width)


def _png_size(data: bytes) -> tuple[int, int]:
    """Walk the chunks and their checksums (W3C PNG, section 5): OpenCV returns a partial picture when the end is
    missing.
    """
    start, name = 8, b""
    while name != b"IEND":
        (length,) = struct.unpack_from(">I", data, start)
        name, end = data[start + 4 : start + 8], start + 8 + length
        if zlib.crc32(data[start + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise ValueError(f"the checksum of its {name!r} chunk is wrong")
        start = end + 4
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walk the marker segments up to the frame header (ITU-T T.81, annex B)."""
    start = 2
    while start + 4 <= len(data):
        if data[start] != 0xFF:
            raise ValueError(f"no marker at byte {start}")
        if data[start + 1] in JPEG_FRAMES:
            return struct.unpack_from(">HH", data, start + 5)
        if data[start + 1] == 0xFF:  # fill byte
            start += 1
        else:
            start += 2 + struct.unpack_from(">H", data, start + 2)[0]
    raise ValueError("its frame header is missing")
