"""Two processes, one fold each: the numbers of one after the other, one clock, and errors that end their own fold
only.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import pandas as pd
import pytest
import torch
import warm
from clocks import Countdown
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.jobs import side_by_side
from hubmap_kit.jobs.side_by_side import train_side_by_side
from hubmap_kit.jobs.train import train
from hubmap_kit.models.device import choose_devices
from hubmap_kit.training.clock import OutOfTime
from hubmap_kit.training.history import read_rows
from hubmap_kit.training.run import Plan, plan

RUN_FILES = (
    "metrics.csv",
    "oof.csv",
    "thresholds.json",
    "folds.csv",
    *(f"fold{k}/model.safetensors" for k in range(3)),
)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over several threads are rounded in another order; workers share the threads of their parent out."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers come from a process that has the libraries loaded: the seconds that each spends on it are not looked at
    in every test.
    """
    ready = multiprocessing.get_context("forkserver")
    ready.set_forkserver_preload([*warm.TRAINING, "hubmap_kit.jobs.side_by_side"])
    forkserver.ensure_running()  # here, where no signal is held back: its children have its signal mask
    monkeypatch.setattr(multiprocessing, "get_context", lambda _method: ready)


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
        # Each worker has the clock for itself, and it is up after one fold: a question to begin, five an epoch, one to
        # predict.
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


@pytest.mark.usefixtures("preloaded")
def test_the_error_of_one_fold_does_not_stop_the_others(sample_data: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", settings_of(sample_data, "data.n_folds=3")
    with pytest.raises(OutOfTime, match="fold 0 is not begun; fold 1 is not begun; fold 2 is not begun"):
        train(settings, out, device="cpu", clock=Countdown(0))
    (out / "fold0").mkdir()
    (out / "fold0" / "last.ckpt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"^fold 0 failed: .*fold0.last\.ckpt is damaged"):
        train(settings, out, resume=True, device="cpu,cpu")
    # One worker met the error, took the next fold, and everything that could be done is done and written.
    assert set(pd.read_csv(out / "oof.csv")["fold"]) == set(pd.read_csv(out / "metrics.csv")["fold"]) == {1, 2}
    assert (out / "curves.png").is_file() and not list(out.rglob(".*.tmp*"))


def plan_of(data: Path, out: Path, *changes: str) -> Plan:
    settings = settings_of(data, *changes)
    return plan(settings, read_train(data / "train.csv"), out, out.parent / "stores")


@pytest.mark.usefixtures("preloaded")
def test_a_worker_that_is_killed_costs_its_own_fold(sample_data: Path, tmp_path: Path) -> None:
    planned, victims = plan_of(sample_data, tmp_path / "run", "training.epochs=8"), []

    def kill_one(fold: int, _row: object) -> None:
        if not victims:
            victims.append(multiprocessing.active_children()[0].pid)
            os.kill(victims[0], signal.SIGKILL)

    # The victim may not have come to a fold yet; then it costs none.
    words = r"^(fold \d|the worker on cpu) failed: the process that trained on cpu ended with code -9 "
    with pytest.raises(HubmapError, match=words) as raised:
        train_side_by_side(planned, [0, 1], choose_devices("cpu,cpu"), kill_one)
    for other in {0, 1} - {int(digit) for digit in re.findall(r"^fold (\d) failed", str(raised.value))}:
        assert len(pd.read_csv(tmp_path / "run" / f"fold{other}" / "metrics.csv")) == 8
        assert (tmp_path / "run" / f"fold{other}" / "oof_counts.parquet").is_file()


@pytest.mark.usefixtures("preloaded")
def test_folds_that_nobody_is_left_to_begin_are_said(sample_data: Path, tmp_path: Path) -> None:
    planned = plan_of(sample_data, tmp_path / "run", "training.epochs=8", "data.n_folds=3")

    def kill_all(_fold: int, _row: object) -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(HubmapError, match=r"^fold 0 failed: .*; fold 1 is not begun; fold 2 is not begun$"):
        train_side_by_side(planned, [0, 1, 2], choose_devices("cpu"), kill_all)


def test_a_sigterm_that_reaches_a_worker_while_it_starts_is_the_parents_to_answer(
    sample_data: Path, tmp_path: Path
) -> None:
    planned, pids = plan_of(sample_data, tmp_path / "run", "training.workers=1"), []

    def terminate_the_first() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.005)
        pids.append(children[0].pid)
        subprocess.run(
            ["kill", "-TERM", str(pids[0])], check=True
        )  # from another process: a worker heeds its parent alone

    sender = threading.Thread(target=terminate_the_first, daemon=True)
    sender.start()
    train_side_by_side(planned, [0], choose_devices("cpu"))
    sender.join(60)
    assert pids and (tmp_path / "run" / "fold0" / "oof_counts.parquet").is_file()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.usefixtures("preloaded")
def test_each_epoch_travels_once_and_a_slow_end_of_a_process_is_none_of_a_failure(
    sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without patience a process that has said its last word, but is still busy ending, would count as one that failed.
    monkeypatch.setattr(side_by_side, "PATIENCE_S", 0.0)
    planned, seen = plan_of(sample_data, tmp_path / "run", "training.epochs=3"), []
    train_side_by_side(planned, [0, 1], choose_devices("cpu,cpu"), lambda fold, row: seen.append((fold, row)))
    for fold in (0, 1):
        assert [row for number, row in seen if number == fold] == read_rows(
            tmp_path / "run" / f"fold{fold}" / "metrics.csv"
        )


@pytest.mark.parametrize("names", ["cuda:0,cuda:0", "auto,cpu", "cpu,tpu9", "cpu,"])
def test_a_list_of_devices_that_makes_no_sense_is_refused(names: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        choose_devices(names)


def test_lists_of_devices() -> None:
    assert choose_devices("cpu") == [torch.device("cpu")] and choose_devices("cpu, cpu") == [torch.device("cpu")] * 2
