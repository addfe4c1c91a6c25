"""TIFF below the level of tifffile: check the chain of pages, and decode strips and tiles without `imagecodecs`.

Each LZW or JPEG segment (strip or tile) is wrapped as a TIFF of its own and given to OpenCV, so that OpenCV does
nothing but decompress; where the segment goes, byte order, predictor and planes stay ours. Tag numbers: TIFF 6.0
specification (Adobe, 1992), section 8.
"""

from __future__ import annotations

import struct
from math import prod
from typing import Any

import cv2
import numpy as np
import tifffile

LZW, JPEG = 5, 7
GREY, RGB, YCBCR = 1, 2, 6


class NeedsImagecodecs(Exception):
    """The segment's codec is in neither tifffile alone nor OpenCV."""


def needed(page: Any) -> bool:
    """Whether tifffile lacks the codec or the predictor of this page."""
    codecs, predictors = tifffile.TIFF.DECOMPRESSORS, tifffile.TIFF.UNPREDICTORS
    packed = (
        page.bitspersample not in (1, 8, 16, 32, 64) and LZW not in codecs
    )  # without LZW there is no imagecodecs at all
    return page.compression not in codecs or page.predictor not in predictors or packed


def check_chain(tif: Any) -> None:
    """Follow the chain of page directories to its end; tifffile drops the pages behind a truncation without an error.

    `tif` is an open `tifffile.TiffFile`; raises ValueError when a directory lies outside the file.
    """
    handle, form, seen = tif.filehandle, tif.tiff, set()
    handle.seek(8 if form.offsetsize == 8 else 4)
    while True:
        (offset,) = struct.unpack(form.offsetformat, handle.read(form.offsetsize))
        if offset == 0 or offset in seen:
            return
        seen.add(offset)
        handle.seek(offset)
        count = handle.read(form.tagnosize)
        if len(count) < form.tagnosize:
            raise ValueError(f"page {len(seen)} starts at byte {offset}, but the file has {handle.size} bytes")
        end = handle.tell() + struct.unpack(form.tagnoformat, count)[0] * form.tagsize
        if end + form.offsetsize > handle.size:
            raise ValueError(
                f"the directory of page {len(seen)} ends at byte {end}, but the file has {handle.size} bytes"
            )
        handle.seek(end)


def decode_series(series: Any) -> np.ndarray:
    """All samples of a series, in the shape of `series.asarray()`; raises NeedsImagecodecs or ValueError (damaged
    bytes).
    """
    key = series.keyframe
    _check_supported(key)
    handle = key.parent.filehandle
    pages = [_decode_page(page, key, handle) for page in series.pages]
    return np.stack(pages).reshape(series.shape)


def _check_supported(page: Any) -> None:
    name = getattr(page.compression, "name", page.compression)
    samples = f"{page.bitspersample}-bit samples with compression {name} and predictor {int(page.predictor)}"
    missing = f"holds {samples}, which need imagecodecs"
    if (
        page.compression not in (LZW, JPEG)
        or page.fillorder != 1
        or page.predictor not in (1, 2)
        or page.imagedepth != 1
    ):
        raise NeedsImagecodecs(missing)
    if page.bitspersample not in (1, 8, 16, 32, 64) or (page.predictor == 2 and page.bitspersample == 1):
        raise NeedsImagecodecs(missing)
    if page.compression == JPEG and (page.bitspersample != 8 or _segment_samples(page) not in (1, 3)):
        raise NeedsImagecodecs(missing)


def _segment_samples(page: Any) -> int:
    return page.samplesperpixel if page.planarconfig == 1 else 1


