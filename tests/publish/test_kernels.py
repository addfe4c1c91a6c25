"""Rendered kernels, and kernels pushed and followed with the real command line and client against the stand-in for Kaggle."""

from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kaggle_double import Double
from kaggle_double.server import KEY

from hubmap_kit.__main__ import main
from hubmap_kit.errors import PublishError
from hubmap_kit.publish.kernel_metadata import Sources, kernel_metadata, read_metadata
from hubmap_kit.publish.root import repository
from hubmap_kit.publish.script import bake, constants_of
from hubmap_kit.runtime import build_id

ROOT = repository()
SCRIPTS = {name: (ROOT / "kernels" / name / f"{name}.py").read_text() for name in ("train", "infer", "tiles")}
BOOTSTRAP = (ROOT / "kernels" / "bootstrap.py").read_text()


def stage(folder: Path, content: bytes) -> str:
    """A code dataset that Kaggle would take; its wheel is never installed here."""
    folder.mkdir()
    (folder / "hubmap_kit-0.1.0-py3-none-any.whl").write_bytes(content)
    build = build_id.describe("code", folder, git_sha="0" * 40)
    build_id.write(folder, build)
    return build.build_id


@dataclass
class World:
    """A stand-in for Kaggle that serves the code bundle `build`, a newer bundle that was never pushed, and a place for renderings."""

    double: Double
    tmp: Path
    build: str
    newer: str

    def command(self, *words: str, staged: str = "code") -> list[str]:
        places = ["--out", str(self.tmp / "kernels"), "--staged", str(self.tmp / staged), "--every", "0.05"]
        return [sys.executable, "-m", "hubmap_kit", "kernels", *words, *places]

    def environment(self) -> dict[str, str]:
        return {**self.double.environment(self.tmp / "environment"), "OMP_NUM_THREADS": "1"}

    def run(self, *words: str, staged: str = "code") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, staged=staged), env=self.environment(), cwd=self.tmp, capture_output=True, text=True, check=False, timeout=120
        )

    def pushed(self, ref: str = "alice/hubmap-train"):
        return self.double.state.kernels[ref].versions[-1]


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    tmp = tmp_path_factory.mktemp("kaggle")
    with Double(public_datasets=("alice/hubmap-kit-weights", "alice/hubmap-kit-pretrained")) as double:
        world = World(double, tmp, stage(tmp / "code", b"one"), stage(tmp / "newer", b"two"))
        words = [sys.executable, "-m", "hubmap_kit", "push", "code", "--staged", str(tmp / "code"), "--poll", "0.05"]
        done = subprocess.run(words, env=world.environment(), cwd=tmp, capture_output=True, text=True, check=False)
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
    "dataset source refused": (("invalid_dataset_source",), (), ("without its dataset source", "alice/hubmap-kit-code")),
    "model source refused, which no client prints": (("invalid_model_source",), (), ("without its model source",)),
    "third GPU session": (("gpu_limit",), (), ("Maximum batch GPU session count of 2", "wait")),
    "retired accelerator": ((), ("--accelerator", "p100"), ("retired", "T4 x2", "--accelerator t4x2")),
    "quota too small": (("quota_used_up",), (), ("11.5 h", "0.0 of 30.0 GPU hours", "--hours", "--force")),
    "kernel fails": (("kernel_fails",), (), ("failed on Kaggle", "raised an error")),
    "kernel says that it failed": (("kernel_completes_failed",), (), ("says that it failed",)),
    "complete without the end marker": (("kernel_completes_without_marker",), (), ("complete", "HUBMAP END", "crashed")),
    "kernel ran stale code": (("kernel_stale_build_id",), (), ("stale build 0123456789ab-0123456789ab",)),
    "kernel cancelled": (("kernel_cancelled",), (), ("cancelled",)),
    "kernel never ends": (("kernel_never_ends",), ("--timeout", "0.0001"), ("goes on on Kaggle", "hubmap kernels train --follow")),
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
    done = world.run("--run", "train", staged="newer")
    check_sentence(done, (f"build {world.build}", f"expects build {world.newer}", "hubmap push code"), record_property)
    assert "SaveKernel" not in world.double.called[before:]


def test_without_a_staged_bundle_the_code_must_be_pushed_first(world: World, record_property) -> None:
    check_sentence(world.run("--run", "train", staged="nowhere"), ("nowhere", "hubmap push code"), record_property)


def test_without_credentials_nothing_is_rendered_for_nobody(world: World, record_property) -> None:
    world.double.faults = ("no_credentials",)
    check_sentence(world.run("tiles"), ("KAGGLE_API_TOKEN",), record_property)


