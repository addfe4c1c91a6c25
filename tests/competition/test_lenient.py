"""A test table that is not as it should be still gives one slide for every id."""

from __future__ import annotations

import csv
import gzip
import io
import logging
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.competition.lenient import UNKNOWN, read_test_leniently
from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES
from hubmap_kit.competition.tables import TEST_COLUMNS, read_test
from hubmap_kit.errors import TableError

HEADER = ",".join(TEST_COLUMNS)
GOOD = "10078,spleen,Hubmap,30,20,0.4945,4"
ROWS = ("21,kidney,HPA,30,20,0.4,4", "3,lung,Hubmap,30,20,0.7562,5", "11,spleen,Hubmap,30,20,0.4945,4")


def table(folder: Path, *rows: str, header: str = HEADER, name: str = "test.csv") -> Path:
    path = folder / name
    path.write_bytes(("\n".join([header, *rows]) + "\n").encode())
    return path


def pictures(folder: Path, *names: str, height: int = 30, width: int = 20) -> Path:
    (folder / "test_images").mkdir(exist_ok=True)
    for name in names:
        if name.endswith((".png", ".jpg")):
            cv2.imwrite(str(folder / "test_images" / name), np.zeros((height, width, 3), np.uint8))
        else:
            tifffile.imwrite(
                folder / "test_images" / name,
                np.zeros((height, width, 3), np.uint8),
                photometric="rgb",
                compression="zlib",
            )
    return folder


def ids_of(path: Path) -> list[str]:
    return [slide.id for slide in read_test_leniently(path)]


def test_a_good_table_is_read_as_ever(tmp_path: Path) -> None:
    pictures(tmp_path, "10078.tiff", "2.tif")
    path = table(tmp_path, GOOD, "2,kidney,HPA,30,20,,")
    assert read_test_leniently(path) == read_test(path)


