"""What a rehearsed kernel finds below /kaggle/input, and what a good session of it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hubmap_kit.errors import RehearsalError
from hubmap_kit.rehearsal.hidden import HiddenSet
from hubmap_kit.rehearsal.steps import LocalSources, Plan, competition_files, expected_output, kernel_mounts

BUILD = "0123456789ab-ba9876543210"


@pytest.fixture
def sources(tmp_path: Path) -> LocalSources:
    for name in (
        "code/a.whl",
        "code/dataset-metadata.json",
        "out/run/config.yaml",
        "train/train.csv",
        "train/test.csv",
        "hidden/test.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return LocalSources(
        {"kit-code": tmp_path / "code"},
        {"kit-train": tmp_path / "out"},
        competition_files(tmp_path / "train", tmp_path / "hidden"),
    )


METADATA = {"dataset_sources": ["me/kit-code"], "kernel_sources": ["me/kit-train"], "competition_sources": ["organs"]}


def test_only_what_the_metadata_lists_is_mounted_in_either_layout(sources: LocalSources, tmp_path: Path) -> None:
    assert kernel_mounts(METADATA, sources, "new") == (
        (tmp_path / "code/a.whl", "/kaggle/input/datasets/me/kit-code/a.whl"),
        (tmp_path / "out/run", "/kaggle/input/notebooks/me/kit-train/run"),
        (tmp_path / "train/train.csv", "/kaggle/input/competitions/organs/train.csv"),
        (tmp_path / "hidden/test.csv", "/kaggle/input/competitions/organs/test.csv"),
    )
    assert [target for _, target in kernel_mounts(METADATA, sources, "flat")] == [
        "/kaggle/input/kit-code/a.whl",
        "/kaggle/input/kit-train/run",
        "/kaggle/input/organs/train.csv",
        "/kaggle/input/organs/test.csv",
    ]
    assert kernel_mounts({"dataset_sources": []}, sources, "new") == ()


def test_a_source_that_is_not_here_is_named_with_the_way_to_get_it(sources: LocalSources) -> None:
    missing = (
        "the kernel attaches me/kit-weights, but nothing on this machine stands for it; stage it with 'hubmap push"
        " weights"
    )
    with pytest.raises(RehearsalError, match=missing):
        kernel_mounts({"dataset_sources": ["me/kit-weights"]}, sources, "new")
    with pytest.raises(RehearsalError, match="the kernel attaches me/other-kernel.*--output other-kernel=FOLDER"):
        kernel_mounts({"kernel_sources": ["me/other-kernel"]}, sources, "new")


@pytest.mark.parametrize(
    ("slides", "overrides", "statuses"),
    [
        (12, [], ("complete",)),
        (7, [], ("complete", "degraded")),
        (7, ["inference.tolerated_failures=0.3"], ("complete",)),
        (12, ["inference.tolerated_failures=0.1"], ("complete", "degraded")),
    ],
)
def test_planted_faults_may_make_a_session_degraded(
    hidden: HiddenSet, slides: int, overrides: list[str], statuses: tuple[str, ...], tmp_path: Path
) -> None:
    """Two of the hidden slides cannot be read."""
    plan = Plan(tmp_path, LocalSources(), hidden=replace(hidden, slides=hidden.slides[:slides]))
    assert expected_output("infer", {"BUILD_ID": BUILD, "OVERRIDES": overrides}, plan).statuses == statuses
