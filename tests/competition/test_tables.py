"""Reading train.csv and test.csv: real folders, filled-in values, and the bad tables that people bring."""

from __future__ import annotations

import csv
import gzip
import logging
from collections import Counter
from pathlib import Path

import pytest

from hubmap_kit.competition import tables
from hubmap_kit.errors import RleError, SlideError, TableError

HEADER = "id,organ,data_source,img_height,img_width,pixel_size,tissue_thickness,rle,age,sex"
GOOD = "62,kidney,HPA,30,20,0.4,4,1 2 40 5,55.0,Male"


def write_train(folder: Path, *rows: str, header: str = HEADER, files: bool = True) -> Path:
    """A train.csv with its (empty) slide files."""
    (folder / "train_images").mkdir(exist_ok=True)
    if files:
        for row in rows:
            (folder / "train_images" / f"{row.split(',')[0]}.tiff").touch()
    path = folder / "train.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_row_becomes_a_slide(tmp_path: Path) -> None:
    path = write_train(tmp_path, "007,largeintestine,Hubmap,30,20,0.229,8,1 2 40 5,,")
    slide = tables.Slide(
        id="007",
        organ="largeintestine",
        source="Hubmap",
        height=30,
        width=20,
        um_per_px=0.229,
        thickness_um=8.0,
        path=tmp_path / "train_images" / "007.tiff",
        rle="1 2 40 5",
    )
    assert tables.read_train(path) == [slide]


def test_test_rows_have_no_mask(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "10078.tif").touch()
    path = tmp_path / "test.csv"
    path.write_text(f"{HEADER.replace(',rle,age,sex', '')}\n10078,spleen,Hubmap,2023,2023,0.4945,4\n")
    (slide,) = tables.read_test(path, images_dir=tmp_path / "elsewhere")
    assert slide.rle is None and slide.path == tmp_path / "elsewhere" / "10078.tif"
    assert tables.read_test(path, check_files=False)[0].path == tmp_path / "test_images" / "10078.tiff"


def test_order_of_columns_extra_columns_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    path = write_train(tmp_path, GOOD)
    expected = tables.read_train(path)
    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)
    names = sorted(row, reverse=True)
    header, cells = ",".join(["note", *names]), ",".join(['"a, b"', *(row[name] for name in names)])
    path.write_bytes(f"\ufeff{header}\r\n\r\n{cells}\r\n".encode())
    assert tables.read_train(path) == expected


@pytest.mark.parametrize("cell", ["", "nan", "NaN"])
def test_an_empty_mask_is_allowed(tmp_path: Path, cell: str) -> None:
    path = write_train(tmp_path, GOOD.replace("1 2 40 5", cell))
    assert tables.read_train(path)[0].rle == ""


def test_missing_physical_sizes_are_filled_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f"{i},prostate,Hubmap,30,20,,,,," for i in range(40)] + ["99,lung,HPA,30,20,nan,4,,,"]
    with caplog.at_level(logging.WARNING):
        slides = tables.read_train(write_train(tmp_path, *rows))
    assert (slides[0].um_per_px, slides[0].thickness_um, slides[-1].um_per_px) == (6.263, 5.0, 0.4)
    (record,) = caplog.records
    assert "81 values" in record.getMessage() and "pixel_size of 0 = 6.263" in record.getMessage()


def test_sizes_written_by_pandas_as_floats_are_whole(tmp_path: Path) -> None:
    (slide,) = tables.read_train(write_train(tmp_path, GOOD.replace(",30,20,", ",30.0,20.0,")))
    assert (slide.height, slide.width) == (30, 20)


def test_masks_longer_than_the_csv_module_allows(tmp_path: Path) -> None:
    mask = " ".join(f"{start} 1" for start in range(0, 90_000, 2))
    before = csv.field_size_limit()
    path = write_train(tmp_path, f"62,kidney,HPA,300,300,0.4,4,{mask},,")
    assert len(mask) > before and tables.read_train(path)[0].rle == mask
    assert csv.field_size_limit() == before


