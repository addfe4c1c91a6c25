"""The submission checker against files that the scorer takes, and one of each kind that it would refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.competition import rle
from hubmap_kit.competition.checker import SubmissionReport, check_rows, check_submission
from hubmap_kit.competition.submission import SubmissionWriter
from hubmap_kit.competition.tables import read_test
from hubmap_kit.errors import SubmissionError, TableError

HEADER = "id,organ,data_source,img_height,img_width,pixel_size,tissue_thickness"
GOOD = "id,rle\na,1 10 20 10\nb,\nc,599 1\n"


@pytest.fixture
def test_csv(tmp_path: Path) -> Path:
    """Three slides of 30 rows and 20 columns (600 pixels), without files."""
    path = tmp_path / "test.csv"
    path.write_text("\n".join([HEADER, *(f"{id},lung,HPA,30,20,0.4,4" for id in "abc")]))
    return path


def check(test_csv: Path, content: str | bytes) -> SubmissionReport:
    path = test_csv.with_name("submission.csv")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return check_submission(path, test_csv)


@pytest.mark.parametrize("content", [GOOD, GOOD.rstrip("\n"), GOOD.replace("\n", "\r\n"), GOOD.replace("b,", 'b,""')])
def test_good_files(test_csv: Path, content: str) -> None:
    report = check(test_csv, content)
    assert (report.rows, report.empty) == (3, 1)
    assert report.mean_coverage == pytest.approx((20 / 600 + 0 + 1 / 600) / 3)


# What is wrong -> (old text, new text, words that the message must hold).
BAD = {
    "start 0": ("1 10", "0 10", "id a has start 0"),
    "length 0": ("1 10", "1 0", "id a has length 0 at start 1"),
    "odd count": ("599 1", "599", r"id c has an odd count of numbers \(1\)"),
    "negative": ("1 10", "1 -10", "id a holds '-10'"),
    "float": ("1 10", "1.0 10", "id a holds '1.0'"),
    "nan": ("b,", "b,nan", "id b holds 'nan'"),
    "two blanks": ("1 10", "1  10", "id a holds ''"),
    "blank at the end": ("599 1", "599 1 ", "id c holds ''"),
    "unsorted": ("1 10 20 10", "20 10 1 10", "id a is not sorted: start 1 comes after 20"),
    "pixel twice": ("20 10", "5 10", "id a names pixel 5 twice"),
    "same start": ("20 10", "1 10", "id a names pixel 1 twice"),
    "beyond the slide": ("599 1", "599 2", "id c ends at pixel 601, but its slide has 600"),
    "far beyond": ("599 1", "99999999999999999999 1", "id c ends at pixel"),
    "missing row": ("b,\n", "", "1 problem: id b is missing"),
    "unknown row": ("b,\n", "b,\nz,\n", "id 'z' is not in the test table"),
    "repeated row": ("b,\n", "b,\nb,\n", "id b comes more than once"),
    "id as a float": ("b,\n", "b.0,\n", "2 problems: id 'b.0' is not in the test table, id b is missing"),
    "other order": ("b,\nc,599 1\n", "c,599 1\nb,\n", r"order of the test table \(id c stands where b was expected\)"),
    "other columns": ("id,rle", "id,predicted", "first line is 'id,predicted' instead of 'id,rle'"),
    "column order": ("id,rle", "rle,id", "first line is 'rle,id'"),
    "index column": ("a,1", "0,a,1", "row 2 has 3 fields instead of 2"),
    "no header": ("id,rle\n", "", "first line is 'a,1 10 20 10' instead of 'id,rle'"),
    "byte-order mark": ("id,rle", "\ufeffid,rle", "byte-order mark"),
    "blank line": ("b,\n", "b,\n\n", "row 4 has 0 fields"),
    "semicolons": (",", ";", "first line is 'id;rle'"),
}


@pytest.mark.parametrize(("old", "new", "says"), BAD.values(), ids=BAD.keys())
def test_bad_files(test_csv: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(SubmissionError, match=says) as caught:
        check(test_csv, GOOD.replace(old, new))
    assert "submission.csv has" in str(caught.value) and "mend" in str(caught.value)


def test_all_problems_are_counted_and_the_first_named(test_csv: Path) -> None:
    rows = "".join(f"x{i},\n" for i in range(20))
    with pytest.raises(SubmissionError, match=r"has 23 problems: .*id 'x0'.*, and 18 more"):
        check(test_csv, "id,rle\n" + rows)


@pytest.mark.parametrize("content", ["", "\n", b"II*\0\xff\xfe"])
def test_files_that_are_no_submission(test_csv: Path, content: str | bytes) -> None:
    with pytest.raises(SubmissionError, match=r"submission\.csv"):
        check(test_csv, content)


def test_no_file_and_no_table(test_csv: Path, tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match=r"none\.csv cannot be read.*write it first"):
        check_submission(tmp_path / "none.csv", test_csv)
    with pytest.raises(TableError, match=r"no\.csv does not exist"):
        check_submission(tmp_path / "none.csv", tmp_path / "no.csv")


def test_rows_are_checked_against_slides_of_any_table(test_csv: Path) -> None:
    """Cells that a check does not need may hold anything; ids may need quotes."""
    slides = read_test(test_csv, check_files=False)
    odd = [replace(slides[0], id='a,"1"', organ="unknown", um_per_px=math.nan), *slides[1:]]
    path = test_csv.with_name("submission.csv")
    path.write_text('id,rle\n"a,""1""",1 10\nb,\nc,599 1\n')
    assert check_rows(path, odd) == SubmissionReport(3, 1, pytest.approx((10 + 1) / 1800))
    path.write_text('id,rle\n"a,""1""",1 10\nb,\nc,599 2\n')
    with pytest.raises(SubmissionError, match=r"1 problem: id c ends at pixel 601"):
        check_rows(path, odd)
    path.write_text("id,rle\n")
    assert check_rows(path, []) == SubmissionReport(0, 0, 0.0)
    with pytest.raises(SubmissionError, match=r"3 problems: id a,\"1\" is missing"):
        check_rows(path, odd)


