"""The sample folder against independent readers: csv, Pillow, OpenCV and pycocotools."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco

from hubmap_kit.errors import ConfigError
from hubmap_kit.sample.generate import generate, plan_slides
from hubmap_kit.sample.slide import draw

ORGANS = {"kidney", "prostate", "largeintestine", "spleen", "lung"}
# The competition's data page: um per pixel and section thickness of HuBMAP slides.
HUBMAP_UM = {"kidney": 0.5, "prostate": 6.263, "largeintestine": 0.2290, "spleen": 0.4945, "lung": 0.7562}
HUBMAP_THICKNESS = {"kidney": 10, "prostate": 5, "largeintestine": 8, "spleen": 4, "lung": 5}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    generate(folder, seed=3, slides_per_organ=1, size=256)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def header_of(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0]


def decoded(text: str, height: int, width: int) -> NDArray[np.uint8]:
    """Start/length pairs as the gap/run counts of pycocotools, which is column-major too."""
    numbers, counts, end = [int(word) for word in text.split()], [], 0
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        counts += [start - end, length]
        end = start + length
    counts.append(height * width - end)
    assert min(counts[:-1]) >= 0, "runs overlap or are out of order"
    return coco.decode(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_columns_are_those_of_the_competition(sample: Path, shared_data: Path) -> None:
    assert header_of(sample / "train.csv") == header_of(shared_data / "hubmap-mini" / "train.csv")
    for name in ("test.csv", "sample_submission.csv"):
        assert header_of(sample / name) == header_of(shared_data / "hubmap-2022" / name)


def test_train_is_hpa_of_every_organ(sample: Path) -> None:
    rows = rows_of(sample / "train.csv")
    assert sorted(row["organ"] for row in rows) == sorted(ORGANS)
    for row in rows:
        assert (row["data_source"], row["tissue_thickness"]) == ("HPA", "4")
        assert 21 <= float(row["age"]) <= 84
        assert row["sex"] in ({"Male"} if row["organ"] == "prostate" else {"Male", "Female"})
    shapes = [(int(row["img_height"]), int(row["img_width"])) for row in rows]
    assert shapes.count((256, 256)) > len(shapes) / 2
    assert any(height != width for height, width in shapes)


def test_test_has_both_sources_of_every_organ(sample: Path) -> None:
    rows = rows_of(sample / "test.csv")
    assert sorted((row["organ"], row["data_source"]) for row in rows) == sorted(
        (o, s) for o in ORGANS for s in ("HPA", "Hubmap")
    )
    for row in rows:
        if row["data_source"] == "Hubmap":
            assert float(row["tissue_thickness"]) == HUBMAP_THICKNESS[row["organ"]]
    prostate = next(row for row in rows if row["organ"] == "prostate" and row["data_source"] == "Hubmap")
    assert (prostate["img_height"], prostate["img_width"], prostate["pixel_size"]) == ("160", "160", "6.263")


def test_ids_are_numbers_used_once_and_in_order(sample: Path) -> None:
    train, test = ([int(row["id"]) for row in rows_of(sample / name)] for name in ("train.csv", "test.csv"))
    assert len(set(train + test)) == len(train) + len(test)
    assert train == sorted(train) and test == sorted(test)
    for name in ("sample_submission.csv", "test_truth.csv"):
        assert [int(row["id"]) for row in rows_of(sample / name)] == test


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_match_their_rows(sample: Path, split: str) -> None:
    rows = rows_of(sample / f"{split}.csv")
    assert {path.name for path in (sample / f"{split}_images").iterdir()} == {f"{row['id']}.tiff" for row in rows}
    for row in rows:
        path = sample / f"{split}_images" / f"{row['id']}.tiff"
        image = np.asarray(Image.open(path))
        assert image.dtype == np.uint8 and image.shape == (int(row["img_height"]), int(row["img_width"]), 3)
        assert np.array_equal(image, cv2.imread(str(path))[..., ::-1])


@pytest.mark.parametrize(("table", "split"), [("train.csv", "train"), ("test_truth.csv", "test")])
def test_every_mask_decodes_and_holds_a_unit(sample: Path, table: str, split: str) -> None:
    slides = {row["id"]: row for row in rows_of(sample / f"{split}.csv")}
    for row in rows_of(sample / table):
        slide = slides[row["id"]]
        mask = decoded(row["rle"], int(slide["img_height"]), int(slide["img_width"]))
        assert mask[0, 0] == 0, "a submission must not start at pixel 0"
        assert mask.sum() * float(slide["pixel_size"]) ** 2 > 1000, "no unit of a believable size"
        assert mask.mean() < 0.4


def test_the_table_holds_the_mask_that_was_drawn(sample: Path) -> None:
    """A wrong origin, or rows for columns, would show on a slide that is not square."""
    plan = next(plan for plan in plan_slides(3, 1, 256) if plan.spec.height != plan.spec.width)
    row = next(row for row in rows_of(sample / "train.csv") if row["id"] == plan.id)
    image, mask = draw(plan.spec, np.random.default_rng([3, *plan.key]))
    assert np.array_equal(decoded(row["rle"], plan.spec.height, plan.spec.width), mask)
    assert np.array_equal(np.asarray(Image.open(sample / "train_images" / f"{plan.id}.tiff")), image)


def test_full_size_slides_have_the_competitions_pixel_sizes() -> None:
    plans = plan_slides(seed=0, slides_per_organ=4, size=1536)
    assert {plan.spec.um_per_px for plan in plans if plan.spec.source == "HPA"} == {0.4}
    hubmap = {plan.spec.organ: plan.spec for plan in plans if plan.spec.source == "Hubmap"}
    assert {organ: spec.um_per_px for organ, spec in hubmap.items()} == HUBMAP_UM
    assert hubmap["largeintestine"].height > 1536 > hubmap["prostate"].height == 160
    assert sum(plan.split == "train" for plan in plans) == 4 * len(ORGANS)


def test_drawing_again_gives_the_same_bytes_whatever_the_threads(sample: Path) -> None:
    first, threads = digests(sample), cv2.getNumThreads()
    try:
        cv2.setNumThreads(1 if threads > 1 else 4)
        generate(sample, seed=3, slides_per_organ=1, size=256)
    finally:
        cv2.setNumThreads(threads)
    assert digests(sample) == first


def test_another_seed_draws_other_slides(sample: Path, tmp_path: Path) -> None:
    generate(tmp_path, seed=4, slides_per_organ=1, size=256)
    mine, theirs = digests(sample), digests(tmp_path)
    assert set(mine.values()).isdisjoint(theirs.values())
    assert set(mine) != set(theirs), "the ids are drawn from the seed too"


@pytest.mark.parametrize("wrong", [{"size": 127}, {"slides_per_organ": 0}, {"seed": -1}])
def test_numbers_that_are_too_small_are_named(tmp_path: Path, wrong: dict[str, int]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        generate(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_real_data_are_never_written_over(tmp_path: Path) -> None:
    table = tmp_path / "train.csv"
    table.write_text("id,organ\n1,lung\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="real data"):
        generate(tmp_path, slides_per_organ=1, size=128)
    assert table.read_text(encoding="utf-8") == "id,organ\n1,lung\n"
    assert list(tmp_path.iterdir()) == [table]


def test_a_folder_with_other_slides_is_refused(tmp_path: Path) -> None:
    slide = tmp_path / "test_images" / "10078.tiff"
    slide.parent.mkdir()
    slide.write_bytes(b"not ours")
    with pytest.raises(ConfigError, match=r"10078\.tiff"):
        generate(tmp_path, slides_per_organ=1, size=128)
    assert slide.read_bytes() == b"not ours"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sample"
    path.write_text("", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file"):
        generate(path, slides_per_organ=1, size=128)
