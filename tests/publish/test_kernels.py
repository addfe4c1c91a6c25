"""Kernels pushed and followed with the real command line and client against the stand-in for Kaggle."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import warm
from kaggle_double import Double
from kaggle_double.kernels import log
from kaggle_double.server import KEY
from staged_builds import stage, stage_weights

from hubmap_kit import build_id
from hubmap_kit.publish.records import last_push
from hubmap_kit.publish.root import repository
from hubmap_kit.publish.script import constants_of

ROOT = repository()


@dataclass
class World:
    """A stand-in for Kaggle that serves the code bundle `build` and `weights`, newer ones that were never pushed, a
    place for renderings.
    """

    double: Double
    tmp: Path
    build: str
    newer: str
    weights: str
    newer_weights: str

    def command(self, *words: str, staged: str = "staged/code") -> list[str]:
        places = ["--out", str(self.tmp / "kernels"), "--staged", str(self.tmp / staged), "--every", "0.05"]
        return [sys.executable, "-m", "hubmap_kit", "kernels", *words, *places]

    def environment(self) -> dict[str, str]:
        return {**self.double.environment(self.tmp / "environment"), "OMP_NUM_THREADS": "1"}

    def run(self, *words: str, staged: str = "staged/code") -> subprocess.CompletedProcess[str]:
        return warm.run(self.command(*words, staged=staged), env=self.environment(), cwd=self.tmp, timeout=120)

    def pushed(self, ref: str = "alice/hubmap-train"):
        return self.double.state.kernels[ref].versions[-1]


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    tmp = tmp_path_factory.mktemp("kaggle")
    with Double() as double:
        builds = stage(tmp / "staged" / "code", b"one"), stage(tmp / "newer" / "code", b"two")
        weights = (
            stage_weights(tmp / "staged" / "weights", b"name: one\n"),
            stage_weights(tmp / "newer" / "weights", b"name: two\n"),
        )
        world = World(double, tmp, *builds, *weights)
        for kind in ("code", "weights"):
            words = [
                sys.executable,
                "-m",
                "hubmap_kit",
                "push",
                kind,
                "--staged",
                str(tmp / "staged" / kind),
                "--poll",
                "0.05",
            ]
            done = warm.run(words, env=world.environment(), cwd=tmp)
            assert done.returncode == 0, done.stderr
        yield world
        assert not double.mistakes and not double.escapes


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """The shared stand-in without faults, with no session running and with half of the week's quota."""
    shared_world.double.faults = ()
    yield shared_world
    for kernel in shared_world.double.state.kernels.values():
        for version in kernel.versions:
            version.status = version.end


# What is refused, or must not be believed. Each row: faults of Kaggle, words of the command, words of the one sentence.
CASES = {
    "push answered with an error": (("kernel_push_error",), (), ("alice/hubmap-train", "Notebook could not be saved")),
    "dataset source refused": (
        ("invalid_dataset_source",),
        (),
        ("without its dataset source", "alice/hubmap-kit-code"),
    ),
    "model source refused, which no client prints": (("invalid_model_source",), (), ("without its model source",)),
    "third GPU session": (
        ("gpu_limit",),
        ("--timeout", "0.0001"),
        ("Maximum batch GPU session count of 2", "wait for a running session to end"),
    ),
    "retired accelerator": ((), ("--accelerator", "p100"), ("retired", "T4 x2", "--accelerator t4x2")),
    "quota too small": (("quota_used_up",), (), ("11.5 h", "0.0 of 30.0 GPU hours", "--hours", "--force")),
    "kernel fails": (("kernel_fails",), (), ("failed on Kaggle", "raised an error")),
    "kernel says that it failed": (("kernel_completes_failed",), (), ("says that it failed",)),
    "complete without the end marker": (
        ("kernel_completes_without_marker",),
        (),
        ("complete", "HUBMAP END", "crashed"),
    ),
    "kernel ran stale code": (("kernel_stale_build_id",), (), ("stale build 0123456789ab-0123456789ab",)),
    "kernel cancelled": (("kernel_cancelled",), (), ("cancelled",)),
    "kernel never ends": (
        ("kernel_never_ends",),
        ("--timeout", "0.0001"),
        ("goes on on Kaggle", "hubmap kernels train --follow"),
    ),
}
REFUSED_BEFORE = ("push answered with an error", "third GPU session", "retired accelerator", "quota too small")