# What is wrong -> (old text, new text, error class, words that the message must hold).
BAD_CELLS = {
    "unknown organ": (
        ",kidney,",
        ",kidny,",
        TableError,
        ["train.csv, line 2 (id 62)", "'kidny'", "did you mean kidney"],
    ),
    "organ in two words": (",kidney,", ",large intestine,", TableError, ["id 62", "did you mean largeintestine"]),
    "other organ": (
        ",kidney,",
        ",heart of gold,",
        TableError,
        ["id 62", "'heart of gold'", "kidney, prostate", "mend the cell"],
    ),
    "unknown source": (",HPA,", ",HuBMAP,", TableError, ["id 62", "data_source 'HuBMAP'", "did you mean Hubmap"]),
    "no source": (",HPA,", ",,", TableError, ["id 62", "data_source ''", "HPA, Hubmap"]),
    "empty id": ("62,", ",", TableError, ["train.csv, line 2", "id ''", "mend"]),
    "id that walks": ("62,", "../62,", TableError, ["train.csv, line 2", "'../62'", "mend"]),
    "id with a folder": ("62,", "a\\62,", TableError, ["line 2", "letters", "mend"]),
    "id of 201 letters": ("62,", f"{'x' * 201},", TableError, ["line 2", "xxx...'", "200 at most", "mend"]),
    "id with a blank": ("62,", " 62,", TableError, ["line 2", "' 62'", "mend"]),
    "height in words": (",30,", ",tall,", TableError, ["id 62", "img_height 'tall'", "mend"]),
    "half a pixel": (",30,", ",30.5,", TableError, ["id 62", "img_height '30.5'", "mend"]),
    "zero width": (",20,", ",0,", TableError, ["id 62", "img_width '0'", "mend"]),
    "negative width": (",20,", ",-20,", TableError, ["id 62", "img_width '-20'", "mend"]),
    "no width": (",20,", ",,", TableError, ["id 62", "img_width ''", "mend"]),
    "pixel size in words": (",0.4,", ",0.4um,", TableError, ["id 62", "pixel_size '0.4um'", "mend"]),
    "zero pixel size": (",0.4,", ",0,", TableError, ["id 62", "pixel_size '0'", "above 0"]),
    "infinite pixel size": (",0.4,", ",inf,", TableError, ["id 62", "pixel_size 'inf'", "mend"]),
    "negative thickness": (",4,", ",-4,", TableError, ["id 62", "tissue_thickness '-4'", "mend"]),
    "row cut off": (",1 2 40 5,55.0,Male", ",1 2 40", TableError, ["line 2 has 8 fields", "10", "again"]),
    "row too long": (",Male", ",Male,x", TableError, ["line 2 has 11 fields", "10", "again"]),
    "mask with odd count": (
        "1 2 40 5",
        "1 2 40",
        RleError,
        ["train.csv, line 2 (id 62), column rle", "3 numbers", "again"],
    ),
    "mask of floats": ("1 2 40 5", "1.0 2", RleError, ["id 62", "'1.0'", "whole numbers"]),
    "negative mask": ("1 2 40 5", "-1 2", RleError, ["id 62", "'-1'"]),
    "mask unsorted": ("1 2 40 5", "40 5 1 2", RleError, ["id 62", "start 1 comes before", "sort"]),
    "mask overlaps": ("1 2 40 5", "1 5 3 2", RleError, ["id 62", "start 3 comes before", "merge"]),
    "mask too large": ("1 2 40 5", "1 2 598 3", RleError, ["id 62", "30x20 = 600", "check"]),
}


@pytest.mark.parametrize(("old", "new", "kind", "says"), BAD_CELLS.values(), ids=BAD_CELLS.keys())
def test_bad_cells(tmp_path: Path, old: str, new: str, kind: type[Exception], says: list[str]) -> None:
    assert old in GOOD
    path = write_train(tmp_path, GOOD.replace(old, new, 1), files=False)
    with pytest.raises(kind) as caught:
        tables.read_train(path, check_files=False)
    for words in says:
        assert words in str(caught.value)


def test_duplicate_id(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"train\.csv, line 3 repeats the id 62 of line 2"):
        tables.read_train(write_train(tmp_path, GOOD, GOOD))


@pytest.mark.parametrize("column", tables.TRAIN_COLUMNS)
def test_missing_column(tmp_path: Path, column: str) -> None:
    path = write_train(tmp_path, GOOD, header=HEADER.replace(column, "something", 1))
    with pytest.raises(
        TableError, match=rf"train\.csv lacks the column {column}, found the columns .*something.*check"
    ):
        tables.read_train(path)


