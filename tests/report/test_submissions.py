"""The list of submissions keeps every row, whatever is written into it, and never writes over a damaged one."""

from __future__ import annotations

import csv
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.errors import TableError
from hubmap_kit.report import submissions

WORDS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=20)
CELLS = WORDS | st.floats(allow_nan=False) | st.none() | st.integers()
ROWS = st.lists(st.dictionaries(st.sampled_from(submissions.COLUMNS), CELLS), max_size=4)


def plain(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


@settings(deadline=None, max_examples=60)
@given(ROWS)
def test_rows_come_back_in_order_one_line_each(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("list") / "deep" / "submissions.csv"
    for row in rows:
        submissions.add_submission(path, row)
    found = plain(path) if rows else []
    assert found == submissions.read_submissions(path)
    assert len(found) == len(rows)
    for cells, row in zip(found, rows, strict=True):
        for column in submissions.COLUMNS:
            value = row.get(column)
            if isinstance(value, float):
                assert float(cells[column]) == pytest.approx(value, rel=1e-5)
            else:
                assert cells[column] == " ".join(("" if value is None else str(value)).split())
    assert not rows or len(path.read_text(encoding="utf-8").splitlines()) >= len(rows) + 1


def test_a_row_is_completed_in_place_and_added_columns_stay(tmp_path: Path) -> None:
    path = tmp_path / "submissions.csv"
    for ref in (11, 12):
        submissions.add_submission(path, {"ref": ref, "status": submissions.PENDING, "message": f"try {ref}"})
    text = path.read_text().splitlines()
    path.write_text("\n".join([text[0] + ",note", text[1] + ",mine", text[2] + ","]) + "\n")
    assert submissions.complete_submission(path, 11, status="COMPLETE", public_score=0.5)
    first, second = plain(path)
    assert (first["status"], first["public_score"], first["message"], first["note"]) == (
        "COMPLETE",
        "0.5",
        "try 11",
        "mine",
    )
    assert [row["ref"] for row in submissions.pending_submissions(path)] == ["12"] and second["message"] == "try 12"
    before = path.read_text()
    assert not submissions.complete_submission(path, 99, status="COMPLETE")
    assert path.read_text() == before


@pytest.mark.parametrize(
    "text", ["", "ref,status\n1,PENDING\n", "\x00\x01", 'time_utc,"run\n', ",".join(submissions.COLUMNS) + "\n1,2\n"]
)
def test_a_damaged_list_is_named_and_left_as_it_is(text: str, tmp_path: Path) -> None:
    path = tmp_path / "submissions.csv"
    path.write_text(text)
    for change in (
        lambda: submissions.add_submission(path, {"ref": 1}),
        lambda: submissions.complete_submission(path, 1),
        lambda: submissions.pending_submissions(path),
    ):
        with pytest.raises(TableError, match="submissions.csv"):
            change()
    assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def write_twenty(path: Path, writer: int) -> None:
    for number in range(20):
        submissions.add_submission(path, {"ref": f"{writer}-{number}"})


def test_writers_at_the_same_time_lose_no_row(tmp_path: Path) -> None:
    path, context = tmp_path / "submissions.csv", multiprocessing.get_context("fork")  # fork: nothing is imported again
    processes = [context.Process(target=write_twenty, args=(path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {row["ref"] for row in plain(path)} == {f"{writer}-{number}" for writer in range(3) for number in range(20)}


def test_a_ledger_of_an_earlier_release_is_continued(tmp_path: Path) -> None:
    assert submissions.submissions_file(tmp_path) == tmp_path / "submissions.csv"
    submissions.add_submission(tmp_path / "ledger.csv", {"ref": 1, "status": submissions.PENDING})
    path = submissions.submissions_file(tmp_path)
    submissions.add_submission(path, {"ref": 2})
    assert path == tmp_path / "ledger.csv" and [row["ref"] for row in plain(path)] == ["1", "2"]
    submissions.add_submission(tmp_path / "submissions.csv", {"ref": 3})
    assert submissions.submissions_file(tmp_path) == tmp_path / "submissions.csv"
    owners, problems = submissions.rows_by_run([tmp_path], {}, [])
    assert {row["ref"] for row in owners[tmp_path]} == {"1", "2", "3"} and problems == []


def test_the_out_of_fold_dice_of_a_run(tmp_path: Path) -> None:
    assert submissions.oof_dice(tmp_path) is None
    (tmp_path / "oof.csv").write_text("id,dice\na,0.25\nb,0.75\nc,0.5\n")
    assert submissions.oof_dice(tmp_path) == 0.5
    (tmp_path / "oof.csv").write_text("id,dice\na,good\n")
    with pytest.raises(TableError, match="oof.csv"):
        submissions.oof_dice(tmp_path)


def test_an_unknown_column_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="score"):
        submissions.add_submission(tmp_path / "submissions.csv", {"score": 1})
