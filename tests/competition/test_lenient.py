"""A test table that is not as it should be still gives one slide for every id."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubmap_kit.competition.lenient import UNKNOWN, read_test_leniently
from hubmap_kit.competition.organs import FACTS
from hubmap_kit.competition.tables import TEST_COLUMNS, read_test
from hubmap_kit.errors import TableError

HEADER = ",".join(TEST_COLUMNS)
GOOD = "10078,spleen,Hubmap,2023,2023,0.4945,4"


def table(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "test.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_good_table_is_read_as_ever(tmp_path: Path) -> None:
    path = table(tmp_path, GOOD, "2,kidney,HPA,30,20,,")
    assert read_test_leniently(path) == read_test(path, check_files=False)


def test_every_fault_costs_its_own_cell_only(tmp_path: Path) -> None:
    rows = [
        GOOD, "1,heart,HPA,30,20,0.7,4", "2,lung,Hubmap,30,20,wide,4", "3,prostate,elsewhere,30,20,-1,4", "4,kidney,HPA,tall,,0.4,4",
        "5,kidney", "a b,kidney,HPA,30,20,0.4,4", "../6,kidney,HPA,30,20,0.4,4", "7,kidney,HPA,30,20,0.4,4,9,9", GOOD,
    ]  # fmt: skip
    slides = {slide.id: slide for slide in read_test_leniently(table(tmp_path, *rows))}
    assert list(slides) == ["10078", "1", "2", "3", "4", "5", "a b", "../6", "7"]
    assert slides["10078"] == read_test(table(tmp_path, GOOD), check_files=False)[0]
    assert (slides["1"].organ, slides["1"].um_per_px) == (UNKNOWN, 0.7)
    assert slides["2"].um_per_px == FACTS["lung"].um_per_px["Hubmap"]
    assert slides["3"].um_per_px == FACTS["prostate"].um_per_px["HPA"]
    assert (slides["4"].height, slides["4"].width) == (1, 1)
    assert slides["5"].um_per_px == 0.4
    for slide in slides.values():
        assert slide.path.parent == tmp_path / "test_images"


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@given(st.lists(st.lists(CELL, min_size=1, max_size=9), min_size=1, max_size=5))
def test_whatever_the_cells_hold(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([*([list(TEST_COLUMNS)]), *rows])
    path = tmp_path_factory.mktemp("odd") / "test.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    usable = dict.fromkeys(row[0].strip() for row in rows if row[0].strip() and not set(row[0].strip()) & set(',"\r\n'))
    try:
        found = [slide.id for slide in read_test_leniently(path)]
    except TableError:
        found = []
    assert found == list(usable)


@pytest.mark.parametrize("text", ["", "number,organ\n1,lung\n", f"{HEADER}\n", f"{HEADER}\n,lung\n"])
def test_without_ids_there_is_nothing_to_answer(text: str, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(TableError, match=r"test\.csv"):
        read_test_leniently(tmp_path / "test.csv")
    with pytest.raises(TableError, match=r"nowhere\.csv"):
        read_test_leniently(tmp_path / "nowhere.csv")