@pytest.mark.parametrize("name", CASES)
def test_what_goes_wrong_is_exit_code_1_and_one_sentence(name: str, world: World, record_property) -> None:
    faults, more, words = CASES[name]
    world.double.faults = faults
    before = sum(len(kernel.versions) for kernel in world.double.state.kernels.values())
    done = world.run("--run", "train", "--follow", *more)
    check_sentence(done, words, record_property)
    saved = sum(len(kernel.versions) for kernel in world.double.state.kernels.values()) - before
    assert saved == (0 if name in REFUSED_BEFORE else 1)


def check_sentence(done: subprocess.CompletedProcess[str], words: tuple[str, ...], record_property) -> str:
    """Exit code 1, the last line is the sentence, and neither a traceback nor a key is anywhere."""
    last = done.stderr.strip().splitlines()[-1]
    record_property("exit code", done.returncode)
    record_property("sentence", last)
    assert done.returncode == 1, done.stdout + done.stderr
    assert last.startswith("error: ")
    for word in words:
        assert word in last
    for text in (done.stdout, done.stderr):
        assert "Traceback" not in text
        assert "Basic " not in text and KEY not in text
    return last


def test_a_kernel_for_code_that_kaggle_does_not_serve_is_not_pushed(world: World, record_property) -> None:
    before = len(world.double.requests)
    done = world.run("--run", "train", staged="newer/code")
    check_sentence(done, (f"build {world.build}", f"expects build {world.newer}", "hubmap push code"), record_property)
    assert "SaveKernel" not in world.double.called[before:]


def test_without_a_staged_bundle_the_code_must_be_pushed_first(world: World, record_property) -> None:
    check_sentence(world.run("--run", "train", staged="nowhere"), ("nowhere", "hubmap push code"), record_property)


def test_without_credentials_nothing_is_rendered_for_nobody(world: World, record_property) -> None:
    world.double.faults = ("no_credentials",)
    check_sentence(world.run("tiles"), ("KAGGLE_API_TOKEN",), record_property)


def test_a_kernel_is_pushed_as_rendered_and_followed_to_its_end(world: World, tmp_path: Path) -> None:
    done = world.run(
        "--run",
        "train",
        "--follow",
        "--folds",
        "1,0",
        "--set",
        "training.epochs=2",
        "--hours",
        "3",
        "--output",
        str(tmp_path / "got"),
    )
    assert done.returncode == 0, done.stderr
    assert f"HUBMAP END train complete build_id={world.build}" in done.stdout
    assert "hubmap kernels --run infer --attach-only kernel:train" in done.stdout
    assert json.loads((tmp_path / "got" / "kernel.json").read_text())["build_id"] == world.build
    version = world.pushed()
    assert version.text == (world.tmp / "kernels" / "train" / "train.py").read_text()
    assert version.asked["isPrivate"] is True and not version.internet
    assert version.accelerator == "NvidiaTeslaT4"
    assert version.sources["datasets"] == ["alice/hubmap-kit-code"] and version.sources["competitions"] == [
        "hubmap-organ-segmentation"
    ]
    assert 3 * 3600 < version.asked["sessionTimeoutSeconds"] < 4 * 3600
    found = constants_of(version.text, "train.py")
    assert (found["FOLDS"], found["OVERRIDES"], found["SESSION_HOURS"]) == ([0, 1], ["training.epochs=2"], 3.0)
    again = world.run("train", "--follow")
    assert again.returncode == 0 and "train complete" in again.stdout


