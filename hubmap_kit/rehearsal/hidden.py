"""A stand-in for the hidden test set: every organ, both sources, and the sizes and faults that a kernel meets only
there; and the scores of a submission for it.

Sizes: HuBMAP slides have 160 x 160 to 4500 x 4500 pixels, HPA slides about 3000 x 3000 (the competition's data page).
That files break, or disagree with the table, was seen in the public data (a 2023 x 2025 file listed as 2023 x 2023) or
is taken for possible.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.checker import check_submission
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import RehearsalError
from hubmap_kit.files import atomic_path
from hubmap_kit.processes import threads
from hubmap_kit.progress import track
from hubmap_kit.rehearsal.request import check_slides
from hubmap_kit.sample.generate import TEST_COLUMNS, write_table, write_tiff
from hubmap_kit.sample.slide import SlideSpec, draw
from hubmap_kit.tiles.store import decode_for

DRAWN_SIDE = 1536  # larger slides are drawn coarser and enlarged: drawing 4500 px takes half a minute and 2 GB
LARGEST, SMALLEST = 4500, 160
MASKS, TRUTH = "truth", "truth.csv"  # beside what is mounted
DISTINCT = 24  # further rows share pictures through hard links, so that 529 slides fit on a disk
TRUTH_COLUMNS = ("id", "organ", "data_source", "height", "width", "fault", "rle")
TRUNCATED, MISSING, LZW, SIZE, NO_PIXEL_SIZE = "truncated", "missing", "lzw", "size", "pixel_size"
UNREADABLE = frozenset({TRUNCATED, MISSING})
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
Pixels = NDArray[np.uint8]


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

    @property
    def unreadable(self) -> bool:
        """No kernel can do better than an empty mask here."""
        return self.fault in UNREADABLE


@dataclass(frozen=True)
class HiddenSet:
    """`folder` is what gets mounted; the masks, {id: 0-based run-length string}, stay outside of it."""

    folder: Path
    slides: tuple[HiddenSlide, ...]
    truth: dict[str, str]

    @property
    def masks(self) -> Path:
        """The same masks as pictures, <id>.png of 0 and 255, that were never run-length strings."""
        return self.folder.with_name(MASKS)


@dataclass(frozen=True)
class Score:
    """A hidden slide with its row of a submission."""

    slide: HiddenSlide
    dice: float
    rle: str


# Image (H, W, 3) uint8 RGB, mask (H, W) uint8 0/1, and the slide as planned or, of a real one, as it is.
Drawing = tuple[Pixels, Pixels, HiddenSlide]
Draw = Callable[[HiddenSlide, np.random.Generator], Drawing]


def make_hidden(
    folder: Path,
    slides: int = 12,
    *,
    faults: bool = True,
    seed: int = 0,
    data: Path | None = None,
    largest: int = LARGEST,
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
    mount, masks = folder / "mount", folder / MASKS
    for path in (*mount.glob("test_images/*.tiff"), *masks.glob("*.png")):
        path.unlink()
    for path in (mount / "test_images", masks):
        path.mkdir(parents=True, exist_ok=True)
    made, truth = _write_all(mount, plans, seed, _real_slides(data, rng) if data else None)
    shown = [slide for slide in made if not slide.unreadable]
    for index, slide_id in enumerate(ids[DISTINCT:]):
        first = shown[index % len(shown)]
        made.append(replace(first, id=slide_id, fault=""))
        truth[slide_id] = truth[first.id]
        os.link(_image_path(mount, first), _image_path(mount, made[-1]))
        os.link(masks / f"{first.id}.png", masks / f"{slide_id}.png")
    write_table(mount / "test.csv", TEST_COLUMNS, [_row(slide) for slide in made])
    write_table(mount / "sample_submission.csv", ("id", "rle"), [[slide.id, "12 34"] for slide in made])
    facts = [[s.id, s.organ, s.source, str(s.height), str(s.width), s.fault, truth[s.id]] for s in made]
    write_table(folder / TRUTH, TRUTH_COLUMNS, facts)
    return HiddenSet(mount, tuple(made), truth)


def _plan(rng: np.random.Generator, ids: Sequence[str], faults: bool, largest: int) -> list[HiddenSlide]:
    plans = []
    for index, slide_id in enumerate(ids):
        organ, source, height, width, fault = FIRST[index] if index < len(FIRST) else _random_shape(rng, index)
        height, width = (max(SMALLEST, round(side * largest / LARGEST)) for side in (height, width))
        um = FACTS[organ].um_per_px[source]
        plans.append(HiddenSlide(slide_id, organ, source, height, width, um, fault if faults else ""))
    return plans


def _random_shape(rng: np.random.Generator, index: int) -> tuple[str, str, int, int, str]:
    """Further slides: three of four from HuBMAP, of any size that it has; prostate stays small there."""
    organ, source = ORGANS[index % len(ORGANS)], SOURCES[int(rng.random() < 0.75)]
    low, high = (2308, 3070) if source == "HPA" else (160, 400) if organ == "prostate" else (600, 4500)
    height, width = (int(side) for side in rng.integers(low, high + 1, 2))
    return organ, source, height, (width if index % 3 == 0 else height), ""


def _write_all(
    mount: Path, plans: Sequence[HiddenSlide], seed: int, real: Draw | None
) -> tuple[list[HiddenSlide], dict[str, str]]:
    """Draw in parallel, as NumPy and OpenCV allow; real slides one by one, for their source counts which it gave."""

    def write(numbered: tuple[int, HiddenSlide]) -> tuple[HiddenSlide, str]:
        index, plan = numbered
        return _write_slide(mount, *(real or _draw_slide)(plan, np.random.default_rng([seed, index])))

    with threads(1 if real else None) as pool:
        written = list(track(pool.map(write, enumerate(plans)), "hidden slides", "slide", len(plans)))
    return [slide for slide, _ in written], {slide.id: text for slide, text in written}


def _draw_slide(plan: HiddenSlide, rng: np.random.Generator) -> Drawing:
    """Synthetic tissue at the planned physical scale."""
    factor = max(1, -(-max(plan.height, plan.width) // DRAWN_SIDE))
    height, width = -(-plan.height // factor), -(-plan.width // factor)
    image, mask = draw(SlideSpec(plan.organ, plan.source, height, width, plan.um_per_px * factor), rng)
    return *_resized(image, mask, plan.height, plan.width), plan


def _real_slides(data: Path, rng: np.random.Generator) -> Draw:
    """Slides of `data`'s training table, of the planned organ where there is one; each once before any comes again."""
    slides = read_train(data / "train.csv")
    order = [slides[index] for index in rng.permutation(len(slides))]

    def next_slide(plan: HiddenSlide, _: np.random.Generator) -> Drawing:
        slide = next((slide for slide in order if slide.organ == plan.organ), order[0])
        order.append(order.pop(order.index(slide)))
        image: Pixels = slide_files.read(slide.path)
        mask = decode_for(slide, *image.shape[:2])
        # Scaled until it covers the wanted size, then its middle: aspect and pixel size keep their meaning.
        zoom = max(plan.height / image.shape[0], plan.width / image.shape[1])
        height, width = max(plan.height, round(image.shape[0] * zoom)), max(plan.width, round(image.shape[1] * zoom))
        top, left = (height - plan.height) // 2, (width - plan.width) // 2
        image, mask = (
            array[top : top + plan.height, left : left + plan.width].copy()
            for array in _resized(image, mask, height, width)
        )
        mask[0, 0] = 0
        um = round(slide.um_per_px / zoom, 4)
        return image, mask, replace(plan, organ=slide.organ, source=slide.source, um_per_px=um)

    return next_slide


