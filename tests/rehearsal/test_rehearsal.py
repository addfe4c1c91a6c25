"""Whole rehearsals through the real command line, in real sandboxes, with kernels rendered and staged as for Kaggle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import warm
from namespaces import needs_namespaces
from rle_oracle import coco_mask, dice, rows_of
from tiny import TINY, overrides

import hubmap_kit
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.rehearsal.hidden import UNREADABLE

ROOT = Path(hubmap_kit.__file__).resolve().parents[1]


SMALL = ("--slides", "7", "--largest", "400", "--sample-size", "256")


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The real command line."""
    modules = warm.TRAINING if "faults" in words else warm.PUBLISHING  # they train a network in their own process
    return warm.run([sys.executable, "-m", "hubmap_kit", *map(str, words)], modules, cwd=ROOT, timeout=900)


def hubmap(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A rehearsal; its environment of Kaggle's versions is the checkout's own, made once."""
    return command("rehearse", *words)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journey with a very small network, in both layouts; its first training session is stopped by its own clock."""
    out = tmp_path_factory.mktemp("rehearsed")
    done = hubmap("journey", "--out", out, "--keep", *SMALL, *overrides(*TINY, "training.epochs=3"))
    (out / "stdout.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return out / "journey"


@needs_namespaces
def test_the_journey_passes_from_tiles_to_a_submission(rehearsed: Path) -> None:
    report = json.loads((rehearsed / "report.json").read_text())
    assert report["passed"]
    steps = {step["name"]: step for step in report["steps"]}
    assert list(steps) == ["tiles", "train", "train-resumed", "infer-new", "infer-flat"]
    # Two of the seven hidden slides cannot be read, which is more than a kernel tolerates, and is expected here.
    assert [step["status"] for step in steps.values()] == ["complete", "stopped", "complete", "degraded", "degraded"]
    assert all(step["peak_gib"] > 0.05 and step["network"] == [] and step["problems"] == [] for step in steps.values())
    text = (rehearsed.parent / "stdout.txt").read_text()
    assert text.rstrip().endswith("the rehearsal passed")
    for name in (*steps, *ORGANS):
        assert name in text
    assert cv2.imread(str(rehearsed / "hidden.png")) is not None


@needs_namespaces
def test_the_second_session_went_on_where_the_first_one_stopped(rehearsed: Path) -> None:
    begun = rows_of(rehearsed / "train/working/demo/fold0/metrics.csv")
    assert 1 <= len(begun) < 3
    assert not (rehearsed / "train/working/demo/fold1").exists()
    log = (rehearsed / "train-resumed/kernel.log").read_text()
    assert "going on with /kaggle/input/hubmap-train/demo" in log
    assert "tile store /kaggle/input/hubmap-make-tiles/stores/" in log
    metrics = rows_of(rehearsed / "train-resumed/working/demo/metrics.csv")
    assert sorted((int(row["fold"]), int(row["epoch"])) for row in metrics) == [
        (fold, epoch) for fold in (0, 1) for epoch in (1, 2, 3)
    ]
    kept = rows_of(rehearsed / "train-resumed/working/demo/fold0/metrics.csv")
    assert [row["train_loss"] for row in kept][: len(begun)] == [row["train_loss"] for row in begun]


@needs_namespaces
def test_both_layouts_give_the_same_submission_for_exactly_the_hidden_table(rehearsed: Path) -> None:
    new, flat = ((rehearsed / f"infer-{layout}/working/submission.csv").read_bytes() for layout in ("new", "flat"))
    assert new == flat
    made = rows_of(rehearsed / "hidden/truth.csv")
    rows = rows_of(rehearsed / "infer-new/working/submission.csv")
    assert [row["id"] for row in rows] == [slide["id"] for slide in made]
    steps = {step["name"]: step for step in json.loads((rehearsed / "report.json").read_text())["steps"]}
    for row, slide, said in zip(rows, made, steps["infer-new"]["slides"], strict=True):
        masks = [coco_mask(each["rle"], int(slide["height"]), int(slide["width"])) for each in (row, slide)]
        assert said["dice"] == pytest.approx(dice(*masks), abs=1e-4)
        assert (row["rle"] == "") >= (slide["fault"] in UNREADABLE)
    assert "datasets/rehearsal" not in (rehearsed / "infer-flat/kernel.log").read_text()
    # The masks lie beside what is mounted, and were proven not to be seen.
    assert {str(rehearsed / "hidden" / name) for name in ("truth", "truth.csv")} <= set(
        steps["infer-new"]["probes"]["absent"]
    )
    broken = next(slide["id"] for slide in made if slide["fault"] == "truncated")
    log = (rehearsed / "infer-new/kernel.log").read_text()
    assert (
        f"slide {broken} gets an empty mask: " in log and "2 of 7 slides failed" in log
    )  # as the verdict looks for it
    assert log.rstrip().endswith(" failed=2/7")


@needs_namespaces
def test_a_rendered_kernel_is_rehearsed_with_what_is_staged(rehearsed: Path, tmp_path: Path) -> None:
    render = (
        "kernels",
        "infer",
        "--owner",
        "somebody",
        "--staged",
        rehearsed / "datasets/code",
        "--out",
        tmp_path / "kernels",
    )
    assert command(*render).returncode == 0
    common = ("infer", "--kernels", tmp_path / "kernels", "--layout", "flat", *SMALL[:4])
    done = hubmap(*common, "--datasets", rehearsed / "datasets", "--out", tmp_path / "out", "--seed", "5")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert (tmp_path / "out/infer/infer/working/submission.csv").is_file()
    assert not (tmp_path / "out/infer/hidden").exists()  # what can be made again is not kept
    # It was rendered for a T4 x2: without a card one line is changed, and the report says so.
    assert ("ACCELERATOR was rehearsed as 'cpu' instead of 't4x2'" in done.stdout) == (
        not Path("/dev/nvidia0").exists()
    )
    empty = hubmap(*common, "--datasets", tmp_path, "--out", tmp_path / "out")
    assert empty.returncode == 1
    assert empty.stderr.rstrip().endswith(f"but {tmp_path / 'code'} does not exist; stage it with 'hubmap bundle'")


@needs_namespaces
def test_a_kernel_that_resumes_attaches_its_own_last_output(rehearsed: Path, tmp_path: Path) -> None:
    """The last good rehearsal is the journey's first training session, which stopped in the middle of fold 0."""
    home, timing = tmp_path / "out/train", "train/working/demo/fold0/timing.csv"
    shutil.copytree(rehearsed / "train", home / "train")
    (home / "report.json").write_text('{"passed": true}')
    (home / ".hubmap-rehearsal").touch()
    kept = (home / timing).read_text()
    settings = ("--config", "demo", "--attach", "kernel:tiles", "--folds", "0,1", "--resume")
    staged = ("--owner", "somebody", "--staged", rehearsed / "datasets/code", "--out", tmp_path / "kernels")
    done = command("kernels", "train", *staged, *settings, *overrides(*TINY, "training.epochs=3"))
    assert done.returncode == 0, done.stderr
    sources = ("--datasets", rehearsed / "datasets", "--output", f"tiles={rehearsed / 'tiles/working'}")
    words = ("train", "--kernels", tmp_path / "kernels", *sources, "--out", tmp_path / "out")

    failed = hubmap(*words, "--data", rehearsed / "data", "--minutes", "0.01")
    assert failed.returncode == 1
    assert "out of time" in failed.stderr.splitlines()[-1]
    assert (tmp_path / "out/train.previous" / timing).read_text() == kept  # the only output there is to go on with
    assert str(tmp_path / "out/train.previous") in failed.stdout

    second = hubmap(*words, "--data", rehearsed / "data")
    assert second.returncode == 0, second.stdout + second.stderr[-3000:]
    assert (home / timing).read_text().startswith(kept)
    assert (home / "train/working/demo/fold1/model.safetensors").is_file()
    store = "tile store /kaggle/input/notebooks/somebody/hubmap-make-tiles/stores/"
    assert store in (home / "train/kernel.log").read_text()
    assert not (tmp_path / "out/train.previous").exists()


@needs_namespaces
def test_every_planted_fault_is_found_for_its_own_reason(tmp_path: Path) -> None:
    done = hubmap("faults", "--out", tmp_path, *SMALL, "--layout", "new")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    steps = {step["name"]: step for step in json.loads((tmp_path / "faults/report.json").read_text())["steps"]}
    assert steps.pop("control")["passed"]
    reasons = {
        "row-missing": "is missing",
        "stale-bundle": "has not propagated",
        "no-weights": "no trained run is attached",
        "network": "updates.example.org:80",
        "p100": "sm_60",
        "memory": "out of memory",
        "disk": "disk full",
        "time": "out of time",
    }
    assert set(steps) == set(reasons)
    for name, words in reasons.items():
        assert not steps[name]["passed"]
        assert len(steps[name]["problems"]) == 1
        assert words in steps[name]["problems"][0]
    assert done.stdout.rstrip().endswith("every fault was found, each for its own reason")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("jurney",),
            "'jurney' cannot be rehearsed; expected journey, train, infer, tiles, faults; did you mean 'journey'?",
        ),
        (("infer", "--layout", "old"), "--layout is 'old'; expected new, flat or both"),
        (("train", "--output", "train"), "--output is 'train'; expected a kernel and a folder, such as train=FOLDER"),
        (("train", "--output", "trian=x"), "--output names the kernel 'trian'; expected train, infer, tiles"),
        (("--memory-gib", "0"), "--memory-gib is 0; expected more than 0"),
        (
            ("--slides", "6"),
            "--slides is 6, but a hidden test set with every fault needs 7; ask for more, or add --no-faults",
        ),
        (("infer", "--slides", "0", "--no-faults"), "--slides is 0, but a hidden test set needs 1; ask for more"),
        (("--stop-after", "-1"), "--stop-after is -1; expected 0 or more"),
        (
            ("infer", "--data", "tests"),
            "--data is tests, but there is no train.csv in it; give a folder in the competition's format",
        ),
    ],
)
@needs_namespaces
def test_a_wrong_word_gets_a_sentence(words: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    done = hubmap(*words, "--out", tmp_path)
    assert (done.returncode, done.stderr) == (1, f"error: {sentence}\n")
    assert os.listdir(tmp_path) == []


@needs_namespaces
def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "faults").mkdir()
    (tmp_path / "faults/mine.txt").touch()
    done = hubmap("faults", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        "is not empty and was not made by a rehearsal; choose another folder with --out"
    )
    assert os.listdir(tmp_path / "faults") == ["mine.txt"]


@needs_namespaces
def test_an_input_that_would_be_made_anew_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "journey/data"
    data.mkdir(parents=True)
    (data / "train.csv").touch()
    (tmp_path / "journey/.hubmap-rehearsal").touch()
    done = hubmap("journey", "--data", data, "--out", tmp_path)
    made_anew = f"error: --data is {data}, but this rehearsal makes {tmp_path / 'journey'} anew"
    assert (done.returncode, done.stderr) == (
        1,
        f"{made_anew}; copy it elsewhere, or choose another folder with --out\n",
    )
    assert (data / "train.csv").is_file()


@needs_namespaces
def test_a_terminated_rehearsal_leaves_nothing_running_and_nothing_around(rehearsed: Path, tmp_path: Path) -> None:
    sources = ("--kernels", rehearsed / "kernels", "--datasets", rehearsed / "datasets", "--data", rehearsed / "data")
    words = [sys.executable, "-m", "hubmap_kit", "rehearse", "tiles", *map(str, sources), "--out", str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    log = tmp_path / "tiles/tiles/kernel.log"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.rstrip().endswith("error: stopped; the kernel was ended, and nothing of the rehearsal goes on")
    assert os.listdir(log.parent) == ["kernel.log"]
