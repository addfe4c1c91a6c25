"""The session clock; and a training that stops itself in time goes on to the numbers of one that was left alone."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from clocks import Countdown, Nearly
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError
from hubmap_kit.jobs.train import train
from hubmap_kit.training import checkpoint
from hubmap_kit.training.clock import Clock, OutOfTime, SessionClock, process_start
from hubmap_kit.training.history import longest, read_timing

SECONDS = st.floats(1e-3, 1e6)
TABLES = ("metrics.csv", "oof.csv", "thresholds.json", "folds.csv")


def settings_of(data: Path, *changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, *changes], str(data))


def sessions(settings: Experiment, out: Path, clocks: list[Clock]) -> list[str]:
    """Train under one clock after the other until the run is done; returns where each session stopped."""
    where = []
    for clock in clocks:
        try:
            train(settings, out, resume=out.exists(), device="cpu", clock=clock)
            return where
        except OutOfTime as stop:
            where.append(stop.where)
            assert str(out) in str(stop) and "--resume" in str(stop)
    raise AssertionError(f"not done after {len(clocks)} sessions: {where}")


# One question begins a fold, an epoch asks one and four for its batches: 8 end a session in the middle of an epoch, 16
# in that of the second fold.
@pytest.mark.parametrize("questions", [8, 16])
def test_many_short_sessions_equal_one_long_one(
    questions: int, sample_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    where = sessions(settings_of(sample_data), out, [Countdown(questions) for _ in range(12)])
    assert where
    for name in TABLES:
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes(), name
    for fold in ("fold0", "fold1"):
        assert (out / fold / "model.safetensors").read_bytes() == (tiny_run / fold / "model.safetensors").read_bytes()


def test_a_fold_without_time_is_not_begun_and_the_done_one_has_its_tables(sample_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Fold 0 asks once to begin, five times in each of two epochs, and once for its prediction; the next question is
    # fold 1.
    with pytest.raises(OutOfTime, match="fold 1 is not begun"):
        train(settings_of(sample_data), out, device="cpu", clock=Countdown(1 + 2 * 5 + 1))
    assert not (out / "fold1").exists()
    assert set(pd.read_csv(out / "oof.csv")["fold"]) == {0} and (out / "curves.png").is_file()


def test_an_epoch_that_would_not_fit_is_not_begun(sample_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # Nothing is known before the first epoch, so it begins; none is as short as a microsecond.
    with pytest.raises(OutOfTime, match="fold 0 after epoch 1 of 2"):
        train(settings_of(sample_data), out, device="cpu", clock=Nearly(1e-6))
    assert len(pd.read_csv(out / "fold0" / "metrics.csv")) == 1
    assert not (out / "oof.csv").exists()


def test_what_an_earlier_session_took_keeps_no_later_one_from_going_on(
    sample_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """An epoch of three years on a machine long gone: this session has time for anything that this machine needs."""
    out = tmp_path / "run"
    with pytest.raises(OutOfTime, match="fold 0 after epoch 1 of 2; fold 1 is not begun"):
        train(settings_of(sample_data), out, device="cpu", clock=Countdown(8))
    slow = {"seconds": 1e8, "validation_seconds": 1e8}
    path = out / "fold0" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    state["timing"] = [row | slow for row in state["timing"]]
    torch.save(state, path)
    pd.read_csv(out / "fold0" / "timing.csv").assign(**slow).to_csv(out / "fold0" / "timing.csv", index=False)
    train(settings_of(sample_data), out, resume=True, device="cpu", clock=Nearly(1e6))
    assert longest(read_timing(out), "seconds") == 1e8
    for name in TABLES:
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes(), name


def test_a_prediction_of_unknown_length_begins_and_stops_when_the_time_is_up(sample_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # One question to begin fold 0, five for each of its epochs; the next one is about the prediction.
    for questions in (1 + 2 * 5, 3):
        with pytest.raises(
            OutOfTime, match="fold 0 is trained, its held-out slides are not predicted; fold 1 is not begun"
        ):
            train(settings_of(sample_data), out, resume=out.exists(), device="cpu", clock=Countdown(questions))
    assert not list(out.rglob("*.parquet")) and not list(out.rglob(".*.tmp*"))
    # A question about the whole, one for each of the five slides, and one to begin fold 1.
    with pytest.raises(OutOfTime, match="fold 1 is not begun"):
        train(settings_of(sample_data), out, resume=True, device="cpu", clock=Countdown(1 + 5))
    assert set(pd.read_csv(out / "oof.csv")["fold"]) == {0}


def test_the_prediction_of_the_held_out_slides_waits_for_a_session_with_time(sample_data: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", settings_of(sample_data, "training.epochs=1")
    # The first epoch begins at a guess of nothing; five slides are expected to take more than three seconds.
    with pytest.raises(OutOfTime, match="fold 0 is trained"):
        train(settings, out, [0], device="cpu", clock=Nearly(3.0))
    assert (out / "fold0" / "model.safetensors").is_file() and not (out / "oof.csv").exists()
    assert len(train(settings, out, [0], resume=True, device="cpu", clock=Nearly(1e6))) == 5


def test_timing_that_cannot_be_read_is_only_a_missing_guess(tmp_path: Path) -> None:
    for fold, text in enumerate(["", "fold,epoch,seconds\n1,1,2.5\n1,2,\n", "fold,epoch\n2,1\n"]):
        (tmp_path / f"fold{fold}").mkdir()
        (tmp_path / f"fold{fold}" / "timing.csv").write_text(text)
    assert longest(read_timing(tmp_path), "seconds") == 2.5
    assert longest(read_timing(tmp_path), "validation_seconds") == 0.0


@pytest.mark.parametrize(
    ("key", "old", "new", "same"),
    [
        ("encoder_weights", "/kaggle/input/a/net.safetensors", "/kaggle/input/datasets/me/a/net.safetensors", True),
        ("encoder_weights", "weights/net.pth", "/kaggle/input/a/net.safetensors", True),
        ("encoder_weights", "weights/net.pth", "weights/other.pth", False),
        ("encoder_weights", "", "weights/net.pth", False),
        ("encoder", "tu-resnet10t", "x/tu-resnet10t", False),
    ],
)
def test_weights_may_move_but_not_change(key: str, old: str, new: str, same: bool) -> None:
    before, after = ({"model": {key: value}} for value in (old, new))  # the other keys are today's defaults
    if same:
        checkpoint.check_same(before, after, Path("config.yaml"))
    else:
        with pytest.raises(CheckpointError, match=f"model.{key}"):
            checkpoint.check_same(before, after, Path("config.yaml"))


@given(SECONDS, SECONDS)
def test_what_fits_is_what_is_left(limit: float, age: float) -> None:
    assume(not 0 < limit - age < 1)  # the limit would pass while the test runs
    before = time.monotonic()
    clock = SessionClock(limit, before - age)
    assert clock.margin_s == pytest.approx(min(300, limit / 20))
    # A process that is older than its session cannot be: its age is not believed.
    assert clock.started == before - age if age < limit else before <= clock.started <= time.monotonic()
    end = clock.started + limit - clock.margin_s
    early, left, late = time.monotonic(), clock.left(), time.monotonic()
    assert end - late - 1e-6 <= left <= end - early + 1e-6
    assert clock.fits(left - 3600) and not clock.fits(left + 1e-6)


@pytest.mark.parametrize(("age", "believed"), [(600.0, True), (3600.0, False), (-50.0, False)])
def test_a_process_that_would_be_very_old_is_not_believed(age: float, believed: bool, tmp_path: Path) -> None:
    """A container may tell the time of another machine; a training must not lose hours to it."""
    ticks = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age) * os.sysconf("SC_CLK_TCK"))
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    (tmp_path / "stat").write_text("1 (odd name) " + " ".join([*fields[:19], str(ticks), *fields[20:]]))
    before = time.monotonic()
    start = process_start(tmp_path / "stat")
    assert start == pytest.approx(before - age, abs=5) if believed else before <= start <= time.monotonic()


def test_a_clock_is_the_same_in_another_process() -> None:
    clock = SessionClock(1000.0, time.monotonic() - 400, margin_s=100)
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).left())"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(clock), capture_output=True, check=True)
    assert clock.left() <= float(done.stdout) <= 500


def test_a_process_begins_before_it_can_ask() -> None:
    code = (
        "import time; time.sleep(0.3)\nfrom hubmap_kit.training.clock import process_start\nprint(process_start(),"
        " time.monotonic())"
    )
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    start, asked = map(float, done.stdout.split())
    # The system counts in hundredths of a second.
    assert before - 0.05 <= start <= asked - 0.25
    assert process_start() <= time.monotonic()
