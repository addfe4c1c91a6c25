"""Folds of the real table, of small tables, and the fold files that must be refused."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hubmap_kit.competition import folds, lineage, tables
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import TableError


def slide(id: str, organ: str) -> tables.Slide:
    return tables.Slide(id, organ, "HPA", 10, 10, 0.4, 4.0, Path(f"{id}.tiff"), "")


def some_slides(**counts: int) -> list[tables.Slide]:
    return [slide(f"{organ[:2]}{i}", organ) for organ, count in counts.items() for i in range(count)]


@pytest.fixture(scope="module")
def real(shared_data: Path) -> list[tables.Slide]:
    return tables.read_train(shared_data / "hubmap-2022" / "train.csv.gz", check_files=False)


@pytest.mark.parametrize("n_folds", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", [0, 7])
def test_every_organ_is_spread_evenly(real: list[tables.Slide], n_folds: int, seed: int) -> None:
    fold_of = folds.assign_folds(real, n_folds, seed)
    assert list(fold_of) == [s.id for s in real] and set(fold_of.values()) == set(range(n_folds))
    for organ in ORGANS:
        sizes = Counter(fold_of[s.id] for s in real if s.organ == organ)
        # Triples of one tissue cannot be divided, so two slides apart is the bound; random folds are 5 to 20 apart.
        assert max(sizes.values()) - min(sizes[fold] for fold in range(n_folds)) <= 2, (organ, sizes)
    total = Counter(fold_of.values())
    assert max(total.values()) - min(total.values()) <= len(ORGANS)


def test_one_tissue_is_in_one_fold(real: list[tables.Slide]) -> None:
    organ_of = {s.id: s.organ for s in real}
    for group in lineage.DUPLICATE_TISSUE:
        assert len({organ_of[id] for id in group}) == 1  # all are in the table, and a tissue has one organ
    for seed in range(5):
        fold_of = folds.assign_folds(real, 5, seed)
        assert all(len({fold_of[id] for id in group}) == 1 for group in lineage.DUPLICATE_TISSUE)


def test_the_seed_decides_and_the_row_order_does_not(real: list[tables.Slide]) -> None:
    first = folds.assign_folds(real, 5, seed=1)
    assert folds.assign_folds(real, 5, seed=1) == first
    shuffled = random.Random(0).sample(real, len(real))
    assert folds.assign_folds(shuffled, 5, seed=1) == first
    other = folds.assign_folds(real, 5, seed=2)
    pairs = list(itertools.pairwise(real))
    together = sum(first[a.id] == first[b.id] and other[a.id] == other[b.id] for a, b in pairs)
    assert other != first and together < len(pairs) / 4  # another partition, not the same one with other numbers


def test_small_tables_fill_every_fold(shared_data: Path) -> None:
    mini = tables.read_train(shared_data / "hubmap-mini" / "train.csv")
    for n_folds in range(2, len(mini) + 1):
        sizes = Counter(folds.assign_folds(mini, n_folds).values())
        assert sorted(sizes) == list(range(n_folds)) and max(sizes.values()) - min(sizes.values()) <= 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("slides", "n_folds"),
    [
        (some_slides(kidney=1, lung=1), 2),
        (some_slides(kidney=1, prostate=1, largeintestine=1, spleen=1, lung=1), 3),
        (some_slides(kidney=9, lung=1), 5),
        (some_slides(kidney=7), 7),
        (some_slides(kidney=2, lung=3), 5),
    ],
)
def test_few_slides_an_organ(slides: list[tables.Slide], n_folds: int) -> None:
    assert set(folds.assign_folds(slides, n_folds).values()) == set(range(n_folds))


@pytest.mark.parametrize(
    ("slides", "n_folds", "says"),
    [
        (some_slides(kidney=8), 1, "n_folds is 1, but it must lie between 2 and"),
        (some_slides(kidney=8), 0, "n_folds is 0"),
        (some_slides(kidney=3, lung=2), 6, "which is 5 for these 5 slides; choose"),
        ([slide(id, "lung") for id in ("10488", "20563", "14388", "1")], 3, "which is 2 for these 4"),
        ([], 2, "0 slides"),
    ],
)
def test_impossible_numbers_of_folds(slides: list[tables.Slide], n_folds: int, says: str) -> None:
    with pytest.raises(TableError, match=says):
        folds.assign_folds(slides, n_folds)


def copies_of(slides: list[tables.Slide], each: int) -> list[tables.Slide]:
    """Copies, every second one of another copy, and two crops of a slide that is in no table."""
    made = []
    for one in slides:
        for number in range(each):
            parent = made[-1].id if number % 2 else one.id
            made.append(replace(one, id=f"{one.id}_pas{number + 1}", parent=parent))
    return made


def test_a_new_split_keeps_descendants_with_their_slides(real: list[tables.Slide], tmp_path: Path) -> None:
    originals = folds.assign_folds(real, 5, seed=2)
    crops = [replace(real[0], id=f"crop{number}", parent="gone") for number in range(2)]
    everyone = random.Random(1).sample([*real, *copies_of(real[::3], 3)], len(real) + 3 * len(real[::3]))
    fold_of = folds.assign_folds(everyone, 5, seed=2)
    assert {slide.id: fold_of[slide.id] for slide in real} == originals, (
        "copies do not move the slides that they were made of"
    )
    assert all(fold_of[slide.id] == fold_of[slide.parent] for slide in everyone if slide.parent)
    with_crops = folds.assign_folds([*real, *crops], 5)
    assert with_crops["crop0"] == with_crops["crop1"]
    path = tmp_path / "folds.csv"
    folds.write_folds(path, fold_of, everyone)
    assert folds.read_folds(path, everyone) == fold_of
    child = next(slide for slide in everyone if slide.parent)
    folds.write_folds(path, fold_of | {child.id: (fold_of[child.id] + 1) % 5}, everyone)
    with pytest.raises(
        TableError, match=rf"splits slides of one tissue \(.*{child.id} in fold.*, which leaks into validation"
    ):
        folds.read_folds(path, everyone)
    assert folds.read_folds(path, real), "without the copies nothing is torn"


def test_a_fold_table_comes_back(tmp_path: Path, real: list[tables.Slide]) -> None:
    fold_of = folds.assign_folds(real, 4, seed=3)
    path = tmp_path / "deep" / "folds.csv"
    folds.write_folds(path, fold_of, real)
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == "id,organ,data_source,fold" and len(lines) == 353 and lines[-1] == ""
    assert lines[1] == f"{real[0].id},{real[0].organ},HPA,{fold_of[real[0].id]}"
    assert folds.read_folds(path, real) == fold_of
    some = real[10:200:3]
    assert folds.read_folds(path, some) == {s.id: fold_of[s.id] for s in some}


def test_slides_without_a_fold_are_not_written(tmp_path: Path) -> None:
    slides = some_slides(kidney=3)
    with pytest.raises(TableError, match=r"folds\.csv cannot be written, 2 slides \(ki1, ki2\) have no fold; assign"):
        folds.write_folds(tmp_path / "folds.csv", {"ki0": 1}, slides)
    assert not list(tmp_path.iterdir())


TISSUE = ["6730", "32741"]
BAD = {
    "missing slide": (lambda rows: rows[:-1], r"no fold for 1 slides \(9\); assign the folds again"),
    "repeated id": (lambda rows: [*rows, rows[0]], "line 6 repeats the id 6730"),
    "fold in words": (lambda rows: [*rows[:-1], "9,two"], r"line 5 \(id 9\) has fold 'two'.*mend"),
    "negative fold": (lambda rows: [*rows[:-1], "9,-1"], r"id 9\) has fold '-1'"),
    "float fold": (lambda rows: [*rows[:-1], "9,1.0"], r"fold '1\.0'"),
    "empty fold": (lambda rows: [*rows[:-1], "9,"], "fold ''"),
    "gap": (lambda rows: [*rows[:-1], "9,7"], r"holds the folds 0, 1, 7, but .* without a gap"),
    "one fold": (lambda rows: [row.replace(",1", ",0") for row in rows], "holds the folds 0, but"),
    "split tissue": (
        lambda rows: ["6730,1", *rows[1:]],
        r"6730 in fold 1, 32741 in fold 0\), which leaks.*put them in one fold",
    ),
}


@pytest.mark.parametrize(("change", "says"), BAD.values(), ids=BAD.keys())
def test_bad_fold_tables(tmp_path: Path, change: Callable[[list[str]], list[str]], says: str) -> None:
    slides = [slide(id, "prostate") for id in [*TISSUE, "8", "9"]]
    rows = ["6730,0", "32741,0", "8,1", "9,1"]
    path = tmp_path / "folds.csv"
    path.write_text("\n".join(["id,fold", *rows]))
    assert folds.read_folds(path, slides) == {"6730": 0, "32741": 0, "8": 1, "9": 1}
    path.write_text("\n".join(["id,fold", *change(rows)]))
    with pytest.raises(TableError, match=says) as caught:
        folds.read_folds(path, slides)
    assert "folds.csv" in str(caught.value)


def test_a_fold_table_without_the_column(tmp_path: Path) -> None:
    (tmp_path / "folds.csv").write_text("id,organ\n8,lung\n")
    with pytest.raises(TableError, match="lacks the column fold"):
        folds.read_folds(tmp_path / "folds.csv", [slide("8", "lung")])
