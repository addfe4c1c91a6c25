"""The hidden test set that a rehearsal makes, and the scores of a submission for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from rle_oracle import coco_mask, rows_of

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import RehearsalError, SlideError
from hubmap_kit.rehearsal.hidden import DISTINCT, FIRST, UNREADABLE, HiddenSet, make_hidden, score_submission
from hubmap_kit.rehearsal.request import LEAST_SLIDES


def test_the_planned_sizes_are_those_of_the_competition() -> None:
    sizes = [(organ, source, height, width) for organ, source, height, width, _ in FIRST]
    assert ("prostate", "Hubmap", 160, 160) in sizes
    assert max(max(height, width) for *_, height, width in sizes) == 4500
    assert min(min(height, width) for *_, height, width in sizes) == 160
    assert any(height != width for *_, height, width in sizes)
    assert any(height % 2 and width % 2 for *_, height, width in sizes)
    assert {organ for organ, *_ in sizes} == set(ORGANS)
    from_hubmap = [source for _, source, *_ in sizes].count("Hubmap")
    assert len(sizes) / 2 < from_hubmap < len(sizes)
    first = FIRST[:LEAST_SLIDES]
    assert {fault for *_, fault in first} == {"", "truncated", "missing", "lzw", "size", "pixel_size"}
    assert {organ for organ, *_, fault in first if fault not in UNREADABLE} == set(ORGANS)


def test_every_fault_is_there_and_is_what_it_says(hidden: HiddenSet) -> None:
    table = {row["id"]: row for row in rows_of(hidden.folder / "test.csv")}
    assert list(table) == [slide.id for slide in hidden.slides]
    assert [row["id"] for row in rows_of(hidden.folder / "sample_submission.csv")] == list(table)
    seen = {}
    for slide in hidden.slides:
        row, path = table[slide.id], hidden.folder / "test_images" / f"{slide.id}.tiff"
        seen[slide.fault] = slide
        if slide.fault in UNREADABLE:
            with pytest.raises(SlideError, match="truncated" if slide.fault == "truncated" else "no such file"):
                slide_files.read(path)
            continue
        pixels = slide_files.read(path)
        assert pixels.shape == (slide.height, slide.width, 3)
        assert (pixels.shape[:2] == (int(row["img_height"]), int(row["img_width"]))) == (slide.fault != "size")
        assert (row["pixel_size"] == "") == (slide.fault == "pixel_size")
        with tifffile.TiffFile(path) as file:
            assert (file.pages[0].compression.name == "LZW") == (slide.fault == "lzw")
        mask = coco_mask(hidden.truth[slide.id], slide.height, slide.width)
        assert mask[0, 0] == 0
        assert 0 < mask.mean() < 0.9
    assert set(seen) == {"", "truncated", "missing", "lzw", "size", "pixel_size"}


def test_masks_lie_on_the_tissue_that_they_name(hidden: HiddenSet) -> None:
    """White pulp is darker than the pulp around it, a lumen brighter: a mask that is shifted or turned would not tell
    them apart.
    """
    for slide in hidden.slides:
        if slide.organ == "spleen":
            pixels = slide_files.read(hidden.folder / "test_images" / f"{slide.id}.tiff").mean(axis=2)
            mask = coco_mask(hidden.truth[slide.id], slide.height, slide.width).astype(bool)
            assert pixels[mask].mean() < pixels[~mask].mean() - 10


def test_the_masks_are_not_where_the_kernel_looks(hidden: HiddenSet) -> None:
    inside = sorted(path.name for path in hidden.folder.iterdir())
    assert inside == ["sample_submission.csv", "test.csv", "test_images"]
    assert "rle" not in (hidden.folder / "test.csv").read_text().splitlines()[0].split(",")
    truth = rows_of(hidden.folder.with_name("truth.csv"))
    assert {row["id"]: row["rle"] for row in truth} == hidden.truth
    assert [
        (row["organ"], row["data_source"], int(row["height"]), int(row["width"]), row["fault"]) for row in truth
    ] == [(slide.organ, slide.source, slide.height, slide.width, slide.fault) for slide in hidden.slides]


def test_the_same_seed_gives_the_same_set_and_another_one_does_not(tmp_path: Path) -> None:
    one, two, three = (
        make_hidden(tmp_path / str(n), slides=7, largest=170, seed=seed) for n, seed in enumerate((1, 1, 2))
    )
    assert (one.slides, one.truth) == (two.slides, two.truth)
    assert [path.read_bytes() for path in sorted(one.folder.rglob("*.*"))] == [
        path.read_bytes() for path in sorted(two.folder.rglob("*.*"))
    ]
    assert not {slide.id for slide in one.slides} & {slide.id for slide in three.slides}


def test_a_large_set_shares_its_pictures(tmp_path: Path) -> None:
    made = make_hidden(tmp_path, slides=80, largest=170)
    files = {path.stem: path.stat().st_ino for path in (made.folder / "test_images").iterdir()}
    assert len(made.slides) == len({slide.id for slide in made.slides}) == 80
    assert len(files) == 79
    assert len(set(files.values())) == DISTINCT - 1
    for slide in made.slides[DISTINCT:]:
        assert slide_files.size(made.folder / "test_images" / f"{slide.id}.tiff") == (slide.height, slide.width)
        assert slide.fault == ""
        coco_mask(made.truth[slide.id], slide.height, slide.width)


def test_too_few_slides_for_every_fault_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RehearsalError, match="--slides is 6, but a hidden test set with every fault needs 7"):
        make_hidden(tmp_path, slides=6)


def test_real_slides_keep_their_tissue_and_scale(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "hubmap-mini"
    made = make_hidden(tmp_path, slides=7, largest=450, data=data)
    train = {(row["organ"], row["data_source"]): [] for row in rows_of(data / "train.csv")}
    for row in rows_of(data / "train.csv"):
        train[(row["organ"], row["data_source"])].append(row)
    for slide in made.slides:
        fits = [
            # Scaled until it covers the wanted size: the one zoom of both sides gives the pixel size.
            row
            for row in train[(slide.organ, slide.source)]
            if abs(
                float(row["pixel_size"])
                / max(slide.height / int(row["img_height"]), slide.width / int(row["img_width"]))
                - slide.um_per_px
            )
            < 1e-3
        ]
        assert fits, slide
        coco_mask(made.truth[slide.id], slide.height, slide.width)


def test_without_faults_everything_can_be_read_and_the_truth_never_was_a_run_length_string(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that the kit makes in writing both truth and submission would cancel itself out; here it must cost
    Dice.
    """
    encode = rle.encode

    def a_row_off(mask: np.ndarray, origin: int = 0) -> str:
        moved = np.roll(mask, 1, axis=0)
        moved[0, 0] = 0
        return encode(moved, origin)

    monkeypatch.setattr(rle, "encode", a_row_off)
    made = make_hidden(tmp_path, slides=7, faults=False, largest=200)
    for slide in made.slides:
        assert slide.fault == ""
        assert slide_files.size(made.folder / "test_images" / f"{slide.id}.tiff") == (slide.height, slide.width)
    path = tmp_path / "submission.csv"
    path.write_text("id,rle\n" + "".join(f"{key},{text}\n" for key, text in made.truth.items()))
    assert all(0.5 < each.dice < 1 for each in score_submission(path, made))