def test_the_end_of_the_session_before_is_not_taken_for_the_new_one(world: World) -> None:
    assert world.run("--run", "train", "--follow").returncode == 0
    old = world.pushed().log
    world.double.world.logs["hubmap-train"] = old
    process = subprocess.Popen(
        world.command("--run", "train", "--follow"),
        env=world.environment(),
        cwd=world.tmp,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    while "is complete" not in (line := process.stderr.readline()):
        assert line
    del world.double.world.logs["hubmap-train"]
    world.pushed().log = log([f"HUBMAP END train stopped build_id={world.build} utc=2026-01-01T00:00:00Z"])
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "utc=2026-01-01T00:00:00Z" in out and "alice/hubmap-train: stopped" in out
    assert "HUBMAP END train complete" not in out


def test_a_log_is_printed_on_a_console_that_lacks_its_characters(world: World) -> None:
    world.double.faults = ("log_odd_text",)
    words = world.command("--run", "train", "--follow")
    done = subprocess.run(
        words,
        env=world.environment() | {"PYTHONIOENCODING": "cp1252"},
        cwd=world.tmp,
        capture_output=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert b"100%|???|" in done.stdout and b"alice/hubmap-train: complete" in done.stdout


def test_a_stopped_training_says_how_to_go_on_and_then_does(world: World) -> None:
    world.double.faults = ("kernel_stopped",)
    done = world.run("--run", "train", "--follow")
    assert done.returncode == 0 and "--run train --resume" in done.stdout, done.stderr
    world.double.faults = ()
    assert world.run("--run", "train", "--resume").returncode == 0
    assert world.pushed().sources["kernels"] == ["alice/hubmap-train"]


def test_force_pushes_although_the_quota_may_not_suffice(world: World) -> None:
    before = world.double.world.settings
    world.double.world.settings = replace(before, gpu_used_h=25.0)
    try:
        assert world.run("--run", "train", "--hours", "4").returncode == 0
        assert world.run("--run", "train").returncode == 1
        assert world.run("--run", "train", "--force").returncode == 0
    finally:
        world.double.world.settings = before


def test_a_dry_run_pushes_nothing(world: World) -> None:
    before = len(world.double.requests)
    done = world.run("--run", "infer", "--dry-run", "--attach", "kernel:train")
    assert done.returncode == 0 and "would push" in done.stdout and "alice/hubmap-train" in done.stdout
    assert "alice/hubmap-kit-weights" in done.stdout and f"WEIGHTS_ID='{world.weights}'" in done.stdout
    assert "SaveKernel" not in world.double.called[before:]


def test_ctrl_c_leaves_the_kernel_running_and_says_how_to_look_again(world: World) -> None:
    world.double.faults = ("kernel_never_ends",)
    process = subprocess.Popen(
        world.command("--run", "train", "--follow"),
        env=world.environment(),
        cwd=world.tmp,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    lines = []
    while "is running" not in (line := process.stderr.readline()):
        assert line, "".join(lines)
        lines.append(line)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (
        rest.strip().splitlines()[-1].startswith("error: stopped following alice/hubmap-train")
        and "hubmap kernels train --follow" in rest
    )
    assert "Traceback" not in rest
    assert world.pushed().status == "RUNNING"


def test_infer_is_pushed_for_the_weights_that_are_staged_and_served(world: World, record_property) -> None:
    assert world.run("--run", "infer").returncode == 0
    assert constants_of(world.pushed("alice/hubmap-infer").text, "infer.py")["WEIGHTS_ID"] == world.weights
    before = len(world.double.requests)
    (world.tmp / "mixed").mkdir()
    (world.tmp / "mixed" / "code").symlink_to(world.tmp / "staged" / "code")
    (world.tmp / "mixed" / "weights").symlink_to(world.tmp / "newer" / "weights")
    words = (f"build {world.weights}", f"expects build {world.newer_weights}", "hubmap push weights", "--force")
    check_sentence(world.run("--run", "infer", staged="mixed/code"), words, record_property)
    assert "SaveKernel" not in world.double.called[before:]
    assert world.run("--run", "infer", "--force", staged="mixed/code").returncode == 0
    assert constants_of(world.pushed("alice/hubmap-infer").text, "infer.py")["WEIGHTS_ID"] == world.weights
    # On a machine where none are staged, Kaggle's are meant.
    (world.tmp / "mixed" / "weights").unlink()
    assert f"WEIGHTS_ID='{world.weights}'" in world.run("--run", "infer", "--dry-run", staged="mixed/code").stdout


def test_code_of_another_commit_is_not_what_a_kernel_is_rendered_for(world: World, record_property) -> None:
    old = stage(world.tmp / "old" / "code", b"one", "1" * 40)
    done = world.run("tiles", "--owner", "alice", staged="old/code")
    check_sentence(
        done,
        ("old/code holds the code of commit 111111111111, but the checkout is at", "hubmap push code", "--force"),
        record_property,
    )
    done = world.run("tiles", "--owner", "alice", "--force", staged="old/code")
    assert done.returncode == 0 and f"BUILD_ID='{old}'" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("train", "--attach", "pretrained"),
            ("alice/hubmap-kit-pretrained does not exist", "hubmap push pretrained", "--attach-only"),
        ),
        (("infer", "--attach", "alice/more-runs"), ("alice/more-runs does not exist", "upload it first")),
        (("infer", "--attach-only", "kernel:tiles"), ("alice/hubmap-make-tiles does not exist",)),
    ],
)
def test_an_input_of_ones_own_that_is_not_there_is_noticed_before_the_push(
    words: tuple[str, ...], said: tuple[str, ...], world: World, record_property
) -> None:
    before = len(world.double.requests)
    check_sentence(world.run("--run", *words), said, record_property)
    assert "SaveKernel" not in world.double.called[before:]


