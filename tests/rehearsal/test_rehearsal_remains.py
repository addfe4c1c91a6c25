"""What a session and a rehearsal leave for the next one: epochs that must be kept, and outputs that must not be
lost.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import hubmap_kit
from hubmap_kit.errors import RehearsalError
from hubmap_kit.rehearsal.inputs import MARKER, fresh, last, settle
from hubmap_kit.rehearsal.journey import not_resumed

ROOT = Path(hubmap_kit.__file__).resolve().parents[1]


def session(folder: Path, folds: dict[int, list[tuple[int, str]]]) -> Path:
    """What a training leaves of its epochs: (epoch, seconds) of each fold; the same losses each time, as on a CPU."""
    for number, epochs in folds.items():
        fold = folder / f"fold{number}"
        fold.mkdir(parents=True)
        (fold / "timing.csv").write_text(
            "fold,epoch,seconds\n" + "".join(f"{number},{epoch},{took}\n" for epoch, took in epochs)
        )
        (fold / "metrics.csv").write_text(
            "fold,epoch,train_loss\n" + "".join(f"{number},{epoch},0.{epoch}\n" for epoch, _ in epochs)
        )
    return folder


@pytest.mark.parametrize(
    ("folds", "problem"),
    [
        ({0: [(1, "2.5"), (2, "2.6")], 1: [(1, "2.7")]}, ""),
        ({0: [(1, "2.5")], 1: [(1, "2.7")]}, ""),
        (
            {0: [(1, "2.4"), (2, "2.6")]},
            "fold0/timing.csv says of epoch 1 seconds 2.4, in the former session 2.5: it was trained again",
        ),
        ({0: [(1, "2.5"), (1, "2.6"), (2, "2.7")]}, "fold0/timing.csv counts the epochs 1, 1, 2, expected 1, 2, 3"),
        ({1: [(1, "2.5"), (2, "2.6")]}, "fold0/timing.csv holds 0 epochs, but the former session had finished 1"),
        ({0: [(1, "2.5")]}, "no epoch came to those of the former session"),
    ],
)
def test_a_session_that_did_not_go_on_is_found(
    folds: dict[int, list[tuple[int, str]]], problem: str, tmp_path: Path
) -> None:
    before, after = session(tmp_path / "before", {0: [(1, "2.5")]}), session(tmp_path / "after", folds)
    found = not_resumed(before, after, further=True)
    assert len(found) == bool(problem), found
    assert "".join(found).startswith(problem)
    assert "left no finished epoch" in not_resumed(tmp_path / "nothing", after)[0]


def rehearsal(folder: Path, passed: bool | None, text: str) -> None:
    """A rehearsal's remains; None: it was broken off."""
    (fresh(folder) / "output.txt").write_text(text)
    if passed is not None:
        (folder / "report.json").write_text(json.dumps({"passed": passed}))
        settle(folder, passed)


def test_the_last_good_output_outlives_what_fails_after_it(tmp_path: Path) -> None:
    home, aside = tmp_path / "train", tmp_path / "train.previous"
    rehearsal(home, True, "first")
    assert last(home) == home
    assert not aside.exists()
    for passed in (False, None, False):
        rehearsal(home, passed, "worse")
        assert (last(home), (aside / "output.txt").read_text()) == (aside, "first")
    rehearsal(home, True, "second")
    assert (last(home), (home / "output.txt").read_text(), aside.exists()) == (home, "second", False)
    assert (home / MARKER).is_file()


def test_a_failed_output_gives_way_to_a_later_one(tmp_path: Path) -> None:
    home, aside = tmp_path / "train", tmp_path / "train.previous"
    for text in ("first", "second"):
        rehearsal(home, False, text)
    assert (last(home), (aside / "output.txt").read_text()) == (home, "first")
    fresh(home)
    assert (last(home), (aside / "output.txt").read_text()) == (aside, "second")


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    rehearsal(tmp_path / "train", True, "first")
    (tmp_path / "train.previous").mkdir()
    (tmp_path / "train.previous" / "mine.txt").touch()
    with pytest.raises(RehearsalError, match=r"train.previous is not empty and was not made by a rehearsal"):
        fresh(tmp_path / "train")
    assert (tmp_path / "train" / "output.txt").read_text() == "first"


def test_whatever_a_kernel_leaves_can_be_removed() -> None:
    """Folders within each other that no path and no recursion reaches, and folders that are closed to everybody."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:  # a disk takes milliseconds for each folder
        home, folder = Path(name), os.open(name, os.O_RDONLY)
        for each in ["left", *["deep"] * 2000]:
            os.mkdir(each, dir_fd=folder)
            inner = os.open(each, os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
        os.close(folder)
        (home / "kept").write_text("kept")
        (home / "left/link").symlink_to(home, target_is_directory=True)
        (home / "left/closed/inner").mkdir(parents=True)
        (home / "left/closed/inner/file").touch()
        for closed in ("left/closed/inner", "left/closed", "left"):
            (home / closed).chmod(0)
        as_user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
        code = (
            "import sys; from pathlib import Path; from hubmap_kit.rehearsal.inputs import remove;"
            " remove(Path(sys.argv[1]))"
        )
        done = subprocess.run(
            [*as_user, sys.executable, "-c", code, str(home / "left")],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert os.listdir(home) == ["kept"]
