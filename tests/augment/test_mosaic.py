"""Mosaics: every pixel comes from where the table says, masks with it, online and as files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from hubmap_kit.augment import mosaic as mosaics
from hubmap_kit.augment.mosaic import mosaic, mosaic_batch, mosaic_tiles
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import ScaleConfig, TilesConfig
from hubmap_kit.errors import HubmapError, StoreError
from hubmap_kit.tiles.store import TileStore, open_or_build


@pytest.fixture(scope="module")
def store(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    return open_or_build(
        tmp_path_factory.mktemp("stores"), read_train(sample_data / "train.csv"), ScaleConfig(), TilesConfig(size=64)
    )


def numbered(size: int, count: int = 4) -> list[mosaics.Tile]:
    """Tiles whose pixels hold their own tile, row and column, and whose masks are a function of those."""
    rows, cols = np.mgrid[:size, :size].astype(np.uint8)
    tiles = []
    for number in range(count):
        image = np.stack([np.full_like(rows, number), rows, cols], axis=2)
        tiles.append((image, mask_of(image)))
    return tiles


def mask_of(image: np.ndarray) -> np.ndarray:
    number, rows, cols = (image[..., channel].astype(int) for channel in range(3))
    return ((rows // 7 + cols // 5 + number) % 3 == 0).astype(np.uint8)


def test_quarters_meet_at_random_centres_and_are_unbroken_parts_of_their_tiles() -> None:
    centres = []
    for seed in range(60):
        image, mask = mosaic(numbered(64), np.random.default_rng(seed))
        np.testing.assert_array_equal(mask, mask_of(image))
        row, col = int((image[:, 0, 0] == 0).sum()), int((image[0, :, 0] == 0).sum())
        for number, (down, across) in enumerate(
            [
                (slice(0, row), slice(0, col)),
                (slice(0, row), slice(col, 64)),
                (slice(row, 64), slice(0, col)),
                (slice(row, 64), slice(col, 64)),
            ]
        ):
            part = image[down, across].astype(int)
            assert (part[..., 0] == number).all()
            assert (np.diff(part[..., 1], axis=0) == 1).all() and (np.diff(part[..., 2], axis=1) == 1).all()
        centres.append((row, col))
    spread = np.array(centres)
    assert len(set(centres)) > 50 and (spread >= 13).all() and (spread <= 51).all() and spread.std(axis=0).min() > 7


def test_a_mosaic_needs_four_equal_tiles() -> None:
    with pytest.raises(ValueError, match="four tiles of one size, got 3"):
        mosaic(numbered(32, 3), np.random.default_rng(0))
    with pytest.raises(ValueError, match="four tiles of one size"):
        mosaic([*numbered(32, 3), numbered(64)[0]], np.random.default_rng(0))


def test_in_a_batch_quarters_come_from_the_batch_and_from_one_organ_if_asked() -> None:
    tiles = numbered(48, 8)
    images, masks = (np.stack([tile[part] for tile in tiles]) for part in (0, 1))
    organs = ["lung", "kidney"] * 4
    kept = images.copy()
    mixed, mixed_masks = mosaic_batch(images, masks, np.random.default_rng(0), 1.0, organs)
    np.testing.assert_array_equal(images, kept)
    np.testing.assert_array_equal(mixed_masks, np.stack([mask_of(image) for image in mixed]))
    sources = [np.unique(image[..., 0]) for image in mixed]
    assert all((part % 2 == number % 2).all() and number in part for number, part in enumerate(sources))
    anywhere = mosaic_batch(images, masks, np.random.default_rng(0), 1.0)[0]
    assert any(len(np.unique(image[..., 0] % 2)) == 2 for image in anywhere)
    again = mosaic_batch(images, masks, np.random.default_rng(0), 1.0, organs)[0]
    np.testing.assert_array_equal(mixed, again)
    np.testing.assert_array_equal(mosaic_batch(images, masks, np.random.default_rng(0), 0.0)[0], images)
    changed = [
        (mosaic_batch(images, masks, np.random.default_rng(seed), 0.4)[0] != images).any(axis=(1, 2, 3)).mean()
        for seed in range(40)
    ]
    assert np.mean(changed) == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("same_organ", [True, False])
@pytest.mark.parametrize("size", [96, 128])
def test_files_hold_the_pixels_that_the_table_names(
    store: TileStore, tmp_path: Path, size: int, same_organ: bool
) -> None:
    table = pd.read_csv(
        mosaic_tiles(store, 10, size, 5, same_organ, tmp_path), dtype={f"id{part}": str for part in range(1, 5)}
    )
    ids = store.slides["id"].tolist()
    assert len(table) == 10
    for row in table.to_dict("records"):
        image = cv2.imread(str(tmp_path / "images" / row["file"]))[..., ::-1]
        mask = cv2.imread(str(tmp_path / "masks" / row["file"]), cv2.IMREAD_UNCHANGED)
        assert image.shape == (size, size, 3) and mask.shape == (size, size) and set(np.unique(mask)) <= {0, 255}
        assert row["foreground"] == pytest.approx((mask > 0).mean(), abs=1e-5)
        spans = [slice(0, row["row"]), slice(row["row"], size)], [slice(0, row["col"]), slice(row["col"], size)]
        for part in range(4):
            down, across = spans[0][part // 2], spans[1][part % 2]
            slide, y, x = ids.index(row[f"id{part + 1}"]), row[f"y{part + 1}"], row[f"x{part + 1}"]
            from_slide = slice(y, y + down.stop - down.start), slice(x, x + across.stop - across.start)
            np.testing.assert_array_equal(image[down, across], store.image(slide)[from_slide])
            np.testing.assert_array_equal(mask[down, across] > 0, store.mask(slide)[from_slide] > 0)
            assert store.slides["organ"][slide] == row[f"organ{part + 1}"]
    organs = table[[f"organ{part}" for part in range(1, 5)]].nunique(axis=1)
    assert (organs == 1).all() if same_organ else (organs > 1).any()
    assert table["organ1"].nunique() == 5 or not same_organ  # organs take turns
    assert (table["foreground"] > 0).mean() > 0.5


def test_files_depend_on_the_seed_and_their_number_alone(store: TileStore, tmp_path: Path) -> None:
    for name, count, seed in (("a", 4, 1), ("b", 7, 1), ("c", 4, 2)):
        mosaic_tiles(store, count, 64, seed, False, tmp_path / name)
    files = {name: [path.read_bytes() for path in sorted((tmp_path / name / "images").iterdir())] for name in "abc"}
    assert files["a"] == files["b"][:4] and len(set(files["b"])) == 7
    assert not set(files["a"]) & set(files["c"])


def test_slides_smaller_than_a_mosaic_are_mirrored(store: TileStore, tmp_path: Path) -> None:
    mosaic_tiles(store, 2, 320, 0, False, tmp_path)
    image = cv2.imread(str(tmp_path / "images" / "mosaic-00001.png"))
    assert image.shape == (320, 320, 3) and image.std() > 5


def test_what_makes_no_mosaic_is_one_sentence(store: TileStore, tmp_path: Path) -> None:
    for n, size, seed, word in ((0, 64, 0, "n=0"), (1, 8, 0, "size=8"), (1, 64, -1, "seed=-1")):
        with pytest.raises(HubmapError, match=f"{word}, but"):
            mosaic_tiles(store, n, size, seed, False, tmp_path)
    empty = TileStore(store.folder, store.grid)
    empty.tiles = store.tiles.iloc[:0]
    with pytest.raises(StoreError, match="holds no tiles"):
        mosaic_tiles(empty, 1, 64, 0, False, tmp_path)
