"""Submissions with the real command line and client against the stand-in for Kaggle, and their place in the ledger."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import warm
from kaggle_double import Double
from kaggle_double.server import KEY

from hubmap_kit import build_id
from hubmap_kit.publish.root import commit, repository


@dataclass
class World:
    """A stand-in for Kaggle with a finished infer kernel, version 1, of the code bundle `build` and the weights
    `weights`.
    """

    double: Double
    tmp: Path
    build: str
    weights: str
    ledger: Path

    def environment(self) -> dict[str, str]:
        return {**self.double.environment(self.tmp / "environment"), "OMP_NUM_THREADS": "1"}

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "hubmap_kit", *words]

    def hubmap(self, *words: str) -> subprocess.CompletedProcess[str]:
        return warm.run(self.command(*words), env=self.environment(), cwd=self.tmp, timeout=120)

    def words(self, *more: str) -> list[str]:
        return [
            "submit",
            "--rendered",
            str(self.tmp / "kernels"),
            "--every",
            "0.05",
            "--ledger",
            str(self.ledger),
            *more,
        ]

    def submit(self, *more: str) -> subprocess.CompletedProcess[str]:
        return self.hubmap(*self.words("-m", 'first, with "flips"', *more))

    def rows(self) -> list[dict[str, str]]:
        with open(self.ledger, newline="") as handle:
            return list(csv.DictReader(handle))

    @property
    def handed_in(self) -> int:
        return len(self.double.state.submissions)


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    tmp = tmp_path_factory.mktemp("kaggle")
    code, weights = tmp / "code", tmp / "weights"
    for folder, name, sha in (
        (code, "hubmap_kit-0.1.0-py3-none-any.whl", commit(repository()).sha),
        (weights, "config.yaml", None),
    ):
        folder.mkdir()
        (folder / name).write_bytes(b"never used here")
        build_id.write(folder, build_id.describe(folder.name, folder, git_sha=sha))
    with Double(daily_limit=50) as double:
        world = World(double, tmp, build_id.read(code).build_id, build_id.read(weights).build_id, tmp / "ledger.csv")
        for words in (
            ["push", "code", "--staged", str(code), "--poll", "0.05"],
            ["push", "weights", "--staged", str(weights), "--poll", "0.05"],
            [
                "kernels",
                "--run",
                "infer",
                "--follow",
                "--staged",
                str(code),
                "--out",
                str(tmp / "kernels"),
                "--every",
                "0.05",
            ],
        ):
            done = world.hubmap(*words)
            assert done.returncode == 0, done.stderr
        yield world
        assert not double.mistakes and not double.escapes


@pytest.fixture
def world(shared_world: World, tmp_path: Path) -> Iterator[World]:
    """The shared stand-in without faults, its kernel finished, and a ledger of its own."""
    shared_world.double.faults = ()
    shared_world.ledger = tmp_path / "ledger.csv"
    yield shared_world
    shared_world.double.state.kernels["alice/hubmap-infer"].versions[0].status = "COMPLETE"


def check_sentence(done: subprocess.CompletedProcess[str], words: tuple[str, ...], record_property) -> None:
    """Exit code 1, the last line is the sentence, and neither a traceback nor a key is anywhere."""
    last = done.stderr.strip().splitlines()[-1]
    record_property("exit code", done.returncode)
    record_property("sentence", last)
    assert done.returncode == 1, done.stdout + done.stderr
    assert last.startswith("error: ")
    for word in words:
        assert word in last
    for text in (done.stdout, done.stderr):
        assert "Traceback" not in text and KEY not in text


def test_a_submission_gets_its_score_into_the_ledger_of_its_run(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "oof.csv").write_text("id,dice\na,0.5\nb,0.75\n")
    world.ledger = run / "submissions.csv"
    done = world.hubmap(
        "submit",
        "--rendered",
        str(world.tmp / "kernels"),
        "--every",
        "0.05",
        "--run",
        str(run),
        "-m",
        'first, with "flips"',
    )
    assert done.returncode == 0, done.stderr
    handed_in = world.double.state.submissions[-1]
    assert (handed_in.kernel, handed_in.version, handed_in.file) == ("alice/hubmap-infer", 1, "submission.csv")
    assert handed_in.message == 'first, with "flips"'
    (row,) = world.rows()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row.pop("time_utc"))
    assert row == {
        "run": str(run),
        "kernel": "alice/hubmap-infer",
        "version": "1",
        "build_id": world.build,
        "weights_id": world.weights,
        "message": 'first, with "flips"',
        "ref": str(handed_in.ref),
        "status": "COMPLETE",
        "public_score": "0.61234",
        "private_score": "0.59876",
        "oof_dice": "0.625",
    }
    assert "public 0.61234" in done.stdout


def test_a_row_stays_pending_until_its_score_is_asked_for(world: World) -> None:
    assert world.submit("--no-wait").returncode == 0
    assert [row["status"] for row in world.rows()] == ["PENDING"]
    while world.rows()[0]["status"] == "PENDING":
        assert world.hubmap(*world.words("--refresh")).returncode == 0
    assert world.rows()[0]["public_score"] == "0.61234"
    assert "no pending submission" in world.hubmap(*world.words("--refresh")).stdout


def test_a_refused_submission_shows_what_is_left_today(world: World, record_property) -> None:
    world.double.faults = ("submission_refused",)
    before = world.handed_in
    done = world.submit()
    check_sentence(done, ("HTTP 400", "accepted the rules"), record_property)
    assert re.search(r"submission limits: \d+ made today, \d+ left today", done.stderr)
    assert world.handed_in == before and [row["status"] for row in world.rows()] == ["REFUSED"]
    assert "no pending submission" in world.hubmap(*world.words("--refresh")).stdout


def test_a_submission_whose_answer_was_lost_is_found_again(world: World, record_property) -> None:
    world.double.faults = ("submission_answer_lost",)
    before = world.handed_in
    done = world.submit()
    assert done.returncode == 0 and "but Kaggle's list has it as submission" in done.stderr, done.stderr
    assert world.handed_in == before + 1 and [row["status"] for row in world.rows()] == ["COMPLETE"]
    world.ledger.unlink()
    world.double.faults = ("submission_answer_lost", "submissions_500")
    words = (
        "HTTP 503",
        "may have been taken all the same",
        "hubmap submit --refresh",
        "hubmap-organ-segmentation/submissions",
    )
    check_sentence(world.submit("-m", "the second"), words, record_property)
    assert world.handed_in == before + 2 and [row["status"] for row in world.rows()] == ["ASKED"]
    world.double.faults = ()
    while world.rows()[0]["status"] in ("ASKED", "PENDING"):
        assert world.hubmap(*world.words("--refresh")).returncode == 0
    (row,) = world.rows()
    assert (row["ref"], row["status"], row["public_score"]) == (
        str(world.double.state.submissions[-1].ref),
        "COMPLETE",
        "0.61234",
    )


def test_a_submission_that_never_came_is_told_from_one_whose_answer_was_lost(world: World, record_property) -> None:
    assert world.submit("--no-wait").returncode == 0  # the same message, and known
    world.double.faults = ("submission_refused_503",)
    check_sentence(world.submit(), ("may have been taken all the same",), record_property)
    world.double.faults = ()
    ledger = world.ledger.read_text()
    world.ledger.write_text(re.sub(r"20\d\d-", "2025-", ledger))  # long enough ago to be shown by now
    done = world.hubmap(*world.words("--refresh"))
    assert done.returncode == 0 and "was not taken; hand it in again" in done.stdout
    assert [row["status"] for row in world.rows()][1] == "REFUSED"


def test_ctrl_c_while_handing_in_says_how_to_see_whether_it_was_taken(world: World) -> None:
    world.double.faults = ("submission_silent",)
    before = world.handed_in
    words = world.command(*world.words("-m", "stopped early"))
    process = subprocess.Popen(
        words, env=world.environment(), cwd=world.tmp, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while world.handed_in == before:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in rest
    assert "was being handed in; it may have been taken all the same" in rest.strip().splitlines()[-1]
    assert [row["status"] for row in world.rows()] == ["ASKED"]
    world.double.faults = ()
    assert world.hubmap(*world.words("--refresh")).returncode == 0
    assert world.rows()[0]["ref"] == str(world.double.state.submissions[-1].ref)


def test_a_row_that_cannot_be_completed_does_not_hold_back_the_others(world: World, record_property) -> None:
    numbers = []
    for name in ("first", "second"):
        assert world.submit("--no-wait").returncode == 0, name
        numbers.append(world.double.state.submissions[-1].ref)
    text = world.ledger.read_text().replace(str(numbers[0]), str(world.double.state.submissions[0].ref))
    world.ledger.write_text(text)
    world.double.faults = ("submission_unknown",)
    world.double.state.submissions[-1].polls = 99
    done = world.hubmap(*world.words("--refresh"))
    check_sentence(done, ("1 of 2 pending rows", str(world.double.state.submissions[0].ref), "404"), record_property)
    assert [row["status"] for row in world.rows()] == ["PENDING", "COMPLETE"]


def test_the_version_that_is_named_is_the_one_that_is_looked_at(world: World, record_property) -> None:
    versions = world.double.state.kernels["alice/hubmap-infer"].versions
    versions.append(replace(versions[0], number=2, status="ERROR", failure="it broke", files=[]))
    try:
        check_sentence(
            world.submit("--version", "2"),
            ("version 2 of kernel alice/hubmap-infer has the status ERROR",),
            record_property,
        )
        assert world.submit("--version", "1", "--no-wait").returncode == 0
        assert (world.rows()[-1]["version"], world.rows()[-1]["build_id"]) == ("1", world.build)
        versions[0].status, versions[1].status = "ERROR", "COMPLETE"
        check_sentence(world.submit("--version", "1"), ("version 1 of kernel",), record_property)
    finally:
        versions.pop()


def test_a_ledger_of_an_earlier_release_is_gone_on_with(world: World) -> None:
    columns = "time_utc,run,kernel,version,build_id,message,ref,status,public_score,private_score,oof_dice"
    world.ledger.write_text(f"{columns}\n2026-01-01T00:00:00+00:00,,alice/hubmap-infer,1,b,old,7,COMPLETE,0.5,0.4,\n")
    assert world.submit("--no-wait").returncode == 0
    assert [(row["message"], row["weights_id"]) for row in world.rows()] == [
        ("old", ""),
        ('first, with "flips"', world.weights),
    ]


def test_a_scoring_error_is_an_error_and_kept_in_the_ledger(world: World, record_property) -> None:
    world.double.faults = ("submission_error",)
    check_sentence(world.submit(), ("failed to score", "Submission Scoring Error"), record_property)
    (row,) = world.rows()
    assert (row["status"], row["public_score"]) == ("ERROR", "")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("QUEUED", ("QUEUED", "hubmap kernels infer --follow")),
        ("ERROR", ("ERROR",)),
        ("CANCEL_ACKNOWLEDGED", ("CANCEL_ACKNOWLEDGED",)),
    ],
)
def test_a_kernel_that_has_not_ended_well_is_not_handed_in(
    status: str, words: tuple[str, ...], world: World, record_property
) -> None:
    version, before = world.double.state.kernels["alice/hubmap-infer"].versions[-1], world.handed_in
    version.status, version.polls = status, -100
    check_sentence(world.submit(), words, record_property)
    assert world.handed_in == before and not world.ledger.exists()


def test_a_kernel_without_the_file_is_not_handed_in(world: World, record_property) -> None:
    before = world.handed_in
    check_sentence(world.submit("--file", "other.csv"), ("has no other.csv",), record_property)
    assert world.handed_in == before


def test_the_version_must_be_known(world: World, record_property) -> None:
    check_sentence(world.submit("--kernel", "hubmap-other"), ("--version", "alice/hubmap-other"), record_property)


def test_a_message_is_asked_for(world: World, record_property) -> None:
    check_sentence(world.hubmap(*world.words()), ("--message",), record_property)


def test_a_damaged_ledger_is_named_before_a_submission_is_spent(world: World, record_property) -> None:
    world.ledger.write_text("time_utc,run\n1,2,3\n")
    before = world.handed_in
    check_sentence(world.submit(), ("ledger.csv", "damaged"), record_property)
    assert world.handed_in == before and world.ledger.read_text() == "time_utc,run\n1,2,3\n"


def test_a_dry_run_hands_nothing_in(world: World) -> None:
    before = world.handed_in
    done = world.submit("--dry-run")
    assert (
        done.returncode == 0
        and "would hand in submission.csv of alice/hubmap-infer version 1" in done.stdout
        and world.build in done.stdout
    )
    assert world.handed_in == before and not world.ledger.exists()


def test_a_score_that_takes_longer_is_looked_up_later(world: World, record_property) -> None:
    done = world.submit("--timeout", "1e-9")
    check_sentence(done, ("no score", "--refresh", str(world.ledger)), record_property)
    assert [row["status"] for row in world.rows()] == ["PENDING"]


def test_ctrl_c_while_waiting_keeps_the_row_and_says_how_to_look_again(world: World) -> None:
    words = world.command(*world.words("-m", "stopped", "--every", "60"))
    process = subprocess.Popen(
        words, env=world.environment(), cwd=world.tmp, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    while "is pending" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=30)
    assert process.returncode == 130 and "was handed in" in out
    assert "--refresh" in rest.strip().splitlines()[-1] and "Traceback" not in rest
    assert [row["status"] for row in world.rows()] == ["PENDING"]
