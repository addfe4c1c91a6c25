"""Draws: workers differ, epochs differ, one seed repeats, and the number of workers changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hubmap_kit import experiment
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import TableError
from hubmap_kit.tiles.store import TileStore, open_or_build
from hubmap_kit.training.dataset import TileDataset, turn, window
from hubmap_kit.training.loader import build_loader


def _settings(*changes: str) -> Experiment:
    return experiment.load(
        "baseline", ["tiles.size=64", "training.batch_size=4", "training.samples_per_epoch=16", *changes]
    )


@pytest.fixture(scope="module")
def store(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    settings = _settings()
    return open_or_build(
        tmp_path_factory.mktemp("stores"), read_train(sample_data / "train.csv"), settings.scale, settings.tiles
    )


def _epoch(store: TileStore, settings: Experiment, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    loader = build_loader(TileDataset(store, range(len(store)), settings), settings, pin_memory=False)
    loader.draws.epoch = epoch
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([masks for _, masks in batches])


@pytest.mark.parametrize("pipeline", ["light", "classic"])
def test_no_two_tiles_of_two_workers_and_two_epochs_are_equal(store: TileStore, pipeline: str) -> None:
    # One slide and one tile of the grid: only augmentation can make the tiles differ.
    settings = _settings(
        "training.workers=2", "training.sampler=grid", f"augment.pipeline={pipeline}", "training.batch_size=1"
    )
    dataset = TileDataset(store, [0], settings)
    dataset.tiles = np.repeat(dataset.tiles[:1], 8, axis=0)
    dataset.per_epoch = 8
    loader = build_loader(dataset, settings, pin_memory=False)
    tiles = []
    for epoch in range(2):
        loader.draws.epoch = epoch
        tiles += [images[0].numpy().tobytes() for images, _ in loader]
    # `light` has 8 symmetries and, half of the time each, two colour changes, so a rare repeat is chance; a repeated
    # stream is not.
    assert len(set(tiles)) >= 12
    assert tiles[:8] != tiles[8:]
    assert tiles[0::2] != tiles[1::2]


def test_one_seed_repeats_whatever_the_number_of_workers(store: TileStore) -> None:
    alone = _epoch(store, _settings("training.workers=0"), epoch=3)
    for workers in (1, 2):
        images, masks = _epoch(store, _settings(f"training.workers={workers}"), epoch=3)
        assert torch.equal(images, alone[0])
        assert torch.equal(masks, alone[1])


def test_epochs_and_seeds_differ(store: TileStore) -> None:
    first = _epoch(store, _settings("training.workers=0"), epoch=0)[0]
    assert not torch.equal(first, _epoch(store, _settings("training.workers=0"), epoch=1)[0])
    assert not torch.equal(first, _epoch(store, _settings("training.workers=0", "training.seed=1"), epoch=0)[0])


def test_the_grid_sampler_shows_every_tile_once_an_epoch(store: TileStore) -> None:
    settings = _settings(
        "training.sampler=grid", "augment.pipeline=none", "training.workers=0", "training.batch_size=8"
    )
    dataset = TileDataset(store, [0, 1], settings)
    table = store.tiles[store.tiles["slide"].isin([0, 1])]
    wanted = sorted(
        store.crop(int(s), int(r), int(c), 64)[0].tobytes() for s, r, c in table[["slide", "row", "col"]].to_numpy()
    )
    for epoch in range(2):
        seen = [dataset[epoch * len(dataset) + position][0].numpy().tobytes() for position in range(len(dataset))]
        assert sorted(seen) == wanted


def test_only_the_given_slides_are_drawn_and_each_in_turn(store: TileStore) -> None:
    settings = _settings("augment.pipeline=none", "training.foreground_share=0")
    dataset = TileDataset(store, [1, 4, 7], settings)
    drawn = [dataset._random_crop(0, position, np.random.default_rng(position))[0] for position in range(9)]
    assert [sorted(drawn[start : start + 3]) for start in (0, 3, 6)] == [[1, 4, 7]] * 3


def test_foreground_crops_hold_foreground_far_more_often(store: TileStore) -> None:
    def share(aimed: float) -> float:
        dataset = TileDataset(
            store, range(len(store)), _settings("augment.pipeline=none", f"training.foreground_share={aimed}")
        )
        return float(np.mean([dataset[draw][1].any() for draw in range(200)]))

    assert share(1.0) > share(0.0) + 0.15


def test_balanced_draws_give_every_organ_the_same_number(store: TileStore) -> None:
    settings = _settings("training.balance_organs=true", "training.foreground_share=0")
    organs = store.slides["organ"].to_numpy()
    lungs, kidneys = np.flatnonzero(organs == "lung"), np.flatnonzero(organs == "kidney")
    dataset = TileDataset(store, [int(lungs[0]), *map(int, kidneys)], settings)
    drawn = [dataset._random_crop(0, position, np.random.default_rng(position))[0] for position in range(16)]
    assert sum(organs[slide] == "lung" for slide in drawn) == 8


def test_masks_move_with_images(sample_data: Path, tmp_path: Path) -> None:
    """With an image that is its own mask, every geometric change must keep the two equal."""
    import tifffile

    from hubmap_kit.competition import rle
    from hubmap_kit.competition.tables import Slide

    mask = np.zeros((200, 150), np.uint8)
    mask[20:90, 30:60] = mask[120:180, 100:140] = 1
    tifffile.imwrite(tmp_path / "a.tiff", np.repeat(mask[..., None] * np.uint8(255), 3, axis=2), photometric="rgb")
    slide = Slide("a", "kidney", "HPA", 200, 150, 0.4, 4.0, tmp_path / "a.tiff", rle.encode(mask))
    settings = _settings("augment.pipeline=none")
    single = open_or_build(tmp_path / "stores", [slide], settings.scale, settings.tiles)
    dataset = TileDataset(single, [0], settings)
    for draw in range(20):
        image, drawn = dataset[draw]
        assert torch.equal(image[..., 0] > 127, drawn > 0)


@pytest.mark.parametrize("pipeline", ["none", "flips", "light"])
@pytest.mark.parametrize("mixing", ["augment.mixing={}", "augment.mixing={mosaic: 0.3, mixup: 0.3}"])
def test_a_batch_holds_what_its_draws_give_one_by_one(store: TileStore, pipeline: str, mixing: str) -> None:
    dataset = TileDataset(store, range(len(store)), _settings(f"augment.pipeline={pipeline}", mixing))
    draws = [3, 40, 17, 3, 90]
    images, masks = dataset.__getitems__(draws)
    assert images.shape == (5, 64, 64, 3) and masks.shape == (5, 64, 64) and images.dtype == masks.dtype == torch.uint8
    for place, draw in enumerate(draws):
        image, mask = dataset[draw]
        assert torch.equal(images[place], image) and torch.equal(masks[place], mask)


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3)])
def test_turn_gives_the_8_symmetries_of_numpy(shape: tuple[int, ...]) -> None:
    large = np.random.default_rng(0).integers(256, size=(20, 20, 3)[: len(shape)], dtype=np.uint8)
    pixels = large[5:11, 7:13]  # a view with gaps between its rows, as a crop is
    pixels.flags.writeable = False
    out = np.zeros(shape, np.uint8)
    found = set()
    for symmetry in range(8):
        turn(pixels, symmetry, out)
        found.add(out.tobytes())
    assert found == {
        np.ascontiguousarray(np.rot90(side, quarters)).tobytes()
        for side in (pixels, pixels[::-1])
        for quarters in range(4)
    }


def test_flips_turn_image_and_mask_together_and_each_way_equally_often(store: TileStore) -> None:
    plain, flipped = (
        TileDataset(store, range(len(store)), _settings(f"augment.pipeline={name}")) for name in ("none", "flips")
    )
    counts = np.zeros(8, int)
    image_out, mask_out = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    for draw in range(400):
        (image, mask), (turned, turned_mask) = plain[draw], flipped[draw]
        for symmetry in range(8):
            turn(image.numpy(), symmetry, image_out)
            if np.array_equal(image_out, turned.numpy()):
                turn(mask.numpy(), symmetry, mask_out)
                assert np.array_equal(mask_out, turned_mask.numpy())
                counts[symmetry] += 1
                break
        else:
            pytest.fail(f"draw {draw} is no symmetry of itself")
    # Both mirrors as in augment.classic, 100 each on average, and no quarter turn.
    assert counts[:4].min() > 60 and not counts[4:].any()


def test_a_window_is_the_crop_of_the_store_inside_and_over_the_edges(store: TileStore) -> None:
    rows, cols = store.image(0).shape[:2]
    for row, col in [(0, 0), (5, 3), (8, 16), (rows - 64, cols - 64), (-9, 4), (rows - 20, cols - 33)]:
        for ours, theirs in zip(window(store, 0, row, col, 64), store.crop(0, row, col, 64), strict=True):
            assert np.array_equal(ours, theirs)


def test_the_batched_engine_gets_tiles_as_they_are(store: TileStore) -> None:
    batched, plain = (
        TileDataset(store, range(len(store)), _settings(*changes))
        for changes in (("augment.pipeline=light", "augment.engine=batched"), ("augment.pipeline=none",))
    )
    assert all(torch.equal(batched[draw][0], plain[draw][0]) for draw in range(8))


def test_slides_are_drawn_in_proportion_to_their_weights(store: TileStore) -> None:
    settings = _settings(
        "training.samples_per_epoch=6000", "augment.pipeline=none", "training.organ_shares={lung: 0.5}"
    )
    names = store.slides["id"].tolist()
    weights = {names[0]: 0.0, names[3]: 0.25}
    dataset = TileDataset(store, range(10), settings, weights)
    drawn = np.bincount(dataset.places(range(6000))[:, 0], minlength=10) / 6000
    wanted = np.array(
        [
            weights.get(name, 1.0) * (0.5 if organ == "lung" else 1)
            for name, organ in zip(names, store.slides["organ"], strict=True)
        ]
    )
    np.testing.assert_allclose(drawn, wanted / wanted.sum(), atol=0.02)
    assert drawn[0] == 0
    assert 0 not in dataset.tiles[:, 0]


def test_slides_of_no_weight_at_all_are_an_error(store: TileStore) -> None:
    with pytest.raises(TableError, match="every slide to learn from has weight 0"):
        TileDataset(store, [0, 1], _settings(), dict.fromkeys(store.slides["id"], 0.0))


def test_a_zoomed_tile_shows_the_same_place_at_another_scale(store: TileStore) -> None:
    # A tile of half the scale holds what four tiles hold: its middle quarter, enlarged, is the tile of the plain draw.
    plain, half = (
        TileDataset(
            store,
            range(len(store)),
            _settings("augment.pipeline=none", "training.seed=3", f"augment.zoom=[{zoom}, {zoom}]"),
        )
        for zoom in (1.0, 0.5)
    )
    seen = 0
    for draw in range(16):
        ((slide, row, col),) = half.places([draw])
        rows, cols = store.image(int(slide)).shape[:2]
        if not (32 <= row <= rows - 96 and 32 <= col <= cols - 96):
            continue  # the larger square was moved back into the slide
        seen += 1
        image, mask = half[draw]
        middle = image.numpy()[16:48, 16:48].astype(float)
        expected = plain[draw][0].numpy().reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(middle - expected).max() <= 1
        assert set(np.unique(mask)) <= {0, 1}
        share = plain[draw][1].numpy().reshape(32, 2, 32, 2).mean(axis=(1, 3))
        assert np.array_equal(mask.numpy()[16:48, 16:48], share >= 0.5)
    assert seen >= 3
