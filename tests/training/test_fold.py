"""The loop itself: what is kept, when it stops, and that accumulated batches equal one large batch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.inference.ensemble import load_network
from hubmap_kit.tiles.store import TileStore, open_or_build
from hubmap_kit.training import learner as learner_module
from hubmap_kit.training.fold import FoldTask, FoldTrainer
from hubmap_kit.training.losses import build_loss
from hubmap_kit.training.oof import validate

CPU = torch.device("cpu")


def settings_of(*changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, *changes])


@pytest.fixture(scope="module")
def store(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    settings = settings_of()
    return open_or_build(
        tmp_path_factory.mktemp("stores"), read_train(sample_data / "train.csv"), settings.scale, settings.tiles
    )


def task_of(store: TileStore, folder: Path) -> FoldTask:
    return FoldTask(0, store, range(0, 7), range(7, 10), folder, CPU)


@pytest.mark.parametrize("monitor", ["dice", "loss"])
def test_the_kept_weights_are_those_of_the_best_validated_epoch(monitor: str, store: TileStore, tmp_path: Path) -> None:
    settings = settings_of(
        f"training.monitor={monitor}", "training.epochs=6", "training.lr=0.02", "training.schedule=constant"
    )
    FoldTrainer(settings, task_of(store, tmp_path)).run()
    rows = pd.read_csv(tmp_path / "metrics.csv")
    best = rows.loc[rows["dice"].idxmax() if monitor == "dice" else rows["val_loss"].idxmin()]
    found = validate(
        load_network(settings, tmp_path, CPU), build_loss(settings.training.loss), store, range(7, 10), settings, CPU
    )
    assert found.dice == pytest.approx(best["dice"], abs=1e-6)
    assert found.loss == pytest.approx(best["val_loss"], abs=1e-5)


def test_it_stops_early_when_nothing_gets_better(store: TileStore, tmp_path: Path) -> None:
    # A rate this small changes no weight, and without norm statistics to follow every validation is the first one
    # again.
    settings = settings_of(
        "training.epochs=9",
        "training.patience=2",
        "training.lr=1e-30",
        "training.weight_decay=0",
        "training.ema_decay=0.999999",
    )
    rows = FoldTrainer(settings, task_of(store, tmp_path)).run()
    best = max(range(len(rows)), key=lambda index: (rows[index]["dice"], -index))
    assert len(rows) == best + 3 < 9


def test_validation_can_be_rarer_but_never_skips_the_last_epoch(store: TileStore, tmp_path: Path) -> None:
    rows = FoldTrainer(settings_of("training.epochs=5", "training.validate_every=2"), task_of(store, tmp_path)).run()
    assert [row["epoch"] for row in rows if "dice" in row] == [2, 4, 5]


class OnePixel(nn.Module):
    """A network without norm layers, so that a step depends on the sum of gradients only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs)


@pytest.mark.parametrize("clip", [0, 0.05])
def test_accumulated_batches_equal_one_large_batch(
    clip: float, store: TileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_module, "build", lambda *_, **__: OnePixel())
    weights = []
    # 12 tiles: one large batch of 8 and one of 4, or groups of four and of two batches of 2.
    for batch, accumulate in ((8, 1), (2, 4)):
        settings = settings_of(
            "training.samples_per_epoch=12",
            f"training.batch_size={batch}",
            f"training.accumulate={accumulate}",
            "training.loss=bce",
            f"training.clip_norm={clip}",
            "training.epochs=2",
            "training.ema_decay=0",
        )
        folder = tmp_path / f"{batch}"
        trainer = FoldTrainer(settings, task_of(store, folder))
        trainer._train(0)
        trainer._train(1)
        assert trainer.learner.schedule.done == 4
        weights.append(torch.cat([value.flatten() for value in trainer.network.state_dict().values()]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


def test_it_learns(store: TileStore, tmp_path: Path) -> None:
    settings = settings_of(
        "training.epochs=12", "training.samples_per_epoch=64", "training.lr=0.01", "augment.pipeline=none"
    )
    rows = FoldTrainer(settings, task_of(store, tmp_path)).run()
    assert rows[-1]["train_loss"] < 0.75 * rows[0]["train_loss"]
    assert max(row["dice"] for row in rows) > rows[0]["dice"] + 0.05


def test_averaged_weights_are_kept_where_there_are_some(store: TileStore, tmp_path: Path) -> None:
    for decay in (0.0, 0.9):
        settings = settings_of(f"training.ema_decay={decay}", "training.epochs=1", "training.lr=0.05")
        trainer = FoldTrainer(settings, task_of(store, tmp_path / str(decay)))
        trainer.run()
        kept = load_file(tmp_path / str(decay) / "model.safetensors")
        live = trainer.network.state_dict()
        same = all(torch.equal(kept[name], live[name]) for name in kept)
        assert same == (decay == 0.0)
        assert all(torch.isfinite(value.float()).all() for value in kept.values())
