"""Writes the embedded sample: a small competition folder of synthetic slides, so that everything runs before any
download.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from hubmap_kit.competition import organs, rle
from hubmap_kit.errors import ConfigError
from hubmap_kit.files import atomic_path
from hubmap_kit.processes import threads
from hubmap_kit.progress import track
from hubmap_kit.sample.slide import SlideSpec, draw

# Tables and slides whose bytes depend on nothing but their content.

STRIP_ROWS = 256


def write_tiff(path: Path, image: NDArray[np.uint8]) -> None:
    """Write an image `(H, W, 3)` uint8 RGB as a deflated TIFF, atomically.

    Neither date nor software is written: they would make two equal slides differ.
    """
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary,
            _strips(image),
            shape=image.shape,
            dtype=image.dtype,
            photometric="rgb",
            compression="zlib",
            predictor=True,
            metadata=None,
            software=False,
            rowsperstrip=STRIP_ROWS,
        )


def _strips(image: NDArray[np.uint8]) -> Iterator[bytes]:
    """Strips, differenced and deflated by Python's own zlib, so that the bytes do not depend on which codecs are
    installed.
    """
    for top in range(0, len(image), STRIP_ROWS):
        strip = image[top : top + STRIP_ROWS]
        difference = strip.copy()
        difference[:, 1:] -= strip[:, :-1]  # wraps around at 256, as TIFF's predictor 2 does
        yield zlib.compress(difference.tobytes(), 6)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV with one header line, atomically; line ends are the same on every system."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


TEST_COLUMNS = ("id", "organ", "data_source", "img_height", "img_width", "pixel_size", "tissue_thickness")
TRAIN_COLUMNS = (*TEST_COLUMNS, "rle", "age", "sex")
SMALLEST_SIZE = 128
FULL_SIZE = 1536  # from this size on, slides have the pixel sizes of the competition: a core of 0.6 mm at 0.4 um
PROSTATE_SIDE = 160  # HuBMAP's prostate slides are this small, at 6.263 um
HUBMAP_SIDES = {"kidney": 1.25, "largeintestine": 1.5, "spleen": 1.25, "lung": 1.0}  # times `size`
TRUTH = "test_truth.csv"


@dataclass(frozen=True)
class PlannedSlide:
    """A slide to be drawn: its id, "train" or "test", its place in the seed tree, and what it shows."""

    id: str
    split: str
    key: tuple[int, ...]
    spec: SlideSpec


def generate(folder: Path, seed: int = 0, slides_per_organ: int = 4, size: int = 1536) -> None:
    """Write train.csv, train_images/, test.csv, test_images/, sample_submission.csv and test_truth.csv into `folder`.

    Train: `slides_per_organ` HPA slides of each organ, most of them size x size pixels. Test: one HPA and one HuBMAP
    slide of each organ; HuBMAP slides have the pixel size of their organ, and `test_truth.csv` (id, rle) holds their
    masks, which the competition keeps to itself. The same arguments give the same bytes. Masks are 0-based column-major
    run-length strings.

    A `size` under 1536 shows the same tissue in fewer, larger pixels; the column pixel_size always tells the drawn
    scale. The bytes do not depend on threads or on installed codecs; another NumPy, OpenCV or zlib may change them.
    Raises ConfigError for a number that is too small, and for a folder that holds anything but this same sample (which
    is then written again).
    """
    folder = Path(folder)
    plans = plan_slides(seed, slides_per_organ, size)
    _check_folder(folder, plans)
    # NumPy and OpenCV let go of the interpreter while they compute, so threads draw side by side; every slide has its
    # own seed.
    with threads() as pool:
        drawn = pool.map(lambda plan: _write_slide(folder, plan, seed), plans)
        rles = dict(
            zip((plan.id for plan in plans), track(drawn, "drawing the sample", "slide", len(plans)), strict=True)
        )
    train, test = [plan for plan in plans if plan.split == "train"], [plan for plan in plans if plan.split == "test"]
    # The truth goes first: it is what marks the folder as a sample, should the rest be cut short.
    write_table(folder / TRUTH, ("id", "rle"), [[plan.id, rles[plan.id]] for plan in test])
    write_table(folder / "train.csv", TRAIN_COLUMNS, [[*_facts(p), rles[p.id], *_person(p, seed)] for p in train])
    write_table(folder / "test.csv", TEST_COLUMNS, [_facts(plan) for plan in test])
    write_table(folder / "sample_submission.csv", ("id", "rle"), [[plan.id, "12 34"] for plan in test])


def plan_slides(seed: int, slides_per_organ: int, size: int) -> list[PlannedSlide]:
    """The slides that `generate` draws, in the order of their ids, train before test.

    Raises ConfigError as `generate` does.
    """
    _check_numbers(seed, slides_per_organ, size)
    ids = _ids(seed, len(organs.ORGANS) * (slides_per_organ + len(organs.SOURCES)))
    train = _train_plans(ids[: len(organs.ORGANS) * slides_per_organ], size)
    test = _test_plans(ids[len(train) :], size)
    return [*sorted(train, key=_number), *sorted(test, key=_number)]


def _check_numbers(seed: int, slides_per_organ: int, size: int) -> None:
    for name, found, least in (
        ("seed", seed, 0),
        ("slides_per_organ", slides_per_organ, 1),
        ("size", size, SMALLEST_SIZE),
    ):
        if found < least:
            raise ConfigError(
                f"The sample was asked for with {name}={found}, but needs {least} or more; pass a larger number"
            )


def _check_folder(folder: Path, plans: Sequence[PlannedSlide]) -> None:
    """Refuse a folder that holds anything but this very sample: nothing is ever deleted, and real data are never
    overwritten.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, but the sample needs a folder; choose another path")
    wanted = {folder / f"{plan.split}_images" / f"{plan.id}.tiff" for plan in plans}
    for path in sorted([*folder.glob("train_images/*"), *folder.glob("test_images/*")]):
        if path not in wanted and not path.name.startswith("."):
            raise ConfigError(f"{path} is no part of the sample asked for; choose an empty folder, or empty this one")
    for name in ("train.csv", "test.csv"):
        if (folder / name).exists() and not (folder / TRUTH).exists():
            raise ConfigError(f"{folder} holds {name} without {TRUTH}, so it may be real data; choose an empty folder")


