"""A stand-in for the hidden test set: every organ, both sources, the sizes and the faults that a kernel meets only
there.

Sizes: HuBMAP slides have 160 x 160 to 4500 x 4500 pixels, HPA slides about 3000 x 3000 (the competition's data page).
That files break, or disagree with the table, was seen in the public data (a 2023 x 2025 file listed as 2023 x 2023) or
is taken for possible.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.errors import RehearsalError
from hubmap_kit.files import atomic_path
from hubmap_kit.processes import threads
from hubmap_kit.progress import track
from hubmap_kit.rehearsal.request import check_slides
from hubmap_kit.sample.generate import TEST_COLUMNS, write_table, write_tiff
from hubmap_kit.sample.slide import SlideSpec, draw
from hubmap_kit.tiles.store import decode_for

# What a hidden slide shows: synthetic tissue, or a real training slide, brought to the size that is wanted.

DRAWN_SIDE = 1536  # larger slides are drawn coarser and enlarged: drawing 4500 px takes half a minute and 2 GB


@dataclass(frozen=True)
class Subject:
    """Image `(H, W, 3)` uint8 RGB, its mask `(H, W)` uint8 0/1, and what they are."""

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    organ: str
    source: str
    um_per_px: float


class Wanted(Protocol):
    """The part of a hidden slide's plan that says what to show."""

    organ: str
    source: str
    height: int
    width: int
    um_per_px: float


