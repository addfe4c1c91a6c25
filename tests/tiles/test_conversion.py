"""Conversions: what is written, against plain slicing and other readers; and that it never depends on how it came
about.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.folds import assign_folds
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import ScaleConfig, TilesConfig
from hubmap_kit.errors import HubmapError, RleError, SlideError, StoreError
from hubmap_kit.jobs import tiles
from hubmap_kit.kernel.mounts import inputs
from hubmap_kit.publish.push import check_staged
from hubmap_kit.tiles.conversion import convert
from hubmap_kit.tiles.convert_config import ConvertConfig
from hubmap_kit.tiles.finishing import open_conversion
from hubmap_kit.tiles.store import TileStore, fingerprint, open_or_build


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "tiles.csv", dtype={"id": str})


@pytest.fixture(scope="module")
def mini(shared_data: Path) -> list[Slide]:
    """A few real slides of every organ, small ones."""
    rows = read_train(shared_data / "hubmap-mini/train.csv")
    return [
        next(row for row in rows if row.organ == organ and row.height < 400)
        for organ in ("kidney", "lung", "spleen", "prostate", "largeintestine")
    ]


@pytest.mark.parametrize("reduce", [1, 2])
def test_a_plain_grid_is_the_store_that_training_makes(tmp_path: Path, mini: list[Slide], reduce: int) -> None:
    built = open_or_build(tmp_path / "trained", mini, ScaleConfig(reduce=reduce), TilesConfig(size=128))
    made = convert(mini, tmp_path / "converted", ConvertConfig(size=128, reduce=reduce))
    assert made.folder == tmp_path / "converted" / built.folder.name and made.counts.tiles == len(built.tiles)
    found = hashes(made.folder)
    assert found.pop("manifest.json") and found == hashes(built.folder)


def test_a_store_from_training_gets_further_tiles_and_keeps_its_pixels(tmp_path: Path, mini: list[Slide]) -> None:
    built = open_or_build(tmp_path, mini, ScaleConfig(), TilesConfig(size=128))
    before, inode = hashes(built.folder), (built.folder / "images.u8").stat().st_ino
    config = ConvertConfig(size=96, edge="shift", min_tissue=0.5)
    made = convert(mini, tmp_path, config)
    assert made.folder == built.folder and (made.folder / "images.u8").stat().st_ino == inode
    assert before.items() <= hashes(made.folder).items()
    fresh = convert(mini, tmp_path / "fresh", config)
    assert hashes(fresh.folder)[made.table] == hashes(made.folder)[made.table]
    opened = open_conversion(made.folder, config)
    assert (
        len(opened.tiles) == made.counts.tiles > 0 and (opened.tiles["tissue"] >= 0.5).all() and made.counts.dropped > 0
    )
    # What training draws from is not touched by a choice of tiles.
    assert "tissue" not in open_or_build(tmp_path, mini, ScaleConfig(), TilesConfig(size=96)).tiles


@pytest.mark.parametrize("kind", ["resize", "crop", "crop+grid", "pad"])
def test_other_stores_are_stores_of_their_own(tmp_path: Path, mini: list[Slide], kind: str) -> None:
    config = ConvertConfig(kind=kind, size=128, canvas=256)
    made = convert(mini, tmp_path / "store", config)
    assert made.mark != fingerprint(mini, ScaleConfig())
    images = convert(mini, tmp_path / "png", config.model_copy(update={"format": "png"}))
    opened, rows = tiles_of(made.folder, config), table(images.folder)
    for row in rows.itertuples():
        number = [slide.id for slide in mini].index(row.id)
        part = slice(row.row, row.row + row.height), slice(row.col, row.col + row.width)
        np.testing.assert_array_equal(np.asarray(Image.open(images.folder / row.image)), opened.image(number)[part])
        np.testing.assert_array_equal(np.asarray(Image.open(images.folder / row.mask)), opened.mask(number)[part])
    assert opened.label(1).max() == 5 and set(np.unique(opened.label(0))) == {0, 1}  # lung, kidney


def tiles_of(folder: Path, config: ConvertConfig) -> TileStore:
    return open_conversion(folder, config) if config.tiled else TileStore(folder, TilesConfig(size=64))


def test_png_tiles_are_slices_of_the_slide(tmp_path: Path, make_slide: Callable) -> None:
    slide, pixels, mask = make_slide("a", 150, 230)
    made = convert([slide], tmp_path / "out", ConvertConfig(size=64, overlap=0.5, edge="shift", format="png"))
    rows = table(made.folder)
    assert sorted(set(rows["x"])) == [0, 32, 64, 96, 128, 160, 166] and len(rows) == made.counts.tiles == 4 * 7
    for row in rows.itertuples():
        part = slice(row.y, row.y + 64), slice(row.x, row.x + 64)
        np.testing.assert_array_equal(np.asarray(Image.open(made.folder / row.image)), pixels[part])
        np.testing.assert_array_equal(np.asarray(Image.open(made.folder / row.mask)), mask[part])
        assert row.foreground == pytest.approx(mask[part].mean()) and row.um_per_px == 0.4


def test_labels_by_organ_and_jpeg(tmp_path: Path, mini: list[Slide]) -> None:
    made = convert(
        mini, tmp_path / "out", ConvertConfig(kind="resize", size=200, labels="organ", format="jpeg", pad="white")
    )
    plain = convert(mini, tmp_path / "plain", ConvertConfig(kind="resize", size=200, format="png", pad="white"))
    for row, exact in zip(table(made.folder).itertuples(), table(plain.folder).itertuples(), strict=True):
        index = ("kidney", "prostate", "largeintestine", "spleen", "lung").index(row.organ) + 1
        label, binary = (
            np.asarray(Image.open(made.folder / row.mask)),
            np.asarray(Image.open(plain.folder / exact.mask)),
        )
        np.testing.assert_array_equal(label, binary * index)
        image = Image.open(made.folder / row.image)
        assert image.format == "JPEG" and set(np.unique(binary)) == {0, 1}
        assert np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(plain.folder / exact.image))).mean() < 4
    assert json.loads((made.folder / "manifest.json").read_text())["tables"]["tiles.csv"]["classes"][5] == "lung"


def test_the_layout_of_mmsegmentation(tmp_path: Path, shared_data: Path) -> None:
    slides = read_train(shared_data / "glas/train.csv")[:12]
    made = convert(slides, tmp_path / "out", ConvertConfig(kind="resize", size=64, format="mmseg", val_fold=2))
    folds = assign_folds(slides, 5)
    for part, wanted in (
        ("val", {slide.id for slide in slides if folds[slide.id] == 2}),
        ("train", {s.id for s in slides if folds[s.id] != 2}),
    ):
        assert wanted and {path.stem for path in (made.folder / "img_dir" / part).iterdir()} == wanted
        assert {path.name for path in (made.folder / "ann_dir" / part).iterdir()} == {f"{name}.png" for name in wanted}
    whole = convert(slides, tmp_path / "whole", ConvertConfig(kind="resize", size=64, format="mmseg", val_fold=-1))
    assert len(list((whole.folder / "img_dir/train").iterdir())) == 12 and not (whole.folder / "img_dir/val").exists()


@pytest.mark.parametrize(
    "values", [{"size": 64, "format": "png", "kind": "crop+grid", "canvas": 300}, {"size": 128, "min_tissue": 0.3}]
)
def test_processes_change_nothing_and_the_manifest_is_true(tmp_path: Path, mini: list[Slide], values: dict) -> None:
    config = ConvertConfig(**values)
    one, two = convert(mini, tmp_path / "one", config, 1), convert(mini, tmp_path / "two", config, 2)
    found = hashes(one.folder)
    assert found == hashes(two.folder) and one.counts == two.counts
    manifest = json.loads((one.folder / "manifest.json").read_text())
    del found["manifest.json"]
    assert {name: facts["sha256"] for name, facts in manifest["files"].items()} == found
    assert all((one.folder / name).stat().st_size == facts["bytes"] for name, facts in manifest["files"].items())
    assert not [path for path in tmp_path.rglob(".*")]


def test_what_is_there_is_not_made_again_and_damage_is_noticed(tmp_path: Path, mini: list[Slide]) -> None:
    config = ConvertConfig(kind="crop", canvas=128, format="png")
    made = convert(mini, tmp_path / "out", config)
    times = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    assert (
        convert(mini, tmp_path / "out", config) == made
        and {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")} == times
    )
    with pytest.raises(StoreError, match="choose another --out"):
        convert(mini, tmp_path / "out", config.model_copy(update={"canvas": 96}))
    next(made.folder.glob("masks/*.png")).write_bytes(b"")
    with pytest.raises(StoreError, match="has 0 bytes"):
        convert(mini, tmp_path / "out", config)


def test_an_error_half_way_keeps_what_is_done(tmp_path: Path, mini: list[Slide]) -> None:
    """The slide that failed is mended, and the others are not read again: their files have other content by then."""
    copies = []
    for slide in mini:
        path = tmp_path / "slides" / slide.path.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(slide.path.read_bytes())
        copies.append(dataclasses.replace(slide, path=path))
    bad = copies[3].path
    content = bad.read_bytes()
    bad.write_bytes(content[:9] + b"\xff" * 60 + content[69:])
    config = ConvertConfig(size=64, format="png")
    with pytest.raises(SlideError, match=bad.name):
        convert(copies, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    bad.write_bytes(content)
    noted = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".out.*.journal/*.json")}
    assert len(noted) == 3
    made = convert(copies, tmp_path / "out", config)
    assert hashes(made.folder) == hashes(convert(mini, tmp_path / "straight", config).folder)


def test_a_dataset_is_ready_to_be_pushed_and_found_by_a_kernel(tmp_path: Path, shared_data: Path) -> None:
    config = ConvertConfig(size=256, reduce=2, format="dataset")
    made = tiles.tiles(shared_data / "hubmap-mini", tmp_path / "input" / "tiles", config)
    assert check_staged(made.folder, "tiles").kind == "tiles"
    slides = read_train(shared_data / "hubmap-mini/train.csv")
    store = inputs(tmp_path / "input", tmp_path / "scratch").store(fingerprint(slides, ScaleConfig(reduce=2)))
    assert store is not None
    (tmp_path / "stores").symlink_to(store.parent)
    opened = open_or_build(tmp_path / "stores", slides, ScaleConfig(reduce=2), TilesConfig(size=256))
    assert len(opened.tiles) == made.counts.tiles and opened.folder.name == made.mark
    assert sorted(path.name for path in (tmp_path / "input").iterdir()) == ["tiles"]
    before = hashes(made.folder)
    assert (
        tiles.tiles(shared_data / "hubmap-mini", made.folder, config).counts == made.counts
        and hashes(made.folder) == before
    )
    with pytest.raises(StoreError, match="not the dataset of these slides"):
        tiles.tiles(shared_data / "hubmap-mini", made.folder, config.model_copy(update={"reduce": 1}))


def glass(slide: Slide, path: Path, height: int = 200, width: int = 200) -> Slide:
    """The slide with nothing but glass on it, and no mask."""
    Image.fromarray(np.full((height, width, 3), 243, np.uint8)).save(path, format="TIFF")
    return dataclasses.replace(slide, id=path.stem, path=path, height=height, width=width, rle="")


def test_no_tissue(tmp_path: Path, mini: list[Slide], record_property: Callable) -> None:
    blank = glass(mini[0], tmp_path / "blank.tiff")
    with pytest.raises(SlideError, match=r"blank\.tiff shows no tissue") as caught:
        convert([blank], tmp_path / "crop", ConvertConfig(kind="crop"))
    record_property("sentence", str(caught.value))
    made = convert([blank, mini[0]], tmp_path / "grid", ConvertConfig(size=64, min_tissue=0.1, format="png"))
    assert set(table(made.folder)["id"]) == {mini[0].id}  # a blank slide among others just gives no tile


def test_a_filter_that_leaves_nothing(tmp_path: Path, mini: list[Slide], record_property: Callable) -> None:
    for values in ({"min_tissue": 1.0, "size": 320}, {"edge": "drop", "size": 768}):
        with pytest.raises(StoreError, match=r"no tile is left of 2 slides") as caught:
            convert(mini[:2], tmp_path / "out", ConvertConfig(format="png", **values))
        record_property("sentence", str(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_a_slide_of_tissue_alone_is_its_own_canvas(tmp_path: Path, shared_data: Path) -> None:
    """The real spleen crop that has no glass: the canvas is the slide, and even the strictest filter keeps tiles."""
    slide = next(row for row in read_train(shared_data / "hubmap-mini/train.csv") if row.id == "8876")
    made = convert([slide], tmp_path / "out", ConvertConfig(kind="crop", canvas=640, format="png"))
    np.testing.assert_array_equal(np.asarray(Image.open(made.folder / "images/8876.png")), slide_files.read(slide.path))
    assert convert([slide], tmp_path / "tiles", ConvertConfig(size=128, format="png", min_tissue=1.0)).counts.tiles > 10


def test_a_mask_outside_the_image(tmp_path: Path, mini: list[Slide], record_property: Callable) -> None:
    """A file that is narrower than its table says: the last columns of the mask have no pixels."""
    blank = glass(mini[0], tmp_path / "narrow.tiff", 200, 150)
    slide = dataclasses.replace(blank, width=200, rle=f"{200 * 180} 50")
    with pytest.raises(RleError, match="slide narrow, 200 x 150 pixels") as caught:
        convert([slide], tmp_path / "out", ConvertConfig(size=64))
    record_property("sentence", str(caught.value))


def test_a_canvas_that_cuts_units_off_says_so(
    tmp_path: Path, shared_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = ConvertConfig(kind="crop", canvas=200, keep_scale=True, format="png")
    made = tiles.tiles(shared_data / "hubmap-mini", tmp_path / "out", config)
    assert 0.05 < made.counts.mask_kept < 0.95 and f"cut off {100 * (1 - made.counts.mask_kept):.2f} %" in caplog.text
    shown = sum(int(np.asarray(Image.open(path)).sum()) for path in (made.folder / "masks").iterdir())
    whole = sum(
        int((slide.rle and sum(map(int, slide.rle.split()[1::2]))) or 0)
        for slide in read_train(shared_data / "hubmap-mini/train.csv")
    )
    assert made.counts.mask_kept == pytest.approx(shown / whole)


def test_places_that_are_taken_or_missing(tmp_path: Path, mini: list[Slide]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="choose another --out"):
        convert(mini, tmp_path / "full", ConvertConfig(format="png"))
    for data in (tmp_path / "full", tmp_path / "nowhere"):
        with pytest.raises(HubmapError, match=str(data)):
            tiles.tiles(data, tmp_path / "out", ConvertConfig())
    with pytest.raises(StoreError, match="is a file"):
        tiles.tiles(tmp_path, tmp_path / "full" / "notes.txt", ConvertConfig())