def test_column_named_twice(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="names the column organ more than once"):
        tables.read_train(write_train(tmp_path, GOOD, header=HEADER.replace("sex", "organ")))


def test_missing_slide_files(tmp_path: Path) -> None:
    path = write_train(tmp_path, GOOD, GOOD.replace("62,", "63,"), GOOD.replace("62,", "64,"))
    (tmp_path / "train_images" / "63.tiff").unlink()
    (tmp_path / "train_images" / "64.tiff").unlink()
    with pytest.raises(
        SlideError, match=r"train_images lacks the slide files of 2 of the 3 rows .* first is 63\.tiff; download"
    ):
        tables.read_train(path)
    assert len(tables.read_train(path, check_files=False)) == 3


FILES = {
    "empty": (b"", "is empty"),
    "blank": (b"\n\n", "is empty"),
    "only a header": (HEADER.encode(), "no rows"),
    "a TIFF": (b"II*\0\x08\0\0\0\xff\xd8\xff", "not text"),
    "a web page": (b"<!doctype html><title>Sign in</title>", "lacks the column id"),
    "an open quote": (f'{HEADER}\n"62,kidney'.encode(), "not CSV"),
}


@pytest.mark.parametrize(("content", "says"), FILES.values(), ids=FILES.keys())
def test_bad_files(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(TableError) as caught:
        tables.read_train(path)
    assert says in str(caught.value) and "train.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_gzip(tmp_path: Path) -> None:
    path = tmp_path / "train.csv.gz"
    for content in (b"id,organ", gzip.compress(f"{HEADER}\n{GOOD}\n".encode())[:-12]):
        path.write_bytes(content)
        with pytest.raises(TableError, match=r"train\.csv\.gz cannot be read as a table .*download"):
            tables.read_train(path)
    path.write_bytes(gzip.compress(f"{HEADER}\n{GOOD}\n".encode()))
    assert tables.read_train(path, check_files=False)[0].id == "62"


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"train\.csv does not exist.*check the path"):
        tables.read_train(tmp_path / "train.csv")
    with pytest.raises(TableError, match="cannot be read as a table"):
        tables.read_test(tmp_path)


@pytest.mark.parametrize(("name", "count"), [("hubmap-mini", 26), ("glas", 85)])
def test_real_folders(shared_data: Path, name: str, count: int) -> None:
    path = shared_data / name / "train.csv"
    slides = tables.read_train(path)
    with path.open(newline="") as file:
        ids = [line.split(",", 1)[0] for line in file][1:]
    assert [slide.id for slide in slides] == ids and len(ids) == count
    assert all(slide.path.is_file() and slide.rle for slide in slides)


def test_the_real_test_table(shared_data: Path) -> None:
    (slide,) = tables.read_test(shared_data / "hubmap-mini" / "test.csv")
    assert (slide.id, slide.organ, slide.source, slide.height, slide.um_per_px) == (
        "10078",
        "spleen",
        "Hubmap",
        810,
        1.235,
    )


def test_the_whole_training_table(shared_data: Path) -> None:
    slides = tables.read_train(shared_data / "hubmap-2022" / "train.csv.gz", check_files=False)
    counts = Counter(slide.organ for slide in slides)  # as published with the data
    assert counts == {"kidney": 99, "prostate": 93, "largeintestine": 58, "spleen": 53, "lung": 48}


@pytest.mark.parametrize(("text", "weight"), [("", 1.0), ("nan", 1.0), ("0", 0.0), ("0.25", 0.25), ("1", 1.0)])
def test_a_weight_is_read_where_there_is_one(text: str, weight: float, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(
        "id,organ,data_source,img_height,img_width,pixel_size,tissue_thickness,rle,age,sex,weight\n1,lung,HPA,9,9,0.4,4,0"
        f" 3,50,Male,{text}\n"
    )
    assert tables.read_train(path, check_files=False)[0].weight == weight


@pytest.mark.parametrize("text", ["-1", "2", "much"])
def test_a_weight_is_a_share(text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(
        "id,organ,data_source,img_height,img_width,pixel_size,tissue_thickness,rle,age,sex,weight\n1,lung,HPA,9,9,0.4,4,0"
        f" 3,50,Male,{text}\n"
    )
    with pytest.raises(TableError, match=f"has weight '{text}', but a number from 0 to 1 was expected"):
        tables.read_train(path, check_files=False)
