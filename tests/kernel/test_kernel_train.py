"""The training kernel with an attached run that is not as it should be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from clocks import Countdown
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.jobs.train import train as train_job
from hubmap_kit.kernel.kernels import Outcome, train
from hubmap_kit.kernel.mounts import COMPETITION
from hubmap_kit.training.clock import OutOfTime

# Fold 0 is trained to its end, fold 1 for one epoch of two.
HALF = (1 + 2 * 5 + 1) + (1 + 5 + 2)


@pytest.fixture
def mounted(sample_data: Path, tmp_path: Path) -> Path:
    """The output of a former session, attached to a new one: `baseline`, half trained."""
    root = tmp_path / "input"
    (root / "competitions").mkdir(parents=True)
    (root / "competitions" / COMPETITION).symlink_to(sample_data)
    run = tmp_path / "former" / "baseline"
    with pytest.raises(OutOfTime, match="fold 1 after epoch 1 of 2"):
        train_job(experiment.load("baseline", TINY, str(sample_data)), run, device="cpu", clock=Countdown(HALF))
    shutil.copytree(run, root / "notebooks" / "alice" / "hubmap-train" / "baseline")
    return root


def session(root: Path, folds: list[int], hours: float = 11.5) -> Outcome:
    for name in ("working", "scratch"):
        (root.parent / name).mkdir()
    return train(
        "baseline", folds, TINY, hours, "cpu", root, root.parent / "working", root.parent / "scratch", resume=True
    )


def test_a_damaged_checkpoint_costs_its_fold_some_epochs_not_the_session(
    mounted: Path, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in mounted.rglob("last.ckpt"):
        path.write_bytes(path.read_bytes()[:-5000])
    done = session(mounted, [])
    assert done.status == "complete" and "2 folds done" in done.sentence and "not finished" not in done.sentence, (
        done.sentence
    )
    logged = capsys.readouterr().err
    assert logged.count("last.ckpt is DAMAGED") == 2 and "fold 1 GOES ON FROM ITS BEST WEIGHTS after epoch 1" in logged
    out = mounted.parent / "working" / "baseline"
    assert (out / "fold0" / "model.safetensors").read_bytes() == (tiny_run / "fold0" / "model.safetensors").read_bytes()
    metrics = pd.read_csv(out / "metrics.csv")
    assert sorted(zip(metrics["fold"], metrics["epoch"], strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_the_end_says_which_folds_are_not_finished(mounted: Path) -> None:
    done = session(mounted, [0])
    assert done.status == "complete" and "1 folds done" in done.sentence and "over 5 slides" in done.sentence
    assert done.sentence.endswith("; not finished, but used if this output is attached: fold 1 after epoch 1 of 2")


def test_the_end_of_a_stopped_session_names_all_that_is_left(mounted: Path) -> None:
    shutil.rmtree(mounted / "notebooks" / "alice" / "hubmap-train" / "baseline" / "fold0")
    stopped = session(mounted, [], hours=1e-9)
    assert stopped.status == "stopped"
    assert "fold 0 is not begun; fold 1 after epoch 1 of 2" in stopped.sentence