def _decode_page(page: Any, key: Any, handle: Any) -> np.ndarray:
    """One page as `(planes, H, W, samples of a segment)`."""
    height, width, samples = key.imagelength, key.imagewidth, _segment_samples(key)
    rows, columns = (key.tilelength, key.tilewidth) if key.is_tiled else (min(key.rowsperstrip, height), width)
    down, across = -(-height // rows), -(-width // columns)
    out = np.empty((key.samplesperpixel // samples, height, width, samples), key.dtype)
    for index in range(prod((out.shape[0], down, across))):
        plane, rest = divmod(index, down * across)
        top, left = rest // across * rows, rest % across * columns
        # The last strip stores only the rows that are left; an edge tile is stored whole.
        stored = rows if key.is_tiled else min(rows, height - top)
        handle.seek(page.dataoffsets[index])
        data = handle.read(page.databytecounts[index])
        segment = (_lzw if key.compression == LZW else _jpeg)(data, (stored, columns, samples), key)
        out[plane, top : top + rows, left : left + columns] = segment[: height - top, : width - left]
    return out


def _lzw(data: bytes, shape: tuple[int, int, int], page: Any) -> np.ndarray:
    rows, columns, samples = shape
    row_bytes = -(-columns * samples * page.bitspersample // 8)
    raw = _lzw_bytes(data, rows, row_bytes)
    if page.bitspersample == 1:
        return np.unpackbits(raw.reshape(rows, row_bytes), axis=1)[:, : columns * samples].reshape(shape).astype(bool)
    array = raw.view(page.dtype.newbyteorder(page.parent.byteorder)).reshape(shape).astype(page.dtype)
    # Horizontal differencing: each sample is the difference from its left neighbour, modulo the sample's range.
    return np.cumsum(array, axis=1, dtype=page.dtype) if page.predictor == 2 else array


def _lzw_bytes(data: bytes, rows: int, row_bytes: int) -> np.ndarray:
    """The unpacked bytes, flat.

    They are asked for as 16-bit samples, because OpenCV reports damage in those and hides it in 8-bit ones; what does
    not fit (the last of an odd number of odd rows) is read once more as bytes.
    """
    if row_bytes % 2 == 0:
        height, width = rows, row_bytes // 2
    else:
        height, width = (rows // 2, row_bytes) if rows > 1 else (1, row_bytes // 2)
    parts, done = [], 2 * height * width
    if done:
        parts.append(
            _opencv(_wrap(data, height, width, LZW, GREY, 1, bits=16)).astype("<u2").reshape(-1).view(np.uint8)
        )
    if done < rows * row_bytes:
        parts.append(_opencv(_wrap(data, rows, row_bytes, LZW, GREY, 1)).reshape(-1)[done:])
    return np.concatenate(parts)


def _jpeg(data: bytes, shape: tuple[int, int, int], page: Any) -> np.ndarray:
    rows, columns, samples = shape
    if not (data.startswith(b"\xff\xd8") and b"\xff\xd9" in data[-16:]):
        raise ValueError("a JPEG strip or tile lacks its start or its end")
    photometric = GREY if samples == 1 else (YCBCR if page.photometric == YCBCR else RGB)
    subsampling = page.subsampling or (2, 2)
    array = _opencv(_wrap(data, rows, columns, JPEG, photometric, samples, page.jpegtables, subsampling))
    return array.reshape(rows, columns, samples)[..., ::-1]  # OpenCV gives BGR; one grey sample is unchanged


def _opencv(wrapped: bytes) -> np.ndarray:
    try:
        array = cv2.imdecode(np.frombuffer(wrapped, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError("a strip or tile does not decode") from error
    if array is None:
        raise ValueError("a strip or tile does not decode")
    return array


def _wrap(
    data: bytes,
    height: int,
    width: int,
    compression: int,
    photometric: int,
    samples: int,
    tables: bytes | None = None,
    subsampling: tuple[int, int] = (1, 1),
    bits: int = 8,
) -> bytes:
    """A little-endian TIFF with one strip: header, extra values, the strip, one directory."""
    extra = struct.pack(f"<{samples}H", *[bits] * samples)
    body = extra + (tables or b"")
    start = 8 + len(body)
    entries = [(256, 4, 1, width), (257, 4, 1, height)]
    entries += [(258, 3, samples, bits if samples == 1 else 8), (259, 3, 1, compression), (262, 3, 1, photometric)]
    entries += [(273, 4, 1, start), (277, 3, 1, samples), (278, 4, 1, height), (279, 4, 1, len(data))]
    if tables:
        entries.append((347, 7, len(tables), 8 + len(extra)))
    if photometric == YCBCR:
        entries.append((530, 3, 2, subsampling[0] | subsampling[1] << 16))
    directory = (
        struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + b"\0\0\0\0"
    )
    padding = b"\0" * (start + len(data) & 1)  # directories start on an even byte
    header = struct.pack("<2sHI", b"II", 42, start + len(data) + len(padding))
    return header + body + data + padding + directory
