"""Finding what is attached, in the layouts that Kaggle has had."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hubmap_kit import build_id
from hubmap_kit.errors import KernelError
from hubmap_kit.kernel import mounts
from hubmap_kit.kernel.mounts import COMPETITION, CROWD, Inputs, inputs

# Where Kaggle puts a dataset, a kernel's output and the competition: now, and as it still does at times.
LAYOUTS = {
    "typed": ("datasets/alice/{}", "notebooks/alice/{}", f"competitions/{COMPETITION}"),
    "flat": ("{}", "{}", COMPETITION),
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    return LAYOUTS[request.param]


def scan(tmp_path: Path) -> Inputs:
    return inputs(tmp_path / "input", tmp_path / "scratch")


def competition(folder: Path) -> Path:
    (folder / "train_images").mkdir(parents=True)
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        (folder / name).touch()
    return folder


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((4,), value)}


def run(folder: Path, *folds: float, epochs: int = 1, checkpoints: bool = True) -> Path:
    """A run folder; folds with the same number have the same weights."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    for number, value in enumerate(folds):
        fold = folder / f"fold{number}"
        fold.mkdir()
        save_file(weights(value), fold / "model.safetensors")
        (fold / "metrics.csv").write_text("fold,epoch\n" + "".join(f"{number},{epoch}\n" for epoch in range(epochs)))
        if checkpoints:
            (fold / "last.ckpt").touch()
    return folder


def publish(kind: str, tree: Path, folder: Path) -> Path:
    """A dataset as Kaggle mounts it: every file of `tree` under its flat name, and BUILD_ID.json."""
    folder.mkdir(parents=True)
    paths = {
        build_id.flat_name(str(path.relative_to(tree))): str(path.relative_to(tree))
        for path in tree.rglob("*")
        if path.is_file()
    }
    for flat, path in paths.items():
        shutil.copyfile(tree / path, folder / flat)
    build_id.write(folder, build_id.describe(kind, folder, paths))
    return folder


def test_the_competition(layout: tuple[str, str, str], tmp_path: Path) -> None:
    with pytest.raises(
        KernelError, match=f"holds 0 folders with train.csv and test.csv.*attach the competition {COMPETITION}"
    ):
        scan(tmp_path).competition()
    found = competition(tmp_path / "input" / layout[2])
    assert scan(tmp_path).competition() == found
    competition(tmp_path / "input" / "another" / "copy")
    assert scan(tmp_path).competition() == found


def test_a_competition_under_a_third_name_must_be_the_only_one(tmp_path: Path) -> None:
    found = competition(tmp_path / "input" / "moved" / "again" / COMPETITION)
    assert scan(tmp_path).competition() == found
    competition(tmp_path / "input" / "datasets" / "bob" / "copy")
    with pytest.raises(KernelError, match=r"holds 2 folders .*moved.*mounted are .*datasets/bob"):
        scan(tmp_path).competition()


def test_runs_come_from_kernels_and_from_published_weights(layout: tuple[str, str, str], tmp_path: Path) -> None:
    assert scan(tmp_path).runs() == []
    root = tmp_path / "input"
    run(root / layout[1].format("hubmap-train") / "baseline", 1, 2)
    run(tmp_path / "trees" / "mini", 3)
    publish("weights", tmp_path / "trees", root / layout[0].format("hubmap-kit-weights"))
    found = scan(tmp_path).runs()
    assert [path.name for path in found] == ["baseline", "mini"]
    assert (found[1] / "fold0" / "model.safetensors").read_bytes() == (
        tmp_path / "trees" / "mini" / "fold0" / "model.safetensors"
    ).read_bytes()


def test_the_same_training_counts_once(layout: tuple[str, str, str], tmp_path: Path) -> None:
    root = tmp_path / "input"
    whole = run(root / layout[1].format("hubmap-train") / "baseline", 1, 2)
    run(root / layout[1].format("hubmap-train-old") / "baseline", 1)
    run(tmp_path / "trees" / "renamed", 1, 2)
    run(tmp_path / "trees" / "other", 1, 3)
    publish("weights", tmp_path / "trees", root / layout[0].format("hubmap-kit-weights"))
    found = scan(tmp_path).runs()
    assert [path.name for path in found] == ["baseline", "other"] and found[0] == whole


def test_published_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "trees" / "mini", 3)
    dataset = publish("weights", tmp_path / "trees", tmp_path / "input" / "w")
    save_file(weights(4), dataset / "mini__fold0__model.safetensors")
    with pytest.raises(KernelError, match=r"mini__fold0__model\.safetensors has the sha256"):
        scan(tmp_path).runs()


