"""The folders of rehearsals: outputs that must not be lost, and remains that must go."""

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
from hubmap_kit.rehearsal.jobs import MARKER, finish_folder, last_good, start_folder

ROOT = Path(hubmap_kit.__file__).resolve().parents[1]


def rehearsal(folder: Path, passed: bool | None, text: str) -> None:
    """A rehearsal's remains; None: it was broken off."""
    (start_folder(folder) / "output.txt").write_text(text)
    if passed is not None:
        (folder / "report.json").write_text(json.dumps({"passed": passed}))
        finish_folder(folder, passed)


def test_the_last_good_output_outlives_what_fails_after_it(tmp_path: Path) -> None:
    home, aside = tmp_path / "train", tmp_path / "train.previous"
    rehearsal(home, True, "first")
    assert last_good(home) == home
    assert not aside.exists()
    for passed in (False, None, False):
        rehearsal(home, passed, "worse")
        assert (last_good(home), (aside / "output.txt").read_text()) == (aside, "first")
    rehearsal(home, True, "second")
    assert (last_good(home), (home / "output.txt").read_text(), aside.exists()) == (home, "second", False)
    assert (home / MARKER).is_file()


def test_a_failed_output_gives_way_to_a_later_one(tmp_path: Path) -> None:
    home, aside = tmp_path / "train", tmp_path / "train.previous"
    for text in ("first", "second"):
        rehearsal(home, False, text)
    assert (last_good(home), (aside / "output.txt").read_text()) == (home, "first")
    start_folder(home)
    assert (last_good(home), (aside / "output.txt").read_text()) == (aside, "second")


def test_a_folder_of_that_name_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    rehearsal(tmp_path / "train", True, "first")
    (tmp_path / "train.previous").mkdir()
    (tmp_path / "train.previous" / "mine.txt").touch()
    with pytest.raises(RehearsalError, match=r"train.previous is not empty and was not made by a rehearsal"):
        start_folder(tmp_path / "train")
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
            "import sys; from pathlib import Path; from hubmap_kit.rehearsal.sandbox import remove_tree;"
            " remove_tree(Path(sys.argv[1]))"
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