def test_the_slide_file_counts_more_than_the_table(test_csv: Path, tmp_path: Path) -> None:
    folder = tmp_path / "test_images"
    folder.mkdir()
    tifffile.imwrite(folder / "c.tiff", np.zeros((30, 21, 3), np.uint8))
    assert check(test_csv, GOOD.replace("599 1", "599 31")).rows == 3
    with pytest.raises(SubmissionError, match="id c ends at pixel 631, but its slide has 630"):
        check(test_csv, GOOD.replace("599 1", "599 32"))
    (folder / "c.tiff").write_bytes(b"cut off")
    assert check(test_csv, GOOD).rows == 3
    with pytest.raises(SubmissionError, match="its slide has 600"):
        check(test_csv, GOOD.replace("599 1", "599 2"))


def test_masks_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(f"{HEADER}\na,lung,HPA,400,400,0.4,4\n")
    mask = " ".join(f"{start} 1" for start in range(1, 160_000, 2))
    assert check(tmp_path / "test.csv", f"id,rle\na,{mask}\n").mean_coverage == 0.5


def test_the_competitions_own_sample(shared_data: Path) -> None:
    for name in ("hubmap-2022", "hubmap-mini"):
        folder = shared_data / name
        report = check_submission(folder / "sample_submission.csv", folder / "test.csv")
        assert (report.rows, report.empty) == (1, 0)


@settings(deadline=None, max_examples=150)
@given(words=st.lists(st.integers(0, 12), max_size=8))
def test_verdicts_are_those_of_the_rules(words: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rules")
    (folder / "test.csv").write_text(f"{HEADER}\na,lung,HPA,5,4,0.4,4\n")
    pairs = list(zip(words[0::2], words[1::2], strict=False))
    pixels = [start + step for start, length in pairs for step in range(length)]
    fine = (
        len(words) % 2 == 0
        and all(start > 0 and length > 0 for start, length in pairs)
        and pixels == sorted(set(pixels))
        and all(pixel < 20 for pixel in pixels)
    )
    content = f"id,rle\na,{' '.join(map(str, words))}\n"
    if fine:
        assert check(folder / "test.csv", content).mean_coverage == pytest.approx(len(pixels) / 20)
    else:
        with pytest.raises(SubmissionError, match="id a "):
            check(folder / "test.csv", content)


def test_what_the_kit_writes_is_accepted(test_csv: Path) -> None:
    noise = np.random.default_rng(0).random((30, 20)) < 0.4
    masks = {"a": np.ones((30, 20), np.uint8), "b": np.zeros((30, 20), np.uint8), "c": noise}
    path = test_csv.with_name("submission.csv")
    with SubmissionWriter(path, list(masks)) as writer:
        for id, mask in masks.items():
            writer.add(id, rle.encode(mask))
    report = check_submission(path, test_csv)
    noise[0, 0] = False
    assert report.empty == 1 and report.mean_coverage == pytest.approx((599 + noise.sum()) / 1800)
