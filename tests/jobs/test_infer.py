"""Prediction under a clock and on a test table with faults: every id gets its row."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from hubmap_kit.__main__ import main
from hubmap_kit.competition import rle
from hubmap_kit.competition.checker import check_submission
from hubmap_kit.errors import SlideError, SubmissionError, TableError
from hubmap_kit.inference.predict import NO_TIME
from hubmap_kit.jobs.predict import predict

SETTINGS = ["inference.views=none", "inference.tune_speed=false"]


def rows_of(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {row["id"]: row["rle"] for row in csv.DictReader(file)}


@pytest.fixture
def table(sample_data: Path, tmp_path: Path) -> Path:
    shutil.copytree(sample_data / "test_images", tmp_path / "test_images")
    return Path(shutil.copyfile(sample_data / "test.csv", tmp_path / "test.csv"))


@pytest.fixture(scope="module")
def whole(sample_data: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The masks when nothing is in the way."""
    out = tmp_path_factory.mktemp("whole") / "submission.csv"
    predict([tiny_run], sample_data / "test.csv", out, overrides=SETTINGS, device="cpu")
    return rows_of(out)


def test_slides_that_come_too_late_get_empty_masks(
    table: Path, tiny_run: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"

    def left() -> float:
        return 0.0 if len(list(pictures.glob("*.png"))) >= 3 else 1e6

    done = predict(
        [tiny_run], table, tmp_path / "s.csv", overrides=SETTINGS, device="cpu", overlays=pictures, left=left
    )
    ids, found = list(whole), rows_of(tmp_path / "s.csv")
    late = [failure.id for failure in done.failures]
    # When the third picture is there, at most a slide in each stage is still on its way.
    assert (
        3 <= len(late) <= 7 and late == ids[-len(late) :] and {failure.reason for failure in done.failures} == {NO_TIME}
    )
    assert found == {slide_id: ("" if slide_id in late else text) for slide_id, text in whole.items()}
    assert (
        any(found.values())
        and done.report.rows == len(ids)
        and sorted(path.stem for path in pictures.iterdir()) == sorted(set(ids) - set(late))
    )


@pytest.mark.parametrize("limit", [{"left": lambda: 0.0}, {"deadline": 1e-9, "left": lambda: 1e6}, {"deadline": 1e-9}])
def test_no_time_at_all_still_makes_a_complete_file(limit: dict, table: Path, tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match=NO_TIME):
        predict([tiny_run], table, tmp_path / "t.csv", overrides=SETTINGS, device="cpu", **limit)
    report = check_submission(tmp_path / "t.csv", table)
    assert report.empty == report.rows > 0
    assert len((tmp_path / "governor.csv").read_text().splitlines()) == report.rows + 1


def test_devices_share_the_slides_under_a_deadline(
    table: Path, tiny_run: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    done = predict([tiny_run], table, tmp_path / "s.csv", overrides=SETTINGS, device="cpu,cpu", deadline=1e5)
    assert done.failures == [] and rows_of(tmp_path / "s.csv") == whole
    with (tmp_path / "governor.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["slide"] for row in rows) == sorted(whole) and {row["step"] for row in rows} == {"0"}


def test_a_faulty_row_costs_no_other_slide(table: Path, tiny_run: Path, whole: dict[str, str], tmp_path: Path) -> None:
    header, *lines = table.read_text().splitlines()
    ids, names = list(whole), header.split(",")
    cells = [line.split(",") for line in lines]
    cells[0][names.index("img_height")] = "7"
    cells[1][names.index("pixel_size")] = ""
    cells[2][names.index("organ")] = "heart"
    cells[3] = cells[3][:3]
    (tmp_path / "test_images" / f"{ids[4]}.tiff").write_bytes(b"II*\0 and no more")
    (tmp_path / "test_images" / f"{ids[5]}.tiff").unlink()
    table.write_text("\n".join([header, *(",".join(row) for row in cells)]) + "\n")
    with pytest.raises((TableError, SlideError)):
        predict([tiny_run], table, tmp_path / "s.csv", device="cpu")
    done = predict([tiny_run], table, tmp_path / "s.csv", overrides=SETTINGS, device="cpu", on_error="degrade")
    found = rows_of(tmp_path / "s.csv")
    assert list(found) == ids and {failure.id for failure in done.failures} == {ids[4], ids[5]}
    for place, slide_id in enumerate(ids):
        if place in (4, 5):
            assert found[slide_id] == ""
        elif place not in (1, 2, 3):  # those have another scale or threshold now
            assert found[slide_id] == whole[slide_id]
    assert done.report.rows == len(ids) and done.report.empty == sum(text == "" for text in found.values())


def test_the_check_sees_every_row_of_an_odd_table(
    table: Path, tiny_run: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder with a mistake, which only the check of the finished file can see."""
    encode = rle.encode
    monkeypatch.setattr(rle, "encode", lambda mask: f"{encode(mask)} {mask.size} 5".strip())
    table.write_text(table.read_text().replace("kidney", "kidny", 1))
    done = predict([tiny_run], table, tmp_path / "s.csv", overrides=SETTINGS, device="cpu", on_error="degrade")
    assert list(rows_of(tmp_path / "s.csv")) == list(whole) and done.report.rows == len(whole)
    assert f"{len(whole)} problems: id {next(iter(whole))} ends at pixel" in done.doubt and done.trouble.startswith(
        f"{done.path} is kept although"
    )


def test_the_last_line_tells_how_many_slides_failed(
    table: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "predict",
        str(tiny_run),
        "--test",
        str(table),
        "--out",
        str(tmp_path / "s.csv"),
        "--device",
        "cpu",
        "--on-error",
        "degrade",
    ]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    broken = sorted((tmp_path / "test_images").iterdir())[:3]
    for path, last in ((None, "checked; 0 of 10 slides failed"), (broken, "checked; 3 of 10 slides failed")):
        for each in path or ():
            each.write_bytes(b"no slide")
        with pytest.raises(SystemExit) as stop:
            main(words)
        lines = capsys.readouterr().out.splitlines()
        assert (
            stop.value.code == 0
            and lines[-1].startswith(f"{tmp_path / 's.csv'}: 10 rows, ")
            and lines[-1].endswith(f"; {last}")
        )
    assert [line.split()[1] for line in lines[:-1]] == [
        path.stem for path in sorted(broken, key=lambda path: int(path.stem))
    ]


def test_a_table_without_rows(table: Path, tiny_run: Path, tmp_path: Path) -> None:
    table.write_text(table.read_text().splitlines()[0])
    with pytest.raises(TableError, match="no rows"):
        predict([tiny_run], table, tmp_path / "s.csv", overrides=SETTINGS, device="cpu")
    done = predict(
        [tiny_run], table, tmp_path / "s.csv", overrides=SETTINGS, device="cpu", on_error="degrade", left=lambda: 1e6
    )
    assert (tmp_path / "s.csv").read_text() == "id,rle\n" and (done.report.rows, done.failures, done.trouble) == (
        0,
        [],
        "",
    )