def test_a_kernel_is_pushed_as_rendered_and_followed_to_its_end(world: World, tmp_path: Path) -> None:
    done = world.run("--run", "train", "--follow", "--folds", "1,0", "--set", "training.epochs=2", "--hours", "3", "--output", str(tmp_path / "got"))
    assert done.returncode == 0, done.stderr
    assert f"HUBMAP END train complete build_id={world.build}" in done.stdout
    assert "hubmap kernels --run infer --attach kernel:train" in done.stdout
    assert json.loads((tmp_path / "got" / "kernel.json").read_text())["build_id"] == world.build
    version = world.pushed()
    assert version.text == (world.tmp / "kernels" / "train" / "train.py").read_text()
    assert version.asked["isPrivate"] is True and not version.internet
    assert version.accelerator == "NvidiaTeslaT4"
    assert version.sources["datasets"] == ["alice/hubmap-kit-code"] and version.sources["competitions"] == ["hubmap-organ-segmentation"]
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
        world.command("--run", "train", "--follow"), env=world.environment(), cwd=world.tmp, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    while "is complete" not in (line := process.stderr.readline()):
        assert line
    del world.double.world.logs["hubmap-train"]
    world.pushed().log = f"HUBMAP END train stopped build_id={world.build} utc=2026-01-01T00:00:00Z\n"
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "utc=2026-01-01T00:00:00Z" in out and "alice/hubmap-train: stopped" in out
    assert "HUBMAP END train complete" not in out


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
    assert "SaveKernel" not in world.double.called[before:]


def test_ctrl_c_leaves_the_kernel_running_and_says_how_to_look_again(world: World) -> None:
    world.double.faults = ("kernel_never_ends",)
    process = subprocess.Popen(
        world.command("--run", "train", "--follow"), env=world.environment(), cwd=world.tmp, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    lines = []
    while "is running" not in (line := process.stderr.readline()):
        assert line, "".join(lines)
        lines.append(line)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130
    assert rest.strip().splitlines()[-1].startswith("error: stopped following alice/hubmap-train") and "hubmap kernels train --follow" in rest
    assert "Traceback" not in rest
    assert world.pushed().status == "RUNNING"


# Rendering

def rendered(out: Path, *words: str) -> dict[str, str]:
    """The scripts of a rendering in this process, by kernel."""
    stage(out / "code", b"wheel") if not (out / "code").exists() else None
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *words, "--owner", "bob", "--out", str(out / "k"), "--staged", str(out / "code")])
    assert stop.value.code == 0
    return {path.stem: path.read_text() for path in sorted((out / "k").glob("*/*.py"))}


def test_every_kernel_becomes_one_short_script_that_stands_alone(tmp_path: Path) -> None:
    scripts = rendered(tmp_path)
    assert set(scripts) == {"train", "infer", "tiles"}
    for name, text in scripts.items():
        assert len(text.splitlines()) <= 85
        modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert "bootstrap" not in modules and text.count("__future__") <= 1
        space: dict[str, object] = {"__name__": "looked_at"}
        exec(compile(text, name, "exec"), space)
        assert callable(space["start"])
        assert space["BUILD_ID"] == build_id.read(tmp_path / "code").build_id
        # What nobody chose is as the repository says.
        for key, value in constants_of(SCRIPTS[name], name).items():
            assert key == "BUILD_ID" or space[key] == value


def test_rendering_writes_metadata_for_the_account_and_leaves_nothing_old(tmp_path: Path) -> None:
    rendered(tmp_path)
    for name in ("train", "infer", "tiles"):
        (tmp_path / "k" / name / "left-over.py").write_text("x = 1\n")
    digest = "sha256:" + "ab" * 32
    rendered(tmp_path, "infer", "--attach", "weights", "--attach", "kernel:train", "--attach", "carol/more-runs", "--image", digest)
    assert sorted(path.name for path in (tmp_path / "k" / "infer").iterdir()) == ["infer.py", "kernel-metadata.json"]
    values = read_metadata(tmp_path / "k" / "infer")
    assert values["dataset_sources"] == ["bob/hubmap-kit-code", "bob/hubmap-kit-weights", "carol/more-runs"]
    assert values["kernel_sources"] == ["bob/hubmap-train"]
    assert values["docker_image"].endswith("@" + digest)
    assert (values["enable_internet"], values["is_private"], values["enable_gpu"]) == (False, True, True)
    tiles = read_metadata(tmp_path / "k" / "tiles")
    assert tiles["enable_gpu"] is False and "machine_shape" not in tiles and tiles["enable_internet"] is False


def test_a_training_from_encoder_weights_gets_them_attached(tmp_path: Path) -> None:
    rendered(tmp_path, "train", "--set", "model.encoder_weights=encoder.safetensors", "--accelerator", "p100")
    values = read_metadata(tmp_path / "k" / "train")
    assert values["dataset_sources"] == ["bob/hubmap-kit-code", "bob/hubmap-kit-pretrained"]
    assert values["machine_shape"] == "NvidiaTeslaP100"