def test_every_fault_costs_its_own_cell_only(tmp_path: Path) -> None:
    rows = [
        GOOD,
        "1,heart,HPA,30,20,0.7,4",
        "2,lung,Hubmap,30,20,wide,4",
        "3,prostate,elsewhere,30,20,-1,4",
        "4,kidney,HPA,tall,,0.4,4",
        "5,kidney",
        "a b,kidney,HPA,30,20,0.4,4",
        "../6,kidney,HPA,30,20,0.4,4",
        "7,kidney,HPA,30,20,0.4,4,9,9",
        '8,"kidney,HPA,30,20,0.4,4',
        '"9"x,kidney,HPA,30,20,0.4,4',
        f"{'x' * 500},kidney,HPA,30,20,0.4,4",
        f"10,{'x' * 200_000},HPA,30,20,0.4,4",
        f"11,lung{',' * 100_000}",
        GOOD,
        ",lung",
        " ,lung",
        ",,,,,,",
    ]
    slides = {slide.id: slide for slide in read_test_leniently(table(pictures(tmp_path, "10078.tiff"), *rows))}
    assert list(slides) == ["10078", "1", "2", "3", "4", "5", "a b", "../6", "7", "8", '9"x', "x" * 500, "10", "11"]
    assert slides["10078"] == read_test(table(tmp_path, GOOD))[0]
    assert (slides["1"].organ, slides["1"].um_per_px) == (UNKNOWN, 0.7)
    assert slides["2"].um_per_px == FACTS["lung"].um_per_px["Hubmap"]
    assert slides["3"].um_per_px == FACTS["prostate"].um_per_px["Hubmap"]
    assert slides["5"].um_per_px == FACTS["kidney"].um_per_px["Hubmap"]
    assert slides["8"].organ == slides["7"].organ == "kidney"
    for slide in slides.values():
        assert slide.path.parent == tmp_path / "test_images"


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_spellings_of_columns_organs_and_sources(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Other case, blanks anywhere, dashes for underscores: the slides are those of the table as it should be."""

    def spell(name: str) -> str:
        changed = "".join(
            data.draw(st.sampled_from([letter.upper(), letter.lower()])) + data.draw(st.sampled_from(["", "", " "]))
            for letter in name
        )
        return data.draw(st.sampled_from(["", " ", "\t"])) + changed.replace(
            "_", data.draw(st.sampled_from(["_", "-", " ", ""]))
        )

    organs = data.draw(st.lists(st.tuples(st.sampled_from(ORGANS), st.sampled_from(SOURCES)), min_size=1, max_size=4))
    folder = tmp_path_factory.mktemp("spelt")
    right = table(folder, *(f"{number},{organ},{source},1,1,,4" for number, (organ, source) in enumerate(organs)))
    expected = read_test(right, check_files=False)
    header = ",".join(spell(column) for column in TEST_COLUMNS)
    odd = table(
        folder,
        *(f"{number},{spell(organ)},{spell(source)},1,1,,4" for number, (organ, source) in enumerate(organs)),
        header=header,
    )
    assert read_test_leniently(odd) == expected


def test_of_two_columns_the_one_that_is_spelt_right_counts(tmp_path: Path) -> None:
    for header, expected in (("ID,id,organ", "b"), ("id,Id,organ", "a")):
        assert ids_of(table(tmp_path, "a,b,Large Intestine", header=header)) == [expected]


def test_a_slide_of_unknown_organ_and_source_is_taken_for_a_hubmap_one(tmp_path: Path) -> None:
    unknown, from_hpa = read_test_leniently(table(tmp_path, "1,heart,?,30,20,,", "2,heart,hpa,30,20,,"))
    assert (unknown.source, unknown.um_per_px, unknown.thickness_um) == ("Hubmap", 0.5, 5.0)
    assert (from_hpa.source, from_hpa.um_per_px, from_hpa.thickness_um) == ("HPA", 0.4, 4.0)


# ---------------------------------------------------------------- bytes and cells

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=8)


@settings(deadline=None)
@given(st.lists(st.lists(CELL, min_size=1, max_size=len(TEST_COLUMNS)), min_size=1, max_size=5))
def test_whatever_the_cells_hold(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([list(TEST_COLUMNS), *rows])
    path = tmp_path_factory.mktemp("odd") / "test.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    assert ids_of(path) == list(dict.fromkeys(row[0] for row in rows if row[0].strip()))


ID = st.one_of(
    st.integers(0, 99_999).map(str),
    st.sampled_from(
        [
            "007",
            "0",
            "111.0",
            "1e3",
            "NA",
            "a b",
            "x-1",
            "../2",
            "caf\xe9",
            "\xfc_\xf8",
            "a,b",
            "a;b",
            "it's",
            'say "a"',
        ]
    ),
)
DAMAGE = st.sampled_from(["", "?", "nan", "1e30", "-1", "1,5", "inf", "x" * 300, "  ", "a\nb", 'a"b'])
# What changes a header: nothing, the case, another name of the id, names that mean nothing, none at all.
HEADERS = {
    "as it is": lambda names: names,
    "capitals": lambda names: [name.upper() for name in names],
    "another id": lambda names: ["Image ID" if name == "id" else name for name in names],
    "letters": lambda names: [chr(ord("p") + place) for place in range(len(names))],
    "none": lambda names: None,
}
KNOWN = ("as it is", "capitals", "another id")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_id_of_a_mangled_table_is_read_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """The oracle is the list of ids that the table is made of."""
    ids = data.draw(st.lists(ID, min_size=1, max_size=6), "ids")
    header = data.draw(st.sampled_from(list(HEADERS)), "header")
    columns = list(TEST_COLUMNS)
    if header in KNOWN:
        columns = data.draw(st.permutations([*TEST_COLUMNS, "note"]), "columns")
        columns = [column for column in columns if column in ("id", "organ") or data.draw(st.booleans())]
    rows = []
    for number, name in enumerate(ids):
        cells = {
            "id": name,
            "organ": ORGANS[number % 5],
            "data_source": "HPA",
            "img_height": "30",
            "img_width": "20",
            "pixel_size": "0.4",
        }
        cells |= {"tissue_thickness": "4", "note": "x"}
        told = (
            columns if header in KNOWN else [column for column in columns if column != "organ"]
        )  # which else shows that this is a table
        hit = data.draw(st.sampled_from(["", *(column for column in told if column != "id")]), "damaged cell")
        cells |= {hit: data.draw(DAMAGE, "damage")} if hit else {}
        rows.append([cells[column] for column in columns])
        if not hit and header in KNOWN:
            rows[-1] += data.draw(st.sampled_from([[], ["9"], ["", ""]]), "more cells")
        elif header in KNOWN:
            rows[-1] = rows[-1][: data.draw(st.integers(columns.index("id") + 1, len(columns)), "fewer cells")]
    names = HEADERS[header](columns)
    text, delimiter = io.StringIO(newline=""), data.draw(st.sampled_from(",\t;|:^"), "delimiter")
    quoting = data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]), "quoting")
    ending = data.draw(st.sampled_from(["\n", "\r\n", "\r", "\n\n", "\r\r\n"]), "line end")
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows(
        rows if names is None else [names, *rows]
    )
    encodings = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"]
    content = text.getvalue().replace("\n", ending)
    if data.draw(st.booleans(), "no end of the last line"):
        content = content.rstrip("\r\n")
    path = tmp_path_factory.mktemp("mangled") / "test.csv"
    path.write_bytes(
        content.encode(data.draw(st.sampled_from(encodings), "encoding"))
        + data.draw(st.sampled_from([b"", b"\0" * 64]), "padding")
    )
    assert ids_of(path) == list(dict.fromkeys(ids))


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]
)
def test_encodings(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_bytes(f"{HEADER}\r\ncaf\xe9,kidney\r\n\xfc,lung\r\n".encode(encoding))
    assert ids_of(tmp_path / "test.csv") == ["caf\xe9", "\xfc"]


def test_one_byte_of_another_encoding_costs_no_other_line(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_bytes(f"{HEADER}\n\u4e2d,kidney\n".encode() + b"caf\xe9,lung\n")
    assert ids_of(tmp_path / "test.csv") == ["\u4e2d", "caf\xe9"]


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    (folder / "test.csv").write_bytes(content)
    try:
        found = ids_of(folder / "test.csv")
    except TableError as error:
        assert str(folder / "test.csv") in str(error)
    else:
        assert all(each.strip() for each in found)


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", ":", " ", "   ", "||", " , "])
def test_delimiters(delimiter: str, tmp_path: Path) -> None:
    rows = [row.replace(",", delimiter) for row in ROWS]
    slides = read_test_leniently(table(tmp_path, *rows, header=HEADER.replace(",", delimiter)))
    assert [slide.id.strip() for slide in slides] == ["21", "3", "11"]
    assert [(slide.organ, slide.um_per_px) for slide in slides] == [
        ("kidney", 0.4),
        ("lung", 0.7562),
        ("spleen", 0.4945),
    ]


def test_decimal_commas(tmp_path: Path) -> None:
    path = table(tmp_path, "21;kidney;HPA;30;20;0,7;4", header=HEADER.replace(",", ";"))
    assert read_test_leniently(path)[0].um_per_px == 0.7


SHAPES = {
    "extra cells at the end": (HEADER, [ROWS[0] + ",9,9", *ROWS[1:]], ["21", "3", "11"]),
    "delimiters at the end": (HEADER, [row + ",,," for row in ROWS], ["21", "3", "11"]),
    "cells missing": (HEADER, ["21", "3,lung", ROWS[2]], ["21", "3", "11"]),
    "a comma in an id": (HEADER, [ROWS[0], "a," + ROWS[1], ROWS[2]], ["21", "a,3", "11"]),
    "two commas in an id": (HEADER, ["a,b," + ROWS[0]], ["a,b,21"]),
    "a comma in the only column": ("id", ["21", "a,b", "3,"], ["21", "a,b", "3"]),
    "a quote that nothing closes": (HEADER, ['"' + ROWS[0], *ROWS[1:]], ["21", "3", "11"]),
    "a quote that another row closes": (
        HEADER,
        ['"' + ROWS[0], ROWS[1], ROWS[2].replace(",", '",', 1)],
        ["21", "3", "11"],
    ),
    "a quote within a cell": (HEADER, [ROWS[0].replace("kid", 'kid"'), *ROWS[1:]], ["21", "3", "11"]),
    "no header": (ROWS[0], ROWS[1:], ["21", "3", "11"]),
    "ids like names of columns": (
        "a_id,kidney,HPA,9,9,.4,4",
        ["b_id,lung,HPA,9,9,.4,4", "id,lung,HPA,9,9,.4,4"],
        ["a_id", "b_id", "id"],
    ),
    "another delimiter in the header": (HEADER, [row.replace(",", "\t") for row in ROWS], ["21", "3", "11"]),
    "a title line": ("test slides", [HEADER, *ROWS], ["21", "3", "11"]),
    "what Excel begins with": ("sep=;", [line.replace(",", ";") for line in (HEADER, *ROWS)], ["21", "3", "11"]),
    "numbered columns": ("0,1,2,3,4,5,6", ROWS, ["21", "3", "11"]),
    "other names": ("a,b,c,d,e,f,g", ROWS, ["21", "3", "11"]),
    "two tables in one": (HEADER, [ROWS[0], HEADER, *ROWS[1:]], ["21", "3", "11"]),
    "only a header": (HEADER, [], []),
    "nothing": ("", [], []),
    "blank lines": ("  ", ["", "\r"], []),
    "delimiters only": (",,,", [",,,"], []),
    "no ids": (HEADER, [",lung", " ,lung"], []),
}


@pytest.mark.parametrize(("header", "rows", "expected"), SHAPES.values(), ids=SHAPES)
def test_shapes_of_tables(header: str, rows: list[str], expected: list[str], tmp_path: Path) -> None:
    assert ids_of(table(tmp_path, *rows, header=header)) == expected


def test_a_table_of_other_names_keeps_its_cells(tmp_path: Path) -> None:
    slides = read_test_leniently(table(tmp_path, *ROWS, header="slide,tissue,lab,h,w,um,t"))
    found = [(slide.organ, slide.source, slide.um_per_px) for slide in slides]
    assert found == [("kidney", "HPA", 0.4), ("lung", "Hubmap", 0.7562), ("spleen", "Hubmap", 0.4945)]


def test_the_files_tell_which_column_holds_the_ids(tmp_path: Path) -> None:
    pictures(tmp_path, "21.tiff", "3.tiff", "11.tiff")
    assert ids_of(table(tmp_path, "5,kidney,21", "6,lung,3", header="donor,organ,picture")) == ["21", "3"]
    assert ids_of(table(tmp_path, *(f"{number},{row}" for number, row in enumerate(ROWS)))) == ["21", "3", "11"]
    assert ids_of(table(tmp_path, "0  21  kidney", "1   3    lung", header="   id   organ")) == ["21", "3"]
    assert ids_of(table(tmp_path, "3", "11", header="21")) == ["21", "3", "11"]


# ---------------------------------------------------------------- slides and their files

NAMES = {
    "as they are": ("21", "21.tiff"),
    "a float": ("111.0", "111.tiff"),
    "an exponent": ("1.11e2", "111.tiff"),
    "zeros lost": ("7", "007.tiff"),
    "zeros won": ("007", "7.tiff"),
    "the suffix": ("21.tiff", "21.tiff"),
    "a folder": ("test_images/21.png", "21.tiff"),
    "a blank": (" 21 ", "21.tiff"),
    "the case": ("Ab", "aB.TIFF"),
    ".tif": ("21", "21.tif"),
    ".png": ("21", "21.png"),
    ".jpg": ("21", "21.jpg"),
    "an accent": ("caf\xe9", "cafe\u0301.tiff"),
}


@pytest.mark.parametrize(("slide_id", "name"), NAMES.values(), ids=NAMES)
def test_ids_stay_as_they_are_written_and_files_are_found_all_the_same(
    slide_id: str, name: str, tmp_path: Path
) -> None:
    pictures(tmp_path, name, "4.tiff")
    (slide,) = read_test_leniently(table(tmp_path, f"{slide_id},kidney,HPA,9,9,0.4,4"))
    assert (slide.id, slide.path, slide.height, slide.width) == (slide_id, tmp_path / "test_images" / name, 30, 20)


def test_an_id_that_may_mean_two_files_means_the_one_of_its_name_or_none(tmp_path: Path) -> None:
    pictures(tmp_path, "7.tiff", "007.tiff", "8.tiff", "8.png")
    found = {
        slide.id: slide.path.name
        for slide in read_test_leniently(table(tmp_path, *(f"{each},lung" for each in ("7", "007", "07", "8.0"))))
    }
    assert found == {"7": "7.tiff", "007": "007.tiff", "07": "07.tiff", "8.0": "8.tiff"}
    assert not (tmp_path / "test_images" / "07.tiff").exists()


SIZES = [
    ("1e6", "kidney", 3000, 0.5),
    ("0", "kidney", 3000, 0.5),
    ("-1", "kidney", 3000, 0.5),
    ("nan", "kidney", 3000, 0.5),
    ("inf", "kidney", 3000, 0.5),
    ("", "kidney", 3000, 0.5),
    ("494.5", "kidney", 3000, 0.5),
    ("5e-7", "kidney", 3000, 0.5),
    ("1e-9", "lung", 900, 0.7562),
    # Of those that a microscope makes: 19 mm of kidney are not believed, nor 0.06 mm of prostate, but what the organ's
    # own size explains.
    ("6.263", "kidney", 3000, 0.5),
    ("0.4", "prostate", 160, 6.263),
    ("6.263", "prostate", 160, 6.263),
    ("6.263", "prostate", 3000, 6.263),
    ("0.9", "kidney", 12000, 0.9),
    ("0.4", "kidney", 3000, 0.4),
    ("0.3", "kidney", 200, 0.3),
    ("6.2", "kidney", 0, 6.2),
    ("1e6", "kidney", 0, 0.5),
]


@pytest.mark.parametrize(("cell", "organ", "side", "expected"), SIZES)
def test_a_pixel_size_is_one_that_tissue_can_have(
    cell: str, organ: str, side: int, expected: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`side` is that of the file, 0 for none; the table says another one."""
    if side:
        pictures(tmp_path, "5.tiff", height=side, width=16)
    with caplog.at_level(logging.WARNING):
        (slide,) = read_test_leniently(table(tmp_path, f"5,{organ},Hubmap,1e30,-3,{cell},4"))
    assert slide.um_per_px == expected and (slide.height, slide.width) == ((side, 16) if side else (1, 1))
    kept = cell not in ("", "nan") and math.isclose(float(cell), expected)
    assert (
        "none that tissue can have" in caplog.text and f"{cell!r} of '5' becomes {expected:g} um" in caplog.text
    ) != kept


# ---------------------------------------------------------------- no table

SAMPLE = "id,rle\n11,1 2\n3,\n"


@pytest.mark.parametrize(
    "content",
    [
        None,
        bytes(range(256)) * 9,
        gzip.compress(SAMPLE.encode(), mtime=0),
        b"<!doctype html><title>Sign in</title>\n<p>7</p>\n",
    ],
)
def test_where_there_is_no_table_the_ids_are_those_of_the_sample_or_of_the_files(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "test.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        TableError,
        match=r"test\.csv is missing or no table, and neither sample_submission\.csv nor slides lie beside it; check",
    ):
        read_test_leniently(path)
    pictures(tmp_path, "3.tiff", "21.png")
    assert ids_of(path) == ["21", "3"]
    (tmp_path / "sample_submission.csv").write_text(SAMPLE)
    assert ids_of(path) == ["11", "3"]
    assert [slide.organ for slide in read_test_leniently(path)] == [UNKNOWN] * 2


@pytest.mark.parametrize(
    ("content", "ids"),
    [
        ("id,kidney,largeintestine,lung,prostate,spleen,pixel_size\n7,1,0,0,0,0,0.5\n21,0,0,1,0,0,0.5\n", ["7", "21"]),
        ("id,HPA,organ\n7,1,kidney\n21,0,lung\n", ["7", "21"]),
        ("organ,data_source,id\nprostate,7\nkidney,HPA,21\n", ["7", "21"]),
        ("organ,id\nlarge intestine, colon,21\nkidney,7\n", ["21", "7"]),
    ],
)
def test_columns_named_after_organs_and_cells_too_few_or_too_many(content: str, ids: list[str], tmp_path: Path) -> None:
    pictures(tmp_path, "7.tiff", "21.tiff")
    path = tmp_path / "test.csv"
    path.write_text(content)
    assert ids_of(path) == ids