def drawn(plan: Wanted, rng: np.random.Generator) -> Subject:
    """Synthetic tissue at the planned physical scale."""
    factor = max(1, -(-max(plan.height, plan.width) // DRAWN_SIDE))
    height, width = -(-plan.height // factor), -(-plan.width // factor)
    image, mask = draw(SlideSpec(plan.organ, plan.source, height, width, plan.um_per_px * factor), rng)
    image, mask = _resized(image, mask, plan.height, plan.width)
    return Subject(image, mask, plan.organ, plan.source, plan.um_per_px)


def real_subjects(data: Path, rng: np.random.Generator) -> Callable[[Wanted, np.random.Generator], Subject]:
    """A source of real slides with their masks, from the training table of `data`: of the planned organ where there is
    one.
    """
    slides = read_train(data / "train.csv")
    order = [slides[index] for index in rng.permutation(len(slides))]

    def subject(plan: Wanted, _: np.random.Generator) -> Subject:
        slide = next((slide for slide in order if slide.organ == plan.organ), order[0])
        order.append(order.pop(order.index(slide)))  # every slide comes once before any comes again
        return _real(slide, plan)

    return subject


def _real(slide: Slide, plan: Wanted) -> Subject:
    """The slide scaled until it covers the wanted size, and its middle: the aspect stays, and so does the meaning of a
    pixel size.
    """
    image = slide_files.read(slide.path)
    mask = decode_for(slide, *image.shape[:2])
    zoom = max(plan.height / image.shape[0], plan.width / image.shape[1])
    height, width = (
        max(wanted, round(side * zoom)) for wanted, side in zip((plan.height, plan.width), image.shape[:2], strict=True)
    )
    image, mask = _resized(image, mask, height, width)
    top, left = (height - plan.height) // 2, (width - plan.width) // 2
    image, mask = (array[top : top + plan.height, left : left + plan.width].copy() for array in (image, mask))
    mask[0, 0] = 0
    return Subject(image, mask, slide.organ, slide.source, round(slide.um_per_px / zoom, 4))


def _resized(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if image.shape[:2] == (height, width):
        return image, mask
    shrinks = height < image.shape[0]
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    mask[0, 0] = 0  # the scorer refuses a run that starts there
    return image, mask


LARGEST, SMALLEST = 4500, 160
MASKS, TRUTH = "truth", "truth.csv"  # beside what is mounted
DISTINCT = 24  # more rows than this share pictures through hard links, so that 529 slides fit on a disk
TRUTH_COLUMNS = ("id", "organ", "data_source", "height", "width", "fault", "rle")
TRUNCATED, MISSING, LZW, SIZE, NO_PIXEL_SIZE = "truncated", "missing", "lzw", "size", "pixel_size"
UNREADABLE = frozenset({TRUNCATED, MISSING})


@dataclass(frozen=True)
class HiddenSlide:
    """One row: what test.csv says but for its fault, and the size in pixels that the file has."""

    id: str
    organ: str
    source: str
    height: int
    width: int
    um_per_px: float
    fault: str = ""


@dataclass(frozen=True)
class HiddenSet:
    """`folder` is what gets mounted; the masks, {id: 0-based run-length string}, stay outside of it."""

    folder: Path
    slides: tuple[HiddenSlide, ...]
    truth: dict[str, str]

    @property
    def masks(self) -> Path:
        """The same masks as pictures, <id>.png of 0 and 255, which no run-length string was between."""
        return self.folder.with_name(MASKS)


# organ, source, height, width, fault: the first seven hold every organ, the smallest, the largest and every fault.
FIRST: tuple[tuple[str, str, int, int, str], ...] = (
    ("prostate", "Hubmap", 160, 160, ""),
    ("kidney", "Hubmap", 4500, 4500, ""),
    ("spleen", "Hubmap", 2023, 2025, SIZE),
    ("lung", "Hubmap", 1501, 1003, LZW),
    ("largeintestine", "Hubmap", 2867, 2534, NO_PIXEL_SIZE),
    ("kidney", "HPA", 3000, 3000, TRUNCATED),
    ("lung", "Hubmap", 777, 777, MISSING),
    ("prostate", "HPA", 2308, 2308, ""),
    ("largeintestine", "HPA", 3000, 3000, ""),
    ("spleen", "Hubmap", 4000, 3100, ""),
    ("prostate", "Hubmap", 337, 241, ""),
    ("lung", "HPA", 3070, 2309, ""),
)
Draw = Callable[[HiddenSlide, np.random.Generator], Subject]


def make_hidden(
    folder: Path, slides: int = 12, faults: bool = True, seed: int = 0, data: Path | None = None, largest: int = LARGEST
) -> HiddenSet:
    """Write test.csv, test_images/ and sample_submission.csv into `folder`/mount, the masks to `folder`/truth/ and
    truth.csv.

    Slides are synthetic, or with `data` (a folder with train.csv) real ones brought to the wanted sizes. `largest`
    pixels bound the longer side; all sizes shrink with it. The same arguments give the same set. Raises RehearsalError
    for too few slides.
    """
    check_slides(slides, faults)
    rng = np.random.default_rng([seed, 529])
    ids = [str(number) for number in rng.permutation(np.arange(34000, 34000 + 20 * max(slides, 50)))[:slides].tolist()]
    plans = _plan(rng, ids[:DISTINCT], faults, largest)
    mount = folder / "mount"
    _clear(mount, folder / MASKS)
    made, truth = _write_all(mount, plans, seed, real_subjects(data, rng) if data else None)
    shown = [slide for slide in made if slide.fault not in UNREADABLE]
    for index, slide_id in enumerate(ids[DISTINCT:]):
        first = shown[index % len(shown)]
        made.append(replace(first, id=slide_id, fault=""))
        truth[slide_id] = truth[first.id]
        os.link(_path(mount, first), _path(mount, made[-1]))
        os.link(folder / MASKS / f"{first.id}.png", folder / MASKS / f"{slide_id}.png")
    write_table(mount / "test.csv", TEST_COLUMNS, [_row(slide) for slide in made])
    write_table(mount / "sample_submission.csv", ("id", "rle"), [[slide.id, "12 34"] for slide in made])
    facts = [[s.id, s.organ, s.source, str(s.height), str(s.width), s.fault, truth[s.id]] for s in made]
    write_table(folder / TRUTH, TRUTH_COLUMNS, facts)
    return HiddenSet(mount, tuple(made), truth)


def read_hidden(folder: Path) -> HiddenSet:
    """The set that `make_hidden` wrote into `folder`; the pixel sizes are those of test.csv."""
    rows = [row for _, row in read_rows(folder / TRUTH, TRUTH_COLUMNS)]
    listed = {row["id"]: row for _, row in read_rows(folder / "mount" / "test.csv", TEST_COLUMNS)}
    slides = [
        HiddenSlide(
            row["id"],
            row["organ"],
            row["data_source"],
            int(row["height"]),
            int(row["width"]),
            float(listed[row["id"]]["pixel_size"] or "nan"),
            row["fault"],
        )
        for row in rows
    ]
    return HiddenSet(folder / "mount", tuple(slides), {row["id"]: row["rle"] for row in rows})


def _plan(rng: np.random.Generator, ids: Sequence[str], faults: bool, largest: int) -> list[HiddenSlide]:
    plans = []
    for index, slide_id in enumerate(ids):
        organ, source, height, width, fault = FIRST[index] if index < len(FIRST) else _drawn_shape(rng, index)
        height, width = (max(SMALLEST, round(side * largest / LARGEST)) for side in (height, width))
        plans.append(
            HiddenSlide(slide_id, organ, source, height, width, FACTS[organ].um_per_px[source], fault if faults else "")
        )
    return plans


def _drawn_shape(rng: np.random.Generator, index: int) -> tuple[str, str, int, int, str]:
    """Further slides: three of four from HuBMAP, of any size that it has; prostate stays small there."""
    organ, source = ORGANS[index % len(ORGANS)], SOURCES[int(rng.random() < 0.75)]
    low, high = (2308, 3070) if source == "HPA" else (160, 400) if organ == "prostate" else (600, 4500)
    height, width = (int(side) for side in rng.integers(low, high + 1, 2))
    return organ, source, height, (width if index % 3 == 0 else height), ""


def _write_all(
    mount: Path, plans: Sequence[HiddenSlide], seed: int, real: Draw | None
) -> tuple[list[HiddenSlide], dict[str, str]]:
    """Draw side by side, as NumPy and OpenCV allow; real slides come one after the other, for each must come once
    before any comes twice.
    """

    def write(numbered: tuple[int, HiddenSlide]) -> tuple[HiddenSlide, str]:
        index, plan = numbered
        return _write(mount, plan, (real or drawn)(plan, np.random.default_rng([seed, index])))

    with threads(1 if real else None) as pool:
        written = list(track(pool.map(write, enumerate(plans)), "hidden slides", "slide", len(plans)))
    return [slide for slide, _ in written], {slide.id: text for slide, text in written}


def _write(mount: Path, plan: HiddenSlide, found: Subject) -> tuple[HiddenSlide, str]:
    slide = replace(plan, organ=found.organ, source=found.source, um_per_px=found.um_per_px)
    path = _path(mount, slide)
    path.parent.mkdir(parents=True, exist_ok=True)
    if slide.fault == LZW:
        _write_lzw(path, found.image)
    elif slide.fault != MISSING:
        write_tiff(path, found.image)
    if slide.fault == TRUNCATED:
        with open(path, "r+b") as file:
            file.truncate(int(path.stat().st_size * 0.6))
    _write_mask(mount.with_name(MASKS) / f"{slide.id}.png", found.mask)
    return slide, rle.encode(found.mask)


def _write_mask(path: Path, mask: NDArray[np.uint8]) -> None:
    with atomic_path(path) as temporary:
        if not cv2.imwrite(str(temporary), mask * np.uint8(255)):
            raise RehearsalError(f"{path} could not be written; check the permissions and the free disk space")


def _write_lzw(path: Path, image: NDArray[np.uint8]) -> None:
    """Compressed as Kaggle's image cannot read it without OpenCV: tifffile would want imagecodecs."""
    with atomic_path(path) as temporary:
        if not cv2.imwrite(
            str(temporary), image[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW]
        ):
            raise RehearsalError(f"{path} could not be written; check the permissions and the free disk space")


def _path(mount: Path, slide: HiddenSlide) -> Path:
    return mount / "test_images" / f"{slide.id}.tiff"


def _row(slide: HiddenSlide) -> list[str]:
    width = slide.width - 2 if slide.fault == SIZE else slide.width
    um = "" if slide.fault == NO_PIXEL_SIZE else f"{slide.um_per_px:g}"
    thickness = FACTS[slide.organ].thickness_um[slide.source]
    return [slide.id, slide.organ, slide.source, str(slide.height), str(width), um, f"{thickness:g}"]


def _clear(mount: Path, masks: Path) -> None:
    for path in (*mount.glob("test_images/*.tiff"), *masks.glob("*.png")):
        path.unlink()
    for folder in (mount, masks):
        folder.mkdir(parents=True, exist_ok=True)