def test_the_run_to_resume_is_the_one_that_came_furthest(layout: tuple[str, str, str], tmp_path: Path) -> None:
    root = tmp_path / "input"
    assert scan(tmp_path).run_to_resume("baseline") is None
    for name, epochs, checkpoints in (("a", 3, True), ("b", 5, True), ("c", 9, False)):
        run(root / layout[1].format(f"kernel-{name}") / "baseline", 1, 2, epochs=epochs, checkpoints=checkpoints)
    run(root / layout[1].format("kernel-d") / "other", 1, epochs=99)
    found = scan(tmp_path).run_to_resume("baseline")
    assert found is not None and found.parent.name == "kernel-b"


def test_pretrained_weights_by_name(layout: tuple[str, str, str], tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"net\.pth is in none of the attached inputs"):
        scan(tmp_path).weights_file("net.pth")
    tree = tmp_path / "trees"
    tree.mkdir()
    save_file(weights(1), tree / "net.safetensors")
    dataset = publish("pretrained", tree, tmp_path / "input" / layout[0].format("hubmap-kit-pretrained"))
    for name in ("net.safetensors", "net.pth"):
        assert scan(tmp_path).weights_file(name).read_bytes() == (tree / "net.safetensors").read_bytes()
    foreign = tmp_path / "input" / layout[0].format("bobs-weights") / "other.pth"
    foreign.parent.mkdir()
    foreign.touch()
    assert scan(tmp_path).weights_file("other.pth") == foreign
    save_file(weights(2), dataset / "net.safetensors")
    with pytest.raises(KernelError, match=r"net\.safetensors has the sha256"):
        scan(tmp_path).weights_file("net.pth")


def test_a_malformed_marker_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    competition(tmp_path / "input" / COMPETITION)
    (tmp_path / "input" / "strange").mkdir()
    (tmp_path / "input" / "strange" / "BUILD_ID.json").write_text('{"kind": "code"}')
    found = scan(tmp_path)
    assert found.datasets == {} and found.competition() and "strange" in caplog.text


def test_crowded_folders_are_not_gone_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = competition(tmp_path / "input" / COMPETITION)
    for number in range(CROWD + 5):
        (folder / "train_images" / f"{number}").mkdir()
    looked = []
    real = os.scandir
    monkeypatch.setattr(mounts.os, "scandir", lambda path: looked.append(str(path)) or real(path))
    found = scan(tmp_path)
    assert len(looked) == 3 and found.competition() == folder
    assert max(len(each.names) for each in found.folders) == CROWD + 1


def test_nothing_is_looked_for_deep_down(tmp_path: Path) -> None:
    run(tmp_path / "input" / "a/b/c/d/e/f/g", 1)
    assert scan(tmp_path).runs() == []


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    competition(tmp_path / "input" / COMPETITION)
    (tmp_path / "input" / "gone").symlink_to(tmp_path / "nowhere")
    locked = tmp_path / "input" / "locked"
    locked.mkdir()
    real = os.scandir

    def scandir(path: str) -> object:
        # Permissions do not hold root back, as whom tests may run.
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(mounts.os, "scandir", scandir)
    found = scan(tmp_path)
    assert found.competition() and locked not in [folder.path for folder in found.folders]


def test_the_weights_that_are_meant_are_waited_for(
    layout: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset's new version may be mounted, or be whole, only a little after the session's start."""
    mounted = tmp_path / "input" / layout[0].format("hubmap-kit-weights")
    run(tmp_path / "old" / "mini", 1)
    run(tmp_path / "new" / "mini", 2)
    publish("weights", tmp_path / "old", mounted)
    wanted = build_id.read(publish("weights", tmp_path / "new", tmp_path / "next")).build_id
    steps = [
        lambda: (
            shutil.copytree(tmp_path / "next", mounted, dirs_exist_ok=True)
            and (mounted / "mini__config.yaml").write_text("")
        ),
        lambda: shutil.copytree(tmp_path / "next", mounted, dirs_exist_ok=True),
    ]
    monkeypatch.setattr(mounts, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: steps.pop(0)()))
    found = mounts.with_weights(tmp_path / "input", tmp_path / "scratch", wanted)
    assert not steps and found.weights_ids() == [wanted] and [path.name for path in found.runs()] == ["mini"]


def test_other_weights_than_those_that_are_meant_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "WAIT_S", 0.0)
    with pytest.raises(KernelError, match="holds no published weights, expected build weights-0"):
        mounts.with_weights(tmp_path / "input", tmp_path / "scratch", "weights-0")
    run(tmp_path / "trees" / "mini", 1)
    held = build_id.read(publish("weights", tmp_path / "trees", tmp_path / "input" / "w")).build_id
    with pytest.raises(
        KernelError, match=f"holds the weights {held}, expected build weights-0.*push weights and kernel again"
    ):
        mounts.with_weights(tmp_path / "input", tmp_path / "scratch", "weights-0")
    assert mounts.with_weights(tmp_path / "input", tmp_path / "scratch", "").weights_ids() == [held]
