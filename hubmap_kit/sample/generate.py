"""Writes the embedded sample: a small competition folder of synthetic slides, so that everything runs before any download."""

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
from hubmap_kit.files import atomic_path
from hubmap_kit.sample.slide import SlideSpec, draw

TEST_COLUMNS = ("id", "organ", "data_source", "img_height", "img_width", "pixel_size", "tissue_thickness")
TRAIN_COLUMNS = (*TEST_COLUMNS, "rle", "age", "sex")
SMALLEST_SIZE = 128
FULL_SIZE = 1024  # from this size on, HuBMAP slides have the organ's own pixel size
HPA_REDUCE = 2  # at FULL_SIZE an HPA slide is a core of 0.75 mm, its 0.4 um pixels reduced by this
PROSTATE_SIDE = 160  # HuBMAP's prostate slides are this small, at 6.263 um
HUBMAP_SIDES = {"kidney": 1.25, "largeintestine": 1.5, "spleen": 1.25, "lung": 1.0}  # times `size`
STRIP_ROWS = 256
TRAIN, TEST = 0, 1


@dataclass(frozen=True)
class _Plan:
    """A slide to be drawn: its id, its place in the seed tree, and what it shows."""

    id: str
    key: tuple[int, ...]
    spec: SlideSpec


def generate(folder: Path, seed: int = 0, slides_per_organ: int = 4, size: int = 1024) -> None:
    """Write train.csv, train_images/, test.csv, test_images/, sample_submission.csv and test_truth.csv into `folder`.

    Train: `slides_per_organ` HPA slides of each organ, most of them size x size pixels. Test: one HPA and one HuBMAP slide of
    each organ; HuBMAP slides have the pixel size of their organ, and `test_truth.csv` (id, rle) holds their masks, which the
    competition keeps to itself. The same arguments give the same bytes. Masks are 0-based column-major run-length strings.

    A `size` under 1024 shows the same tissue in fewer, larger pixels; the column pixel_size always tells the drawn scale.
    Raises ValueError for a `size` under 128 or `slides_per_organ` under 1.
    """
    if size < SMALLEST_SIZE or slides_per_organ < 1:
        raise ValueError(
            f"the sample needs size >= {SMALLEST_SIZE} and slides_per_organ >= 1, found size={size} and "
            f"slides_per_organ={slides_per_organ}; pass larger numbers"
        )
    folder = Path(folder)
    ids = _ids(seed, len(organs.ORGANS) * (slides_per_organ + 2))
    train = _train_plans(ids[: len(organs.ORGANS) * slides_per_organ], slides_per_organ, size)
    test = _test_plans(ids[len(train) :], size)
    train_rles = {plan.id: _write_slide(folder / "train_images", plan, seed) for plan in train}
    test_rles = {plan.id: _write_slide(folder / "test_images", plan, seed) for plan in test}
    train_rows = [[*_facts(plan), train_rles[plan.id], *_person(plan, seed)] for plan in _sorted(train)]
    _write_table(folder / "train.csv", TRAIN_COLUMNS, train_rows)
    _write_table(folder / "test.csv", TEST_COLUMNS, [_facts(plan) for plan in _sorted(test)])
    _write_table(folder / "sample_submission.csv", ("id", "rle"), [[plan.id, "12 34"] for plan in _sorted(test)])
    _write_table(folder / "test_truth.csv", ("id", "rle"), [[plan.id, test_rles[plan.id]] for plan in _sorted(test)])


def _ids(seed: int, count: int) -> list[str]:
    drawn = np.random.default_rng([seed, 99]).permutation(np.arange(100, 33000))[:count]
    return [str(number) for number in drawn.tolist()]


