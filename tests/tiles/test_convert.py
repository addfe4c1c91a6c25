"""Slides -> store: what the bytes depend on, reuse, unfinished builds, scales, and real tissue."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from pycocotools import mask as coco

from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import ScaleConfig, TilesConfig
from hubmap_kit.errors import SlideError
from hubmap_kit.tiles.store import TileStore, decode_for, fingerprint, open_or_build

SMALL = TilesConfig(size=64)


def block_mean(values: np.ndarray, factor: int) -> np.ndarray:
    """Mean of blocks; rows and columns that fill no block are left out."""
    height, width = (side // factor * factor for side in values.shape[:2])
    values = values[:height, :width].astype(float)
    return values.reshape(height // factor, factor, width // factor, factor, *values.shape[2:]).mean((1, 3))


def oracle_mask(rle: str, height: int, width: int) -> np.ndarray:
    """The mask by pycocotools: its counts are run lengths in column-major order, starting with a run of zeros."""
    numbers = np.array(rle.split(), np.int64)
    ends = np.stack([numbers[::2], numbers[::2] + numbers[1::2]], axis=1).ravel()
    counts = np.diff([0, *ends.tolist(), height * width]).tolist()
    return coco.decode(coco.frPyObjects({"size": [height, width], "counts": counts}, height, width))


@pytest.mark.parametrize("factor", [2, 4])
def test_reduced_slides_and_masks_are_block_means(tmp_path: Path, make_slide: Callable, factor: int) -> None:
    slide, pixels, mask = make_slide("a", 160, 240)
    store = open_or_build(tmp_path, [slide], ScaleConfig(reduce=factor), SMALL)
    assert store.image(0).shape == (160 // factor, 240 // factor, 3)
    assert np.abs(store.image(0) - block_mean(pixels, factor)).max() <= 0.5 + 1e-6
    np.testing.assert_array_equal(store.mask(0), block_mean(mask, factor) >= 0.5)
    row = store.slides.iloc[0]
    assert (row["height"], row["width"], row["rows"], row["cols"]) == (160, 240, 160 // factor, 240 // factor)
    # Table corners are given in both scales.
    assert (store.tiles["y"] == store.tiles["row"] * factor).all() and (
        store.tiles["x"] == store.tiles["col"] * factor
    ).all()


def test_the_same_data_and_settings_reuse_the_folder(tmp_path: Path, make_slide: Callable) -> None:
    slides = [make_slide("a", 80, 80)[0], make_slide("b", 70, 90)[0]]
    first = open_or_build(tmp_path / "stores", slides, ScaleConfig(), SMALL)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in first.folder.iterdir()}
    second = open_or_build(tmp_path / "stores", slides, ScaleConfig(), SMALL)
    assert second.folder == first.folder
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in second.folder.iterdir()} == before
    assert len(list((tmp_path / "stores").iterdir())) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rle", "100 5"),
        ("rle", ""),
        ("um_per_px", 0.5),
        ("organ", "lung"),
        ("source", "Hubmap"),
        ("id", "c"),
        ("height", 160),
    ],
)
def test_whatever_the_bytes_depend_on_makes_another_store(make_slide: Callable, field: str, value: object) -> None:
    slide = make_slide("a", 80, 80)[0]
    changed = dataclasses.replace(slide, **{field: value})
    assert fingerprint([changed], ScaleConfig()) != fingerprint([slide], ScaleConfig())


def test_two_tables_that_give_one_file_different_masks_do_not_share_a_store(
    tmp_path: Path, make_slide: Callable
) -> None:
    """A file smaller than its table row takes a resampled mask, so the row's size decides about the bytes."""
    slide, _, mask = make_slide("a", 80, 80)
    right = open_or_build(tmp_path, [slide], ScaleConfig(), SMALL)
    np.testing.assert_array_equal(right.mask(0), mask)
    wrong = dataclasses.replace(slide, height=160, width=160)
    other = open_or_build(tmp_path, [wrong], ScaleConfig(), SMALL)
    np.testing.assert_array_equal(other.mask(0), decode_for(wrong, 80, 80))
    assert (other.mask(0) != mask).any()


def test_settings_slides_and_their_order_make_another_store(make_slide: Callable) -> None:
    a, b = make_slide("a", 80, 80)[0], make_slide("b", 80, 80)[0]
    scales = [
        ScaleConfig(),
        ScaleConfig(reduce=2),
        ScaleConfig(policy="physical"),
        ScaleConfig(policy="physical", um_per_px=1.0),
    ]
    marks = [fingerprint([a, b], scale) for scale in scales]
    marks += [fingerprint(slides, ScaleConfig()) for slides in ([a], [b], [b, a])]
    assert len(set(marks)) == len(marks)


def test_settings_that_do_not_apply_change_nothing(make_slide: Callable) -> None:
    slide = make_slide("a", 80, 80)[0]
    assert fingerprint([slide], ScaleConfig(um_per_px=3.0)) == fingerprint([slide], ScaleConfig())
    assert fingerprint([slide], ScaleConfig(policy="physical", reduce=4)) == fingerprint(
        [slide], ScaleConfig(policy="physical")
    )


