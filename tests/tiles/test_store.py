"""The store: crops anywhere equal numpy's mirror of the whole slide; workers reopen it; a damaged store is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hubmap_kit.config import ScaleConfig, TilesConfig
from hubmap_kit.errors import StoreError
from hubmap_kit.tiles.store import TileStore, is_finished, mirror, open_or_build

SIZES = ((90, 131), (40, 57), (200, 64))  # widths that do and do not fill whole bytes of mask bits

GRID = TilesConfig(size=64)


@pytest.fixture
def made(tmp_path: Path, make_slide: Callable) -> tuple[TileStore, list[np.ndarray], list[np.ndarray]]:
    """An unscaled store, and the pixels and masks that went into it."""
    slides, pixels, masks = zip(*(make_slide(f"s{number}", *size) for number, size in enumerate(SIZES)), strict=True)
    store = open_or_build(tmp_path / "stores", slides, ScaleConfig(), GRID)
    return store, list(pixels), list(masks)


def mirrored_crop(whole: np.ndarray, row: int, col: int, size: int) -> np.ndarray:
    """The crop of the whole slide's mirror image, computed by numpy."""
    far = 2 * size + max(whole.shape)
    padded = np.pad(whole, [(far, far), (far, far), *[(0, 0)] * (whole.ndim - 2)], mode="symmetric")
    return padded[row + far : row + far + size, col + far : col + far + size]


def test_slides_come_back_as_they_went_in(made: tuple) -> None:
    store, pixels, masks = made
    assert len(store) == len(SIZES) and store.slides["id"].tolist() == ["s0", "s1", "s2"]
    for number in range(len(store)):
        np.testing.assert_array_equal(store.image(number), pixels[number])
        np.testing.assert_array_equal(store.mask(number), masks[number])
        assert store.mask(number).dtype == np.uint8