def _ids(seed: int, count: int) -> list[str]:
    drawn = np.random.default_rng([seed, 99]).permutation(np.arange(100, 33000 + 10 * count))[:count]
    return [str(number) for number in drawn.tolist()]


def _train_plans(ids: Sequence[str], size: int) -> list[PlannedSlide]:
    scale = _hpa_um_per_px(size)
    plans = []
    for index, id_ in enumerate(ids):
        organ = index % len(organs.ORGANS)
        height, width = _odd_sizes(index, size)
        spec = SlideSpec(organs.ORGANS[organ], "HPA", height, width, scale)
        plans.append(PlannedSlide(id_, "train", (0, organ, index // len(organs.ORGANS)), spec))
    return plans


def _odd_sizes(index: int, size: int) -> tuple[int, int]:
    """Most slides are size x size; as in the competition a few are not, and one is not even square."""
    factors = {1: (0.9, 0.9), 3: (1.0, 0.85), 7: (1.06, 1.06), 14: (0.95, 0.95)}.get(index, (1.0, 1.0))
    return round(size * factors[0]), round(size * factors[1])


def _test_plans(ids: Sequence[str], size: int) -> list[PlannedSlide]:
    plans = []
    for index, id_ in enumerate(ids):
        organ, source = index // len(organs.SOURCES), organs.SOURCES[index % len(organs.SOURCES)]
        name = organs.ORGANS[organ]
        spec = SlideSpec(name, "HPA", size, size, _hpa_um_per_px(size)) if source == "HPA" else _hubmap_spec(name, size)
        plans.append(PlannedSlide(id_, "test", (1, organ, index), spec))
    return plans


def _hpa_um_per_px(size: int) -> float:
    return round(organs.FACTS[organs.ORGANS[0]].um_per_px["HPA"] * max(FULL_SIZE / size, 1.0), 4)


def _hubmap_spec(organ: str, size: int) -> SlideSpec:
    own = organs.FACTS[organ].um_per_px["Hubmap"]
    if organ == "prostate":
        return SlideSpec(organ, "Hubmap", PROSTATE_SIDE, PROSTATE_SIDE, own)
    side = round(size * HUBMAP_SIDES[organ])
    return SlideSpec(organ, "Hubmap", side, side, round(own * max(FULL_SIZE / size, 1.0), 4))


def _number(plan: PlannedSlide) -> int:
    return int(plan.id)


def _write_slide(folder: Path, plan: PlannedSlide, seed: int) -> str:
    image, mask = draw(plan.spec, np.random.default_rng([seed, *plan.key]))
    write_tiff(folder / f"{plan.split}_images" / f"{plan.id}.tiff", image)
    return rle.encode(mask, origin=0)


def _facts(plan: PlannedSlide) -> list[str]:
    spec = plan.spec
    thickness = organs.FACTS[spec.organ].thickness_um[spec.source]
    return [
        plan.id,
        spec.organ,
        spec.source,
        str(spec.height),
        str(spec.width),
        f"{spec.um_per_px:g}",
        f"{thickness:g}",
    ]


def _person(plan: PlannedSlide, seed: int) -> list[str]:
    rng = np.random.default_rng([seed, 98, *plan.key])
    sexes = ("Male",) if plan.spec.organ == "prostate" else ("Male", "Female")
    return [f"{int(rng.integers(21, 85))}.0", sexes[int(rng.integers(len(sexes)))]]