WRONG = {
    "unknown kernel": (["trains"], "did you mean 'train'"),
    "unknown accelerator": (["train", "--accelerator", "v100"], "t4x2, p100, cpu"),
    "a setting that is none": (["train", "--set", "training.epoch=3"], "epochs"),
    "a file as experiment": (["train", "--config", "mine.yaml"], "hubmap_kit/configs"),
    "folds of a kernel without": (["infer", "--folds", "0"], "--folds means nothing to infer"),
    "folds in words": (["train", "--folds", "all"], "numbers such as 0,2"),
    "training settings for infer": (["infer", "--set", "training.lr=1"], "means nothing to infer"),
    "resume of a kernel that cannot": (["tiles", "--resume"], "--resume means nothing to tiles"),
    "hours beyond the competition": (["infer", "--hours", "9.5"], "at most 9 hours"),
    "hours below zero": (["train", "--hours", "-1"], "at most 12 hours"),
    "attached to all": (["--attach", "weights"], "meant for one kernel"),
    "attached nonsense": (["infer", "--attach", "wheights"], "owner/slug"),
    "half an image": (["train", "--image", "sha256:12"], "64 hex digits"),
    "another kernel than the one to run": (["train", "--run", "infer"], "--run is 'infer'"),
    "follow nothing": (["train", "infer", "--follow"], "name it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rendering_is_one_sentence_and_changes_nothing(name: str, tmp_path: Path, world: World, capsys, monkeypatch, record_property) -> None:
    words, said = WRONG[name]
    for key, value in world.environment().items():
        monkeypatch.setenv(key, value)
    stage(tmp_path / "code", b"wheel")
    with pytest.raises(SystemExit) as stop:
        main(["kernels", *words, "--owner", "bob", "--out", str(tmp_path / "k"), "--staged", str(tmp_path / "code")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    record_property("exit code", stop.value.code)
    record_property("sentence", last)
    assert stop.value.code == 1 and last.startswith("error: ") and said in last
    assert not (tmp_path / "k").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_private": False}, "private"), ({"enable_internet": True}, "internet"), ({"enable_internet": "false"}, "true or false"),
        ({"title": "hubmap infer 2"}, "hubmap-infer"), ({"title": None}, "title"), ({"kernel_type": "notebook"}, "script"),
        ({"code_file": "other.py"}, "infer.py"),
    ],
)  # fmt: skip
def test_a_template_that_kaggle_would_take_wrongly_is_refused(change: dict[str, object], said: str) -> None:
    template = read_metadata(ROOT / "kernels" / "infer") | change
    with pytest.raises(PublishError, match=said):
        kernel_metadata("infer", template, Sources("alice", "t4x2"))


@pytest.mark.parametrize(("asked", "written"), [({}, False), ({"enable_internet": False}, False), ({"enable_internet": True}, True)])
def test_internet_is_always_written_because_the_client_takes_its_absence_for_yes(asked: dict[str, bool], written: bool) -> None:
    template = read_metadata(ROOT / "kernels" / "train")
    del template["enable_internet"]
    assert kernel_metadata("train", template | asked, Sources("alice", "t4x2"))["enable_internet"] is written


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.sampled_from(["CONFIG", "FOLDS", "OVERRIDES", "SESSION_HOURS"]), LITERALS), LITERALS)
def test_any_plain_value_survives_the_rendering(chosen: dict[str, object], old: object) -> None:
    """The old value may be anything too, on many lines, with characters of several bytes before it and a comment after it."""
    folds, rest = f'FOLDS = [\n    "ü",  # é\n    {old!r},\n]  # kept', f'CONFIG = "Ä", {old!r}; SESSION_HOURS = 1  # 𝔸 = 2'
    script = f'"""Ä."""\nfrom bootstrap import start\n{folds}\n{rest}\nOVERRIDES = []\n'
    text = bake(script, BOOTSTRAP, chosen, "script.py")
    space: dict[str, object] = {"__name__": "looked_at"}
    exec(compile(text, "script.py", "exec"), space)
    before: dict[str, object] = {}
    exec(compile(script.replace("from bootstrap import start", ""), "script.py", "exec"), before)
    for key in ("CONFIG", "FOLDS", "OVERRIDES", "SESSION_HOURS"):
        assert space[key] == (chosen[key] if key in chosen else before[key])
    assert "# kept\n" in text and "# 𝔸 = 2\n" in text


@pytest.mark.parametrize(
    ("script", "constants", "said"),
    [
        ("from bootstrap import start\nA = 1\n", {"B": 2}, "no constant B"),
        ("from bootstrap import start\nA = len('x')\n", {"A": 2}, "no constant A"),
        ("from bootstrap import start\nif True:\n    A = 1\n", {"A": 2}, "no constant A"),
        ("A = 1\n", {"A": 2}, "from bootstrap import start"),
        ("from bootstrap import start\nA = (\n", {"A": 2}, "line 2 is not valid Python"),
        ("from bootstrap import start\nA = 1\ndef find(): pass\n", {"A": 2}, "both define find"),
    ],
)
def test_a_script_that_cannot_be_rendered_is_named(script: str, constants: dict[str, object], said: str) -> None:
    with pytest.raises(PublishError, match=said):
        bake(script, BOOTSTRAP, constants, "script.py")