def test_crops_inside_and_over_every_edge(made: tuple) -> None:
    store, pixels, masks = made
    random = np.random.default_rng(0)
    for _ in range(300):
        slide = int(random.integers(len(SIZES)))
        size = int(random.integers(1, min(SIZES[slide]) + 1))
        # At least half of the crop's side stays inside, so the mirrored pixels are pixels of the crop itself.
        row, col = (int(random.integers(-(size // 2), side - size + size // 2 + 1)) for side in SIZES[slide])
        image, mask = store.crop(slide, row, col, size)
        place = f"slide {slide} at {row}, {col}, {size} px"
        np.testing.assert_array_equal(image, mirrored_crop(pixels[slide], row, col, size), err_msg=place)
        np.testing.assert_array_equal(mask, mirrored_crop(masks[slide], row, col, size))
        assert mask.dtype == image.dtype == np.uint8


def test_a_crop_that_lies_mostly_outside_mirrors_the_slide_and_not_only_its_own_strip(made: tuple) -> None:
    """The last tile of a grid may hold a few rows of the slide only; repeating those as stripes would be no tissue at
    all.
    """
    store, pixels, masks = made
    rows, cols = SIZES[0]
    for row, col in [(rows - 6, 20), (20, cols - 6), (-58, 10), (10, -58), (rows - 6, cols - 6), (-50, -50)]:
        image, mask = store.crop(0, row, col, 64)
        np.testing.assert_array_equal(image, mirrored_crop(pixels[0], row, col, 64), err_msg=f"crop at {row}, {col}")
        np.testing.assert_array_equal(mask, mirrored_crop(masks[0], row, col, 64))


@pytest.mark.parametrize(("row", "col", "size"), [(0, 0, 64), (0, 0, 300), (-13, -20, 128), (-100, -100, 257)])
def test_crops_larger_than_the_slide(made: tuple, row: int, col: int, size: int) -> None:
    store, pixels, masks = made
    image, mask = store.crop(1, row, col, size)
    np.testing.assert_array_equal(image, mirrored_crop(pixels[1], row, col, size))
    np.testing.assert_array_equal(mask, mirrored_crop(masks[1], row, col, size))


def test_crops_are_own_copies(made: tuple) -> None:
    store, pixels, masks = made
    image, mask = store.crop(0, 8, 8, 32)
    assert image.flags.writeable and mask.flags.writeable and image.flags.c_contiguous
    image[:], mask[:] = 0, 7
    np.testing.assert_array_equal(store.image(0), pixels[0])
    np.testing.assert_array_equal(store.mask(0), masks[0])
    with pytest.raises(ValueError, match="read-only"):
        store.image(0)[0, 0] = 0


@pytest.mark.parametrize(("row", "col"), [(90, 0), (0, 131), (-64, 0), (0, -64), (1000, 1000)])
def test_crops_without_any_tissue_are_refused(made: tuple, row: int, col: int) -> None:
    with pytest.raises(IndexError, match="outside slide s0"):
        made[0].crop(0, row, col, 64)


def test_the_tile_table_agrees_with_the_masks(made: tuple) -> None:
    store, _, masks = made
    assert set(store.tiles.columns) >= {"slide", "id", "y", "x", "row", "col", "size", "foreground"}
    assert len(store.tiles) == 2 * 3 + 1 * 1 + 4 * 1
    for tile in store.tiles.itertuples():
        inside = masks[tile.slide][tile.row : tile.row + 64, tile.col : tile.col + 64]
        assert tile.foreground == pytest.approx(inside.sum() / 64**2) and tile.size == 64
        assert (tile.y, tile.x) == (tile.row, tile.col) and tile.id == f"s{tile.slide}"


def test_pickling_reopens_the_files_and_copies_nothing(made: tuple) -> None:
    store, pixels, _ = made
    text = pickle.dumps(store)
    assert len(text) < 1000
    twin = pickle.loads(text)
    np.testing.assert_array_equal(twin.image(2), pixels[2])
    assert isinstance(twin.image(2).base, np.memmap) or isinstance(twin.image(2), np.memmap)


@pytest.mark.parametrize("name", ["store.json", "images.u8", "masks.bits", "slides.parquet"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_store_is_refused(made: tuple, name: str, damage: str) -> None:
    folder = made[0].folder
    path, content = folder / name, (folder / name).read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    with pytest.raises(StoreError, match=str(folder)):
        TileStore(folder, GRID)


def test_a_tile_table_is_made_again_when_it_is_gone_and_refused_when_it_is_damaged(made: tuple) -> None:
    folder, before = made[0].folder, made[0].tiles
    path = folder / "tiles-64-0.parquet"
    path.unlink()
    pd.testing.assert_frame_equal(TileStore(folder, GRID).tiles, before)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StoreError, match=str(path)):
        TileStore(folder, GRID)


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="store.json"):
            TileStore(folder, GRID)
        assert not is_finished(folder, "0")


@pytest.mark.parametrize("meta", ["[]", "null", "3", '{"format": 99}', "{}"])
def test_a_store_of_another_format_is_refused(made: tuple, meta: str) -> None:
    folder = made[0].folder
    (folder / "store.json").write_text(meta)
    with pytest.raises(StoreError):
        TileStore(folder, GRID)
    assert not is_finished(folder, folder.name)


def test_a_store_for_other_data_does_not_count_as_finished(made: tuple) -> None:
    folder = made[0].folder
    mark = json.loads((folder / "store.json").read_text())["fingerprint"]
    assert is_finished(folder, mark) and not is_finished(folder, "0" * 16)


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 2, 3, 4), (40, 0, 0, 90), (7, 7, 7, 7)])
def test_mirror_is_numpys(pads: tuple[int, int, int, int]) -> None:
    random = np.random.default_rng(3)
    for shape in ((5, 9), (1, 1), (12, 4, 3)):
        pixels = random.integers(0, 256, shape, np.uint8)
        expected = np.pad(pixels, [pads[:2], pads[2:], *[(0, 0)] * (len(shape) - 2)], mode="symmetric")
        np.testing.assert_array_equal(mirror(pixels, pads), expected)
