"""`hubmap push` with the real Kaggle client against a double: what is uploaded, when it ends, what an interrupted one
leaves.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hubmap_kit import build_id

Kaggle = Callable[..., Any]
REF = "alice/hubmap-kit-pretrained"
QUICK = ("--poll", "0.05", "--timeout", "0.2")  # seconds, minutes
SLOW = ("--poll", "1")  # leaves the time to interrupt


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "dataset-metadata.json"}


def waits_after(cli: Any, call: str) -> bool:
    """Whether the client looks at the dataset after `call`."""
    called = cli.double.called
    return call in called and "GetDatasetStatus" in called[called.index(call) :]


def test_first_push_creates_a_private_dataset_the_second_uploads_nothing(kaggle: Kaggle, staged: Path) -> None:
    with kaggle() as cli:
        first = cli.push(staged, *QUICK)
        assert (first.code, f"{REF}: created, version 1" in first.out) == (0, True), first.err
        dataset = cli.double.state.datasets[REF]
        assert dataset.private
        assert (dataset.title, dataset.licence) == ("hubmap-kit-pretrained", "other")
        assert cli.held(REF) == content(staged)
        cli.double.requests.clear()
        second = cli.push(staged, *QUICK)
        assert (second.code, f"{REF}: unchanged, version 1" in second.out) == (0, True), second.err
        assert not cli.written()


def test_a_changed_build_becomes_a_version_and_force_another(kaggle: Kaggle, staged: Path, hold: Any) -> None:
    with kaggle(token=True) as cli:
        dataset = hold(cli.double)
        done = cli.push(staged, *QUICK)
        assert (done.code, f"{REF}: versioned, version 2" in done.out) == (0, True), done.err
        assert cli.held(REF) == content(staged)
        assert dataset.versions[-1].notes == build_id.read(staged).build_id
        done = cli.push(staged, "--force", *QUICK)
        assert (done.code, f"{REF}: versioned, version 3" in done.out) == (0, True), done.err
        assert "CreateDataset" not in cli.double.called


def test_the_verb_stages_what_it_is_given(kaggle: Kaggle, builds: tuple[Path, Path], tmp_path: Path) -> None:
    with kaggle() as cli:
        out = tmp_path / "datasets" / "pretrained"
        done = cli("push", "pretrained", "--weights", builds[1] / "encoder.safetensors", "--out", out, *QUICK)
        assert done.code == 0, done.err
        assert set(cli.held(REF)) == {"BUILD_ID.json", "encoder.safetensors"}
        assert cli.held(REF) == content(out)
        assert build_id.verify(out).build_id in done.out


@pytest.mark.parametrize("there", [False, True], ids=["absent", "held"])
def test_a_dry_run_writes_nothing(kaggle: Kaggle, staged: Path, hold: Any, there: bool) -> None:
    with kaggle() as cli:
        if there:
            hold(cli.double)
        done = cli.push(staged, "--dry-run", *QUICK)
        assert done.code == 0, done.err
        assert f"it would be: {'version' if there else 'create'}" in done.out
        for name, bytes_ in content(staged).items():
            assert re.search(rf"^ *{len(bytes_):,} bytes  {name}$", done.out, re.MULTILINE), done.out
        assert cli.double.called
        assert not cli.written()


@pytest.mark.parametrize(
    ("fault", "seeded"),
    [
        ("upload_dropped", False),
        ("file_zipped", True),
        ("stale_build_id_briefly", True),
        ("ready_too_early", True),
        ("server_503_briefly", True),
    ],
)
def test_faults_that_pass_do_not_stop_a_push(kaggle: Kaggle, staged: Path, hold: Any, fault: str, seeded: bool) -> None:
    with kaggle(fault) as cli:
        if seeded:
            hold(cli.double)
        done = cli.push(staged, *QUICK)
        assert done.code == 0, done.err
        assert cli.held(REF) == content(staged)
        assert len(cli.double.state.datasets[REF].versions) == 1 + seeded


def test_ctrl_c_in_an_upload_then_the_second_push_makes_one_version(kaggle: Kaggle, staged: Path, hold: Any) -> None:
    with kaggle("upload_dropped") as cli:
        hold(cli.double)
        # The first file is cut off half-way, and the client waits two seconds before it goes on.
        done = cli.interrupted(
            lambda: "PUT /upload" in cli.double.called, "push", "pretrained", "--staged", staged, "--poll", "5"
        )
        assert done.code == 130
        assert "the same command again" in done.sentence
        assert len(cli.double.state.datasets[REF].versions) == 1
        cli.double.faults = ()
        assert "versioned, version 2" in cli.push(staged, *QUICK).out
        assert cli.held(REF) == content(staged)


def test_ctrl_c_while_kaggle_works_on_a_version_then_the_second_push_waits_for_it(
    kaggle: Kaggle, staged: Path, hold: Any
) -> None:
    with kaggle(polls_until_ready=10) as cli:
        hold(cli.double)
        done = cli.interrupted(
            lambda: waits_after(cli, "CreateDatasetVersion"), "push", "pretrained", "--staged", staged, *SLOW
        )
        assert done.code == 130
        assert "the same command again" in done.sentence
        cli.double.requests.clear()
        done = cli.push(staged, *QUICK)
        assert (done.code, f"{REF}: unchanged, version 2" in done.out) == (0, True), done.err
        assert not cli.written()
        assert cli.held(REF) == content(staged)


def test_ctrl_c_while_kaggle_hides_a_new_dataset_then_the_second_push_waits_for_it(
    kaggle: Kaggle, staged: Path
) -> None:
    with kaggle(hidden_calls=10) as cli:
        done = cli.interrupted(
            lambda: waits_after(cli, "CreateDataset"), "push", "pretrained", "--staged", staged, *SLOW
        )
        assert done.code == 130
        done = cli.push(staged, *QUICK)
        assert (done.code, f"{REF}: unchanged, version 1" in done.out) == (0, True), done.err
        assert "CreateDatasetVersion" not in cli.double.called
        assert cli.held(REF) == content(staged)


def test_a_version_that_failed_is_replaced(kaggle: Kaggle, staged: Path) -> None:
    with kaggle("dataset_failed") as cli:
        assert cli.push(staged, *QUICK).code == 1
        cli.double.faults = ()
        # Such a version stays failed although it holds this very build; only another one can become ready.
        done = cli.push(staged, *QUICK)
        assert (done.code, f"{REF}: versioned, version 2" in done.out) == (0, True), done.err
        assert cli.held(REF) == content(staged)


def test_what_is_denied_right_after_a_creation_is_waited_for(kaggle: Kaggle, staged: Path) -> None:
    with kaggle("files_403_briefly", hidden_calls=2) as cli:
        done = cli.push(staged, *QUICK)
        assert (done.code, f"{REF}: created, version 1" in done.out) == (0, True), done.err


def test_a_dataset_that_was_made_public_gets_no_version(kaggle: Kaggle, staged: Path, hold: Any) -> None:
    with kaggle("dataset_public") as cli:
        hold(cli.double)
        for options in ((), ("--dry-run",)):
            done = cli.push(staged, *options, *QUICK)
            assert (
                done.code == 1 and f"{REF} is public on Kaggle" in done.sentence and "make it private" in done.sentence
            )
        assert not cli.written()
        done = cli.push(staged, "--force", *QUICK)
        assert (
            done.code == 0 and "is public on Kaggle, and so would be its new version; going on all the same" in done.err
        ), done.err
