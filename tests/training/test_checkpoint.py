"""Checkpoints of an older version of the kit, and damaged ones."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from clocks import Countdown
from safetensors.torch import load_file
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError
from hubmap_kit.files import write_yaml
from hubmap_kit.jobs.train import train
from hubmap_kit.tiles.store import open_or_build
from hubmap_kit.training import checkpoint
from hubmap_kit.training.clock import OutOfTime
from hubmap_kit.training.fold import FoldTask, FoldTrainer
from hubmap_kit.training.history import best, read_rows

TABLES = ("metrics.csv", "oof.csv", "thresholds.json")
EPOCHS = 4


def settings_of(data: Path, *changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, *changes], str(data))


def stop_after(settings: Experiment, out: Path, epochs: int) -> None:
    """Train fold 0 for some epochs: a question to begin, five for each epoch, and one that is answered in the middle of
    the next.
    """
    with pytest.raises(OutOfTime, match=f"fold 0 after epoch {epochs} of"):
        train(settings, out, [0], device="cpu", clock=Countdown(1 + 5 * epochs + 1))


def test_a_key_that_a_later_version_added_does_not_end_a_run(sample_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", settings_of(sample_data)
    stop_after(settings, out, 1)
    state = torch.load(out / "fold0" / "last.ckpt", weights_only=True)
    del state["settings"]["training"]["patience"], state["settings"]["scale"]  # as if neither had been there yet
    state["settings"]["scale"] = {
        key: value for key, value in experiment.dump(settings)["scale"].items() if key != "max_zoom"
    }
    torch.save(state, out / "fold0" / "last.ckpt")
    write_yaml(out / "config.yaml", state["settings"])
    with pytest.raises(CheckpointError, match="training.patience = 0, now it is 3"):
        train(settings_of(sample_data, "training.patience=3"), out, resume=True, device="cpu")
    # Where metrics go beside metrics.csv changes no number.
    train(settings_of(sample_data, "training.sinks=[tensorboard]"), out, resume=True, device="cpu")
    assert any((out / "tensorboard" / "fold0").iterdir())
    for name in TABLES:
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes(), name


def test_a_key_that_is_gone_is_said(sample_data: Path) -> None:
    new = experiment.dump(settings_of(sample_data))
    old = new | {"training": new["training"] | {"momentum": 0.9}}
    with pytest.raises(
        CheckpointError, match=r"last\.ckpt: unknown key 'training.momentum'.*another version of the kit"
    ):
        checkpoint.check_same(old, new, Path("last.ckpt"))


def test_a_damaged_checkpoint_without_weights_begins_anew(
    sample_data: Path, tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    stop_after(settings_of(sample_data), out, 0)
    (out / "fold0").mkdir()
    (out / "fold0" / "last.ckpt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"fold0.last\.ckpt is damaged"):
        train(settings_of(sample_data), out, resume=True, device="cpu")
    train(settings_of(sample_data), out, resume=True, device="cpu", degrade=True)
    assert "fold 0 BEGINS ANEW" in caplog.text
    for name in (*TABLES, "fold0/model.safetensors", "fold1/model.safetensors"):
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes(), name


def test_a_damaged_checkpoint_of_a_finished_fold_costs_nothing(
    sample_data: Path, tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    (out / "fold0" / "last.ckpt").write_bytes((out / "fold0" / "last.ckpt").read_bytes()[:-5000])
    train(settings_of(sample_data), out, resume=True, device="cpu", degrade=True)
    assert "last.ckpt is DAMAGED" in caplog.text
    for name in (*TABLES, "fold0/model.safetensors"):
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes(), name


def test_a_damaged_checkpoint_goes_on_from_the_best_weights(
    sample_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings, whole, out = (
        settings_of(sample_data, f"training.epochs={EPOCHS}"),
        tmp_path / "a" / "run",
        tmp_path / "b" / "run",
    )
    train(settings, whole, [0], device="cpu")
    stop_after(settings, out, EPOCHS - 1)
    (out / "fold0" / "last.ckpt").write_bytes(b"PK\x03\x04 cut")
    top = best(read_rows(out / "fold0" / "metrics.csv"), settings.training)
    kept = load_file(out / "fold0" / "model.safetensors")

    store = open_or_build(out.parent / "stores", read_train(sample_data / "train.csv"), settings.scale, settings.tiles)
    trainer = FoldTrainer(
        settings, FoldTask(0, store, range(5), range(5, 10), out / "fold0", torch.device("cpu"), degrade=True)
    )
    trainer._resume()
    for network in (trainer.network, trainer.evaluated):
        assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())
    assert trainer.state.epoch == top["epoch"]

    train(settings, out, [0], resume=True, device="cpu", degrade=True)
    assert f"fold 0 GOES ON FROM ITS BEST WEIGHTS after epoch {top['epoch']}" in caplog.text
    ours, theirs = pd.read_csv(out / "metrics.csv"), pd.read_csv(whole / "metrics.csv")
    # What was kept is as it was, and the rate goes on as if nothing had happened.
    pd.testing.assert_frame_equal(ours[: top["epoch"]], theirs[: top["epoch"]])
    pd.testing.assert_series_equal(ours["lr"], theirs["lr"])
    assert sorted(pd.read_csv(out / "fold0" / "timing.csv")["epoch"]) == list(range(1, EPOCHS + 1))
    assert len(pd.read_csv(out / "oof.csv")) == 5