def test_grids_share_the_pixels_of_one_store(tmp_path: Path, make_slide: Callable) -> None:
    slide, _, mask = make_slide("a", 150, 200)
    grids = [TilesConfig(size=64), TilesConfig(size=96), TilesConfig(size=64, overlap=0.5)]
    stores = [open_or_build(tmp_path, [slide], ScaleConfig(), tiles) for tiles in grids]
    assert len({store.folder for store in stores}) == 1
    assert [len(store.tiles) for store in stores] == [3 * 4, 2 * 3, 4 * 6]
    for store, tiles in zip(stores, grids, strict=True):
        for tile in store.tiles.itertuples():
            inside = mask[tile.row : tile.row + tiles.size, tile.col : tile.col + tiles.size].sum()
            assert tile.foreground == pytest.approx(inside / tiles.size**2)


def test_a_slide_file_of_another_size_makes_another_store(make_slide: Callable) -> None:
    slide = make_slide("a", 80, 80)[0]
    before = fingerprint([slide], ScaleConfig())
    tifffile.imwrite(slide.path, np.zeros((90, 90, 3), np.uint8), photometric="rgb")
    assert fingerprint([slide], ScaleConfig()) != before


def test_a_build_that_fails_half_way_leaves_nothing_behind(tmp_path: Path, make_slide: Callable) -> None:
    good, bad = make_slide("a", 80, 80)[0], make_slide("b", 80, 80)[0]
    content = bad.path.read_bytes()
    bad.path.write_bytes(b"not a slide" + content[: len(content) // 2])
    stores = tmp_path / "stores"
    with pytest.raises(SlideError, match=r"b\.tiff"):
        open_or_build(stores, [good, bad], ScaleConfig(), SMALL)
    assert list(stores.iterdir()) == []
    bad.path.write_bytes(content)
    assert len(open_or_build(stores, [good, bad], ScaleConfig(), SMALL)) == 2


KILLED = """
import os, sys
from pathlib import Path
from hubmap_kit.competition import slides
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import ScaleConfig, TilesConfig
from hubmap_kit.tiles.store import open_or_build
rows, true_read = read_train(sys.argv[1]), slides.read
def read(path):
    if path == rows[-1].path:
        os._exit(9)  # as a kernel that is stopped: no clean-up runs
    return true_read(path)
slides.read = read
open_or_build(Path(sys.argv[2]), rows, ScaleConfig(), TilesConfig(size=64))
"""


def test_a_killed_build_is_no_store_and_the_next_build_succeeds(tmp_path: Path, make_slide: Callable) -> None:
    slides = [make_slide(name, 80, 80)[0] for name in "abc"]
    header = "id,organ,data_source,img_height,img_width,pixel_size,tissue_thickness,rle\n"
    rows = [
        f"{s.id},{s.organ},{s.source},{s.height},{s.width},{s.um_per_px},{s.thickness_um},{s.rle}\n" for s in slides
    ]
    (tmp_path / "train.csv").write_text(header + "".join(rows))
    (tmp_path / "train_images").symlink_to(slides[0].path.parent)
    stores = tmp_path / "stores"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "train.csv"), str(stores)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    table = read_train(tmp_path / "train.csv")
    mark = fingerprint(table, ScaleConfig())
    assert not (stores / mark).exists()
    assert len(open_or_build(stores, table, ScaleConfig(), SMALL)) == 3


def test_a_table_that_is_wrong_about_the_width_only(make_slide: Callable) -> None:
    """Runs go down columns, so a wrong width in the table moves nothing."""
    slide, _, mask = make_slide("a", 80, 90)
    np.testing.assert_array_equal(decode_for(dataclasses.replace(slide, width=95), 80, 90), mask)


def test_a_file_that_is_a_resampled_copy_takes_the_mask_along(make_slide: Callable) -> None:
    slide, _, mask = make_slide("a", 80, 120)
    np.testing.assert_array_equal(decode_for(slide, 40, 60), block_mean(mask, 2) >= 0.5)


def test_a_slide_without_foreground(tmp_path: Path, make_slide: Callable) -> None:
    slide = dataclasses.replace(make_slide("a", 80, 90)[0], rle="")
    store = open_or_build(tmp_path, [slide], ScaleConfig(), SMALL)
    assert not store.mask(0).any() and (store.tiles["foreground"] == 0).all()


@pytest.mark.parametrize(("name", "wanted"), [("hubmap-mini", ("127", "435")), ("glas", ("1", "10"))])
def test_real_tissue(shared_data: Path, tmp_path: Path, name: str, wanted: tuple[str, ...]) -> None:
    """Two slides of each folder at half size: tifffile's pixels and pycocotools' masks, in blocks of 2 x 2."""
    slides = [slide for slide in read_train(shared_data / name / "train.csv") if slide.id in wanted]
    assert len(slides) == 2
    store = open_or_build(tmp_path, slides, ScaleConfig(reduce=2), SMALL)
    for number, slide in enumerate(slides):
        pixels, mask = tifffile.imread(slide.path), oracle_mask(slide.rle or "", slide.height, slide.width)
        assert store.image(number).shape[:2] == tuple(round(side / 2) for side in pixels.shape[:2])
        if slide.height % 2 == 0 and slide.width % 2 == 0:
            assert np.abs(store.image(number) - block_mean(pixels, 2)).max() <= 0.5 + 1e-6
            np.testing.assert_array_equal(store.mask(number), block_mean(mask, 2) >= 0.5)
        assert store.mask(number).mean() == pytest.approx(mask.mean(), rel=0.05) and mask.any()
    assert isinstance(store, TileStore) and store.slides["um_per_px"].tolist() == [slide.um_per_px for slide in slides]