def test_following_looks_at_the_version_that_was_pushed_from_here(world: World) -> None:
    assert world.run("--run", "train").returncode == 0
    mine = world.pushed().number
    world.double.faults = ("kernel_fails",)
    elsewhere = warm.run(
        [*world.command("--run", "train", "--force"), "--out", str(world.tmp / "elsewhere")],
        env=world.environment(),
        cwd=world.tmp,
    )
    assert elsewhere.returncode == 0 and world.pushed().number == mine + 1
    done = world.run("train", "--follow")
    assert done.returncode == 0 and f"log of version {mine} is made up" in done.stdout, done.stderr


def test_a_push_whose_answer_was_lost_is_found_again(world: World, record_property) -> None:
    def saved() -> int:
        return len(world.double.state.kernels["alice/hubmap-train"].versions)

    assert world.run("--run", "train", "--follow").returncode == 0
    before = saved()
    world.double.faults = ("save_answer_lost",)
    done = world.run("--run", "train")
    assert (
        done.returncode == 0
        and f"HTTP 503: Service Unavailable); but Kaggle shows version {before + 1} of it" in done.stderr
    ), done.stderr
    before += 1
    assert saved() == before
    world.double.faults = ("save_answer_lost", "kernel_old_number")
    words = (
        "HTTP 503",
        "may have been saved all the same",
        "hubmap kernels train --follow",
        "https://www.kaggle.com/code/alice/hubmap-train",
    )
    check_sentence(world.run("--run", "train"), words, record_property)
    assert saved() == before + 1
    world.double.faults = ()
    check_sentence(world.run("--run", "train"), (f"went through as version {before + 1}", "--follow"), record_property)
    assert saved() == before + 1
    done = world.run("train", "--follow")
    assert done.returncode == 0 and f"log of version {before + 1} is made up" in done.stdout, done.stderr
    # One that did not come through leaves the last push what it was, and the next is made.
    world.double.faults = ("save_refused_503",)
    check_sentence(world.run("--run", "train"), ("may have been saved all the same",), record_property)
    world.double.faults = ()
    intent = world.tmp / "kernels" / "train.pushing.json"
    intent.write_text(re.sub(r"20\d\d-", "2025-", intent.read_text()))  # long enough ago to be shown by now
    done = world.run("train", "--follow")
    assert (
        done.returncode == 0
        and "did not go through" in done.stderr
        and f"log of version {before + 1} is made up" in done.stdout
    )
    assert world.run("--run", "train").returncode == 0 and saved() == before + 2


def test_ctrl_c_while_a_kernel_is_saved_says_how_to_see_whether_it_was(world: World) -> None:
    world.double.faults = ("save_silent",)
    before = world.pushed().number
    process = subprocess.Popen(
        world.command("--run", "train"),
        env=world.environment(),
        cwd=world.tmp,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while world.pushed().number == before:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in rest
    last = rest.strip().splitlines()[-1]
    assert (
        last.startswith("error: stopped while kernel alice/hubmap-train was being saved")
        and "hubmap kernels train --follow" in last
    )
    world.double.faults = ()
    done = world.run("train", "--follow")
    assert done.returncode == 0 and f"log of version {before + 1} is made up" in done.stdout, done.stderr


def test_a_push_to_the_stand_in_leaves_nothing_that_a_real_one_would_believe(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.run("--run", "train", "--follow").returncode == 0
    folder = world.tmp / "kernels" / "train"
    for there in ("LOCALHOST", "PROD"):
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", there)
        assert (last_push(folder) is not None) == (there == "LOCALHOST")
    # A checkout of its own, whose folder build is looked at.
    kit = tmp_path / "kit"
    for name in ("hubmap_kit", "kernels", "datasets-meta"):
        shutil.copytree(ROOT / name, kit / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "setup.py", kit / "setup.py")
    for place, there in (("build/rehearsed-push", "LOCALHOST"), ("build", "PROD")):
        stage(kit / place / "datasets" / "code", there.encode(), None)
        words = [sys.executable, "-m", "hubmap_kit", "kernels", "tiles", "--owner", "bob"]
        environment = {**world.environment(), "KAGGLE_API_ENVIRONMENT": there, "PYTHONPATH": str(kit)}
        done = subprocess.run(words, env=environment, cwd=kit, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        script = kit / place / "kernels" / "tiles" / "tiles.py"
        assert build_id.read(kit / place / "datasets" / "code").build_id in script.read_text()
        assert (kit / "build" / "kernels").exists() == (there == "PROD")