def _train_plans(ids: Sequence[str], slides_per_organ: int, size: int) -> list[_Plan]:
    scale = _hpa_um_per_px(size)
    plans = []
    for index, id_ in enumerate(ids):
        organ = index % len(organs.ORGANS)
        height, width = _odd_sizes(index, size)
        spec = SlideSpec(organs.ORGANS[organ], "HPA", height, width, scale)
        plans.append(_Plan(id_, (TRAIN, organ, index // len(organs.ORGANS)), spec))
    return plans


def _odd_sizes(index: int, size: int) -> tuple[int, int]:
    """Most slides are size x size; as in the competition a few are not, and one is not even square."""
    factors = {1: (0.9, 0.9), 3: (1.0, 0.85), 7: (1.06, 1.06), 14: (0.95, 0.95)}.get(index, (1.0, 1.0))
    return round(size * factors[0]), round(size * factors[1])


def _test_plans(ids: Sequence[str], size: int) -> list[_Plan]:
    plans = []
    for index, id_ in enumerate(ids):
        organ, source = index // len(organs.SOURCES), organs.SOURCES[index % len(organs.SOURCES)]
        name = organs.ORGANS[organ]
        spec = SlideSpec(name, "HPA", size, size, _hpa_um_per_px(size)) if source == "HPA" else _hubmap_spec(name, size)
        plans.append(_Plan(id_, (TEST, organ, index), spec))
    return plans


def _hpa_um_per_px(size: int) -> float:
    return round(organs.FACTS[organs.ORGANS[0]].um_per_px["HPA"] * HPA_REDUCE * FULL_SIZE / size, 4)


def _hubmap_spec(organ: str, size: int) -> SlideSpec:
    own = organs.FACTS[organ].um_per_px["Hubmap"]
    if organ == "prostate":
        return SlideSpec(organ, "Hubmap", PROSTATE_SIDE, PROSTATE_SIDE, own)
    side = round(size * HUBMAP_SIDES[organ])
    return SlideSpec(organ, "Hubmap", side, side, round(own * max(FULL_SIZE / size, 1.0), 4))


def _write_slide(folder: Path, plan: _Plan, seed: int) -> str:
    image, mask = draw(plan.spec, np.random.default_rng([seed, *plan.key]))
    _write_tiff(folder / f"{plan.id}.tiff", image)
    return rle.encode(mask, origin=0)


def _write_tiff(path: Path, image: NDArray[np.uint8]) -> None:
    # Neither date nor software is written: they would make two equal slides differ.
    with atomic_path(path) as temporary:
        tifffile.imwrite(
            temporary, _strips(image), shape=image.shape, dtype=image.dtype, photometric="rgb", compression="zlib",
            predictor=True, metadata=None, software=False, rowsperstrip=STRIP_ROWS,
        )


def _strips(image: NDArray[np.uint8]) -> Iterator[bytes]:
    """Deflated strips after horizontal differencing, by Python's own zlib: the bytes do not depend on which codecs are installed."""
    for top in range(0, len(image), STRIP_ROWS):
        strip = image[top : top + STRIP_ROWS]
        difference = strip.copy()
        difference[:, 1:] -= strip[:, :-1]  # wraps around at 256, as TIFF's predictor 2 does
        yield zlib.compress(difference.tobytes(), 6)


def _facts(plan: _Plan) -> list[str]:
    spec = plan.spec
    thickness = organs.FACTS[spec.organ].thickness_um[spec.source]
    return [plan.id, spec.organ, spec.source, str(spec.height), str(spec.width), f"{spec.um_per_px:g}", f"{thickness:g}"]


def _person(plan: _Plan, seed: int) -> list[str]:
    rng = np.random.default_rng([seed, 98, *plan.key])
    sexes = ("Male",) if plan.spec.organ == "prostate" else ("Male", "Female")
    return [f"{int(rng.integers(21, 85))}.0", sexes[int(rng.integers(len(sexes)))]]


def _sorted(plans: Iterable[_Plan]) -> list[_Plan]:
    return sorted(plans, key=lambda plan: int(plan.id))


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