def _resized(image: Pixels, mask: Pixels, height: int, width: int) -> tuple[Pixels, Pixels]:
    if image.shape[:2] == (height, width):
        return image, mask
    how = cv2.INTER_AREA if height < image.shape[0] else cv2.INTER_CUBIC
    image = np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)
    mask = np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
    mask[0, 0] = 0  # the scorer refuses a run that starts there
    return image, mask


def _write_slide(mount: Path, image: Pixels, mask: Pixels, slide: HiddenSlide) -> tuple[HiddenSlide, str]:
    path = _image_path(mount, slide)
    if slide.fault == LZW:  # as Kaggle's image reads it with OpenCV alone: tifffile would want imagecodecs
        _write_picture(path, image[..., ::-1], cv2.IMWRITE_TIFF_COMPRESSION, cv2.IMWRITE_TIFF_COMPRESSION_LZW)
    elif slide.fault != MISSING:
        write_tiff(path, image)
    if slide.fault == TRUNCATED:
        os.truncate(path, int(path.stat().st_size * 0.6))
    _write_picture(mount.with_name(MASKS) / f"{slide.id}.png", mask * np.uint8(255))
    return slide, rle.encode(mask)


def _write_picture(path: Path, pixels: Pixels, *options: int) -> None:
    with atomic_path(path) as temporary:
        if not cv2.imwrite(str(temporary), pixels, options):
            raise RehearsalError(f"{path} could not be written; check the permissions and the free disk space")


def _image_path(mount: Path, slide: HiddenSlide) -> Path:
    return mount / "test_images" / f"{slide.id}.tiff"


def _row(slide: HiddenSlide) -> list[str]:
    width = slide.width - 2 if slide.fault == SIZE else slide.width
    um = "" if slide.fault == NO_PIXEL_SIZE else f"{slide.um_per_px:g}"
    thickness = FACTS[slide.organ].thickness_um[slide.source]
    return [slide.id, slide.organ, slide.source, str(slide.height), str(width), um, f"{thickness:g}"]


def score_submission(submission: Path, hidden: HiddenSet) -> list[Score]:
    """Check the file against the hidden table (ids, order, runs inside the slides), then compare it with the masks.

    Raises SubmissionError where the scorer would refuse it.
    """
    with _without_warnings():
        check_submission(submission, hidden.folder / "test.csv")
    predicted = {row["id"]: row["rle"] for _, row in read_rows(submission, ("id", "rle"))}
    scores = []
    for slide in hidden.slides:
        truth = _read_mask(hidden.masks / f"{slide.id}.png")
        scores.append(Score(slide, _dice(_painted(predicted[slide.id], *truth.shape), truth), predicted[slide.id]))
    return scores


def _painted(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """The mask of starts and lengths, counted from 0 down the columns as in train.csv; a decoder apart from the kit's
    own, whose mistakes would cancel out.
    """
    pixels = np.zeros(height * width, bool)
    numbers = [int(word) for word in text.split()]
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        pixels[start : start + length] = True
    return pixels.reshape(width, height).T


def _dice(one: NDArray[np.bool_], two: NDArray[np.bool_]) -> float:
    total = np.count_nonzero(one) + np.count_nonzero(two)
    return 2 * np.count_nonzero(one & two) / total if total else 1.0


def _read_mask(path: Path) -> NDArray[np.bool_]:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise RehearsalError(
            f"{path} cannot be read, but it holds a hidden slide's mask; leave the folder alone while a rehearsal runs"
        )
    return np.asarray(mask > 0)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The readers warn about faults that the rehearsal made itself."""
    logger = logging.getLogger("hubmap_kit.competition")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
