"""Writing submission.csv: what is on disk at every moment, and the mistakes that must not reach the scorer."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hubmap_kit.competition import rle
from hubmap_kit.competition.submission import SubmissionWriter
from hubmap_kit.errors import SubmissionError


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "out" / "submission.csv"
    with SubmissionWriter(path, ["10078", "007"]) as writer:
        writer.add("10078", "12 34")
        assert not path.exists()
        assert writer.partial.read_bytes() == b"id,rle\n10078,12 34\n"
        writer.add("007", "")
    assert path.read_bytes() == b"id,rle\n10078,12 34\n007,\n"
    assert [file.name for file in path.parent.iterdir()] == ["submission.csv"]


def test_a_crash_keeps_the_rows_and_the_old_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ZeroDivisionError),
        SubmissionWriter(path, ["a", "b"]) as writer,
    ):
        writer.add("a", "1 2")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert writer.partial.read_text() == "id,rle\na,1 2\n"
    assert "1 of 2 rows" in caplog.text and str(writer.partial) in caplog.text


def test_missing_rows_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    with (
        pytest.raises(
            SubmissionError, match=r"submission\.csv lacks 2 of 3 rows, the first is b;.*empty mask"
        ) as caught,
        SubmissionWriter(path, ["a", "b", "c"]) as writer,
    ):
        writer.add("a", "1 2")
    assert str(writer.partial) in str(caught.value) and writer.partial.read_text() == "id,rle\na,1 2\n"
    assert not path.exists()


def test_a_second_try_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "submission.csv"
    with pytest.raises(SubmissionError), SubmissionWriter(path, ["a"]):
        pass
    with SubmissionWriter(path, ["a"]) as writer:
        writer.add("a", "3 1")
    assert path.read_text() == "id,rle\na,3 1\n"


IDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(IDS, unique=True, max_size=5))
def test_ids_of_any_text_come_back_from_the_file(ids: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("ids") / "submission.csv"
    with SubmissionWriter(path, ids) as writer:
        for name in ids:
            writer.add(name, "1 2")
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file, strict=True)) == [["id", "rle"], *([name, "1 2"] for name in ids)]


BAD = {
    "unknown id": ("z", "1 2", "got a row for z, but a was expected; add every id"),
    "late id": ("b", "1 2", "got a row for b, but a was expected"),
    "no text": ("a", None, "'None' as the mask of a"),
    "missing number": ("a", float("nan"), "'nan' as the mask of a.*empty string"),
    "words": ("a", "1 two", "'1 two' as the mask of a.*encode"),
    "two fields": ("a", "1 2,3 4", "mask of a"),
    "two lines": ("a", "1 2\n3 4", "mask of a"),
}


@pytest.mark.parametrize(("id", "mask", "says"), BAD.values(), ids=BAD.keys())
def test_bad_rows_are_refused_and_the_next_good_one_is_taken(tmp_path: Path, id: str, mask: str, says: str) -> None:
    with SubmissionWriter(tmp_path / "submission.csv", ["a", "b"]) as writer:
        with pytest.raises(SubmissionError, match=says):
            writer.add(id, mask)
        writer.add("a", "1 2")
        writer.add("b", "")
    assert (tmp_path / "submission.csv").read_text() == "id,rle\na,1 2\nb,\n"


def test_repeated_rows(tmp_path: Path) -> None:
    with SubmissionWriter(tmp_path / "submission.csv", ["a", "b"]) as writer:
        writer.add("a", "")
        with pytest.raises(SubmissionError, match="row for a, but b was expected"):
            writer.add("a", "")
        writer.add("b", "")
        with pytest.raises(SubmissionError, match="row for b, but no more rows were expected"):
            writer.add("b", "")


def test_repeated_ids_and_a_closed_writer(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match="the id b twice"):
        SubmissionWriter(tmp_path / "submission.csv", ["a", "b", "b"])
    with pytest.raises(SubmissionError, match="not open.*`with` block"):
        SubmissionWriter(tmp_path / "submission.csv", ["a"]).add("a", "")
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=60)
@given(mask=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.integers(0, 1)))
def test_only_the_first_pixel_is_left_out(mask: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "submission.csv"
    with SubmissionWriter(path, ["a"]) as writer:
        writer.add("a", rle.encode(mask))
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    expected = mask.copy()
    expected[0, 0] = 0
    np.testing.assert_array_equal(rle.decode(row["rle"], *mask.shape), expected)
    assert not row["rle"].startswith("0 ")
