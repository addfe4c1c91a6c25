"""`hubmap external` on folders of pictures: what comes in, what is refused, that nothing changes twice, and tables
joined by links.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from external_cli import hubmap
from slide_pictures import picture

from hubmap_kit.competition import external, rle, slides
from hubmap_kit.competition.external import read_table
from hubmap_kit.competition.folds import read_folds
from hubmap_kit.competition.tables import TEST_COLUMNS, read_test, read_train
from hubmap_kit.errors import HubmapError, SlideError, TableError
from hubmap_kit.jobs.external import Source, add, merge

COLON = ["--organ", "largeintestine", "--um-per-px", "0.62", "--source-name", "glas", "--like", "Hubmap"]


def mask_of(number: int) -> np.ndarray:
    mask = np.zeros((37, 53), np.uint16)
    mask[3:9, 4 + number : 20], mask[20:30, 30:40] = 1, 300
    return mask


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four slides in three formats, one of them in a sub-folder, with instance-labelled masks."""
    folder = tmp_path / "source"
    (folder / "slides/more").mkdir(parents=True)
    (folder / "masks").mkdir()
    for number, name in enumerate(("a.png", "b.tif", "c.jpg", "more/d.tiff")):
        pixels = np.roll(picture(), number, axis=1)
        path = folder / "slides" / name
        if path.suffix.startswith(".tif"):
            tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib")
        else:
            cv2.imwrite(str(path), pixels[..., ::-1])
        cv2.imwrite(str(folder / "masks" / f"{path.stem}.png"), mask_of(number))
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_a_data_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    words = [
        "external",
        "add",
        source / "slides",
        *COLON,
        "--masks",
        source / "masks",
        "--out",
        out,
        "--licence",
        "CC0",
        "--provenance",
        "https://x.org/y",
    ]
    assert "4 slides added, 0 were there, 0 refused" in hubmap(*words)
    rows = {row["file"]: row for row in read_table(out / "train.csv")}
    for slide in read_train(out / "train.csv"):
        row = next(row for row in rows.values() if row["id"] == slide.id)
        number = "abcd".index(Path(row["file"]).stem)
        pixels = slides.read(source / "slides" / row["file"])
        np.testing.assert_array_equal(slides.read(slide.path), pixels)
        np.testing.assert_array_equal(rle.decode(slide.rle or "", *pixels.shape[:2]), mask_of(number) > 0)
        assert (slide.organ, slide.source, slide.um_per_px, slide.thickness_um) == ("largeintestine", "Hubmap", 0.62, 8)
        assert (row["licence"], row["provenance"], row["parent"], row["age"]) == (
            "CC0",
            "external:glas https://x.org/y",
            "",
            "",
        )
    assert set(rows) == {"a.png", "b.tif", "c.jpg", "more/d.tiff"}
    before = snapshot(out)
    assert "0 slides added, 4 were there" in hubmap(*words)
    assert snapshot(out) == before, "adding the same twice changes nothing"


def test_several_sources_share_a_folder(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    colon, lung = Source("largeintestine", 0.62, "glas", "Hubmap"), Source("lung", 0.5, "web", thickness_um=3)
    (tmp_path / "other").mkdir()
    cv2.imwrite(str(tmp_path / "other/a.png"), picture(50, 40)[..., ::-1])
    cv2.imwrite(str(tmp_path / "other/a_anno.png"), np.ones((50, 40), np.uint8))
    add(source / "slides", out, colon, source / "masks")
    first = read_table(out / "train.csv")
    assert add(tmp_path / "other", out, lung, tmp_path / "other").new == ["a.png"], "masks may lie between the slides"
    rows = read_table(out / "train.csv")
    assert rows[:4] == first and rows[4]["tissue_thickness"] == "3" and rle.area(rows[4]["rle"]) == 2000
    assert len(read_train(out / "train.csv")) == 5


def test_slides_without_masks_teach_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    hubmap("external", "add", source / "slides", *COLON, "--out", out)
    assert len(read_test(out / "test.csv")) == 4 and not (out / "train.csv").exists()
    assert all("rle" not in row for row in read_table(out / "test.csv", TEST_COLUMNS))


def _grey(slides_: Path) -> None:
    cv2.imwrite(str(slides_ / "z.png"), picture(37, 53, 1))


def _cut(slides_: Path) -> None:
    (slides_ / "z.png").write_bytes((slides_ / "a.png").read_bytes()[:900])


def _bmp(slides_: Path) -> None:
    cv2.imwrite(str(slides_ / "z.bmp"), picture())


def _no_mask(slides_: Path) -> None:
    cv2.imwrite(str(slides_ / "y.png"), picture(37, 50))


def _other_mask(slides_: Path) -> None:
    cv2.imwrite(str(slides_ / "z.png"), picture(53, 37))


def _twice(slides_: Path) -> None:
    shutil.copy(slides_ / "a.png", slides_ / "z.png")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_grey, "z.png is grey in every pixel"),
        (_cut, "z.png: the file is truncated or damaged"),
        (_bmp, "z.bmp: starts with the bytes 42 4d"),
        (_no_mask, "y.png has no mask in"),
        (_other_mask, "mask of 37 x 53 pixels, but its slide has 53 x 37"),
        (_twice, "holds the same pixels as a.png"),
    ],
)
def test_a_bad_slide_is_refused_and_the_others_are_taken(
    spoil: Callable[[Path], None], sentence: str, source: Path, tmp_path: Path
) -> None:
    cv2.imwrite(str(source / "masks/z.png"), mask_of(0))
    spoil(source / "slides")
    done = add(source / "slides", tmp_path / "data", Source("lung", 0.5, "web"), source / "masks")
    assert len(done.new) == 4 and len(read_train(tmp_path / "data/train.csv")) == 4
    (reason,) = done.refused.values()
    assert sentence in reason
    assert sentence in (tmp_path / "data/refused.csv").read_text()


