"""Two processes, one fold each: the numbers of one after the other, one clock, one error."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from clocks import Countdown
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.models.device import choose_devices
from hubmap_kit.runtime.train_job import train
from hubmap_kit.training.clock import OutOfTime

RUN_FILES = ("metrics.csv", "oof.csv", "thresholds.json", "folds.csv", *(f"fold{k}/model.safetensors" for k in range(3)))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over several threads are rounded in another order; workers share the threads of their parent out."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def settings_of(data: Path, *changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, *changes], str(data))


def test_side_by_side_equals_one_after_the_other(
    sample_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings, one, two = settings_of(sample_data, "data.n_folds=3"), tmp_path / "one" / "run", tmp_path / "two" / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    caplog.set_level(logging.INFO, "hubmap_kit")
    try:
        train(settings, one, device="cpu")
        capfd.readouterr()
        # Each worker has the clock for itself, and it is up after one fold: a question to begin, five an epoch, one to predict.
        with pytest.raises(OutOfTime, match=r"the time is up: fold \d is not begun; "):
            train(settings, two, device="cpu,cpu", clock=Countdown(1 + 2 * 5 + 1))
        logged = capfd.readouterr().err
        done = set(pd.read_csv(two / "oof.csv")["fold"])
        assert len(done) == 2 and (two / "curves.png").is_file()
        for fold in done:
            assert re.search(rf"^\[fold {fold}, cpu\] fold {fold} epoch 2/2: ", logged, re.MULTILINE)
        train(settings, two, resume=True, device="cpu,cpu")  # one fold is left, so no process is started
    finally:
        torch.set_num_threads(before)
    for name in RUN_FILES:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name


def test_the_error_of_one_worker_stops_the_other(sample_data: Path, tmp_path: Path) -> None:
    out, endless = tmp_path / "run", settings_of(sample_data, "training.epochs=100000", "training.schedule=constant")
    with pytest.raises(OutOfTime, match="fold 0 is not begun"):
        train(endless, out, device="cpu", clock=Countdown(0))
    (out / "fold1").mkdir()
    (out / "fold1" / "last.ckpt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"fold1.last\.ckpt is damaged"):
        train(endless, out, resume=True, device="cpu,cpu")
    # The other one was told to stop: nothing of it is half written.
    assert not list(out.rglob(".*.tmp*")) and not (out / "oof.csv").exists()
    assert not (out / "fold0" / "metrics.csv").exists() or len(pd.read_csv(out / "fold0" / "metrics.csv")) < 100_000


@pytest.mark.parametrize("names", ["cuda:0,cuda:0", "auto,cpu", "cpu,tpu9", "cpu,"])
def test_a_list_of_devices_that_makes_no_sense_is_refused(names: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        choose_devices(names)


def test_lists_of_devices() -> None:
    assert choose_devices("cpu") == [torch.device("cpu")] and choose_devices("cpu, cpu") == [torch.device("cpu")] * 2
