"""Hard tiles: which they are, that draws go there, with any number of workers, and that a resumed run aims at the
same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.tiles.store import TileStore, open_or_build
from hubmap_kit.training.dataset import NOT_AIMED, TileDataset
from hubmap_kit.training.fold import FoldTask, FoldTrainer
from hubmap_kit.training.loader import HardTiles, build_loader, nearest
from hubmap_kit.training.losses import build_loss

GRID = np.array([[slide, row, col] for slide in (0, 3) for row in (0, 64) for col in (0, 64)])
CPU = torch.device("cpu")


def settings_of(*changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, "training.samples_per_epoch=40", *changes])


@pytest.fixture(scope="module")
def store(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    settings = settings_of()
    return open_or_build(
        tmp_path_factory.mktemp("stores"), read_train(sample_data / "train.csv"), settings.scale, settings.tiles
    )


def hard_tiles(share: float, losses: list[float], seed: int = 0) -> HardTiles:
    hard = HardTiles(GRID, share, seed)
    hard.restore(torch.tensor(losses))
    return hard


def test_the_hardest_quarter_of_the_tiles_seen_comes_worst_first() -> None:
    nan = float("nan")
    assert hard_tiles(1, [1, 9, 2, nan, 3, 8, 1, 1]).hardest().tolist() == [1, 5]
    assert hard_tiles(1, [nan, nan, 2, nan, nan, nan, nan, nan]).hardest().tolist() == [2]
    assert HardTiles(GRID, 1, 0).hardest().tolist() == []


def test_the_share_of_draws_is_aimed_and_only_at_hard_tiles() -> None:
    aims = hard_tiles(0.3, [1, 9, 2, 2, 3, 8, 1, 1]).aims(epoch=2, count=4000)
    assert set(aims.tolist()) == {NOT_AIMED, 1, 5}
    assert np.mean(aims != NOT_AIMED) == pytest.approx(0.3, abs=0.03)
    assert np.mean(aims[aims != NOT_AIMED] == 1) == pytest.approx(0.5, abs=0.06)


def test_aims_repeat_with_the_same_losses_and_change_with_seed_and_epoch() -> None:
    losses = [1.0, 9, 2, 2, 3, 8, 1, 1]
    aims = hard_tiles(0.5, losses).aims(1, 100)
    assert np.array_equal(aims, hard_tiles(0.5, losses).aims(1, 100))
    assert not np.array_equal(aims, hard_tiles(0.5, losses).aims(2, 100))
    assert not np.array_equal(aims, hard_tiles(0.5, losses, seed=1).aims(1, 100))
    assert (HardTiles(GRID, 0.5, 0).aims(0, 100) == NOT_AIMED).all()


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 3, 5]), st.integers(0, 64), st.integers(0, 64)), max_size=12))
def test_a_crop_belongs_to_the_tile_of_its_slide_that_it_covers_most_of(places: list[tuple[int, int, int]]) -> None:
    found = nearest(np.array(places, np.int64).reshape(-1, 3), GRID)
    for (slide, row, col), tile in zip(places, found, strict=True):
        shared = [(s == slide) * max(0, 64 - abs(r - row)) * max(0, 64 - abs(c - col)) for s, r, c in GRID.tolist()]
        assert tile == NOT_AIMED if slide == 5 else shared[tile] == max(shared) > 0


def test_losses_of_an_epoch_are_means_by_tile_and_those_before_are_forgotten() -> None:
    hard, loss = hard_tiles(1, [7.0] * 8), build_loss("bce")
    masks = torch.zeros(5, 1, 4, 4)
    logits = torch.tensor([-2.0, 0.0, 3.0, 1.0, 2.0])[:, None, None, None].expand(5, 1, 4, 4)
    hard.note(loss, logits[:3], masks[:3])
    hard.note(loss, logits[3:], masks[3:])
    # The sixth draw was in a batch that was dropped.
    hard.learn(np.array([[0, 0, 0], [3, 60, 70], [0, 9, 8], [9, 0, 0], [3, 64, 0], [0, 64, 64]]))
    of = np.log1p(np.exp([-2.0, 0.0, 3.0, 1.0, 2.0]))
    nan = np.nan
    np.testing.assert_allclose(hard.losses, [(of[0] + of[2]) / 2, nan, nan, nan, nan, nan, of[4], of[1]], rtol=1e-5)


def test_losses_of_another_grid_are_refused() -> None:
    with pytest.raises(CheckpointError, match="of 3 tiles, the store has 8"):
        hard_tiles(1, [1, 2, 3])


def test_aimed_draws_land_on_the_tile_whatever_the_number_of_workers(store: TileStore) -> None:
    batches = []
    for workers in (0, 2):
        settings = settings_of("training.hard_share=1", f"training.workers={workers}", "augment.pipeline=flips")
        dataset = TileDataset(store, [1, 4], settings)
        loader = build_loader(dataset, settings, pin_memory=False)
        list(loader)  # the workers are there before the losses are known
        worst = len(dataset.tiles) - 1
        losses = np.full(len(dataset.tiles), np.nan, np.float32)
        losses[worst] = 1
        loader.draws.hard.restore(torch.from_numpy(losses))
        loader.draws.epoch = 1
        places = dataset.places(loader.draws.draws())
        slide, row, col = dataset.tiles[worst]
        assert (places[:, 0] == slide).all()
        assert np.abs(places[:, 1:] - [row, col]).max() <= dataset.size
        batches.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(*batches)


def test_the_grid_sampler_has_no_hard_draws() -> None:
    with pytest.raises(ConfigError, match="hard_share goes with sampler random"):
        settings_of("training.hard_share=0.5", "training.sampler=grid")


def test_a_resumed_fold_aims_where_it_would_have_aimed(store: TileStore, tmp_path: Path) -> None:
    settings = settings_of("training.hard_share=0.6", "training.epochs=4", "training.batch_size=4")

    class Stopped(Exception):
        pass

    def stop(_: int, row: dict[str, object]) -> None:
        if row["epoch"] == 2:
            raise Stopped

    tasks = [FoldTask(0, store, range(7), range(7, 10), tmp_path / name, CPU) for name in ("whole", "parts", "without")]
    whole = FoldTrainer(settings, tasks[0])
    whole.run()
    with pytest.raises(Stopped):
        FoldTrainer(settings, tasks[1]).run(stop)
    parts = FoldTrainer(settings, tasks[1])
    parts.run()
    np.testing.assert_array_equal(whole.hard.losses, parts.hard.losses)
    without = settings.model_copy(update={"training": settings.training.model_copy(update={"hard_share": 0.0})})
    FoldTrainer(without, tasks[2]).run()
    weights = [load_file(task.folder / "model.safetensors") for task in tasks]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())