def test_another_label_for_a_known_slide_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    add(source / "slides", out, Source("lung", 0.5, "web"), source / "masks")
    before = (out / "train.csv").read_bytes()
    cv2.imwrite(str(source / "masks/a.png"), mask_of(3))
    done = add(source / "slides", out, Source("lung", 0.5, "web"), source / "masks")
    assert list(done.refused) == ["a.png"] and "with another rle" in done.refused["a.png"] and len(done.known) == 3
    assert (out / "train.csv").read_bytes() == before


def test_copies_and_descendants_know_their_parents(source: Path, sample_data: Path, tmp_path: Path) -> None:
    known = read_train(sample_data / "train.csv")[0]
    shutil.copy(known.path, source / "slides/copy.tiff")
    (tmp_path / "parents.csv").write_text("file,parent\na.png,77\n")
    hubmap(
        "external",
        "add",
        source / "slides",
        *COLON,
        "--out",
        tmp_path / "data",
        "--against",
        sample_data,
        "--parents",
        tmp_path / "parents.csv",
    )
    found = {row["file"]: row["parent"] for row in read_table(tmp_path / "data/test.csv", TEST_COLUMNS)}
    assert found == {"a.png": "77", "b.tif": "", "c.jpg": "", "more/d.tiff": "", "copy.tiff": known.id}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"organ": "liver"}, "--organ is 'liver'"),
        ({"um_per_px": 0.0}, "--um-per-px is 0"),
        ({"like": "hpa"}, "--like is 'hpa'"),
        ({"name": "a b"}, "one word was expected"),
    ],
)
def test_what_a_table_cannot_hold_is_refused(change: dict, sentence: str, source: Path, tmp_path: Path) -> None:
    values = {"organ": "lung", "um_per_px": 0.5, "name": "web"} | change
    with pytest.raises(TableError, match=sentence):
        add(source / "slides", tmp_path / "data", Source(**values))
    assert not (tmp_path / "data").exists()


def test_folders_that_are_not_what_they_should_be(source: Path, sample_data: Path, tmp_path: Path) -> None:
    lung = Source("lung", 0.5, "web")
    for folder, masks, sentence in (
        (tmp_path / "no", None, "is not a folder"),
        (source, tmp_path / "no", "the folder of the masks"),
        (source / "masks", None, "none of its 4"),
    ):
        with pytest.raises(SlideError, match=sentence):
            add(folder, tmp_path / "data", lung, masks)
    shutil.copytree(sample_data, tmp_path / "own")
    before = snapshot(tmp_path / "own")
    with pytest.raises(TableError, match="was not made by 'hubmap external' and is left as it is"):
        add(source / "slides", tmp_path / "own", lung, source / "masks")
    assert snapshot(tmp_path / "own") == before


def test_glas_comes_back_as_it_is(shared_data: Path, tmp_path: Path) -> None:
    truth = {slide.id: slide for slide in read_train(shared_data / "glas/train.csv")[:6]}
    (tmp_path / "masks").mkdir()
    (tmp_path / "slides").mkdir()
    for slide in truth.values():
        _, labels = cv2.connectedComponents(rle.decode(slide.rle or "", slide.height, slide.width))
        cv2.imwrite(str(tmp_path / "masks" / f"{slide.id}.png"), labels.astype(np.uint8))
        shutil.copy(slide.path, tmp_path / "slides")
    add(tmp_path / "slides", tmp_path / "data", Source("largeintestine", 0.62, "glas", "Hubmap"), tmp_path / "masks")
    rows = read_table(tmp_path / "data/train.csv")
    assert {Path(row["file"]).stem: row["rle"] for row in rows} == {slide.id: slide.rle for slide in truth.values()}


