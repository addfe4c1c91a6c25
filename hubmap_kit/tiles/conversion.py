"""Slides -> a store or folders of tiles, by a ConvertConfig: parallel over slides, resumable, one slide in memory per
process.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.folds import assign_folds
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import ScaleConfig
from hubmap_kit.errors import RleError, SlideError, StoreError
from hubmap_kit.processes import become_worker, sigterm_held_back
from hubmap_kit.progress import bar
from hubmap_kit.tiles import store as files
from hubmap_kit.tiles.background import TissueMap, mask_box, tissue_map
from hubmap_kit.tiles.convert_config import ConvertConfig
from hubmap_kit.tiles.finishing import (
    Conversion,
    Growing,
    discard,
    found,
    growing,
    is_plain,
    remove_strangers,
    table_name,
    write_manifest,
    write_store,
    write_table,
)
from hubmap_kit.tiles.grid import box_shares
from hubmap_kit.tiles.store import decode_for, fingerprint
from hubmap_kit.tiles.writers import (
    FolderWriter,
    NoWriter,
    Picture,
    StoreWriter,
    Writer,
    cut,
    plan,
    tile_corners,
    union,
)

# Work on many slides in several processes: a bounded number at a time, so that memory does not grow with the slides.

T = TypeVar("T")
AHEAD = 2  # tasks handed out per process


def over_processes(work: Callable[[T], None], tasks: Sequence[T], jobs: int) -> Iterator[None]:
    """Do `work` for each task in `jobs` processes (1: in this one), and yield once for every task that is done, in any
    order.

    The first error ends it. Raises StoreError when a process dies, which is what an out-of-memory killer does.
    """
    if jobs <= 1 or len(tasks) <= 1:
        for task in tasks:
            work(task)
            yield
        return
    # A forked process would inherit locks that OpenCV's or pyarrow's threads hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from _hand_out(pool, work, tasks, jobs * AHEAD)
        except BrokenProcessPool as error:
            raise StoreError(
                "a process of the conversion was killed, as happens where memory is short; run again with fewer --jobs,"
                " it goes on"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _hand_out(pool: ProcessPoolExecutor, work: Callable[[T], None], tasks: Sequence[T], most: int) -> Iterator[None]:
    running: set[Future[None]] = set()
    for task in tasks:
        if len(running) >= most:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
        with sigterm_held_back():
            running.add(pool.submit(work, task))
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _start_worker() -> None:
    become_worker()
    cv2.setNumThreads(0)


PIXELS = 1  # raised when the same settings begin to give other pixels
VAL_FOLDS = 5
_USED = {
    "grid": ("reduce",),
    "resize": ("size", "pad"),
    "crop": ("canvas", "keep_scale", "reduce", "pad"),
    "pad": ("size", "reduce", "pad"),
}


@dataclass(frozen=True)
class Task:
    """One slide, and where its pixels go."""

    number: int
    slide: Slide
    config: ConvertConfig
    writer: Writer
    growing: Growing


def conversion_mark(slides: Sequence[Slide], config: ConvertConfig) -> str:
    """A hash (hex, 16 digits) of all that the written pixels depend on.

    A plain grid in a store has the fingerprint of the store that training looks for: its tiles are tables beside the
    pixels.
    """
    family = "crop" if config.cropped else config.kind
    base = fingerprint(slides, ScaleConfig(reduce=config.reduce))
    if config.stored and family == "grid" and not config.extends:
        return base
    keys = (*_USED[family], *(("size", "overlap", "edge", "pad") if config.extends else ()))
    used = {key: getattr(config, key) for key in keys} if config.stored else config.model_dump()
    text = json.dumps([PIXELS, fingerprint(slides, ScaleConfig()), family, used], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def convert(slides: Sequence[Slide], out: Path, config: ConvertConfig, jobs: int = 1) -> Conversion:
    """Convert slides into `out` with `jobs` processes; the files depend neither on their number nor on runs that were
    killed.

    A store lies in `out`/<mark>, beside others, so that training finds it with `--stores out`; folders of images are
    `out` itself. What is there already is not made again. Raises SlideError, RleError, and StoreError where `out` holds
    something else.
    """
    mark = conversion_mark(slides, config)
    final = out / mark if config.stored else out
    done = found(final, mark, config)
    if done is not None:
        discard(final, mark)
        return done
    if config.stored and files.is_finished(final, mark):
        _add_table(slides, final, mark, config, jobs)
    else:
        _check_free(final)
        with growing(final, mark) as here:
            writers = (
                _store_writers(slides, config, here.folder)
                if config.stored
                else _folder_writers(slides, config, here.folder)
            )
            entries = _run(slides, config, writers, here, jobs)
            _finish(here, mark, config, entries)
    made = found(final, mark, config)
    if made is None:
        raise StoreError(
            f"{final} is not what was just written there; another process works in it, so choose another --out"
        )
    return made


def _check_free(final: Path) -> None:
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise StoreError(
            f"{final} exists and holds no finished conversion of these slides with these settings; choose another --out"
            " or delete it"
        )


def _add_table(slides: Sequence[Slide], final: Path, mark: str, config: ConvertConfig, jobs: int) -> None:
    """Give a store whose pixels are there the tiles of one more conversion."""
    with growing(final, f"{mark}-{table_name(config)}") as here:
        entries = _run(slides, config, [NoWriter()] * len(slides), here, jobs)
        write_manifest(final, mark, config, write_table(final, config, entries), {})
        here.drop()


def _run(
    slides: Sequence[Slide], config: ConvertConfig, writers: Sequence[Writer], here: Growing, jobs: int
) -> list[dict[str, Any]]:
    """Convert every slide that the journal does not have yet; what is known of all of them."""
    here.forget_damaged()
    done = here.done()
    tasks = [
        Task(number, slide, config, writer, here)
        for number, (slide, writer) in enumerate(zip(slides, writers, strict=True))
        if number not in done
    ]
    with bar(len(slides), f"convert, {config.kind}", "slide") as progress:
        progress.update(len(done))
        for _ in over_processes(_convert_one, tasks, jobs):
            progress.update(1)
    return list(here.entries())


def _finish(here: Growing, mark: str, config: ConvertConfig, entries: Sequence[dict[str, Any]]) -> None:
    listed = {name: facts for entry in entries for name, facts in entry["files"].items()}
    remove_strangers(here.folder, {files.IMAGES, files.MASKS} if config.stored else set(listed))
    if config.stored:
        write_store(here.folder, mark, config, entries)
    try:
        counts = write_table(here.folder, config, entries)
    except StoreError:
        here.drop()
        raise
    write_manifest(here.folder, mark, config, counts, listed)
    here.finish()


def _store_writers(slides: Sequence[Slide], config: ConvertConfig, folder: Path) -> list[Writer]:
    """Places of all pictures in the files of a store, which get their full sizes at once. Only headers are read."""
    writers: list[Writer] = []
    images = masks = 0
    for slide in slides:
        picture = plan(config, *slide_files.size(slide.path))
        writers.append(StoreWriter(folder, images, masks))
        images += picture.rows * picture.cols * 3
        masks += picture.rows * ((picture.cols + 7) // 8)
    for name, end in ((files.IMAGES, images), (files.MASKS, masks)):
        with open(folder / name, "ab") as handle:
            handle.truncate(end)  # sparse until the slides are written; what an earlier run wrote stays
    return writers


def _folder_writers(slides: Sequence[Slide], config: ConvertConfig, folder: Path) -> list[Writer]:
    organ_labels = config.labels == "organ"
    if config.format != "mmseg":
        return [
            FolderWriter(
                folder, "images", "masks", ".jpg" if config.format == "jpeg" else ".png", organ_labels, config.tiled
            )
        ] * len(slides)
    folds = assign_folds(slides, VAL_FOLDS) if config.val_fold >= 0 else {}
    parts = ["val" if folds.get(slide.id) == config.val_fold else "train" for slide in slides]
    return [
        FolderWriter(folder, f"img_dir/{part}", f"ann_dir/{part}", ".png", organ_labels, config.tiled) for part in parts
    ]


def _convert_one(task: Task) -> None:
    slide, config = task.slide, task.config
    pixels = slide_files.read(slide.path)
    try:
        mask = decode_for(slide, *pixels.shape[:2])
    except RleError as error:
        raise RleError(
            f"slide {slide.id}, {pixels.shape[0]} x {pixels.shape[1]} pixels in its file: {error}"
        ) from error
    tissue = tissue_map(pixels) if config.cropped or not is_plain(config) else None
    picture = _picture(config, slide, mask, tissue)
    image, label = cut(picture, pixels, mask, config.pad)
    size = (config.size, config.size) if config.tiled else (picture.rows, picture.cols)
    corners = tile_corners(config, picture.rows, picture.cols)
    boxes = picture.boxes(corners, *size)
    foreground = box_shares(label, corners, config.size) if config.tiled else np.array([label.mean()])
    shares = tissue.shares(boxes) if tissue is not None else np.ones(len(corners))
    kept = shares >= config.min_tissue
    tiles = [
        {
            "y": picture.top + round(down),
            "x": picture.left + round(across),
            "row": row,
            "col": col,
            "foreground": inside,
            "tissue": stained,
        }
        for (down, across), (row, col), inside, stained in zip(
            (boxes[kept, :2] - (picture.top, picture.left)).tolist(),
            corners[kept].tolist(),
            foreground[kept].tolist(),
            shares[kept].tolist(),
            strict=True,
        )
    ]
    written = task.writer.write(slide, image, label, corners[kept], size)
    dropped = {"dropped": int((~kept).sum()), "dropped_with_mask": int(np.count_nonzero(foreground[~kept]))}
    task.growing.note(
        task.number,
        {
            **_facts(slide, picture, mask),
            "tiles": tiles,
            "tile_rows": size[0],
            "tile_cols": size[1],
            **dropped,
            **written,
        },
    )


def _picture(config: ConvertConfig, slide: Slide, mask: np.ndarray, tissue: TissueMap | None) -> Picture:
    if not config.cropped or tissue is None:
        return plan(config, *mask.shape)
    box = union(tissue.box(), mask_box(mask))  # a unit that was drawn on pale tissue is never cut off
    if box is None:
        raise SlideError(
            f"{slide.path} shows no tissue, only glass, so there is nothing to crop to; drop its row or choose another"
            " convert.kind"
        )
    height, width = mask.shape
    return plan(config, height, width, box)


def _facts(slide: Slide, picture: Picture, mask: np.ndarray) -> dict[str, Any]:
    part, _ = picture.inside(*mask.shape)
    total = int(np.count_nonzero(mask))
    shown = int(np.count_nonzero(mask[part]))
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "um_per_px": slide.um_per_px,
        "height": round(picture.height),
        "width": round(picture.width),
        "rows": picture.rows,
        "cols": picture.cols,
        "top": picture.top,
        "left": picture.left,
        "per_row": picture.height / picture.rows,
        "mask_pixels": total,
        "mask_shown": shown,
        "mask_kept": shown / total if total else 1.0,
    }
