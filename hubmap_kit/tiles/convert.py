"""Slides -> tile store."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.pixel_sizes import PixelSizeWatch
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import ScaleChoices, ScaleConfig, TilesConfig
from hubmap_kit.files import sweep, write_json
from hubmap_kit.progress import track
from hubmap_kit.tiles import store as files
from hubmap_kit.tiles.scaling import resize_image, resize_mask, scaled_shape
from hubmap_kit.tiles.store import TileStore, is_finished

log = logging.getLogger(__name__)


def fingerprint(slides: Sequence[Slide], scale: ScaleConfig) -> str:
    """A hash (hex, 16 digits) of everything that a store's bytes depend on; slide files count by name and size."""
    parts: list[object] = [files.FORMAT, *_what_counts(scale)]
    parts += [[organ, *_what_counts(choices)] for organ, choices in sorted(scale.organs.items())]
    for slide in slides:
        size = slide.path.stat().st_size if slide.path.is_file() else -1
        labels = hashlib.sha256((slide.rle or "").encode()).hexdigest()
        parts.append(
            [
                slide.id,
                slide.organ,
                slide.source,
                slide.um_per_px,
                slide.height,
                slide.width,
                slide.path.name,
                size,
                labels,
            ]
        )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _what_counts(choices: ScaleChoices) -> list[object]:
    used = {"reduce": ("reduce",), "physical": ("um_per_px", "max_zoom"), "fit": ("fit",)}[choices.policy]
    return [choices.policy, *(getattr(choices, key) for key in used)]


def open_or_build(parent: Path, slides: Sequence[Slide], scale: ScaleConfig, tiles: TilesConfig) -> TileStore:
    """The store for these slides and this scale in `parent`, built if it is not there yet, with the tiles of one grid.

    The folder is named by the fingerprint, so runs that share data and scale share it, whatever their tiles. Raises
    SlideError and RleError.
    """
    mark = fingerprint(slides, scale)
    folder = parent / mark
    if not is_finished(folder, mark):
        build(folder, slides, scale, mark)
    return TileStore(folder, tiles)


def build(folder: Path, slides: Sequence[Slide], scale: ScaleConfig, mark: str) -> None:
    """Write a store.

    It grows under a temporary name and takes its own when it is complete; one slide is in memory at a time.
    """
    growing = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    sweep(folder.parent, f".{folder.name}.*.tmp")
    growing.mkdir(parents=True)
    watch = PixelSizeWatch()
    try:
        with open(growing / files.IMAGES, "wb") as images, open(growing / files.MASKS, "wb") as masks:
            rows = [_append(slide, scale, images, masks, watch) for slide in track(slides, "tile store", "slide")]
        pd.DataFrame(rows).to_parquet(growing / files.SLIDES)
        meta = {"format": files.FORMAT, "fingerprint": mark, "slides": len(rows), "scale": scale.model_dump()}
        write_json(growing / files.META, meta)
        if is_finished(folder, mark):
            return  # another process, such as the fold on the other GPU, was faster with the same store
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(growing, folder)
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    log.info("tile store of %d slides in %s", len(rows), folder)


def _append(
    slide: Slide, scale: ScaleConfig, images: BinaryIO, masks: BinaryIO, watch: PixelSizeWatch
) -> dict[str, object]:
    pixels = slide_files.read(slide.path)
    height, width = pixels.shape[:2]
    watch.look(slide, height, width)
    shape = scaled_shape(height, width, slide.um_per_px, scale, slide.organ)
    mask = resize_mask(decode_for(slide, height, width), shape)
    offsets = {"image_offset": images.tell(), "mask_offset": masks.tell()}
    images.write(np.ascontiguousarray(resize_image(pixels, shape)).data)
    masks.write(np.packbits(mask, axis=1).data)
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "um_per_px": slide.um_per_px,
        "height": height,
        "width": width,
        "rows": shape[0],
        "cols": shape[1],
        **offsets,
    }


def decode_for(slide: Slide, height: int, width: int) -> np.ndarray:
    """The slide's mask (height, width) of 0/1 at the size that its file has.

    Sizes in the table are sometimes off. Runs go down columns, so where only the width differs the file is believed as
    it is; where the height differs too, the file must be a resampled copy, and the mask is resampled with it.
    """
    text = slide.rle or ""
    if (height, width) == (slide.height, slide.width) or not text:
        return rle.decode(text, height, width)
    log.warning(
        "slide %s is %d x %d in its file but %d x %d in the table", slide.id, height, width, slide.height, slide.width
    )
    if height == slide.height:
        return rle.decode(text, height, width)
    return resize_mask(rle.decode(text, slide.height, slide.width), (height, width))