# ---------------------------------------------------------------- joining


def test_tables_are_joined_by_links(source: Path, sample_data: Path, tmp_path: Path) -> None:
    parent = read_train(sample_data / "train.csv")[0].id
    (tmp_path / "parents.csv").write_text(f"file,parent\na.png,{parent}\nb.tif,{parent}\n")
    add(source / "slides", tmp_path / "new", Source("lung", 0.5, "web"), source / "masks", tmp_path / "parents.csv")
    (tmp_path / "folds.csv").write_text(
        "id,fold\n"
        + "".join(f"{slide.id},{number % 2}\n" for number, slide in enumerate(read_train(sample_data / "train.csv")))
    )
    told = hubmap(
        "external", "merge", sample_data, tmp_path / "new", "--out", tmp_path / "all", "--folds", tmp_path / "folds.csv"
    )
    assert "14 slides; next: hubmap train" in told and "data.n_folds=2" in told
    joined = read_train(tmp_path / "all/train.csv")
    assert len(joined) == 14 and all(
        slide.path.is_symlink() and not os.readlink(slide.path).startswith("/") for slide in joined
    )
    originals = {
        slide.id: slide for folder in (sample_data, tmp_path / "new") for slide in read_train(folder / "train.csv")
    }
    assert all(
        slide.rle == originals[slide.id].rle and slide.path.samefile(originals[slide.id].path) for slide in joined
    )
    folds = read_folds(tmp_path / "all/folds.csv", joined)
    children = [row["id"] for row in read_table(tmp_path / "all/train.csv") if row["parent"] == parent]
    assert len(children) == 2 and {folds[slide_id] for slide_id in children} == {folds[parent]} == {0}
    given = {row["id"]: int(row["fold"]) for row in read_table(tmp_path / "folds.csv", ("id", "fold"))}
    assert {slide_id: folds[slide_id] for slide_id in given} == given
    again = snapshot(tmp_path / "all")
    merge([sample_data, tmp_path / "new"], tmp_path / "all", folds_csv=tmp_path / "folds.csv")
    assert snapshot(tmp_path / "all") == again


def test_odd_lungs_are_left_out_or_weighed_down(sample_data: Path, tmp_path: Path) -> None:
    rows = external.read_table(sample_data / "train.csv")
    odd = next(row for row in rows if row["organ"] == "lung")
    (tmp_path / "d/train_images").mkdir(parents=True)
    for row in rows:
        (tmp_path / f"d/train_images/{'127' if row is odd else row['id']}.tiff").symlink_to(
            sample_data / f"train_images/{row['id']}.tiff"
        )
    odd["id"] = "127"
    external.write_table(tmp_path / "d/train.csv", rows, ())
    assert "1 lung slides left out" in hubmap("external", "lung", tmp_path / "d", "--out", tmp_path / "less")
    assert {slide.id for slide in read_train(tmp_path / "less/train.csv")} == {row["id"] for row in rows} - {"127"}
    hubmap("external", "lung", tmp_path / "d", "--out", tmp_path / "down", "--weight", "0.25")
    assert {row["id"]: row["weight"] for row in read_table(tmp_path / "down/train.csv")} == {
        row["id"]: "0.25" if row["id"] == "127" else "1" for row in rows
    }
    assert len(read_train(tmp_path / "down/train.csv")) == len(rows)
    with pytest.raises(TableError, match="did you mean 'type-two'"):
        hubmap("external", "lung", tmp_path / "d", "--out", tmp_path / "x", "--style", "type-tow")


def test_joins_that_would_do_harm_are_refused(sample_data: Path, tmp_path: Path) -> None:
    for tables, out in (
        ([sample_data], sample_data),
        ([sample_data, sample_data], tmp_path / "x"),
        ([], tmp_path / "x"),
    ):
        with pytest.raises(HubmapError, match=r"choose a new one|each named once"):
            merge(tables, out)
    shutil.copytree(sample_data, tmp_path / "copy")
    with pytest.raises(SlideError, match="is a slide file of its own"):
        (tmp_path / "copy/train.csv").unlink()
        merge([sample_data], tmp_path / "copy")
