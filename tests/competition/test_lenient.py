"""A test table that is not as it should be still gives one slide for every id."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.competition.lenient import UNKNOWN, read_test_leniently
from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES
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
    assert slides["3"].um_per_px == FACTS["prostate"].um_per_px["Hubmap"]
    assert (slides["4"].height, slides["4"].width) == (1, 1)
    assert slides["5"].um_per_px == FACTS["kidney"].um_per_px["Hubmap"]
    for slide in slides.values():
        assert slide.path.parent == tmp_path / "test_images"


@settings(max_examples=40)
@given(st.data())
def test_spellings_of_columns_organs_and_sources(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Other case, blanks anywhere, dashes for underscores: the slides are those of the table as it should be."""
    def spell(name: str) -> str:
        changed = "".join(data.draw(st.sampled_from([letter.upper(), letter.lower()])) + data.draw(st.sampled_from(["", "", " "])) for letter in name)
        return data.draw(st.sampled_from(["", " ", "\t"])) + changed.replace("_", data.draw(st.sampled_from(["_", "-", " ", ""])))

    organs = data.draw(st.lists(st.tuples(st.sampled_from(ORGANS), st.sampled_from(SOURCES)), min_size=1, max_size=4))
    folder = tmp_path_factory.mktemp("spelt")
    right = table(folder, *(f"{number},{organ},{source},30,20,,4" for number, (organ, source) in enumerate(organs)))
    expected = read_test(right, check_files=False)
    header = ",".join(spell(column) for column in TEST_COLUMNS)
    odd = table(folder, *(f"{number},{spell(organ)},{spell(source)},30,20,,4" for number, (organ, source) in enumerate(organs)), header=header)
    assert read_test_leniently(odd) == expected


def test_of_two_columns_the_one_that_is_spelt_right_counts(tmp_path: Path) -> None:
    for header, expected in (("ID,id,organ", "b"), ("id,Id,organ", "a")):
        assert [slide.id for slide in read_test_leniently(table(tmp_path, "a,b,Large Intestine", header=header))] == [expected]


def test_a_slide_of_unknown_organ_and_source_is_taken_for_a_hubmap_one(tmp_path: Path) -> None:
    unknown, from_hpa = read_test_leniently(table(tmp_path, "1,heart,?,30,20,,", "2,heart,hpa,30,20,,"))
    assert (unknown.source, unknown.um_per_px, unknown.thickness_um) == ("Hubmap", 0.5, 5.0)
    assert (from_hpa.source, from_hpa.um_per_px, from_hpa.thickness_um) == ("HPA", 0.4, 4.0)


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
