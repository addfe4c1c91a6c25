"""Which folds are finished, said wherever a run's results are; and the rows of a history, through their file and
back.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from clocks import Countdown
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.config import Experiment, TrainingConfig
from hubmap_kit.jobs.train import evaluate, train
from hubmap_kit.training.clock import OutOfTime
from hubmap_kit.training.history import is_over, read_rows, unfinished, write_rows

HALF = "fold 1 after epoch 1 of 2"


def settings_of(data: Path, *changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, *changes], str(data))


@pytest.fixture
def half_trained(sample_data: Path, tmp_path: Path) -> Path:
    """A run with fold 0 finished, and fold 1 in the middle of its second epoch."""
    out = tmp_path / "run"
    with pytest.raises(OutOfTime, match=HALF):
        train(settings_of(sample_data), out, device="cpu", clock=Countdown((1 + 2 * 5 + 1) + (1 + 5 + 2)))
    return out


def test_a_half_trained_fold_is_said_wherever_results_are(
    half_trained: Path, sample_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(sample_data)
    assert unfinished(half_trained, settings.training) == {1: HALF}
    trained = [record.message for record in caplog.get_records("setup") if record.levelno == logging.WARNING]
    assert trained == [
        f"{half_trained}: {HALF}; its slides are not in oof.csv, and thresholds.json is fitted without them"
    ]
    table = pd.read_csv(half_trained / "oof.csv")
    assert set(table["fold"]) == {0} and table["finished"].all()

    table = evaluate(half_trained, device="cpu", pictures=False)
    assert dict(zip(table["fold"], table["finished"], strict=True)) == {0: True, 1: False}
    assert pd.read_csv(half_trained / "oof.csv")["finished"].tolist() == table["finished"].tolist()
    assert f"{HALF}; oof.csv and thresholds.json judge its best epoch so far" in caplog.text
    assert json.loads((half_trained / "thresholds.json").read_text())


def test_an_evaluated_half_trained_fold_is_trained_to_its_end_side_by_side(
    half_trained: Path, sample_data: Path, tiny_run: Path
) -> None:
    evaluate(half_trained, device="cpu", pictures=False)  # fold 1 has out-of-fold results then
    train(settings_of(sample_data), half_trained, resume=True, device="cpu,cpu")
    for name in ("metrics.csv", "oof.csv", "thresholds.json"):
        assert (half_trained / name).read_bytes() == (tiny_run / name).read_bytes(), name
    assert unfinished(half_trained, settings_of(sample_data).training, [0, 1]) == {}


def test_phrases(tiny_run: Path, sample_data: Path, half_trained: Path) -> None:
    training = settings_of(sample_data).training
    assert unfinished(tiny_run, training, [0, 1]) == {}
    (half_trained / "fold0" / "oof_counts.parquet").unlink()
    (half_trained / "fold1" / "metrics.csv").write_text("")
    assert unfinished(half_trained, training, [3]) == {
        0: "fold 0 is trained, its held-out slides are not predicted",
        1: "fold 1 with a metrics.csv that cannot be read",
        3: "fold 3 is not begun",
    }
    (half_trained / "fold1" / "last.ckpt").unlink()  # as in published weights
    (half_trained / "fold0" / "last.ckpt").unlink()
    assert set(unfinished(half_trained, training)) <= {0}


@pytest.mark.parametrize("stop", ["early", "late"])
def test_an_early_stop_is_an_end(stop: str) -> None:
    rows = [
        {"fold": 0, "epoch": 1, "dice": 0.5, "val_loss": 1.0},
        {"fold": 0, "epoch": 2},
        {"fold": 0, "epoch": 3, "dice": 0.4, "val_loss": 0.9},
    ]
    config = TrainingConfig(epochs=9, patience=1 if stop == "early" else 2)
    assert is_over(rows, config) == (stop == "early")
    assert not is_over(rows, config.model_copy(update={"monitor": "loss"}))


NUMBER = st.floats(allow_nan=False, allow_infinity=False)
ROW = st.fixed_dictionaries(
    {"fold": st.integers(0, 9), "epoch": st.integers(1, 999)},
    optional={"dice": NUMBER, "val_loss": NUMBER, "lr": NUMBER},
)


@given(st.lists(ROW, min_size=1, max_size=6))
def test_rows_come_back_to_the_last_digit(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "metrics.csv"
    write_rows(path, rows)
    assert read_rows(path) == rows


def test_pictures_that_cannot_be_drawn_do_not_end_a_training(
    sample_data: Path, tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with pytest.raises(OutOfTime):
        train(settings_of(sample_data), out, device="cpu", clock=Countdown(8))
    (out / "curves.png").unlink()
    (out / "curves.png").mkdir()  # nothing can be renamed to it
    caplog.clear()
    table = train(settings_of(sample_data), out, resume=True, device="cpu")
    assert len(table) == 10 and (out / "oof.csv").read_bytes() == (tiny_run / "oof.csv").read_bytes()
    assert [record.levelno for record in caplog.records if "curves cannot be drawn" in record.message] == [
        logging.WARNING
    ] * 2
