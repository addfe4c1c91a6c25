"""A run that is killed and resumed ends in the same numbers as one that was left alone."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import warm
from safetensors.torch import load_file
from tiny import TINY, overrides

EPOCHS = 5
SETTINGS = (
    *TINY,
    f"training.epochs={EPOCHS}",
    "training.samples_per_epoch=24",
    "training.workers=1",
    "training.accumulate=4",
    "augment.pipeline=classic",
)


def _command(data: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "hubmap_kit",
        "train",
        "--config",
        "baseline",
        "--data",
        str(data),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--folds",
        "0",
        *overrides(*SETTINGS),
        *more,
    ]


def _run(command: list[str]) -> None:
    done = warm.run(command, warm.TRAINING)
    assert done.returncode == 0, done.stderr


def _kill_in_the_middle_of_epoch_two(command: list[str], metrics: Path) -> None:
    """SIGKILL as soon as the first epoch's row is on disk: the second epoch has begun by then, or is about to."""
    done = warm.run(command, warm.TRAINING, kill_when=metrics.is_file)
    assert done.returncode == -signal.SIGKILL, "the run ended before it could be killed"


@pytest.mark.parametrize(
    "changes",
    [
        # FPN has dropout, which draws from torch's global generator: its state must survive as well.
        [
            "training.schedule=cosine",
            "model.arch=fpn",
            "model.options={encoder_depth: 5}",
            "model.encoder=tu-test_resnet",
        ],
        [
            "training.swa=0.6",
            "training.ema_decay=0",
            "training.keep_last=2",
            "training.average_last=true",
            "training.freeze_epochs=2",
            "training.optimizer=ranger",
            "training.encoder_lr=0.5",
            "model.classes=organs",
            "training.loss=ce+dice",
            "model.auxiliary={fcn: 0.4, deep: 0.3, organ: 0.1, pixel_size: 0.1}",
            "augment.engine=batched",
        ],
    ],
    ids=["dropout", "averages-and-heads"],
)
def test_killed_and_resumed_equals_never_killed(changes: list[str], sample_data: Path, tmp_path: Path) -> None:
    more = overrides(*changes)
    undisturbed, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
    _run(_command(sample_data, undisturbed, *more))
    _kill_in_the_middle_of_epoch_two(_command(sample_data, killed, *more), killed / "fold0" / "metrics.csv")
    assert len(pd.read_csv(killed / "fold0" / "metrics.csv")) < EPOCHS
    _run(_command(sample_data, killed, *more, "--resume"))

    assert (killed / "metrics.csv").read_bytes() == (undisturbed / "metrics.csv").read_bytes()
    assert len(pd.read_csv(killed / "metrics.csv")) == EPOCHS
    assert (killed / "oof.csv").read_bytes() == (undisturbed / "oof.csv").read_bytes()
    ours, theirs = (
        load_file(killed / "fold0" / "model.safetensors"),
        load_file(undisturbed / "fold0" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_fold_is_left_alone_and_the_next_one_trained(
    sample_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    base = [
        "train",
        "--config",
        "baseline",
        "--data",
        str(sample_data),
        "--out",
        str(out),
        "--device",
        "cpu",
        *overrides(*TINY),
    ]
    from hubmap_kit.__main__ import main

    for arguments in ([*base, "--folds", "1"], [*base, "--resume"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        if "--folds" in arguments:
            before = (out / "fold1" / "model.safetensors").stat().st_mtime_ns
    assert (out / "fold1" / "model.safetensors").stat().st_mtime_ns == before
    # Trained one by one, in the other order, the folds are those of the run that trained both at once.
    for name in ("metrics.csv", "oof.csv", "thresholds.json"):
        assert (out / name).read_bytes() == (tiny_run / name).read_bytes()


def test_results_of_an_evaluate_in_mid_run_do_not_outlive_the_weights(sample_data: Path, tmp_path: Path) -> None:
    from hubmap_kit.__main__ import main

    whole, stopped = tmp_path / "a" / "run", tmp_path / "b" / "run"
    _run(_command(sample_data, whole))
    _kill_in_the_middle_of_epoch_two(_command(sample_data, stopped), stopped / "fold0" / "metrics.csv")
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(stopped), "--device", "cpu", "--no-pictures"])
    assert stop.value.code == 0
    early = (stopped / "oof.csv").read_bytes()
    _run(_command(sample_data, stopped, "--resume"))
    assert early != (stopped / "oof.csv").read_bytes() == (whole / "oof.csv").read_bytes()


def test_a_fold_with_weights_alone_is_never_trained_over(sample_data: Path, tiny_run: Path, tmp_path: Path) -> None:
    import shutil

    from hubmap_kit.__main__ import main

    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    (out / "fold0" / "last.ckpt").unlink()
    before = (out / "fold0" / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", str(out), "--resume", "--data", str(sample_data), "--device", "cpu"])
    assert stop.value.code == 0
    assert (out / "fold0" / "model.safetensors").read_bytes() == before


def test_a_fold_killed_while_it_saved_its_first_epoch_is_trained_anew(sample_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = _command(sample_data, out, "--set", "training.epochs=1")
    _run(command)
    fold = out / "fold0"
    whole = load_file(fold / "model.safetensors")
    for name in ("last.ckpt", "metrics.csv", "oof_counts.parquet"):  # what comes after the weights
        (fold / name).unlink(missing_ok=True)
    before = sorted(path.name for path in fold.iterdir())
    assert "model.safetensors" in before and "timing.csv" in before
    done = warm.run([*command, "--resume"], warm.TRAINING)
    assert done.returncode == 0 and "taken as finished" not in done.stderr, done.stderr
    assert (fold / "last.ckpt").is_file()
    assert all(torch.equal(value, whole[name]) for name, value in load_file(fold / "model.safetensors").items())
