"""Verdicts on sessions: each fault in one sentence, and nothing else."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rle_oracle import coco_mask, dice, text_of

from hubmap_kit.rehearsal.hidden import UNREADABLE, HiddenSet
from hubmap_kit.rehearsal.image import KAGGLE_PYTHON
from hubmap_kit.rehearsal.journey import unexpected_results
from hubmap_kit.rehearsal.judge import Expected, Verdict, judge, not_resumed
from hubmap_kit.rehearsal.reporting import session_table
from hubmap_kit.rehearsal.sandbox import CANARY, GIB, Limits, Outcome
from hubmap_kit.rehearsal.steps import Step

BUILD = "0123456789ab-ba9876543210"


@pytest.fixture
def good(hidden: HiddenSet, tmp_path: Path) -> tuple[Outcome, Expected]:
    """A session that did everything right: the true masks handed in, empty ones where nothing can be read."""
    working = tmp_path / "working"
    working.mkdir()
    masks = {slide.id: "" if slide.fault in UNREADABLE else hidden.truth[slide.id] for slide in hidden.slides}
    write_submission(working, masks)
    facts = {"kernel": "infer", "status": "complete", "build_id": BUILD, "seconds": 12.0, "sentence": "fine"}
    (working / "kernel.json").write_text(json.dumps(facts))
    log = tmp_path / "kernel.log"
    log.write_text(f"HUBMAP START\nfine\nHUBMAP END infer complete build_id={BUILD} utc=2026-11-23T00:00:00Z\n")
    files = ("submission.csv",)
    return Outcome(0, 12.0, GIB, 1 << 20, "", log, working), Expected(
        "infer", BUILD, ("complete",), files, (*files, "kernel.json"), hidden
    )


def write_submission(working: Path, masks: dict[str, str]) -> None:
    (working / "submission.csv").write_text("id,rle\n" + "".join(f"{key},{text}\n" for key, text in masks.items()))


def verdict_of(good: tuple[Outcome, Expected], **changes: object) -> Verdict:
    outcome, expected = good
    return judge(replace(outcome, **changes), Limits(), expected)  # type: ignore[arg-type]


def test_a_good_session_passes(good: tuple[Outcome, Expected], hidden: HiddenSet) -> None:
    verdict = verdict_of(good)
    assert verdict.problems == []
    assert verdict.status == "complete"
    assert [each.dice for each in verdict.scores if not each.slide.unreadable] == [1.0] * (len(hidden.slides) - 2)
    assert [each.slide.fault for each in verdict.scores if each.slide.unreadable] == ["truncated", "missing"]


def test_a_degraded_session_fails_with_its_sentence_unless_it_is_expected(
    good: tuple[Outcome, Expected], hidden: HiddenSet
) -> None:
    outcome, expected = good
    facts = json.loads((outcome.working / "kernel.json").read_text())
    marker = f"HUBMAP END infer %s build_id={BUILD} utc=2026-11-23T00:00:00Z failed=%d/12\n"
    outcome.log.write_text("fine\n" + marker % ("complete", 2))
    assert verdict_of(good).problems == []
    outcome.log.write_text("degraded: 9 of 12 slides failed\n" + marker % ("degraded", 9))
    (outcome.working / "kernel.json").write_text(json.dumps(facts | {"status": "degraded"}))
    verdict = verdict_of(good)
    assert (verdict.status, verdict.problems) == (
        "degraded",
        ["the end marker says degraded, expected complete: 9 of 12 slides failed"],
    )
    # Where it is expected, the submission is judged as ever.
    good = outcome, replace(expected, statuses=("complete", "degraded"))
    assert verdict_of(good).problems == [] and len(verdict_of(good).scores) == len(hidden.slides)
    write_submission(outcome.working, {slide.id: "" for slide in hidden.slides[1:]})
    assert "is missing" in verdict_of(good).problems[0]


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dy=st.integers(-30, 30), dx=st.integers(-30, 30), seed=st.integers(0, 9))
def test_dice_is_that_of_pycocotools(
    good: tuple[Outcome, Expected], hidden: HiddenSet, dy: int, dx: int, seed: int
) -> None:
    rng, masks, wanted = np.random.default_rng(seed), {}, {}
    for slide in hidden.slides:
        truth = coco_mask(hidden.truth[slide.id], slide.height, slide.width)
        mask = np.roll(truth, (dy, dx), (0, 1)) * (rng.random(truth.shape) > 0.1).astype(np.uint8)
        mask[0, 0] = 0
        if slide.fault in UNREADABLE:
            mask[:] = 0
        wanted[slide.id] = dice(truth, mask)
        masks[slide.id] = text_of(mask)
    write_submission(good[0].working, masks)
    verdict = verdict_of(good)
    assert verdict.problems == []
    assert {each.slide.id: each.dice for each in verdict.scores} == pytest.approx(wanted)


def test_limits_and_crashes_are_named(good: tuple[Outcome, Expected]) -> None:
    memory = verdict_of(good, code=-9, stopped="memory", peak_bytes=30 * GIB).problems
    assert memory == [
        "out of memory: its processes held 30.00 GiB together, more than the session's 29 GiB, and were ended"
    ]
    assert verdict_of(good, code=-9, stopped="time").problems == [
        "out of time: it ran past the session's 540 minutes and was ended"
    ]
    assert verdict_of(good, disk_bytes=20 * GIB).problems == [
        "disk full: its output filled all 20.00 GiB of /kaggle/working"
    ]
    assert verdict_of(good, code=-11).problems[0].startswith("the kernel was killed by signal 11")
    good[0].log.write_text("a\nerror: no weights\n  \nHUBMAP END infer failed build_id=x utc=y\n")
    assert verdict_of(good, code=1).problems[0] == "the kernel ended with exit code 1: no weights"


def test_a_log_without_the_right_end_is_refused(good: tuple[Outcome, Expected]) -> None:
    log = good[0].log
    for text, sentence in (
        ("HUBMAP END infer complete build_id=x utc=y\nmore\n", "the log does not end with the kernel's end marker"),
        ("", "the log does not end with the kernel's end marker"),
        (
            "HUBMAP END train complete build_id=0123456789ab-ba9876543210 utc=y\n",
            "the end marker is that of the kernel train, expected infer",
        ),
        ("HUBMAP END infer complete build_id=old utc=y\n", f"the end marker names build old, expected {BUILD}"),
        (f"HUBMAP END infer stopped build_id={BUILD} utc=y\n", "the end marker says stopped, expected complete"),
    ):
        log.write_text(text)
        assert any(problem.startswith(sentence) for problem in verdict_of(good).problems), text


def test_kernel_json_must_agree_with_the_log(good: tuple[Outcome, Expected]) -> None:
    path = good[0].working / "kernel.json"
    path.write_text(json.dumps({"kernel": "infer", "status": "complete", "build_id": "other"}))
    assert verdict_of(good).problems == [f"kernel.json says infer complete other, the log infer complete {BUILD}"]
    path.write_text("{")
    assert verdict_of(good).problems == ["kernel.json is missing or no summary of the kernel (JSONDecodeError)"]


def test_a_secret_in_the_log_or_in_any_file_is_found(good: tuple[Outcome, Expected]) -> None:
    outcome, expected = good
    folder = outcome.working / "run"
    folder.mkdir()
    (folder / "environment.json").write_bytes(
        b"\0" * ((1 << 24) - 5) + CANARY.encode() + b"\0"
    )  # over the edge of a chunk
    verdict = judge(outcome, Limits(), replace(expected, files=("submission.csv", "run/**")))
    assert verdict.problems == ["environment.json holds the value of a secret variable of the session"]
    shutil.rmtree(folder)
    outcome.log.write_text(f"{CANARY}\n{outcome.log.read_text()}")
    assert verdict_of(good).problems == ["kernel.log holds the value of a secret variable of the session"]


def test_the_network_is_named_with_host_and_line(good: tuple[Outcome, Expected]) -> None:
    note = {"host": "pypi.org:443", "line": "/kaggle/src/script.py:7 in <module>", "event": "socket.connect"}
    assert verdict_of(good, network=(note, note), lost_packets=3).problems == [
        "used the network, which a code competition forbids: asked for pypi.org:443 at /kaggle/src/script.py:7 in"
        " <module>"
    ]
    packets = "used the network, which a code competition forbids: 3 packets of a program that is not Python"
    assert verdict_of(good, lost_packets=3).problems == [packets]


def test_odd_and_missing_files_are_named(good: tuple[Outcome, Expected]) -> None:
    working = good[0].working
    (working / "stores").mkdir()
    (working / "stores" / "images.bin").touch()
    (working / "data").symlink_to("/kaggle/input")
    assert verdict_of(good).problems == [
        "data lies in the output, where nothing expects it",
        "stores/images.bin lies in the output, where nothing expects it",
        "data is a link in the output, which Kaggle does not keep",
    ]
    shutil.rmtree(working / "stores")
    (working / "data").unlink()
    (working / "submission.csv").unlink()
    assert verdict_of(good).problems == ["submission.csv is missing from the output"]


def test_a_submission_that_the_scorer_refuses_fails(good: tuple[Outcome, Expected], hidden: HiddenSet) -> None:
    path = good[0].working / "submission.csv"
    lines = path.read_text().splitlines(keepends=True)
    first, second = hidden.slides[:2]
    for changed, sentence in (
        (lines[:-1], f"id {hidden.slides[-1].id} is missing"),
        ([lines[0], lines[2], lines[1], *lines[3:]], f"id {second.id} stands where {first.id} was expected"),
        ([lines[0], f"{first.id},0 5\n", *lines[2:]], "has start 0"),
        ([lines[0], f"{first.id},{first.height * first.width} 5\n", *lines[2:]], "ends at pixel"),
    ):
        path.write_text("".join(changed))
        problems = verdict_of(good).problems
        assert len(problems) == 1
        assert sentence in problems[0]


def test_a_mask_of_a_slide_that_nobody_can_read_is_suspicious(
    good: tuple[Outcome, Expected], hidden: HiddenSet
) -> None:
    write_submission(good[0].working, {slide.id: "5 2" for slide in hidden.slides})
    broken = next(slide for slide in hidden.slides if slide.fault == "truncated")
    assert verdict_of(good).problems == [f"slide {broken.id} cannot be read, but its row holds a mask"]


def test_empty_masks_of_readable_slides_are_noted(good: tuple[Outcome, Expected], hidden: HiddenSet) -> None:
    write_submission(
        good[0].working, {slide.id: hidden.truth[slide.id] if slide.fault in ODD else "" for slide in hidden.slides}
    )
    verdict = verdict_of(good)
    assert verdict.problems == []
    assert f"7 readable slides have an empty mask, the first is {hidden.slides[0].id}" in verdict.notes


ODD = {"lzw": "LZW-compressed", "size": "its size is not the table's", "pixel_size": "its pixel size is missing"}


@pytest.mark.parametrize("fault", ODD)
def test_an_odd_slide_that_can_be_read_must_have_a_mask(
    good: tuple[Outcome, Expected], hidden: HiddenSet, fault: str
) -> None:
    odd = next(slide for slide in hidden.slides if slide.fault == fault)
    lines = (good[0].working / "submission.csv").read_text().splitlines()
    (good[0].working / "submission.csv").write_text(
        "\n".join(f"{odd.id}," if line.startswith(f"{odd.id},") else line for line in lines) + "\n"
    )
    assert verdict_of(good).problems == [f"slide {odd.id} ({ODD[fault]}) can be read, but its row is empty"]
    log = good[0].log.read_text()
    good[0].log.write_text(f"slide {odd.id} gets an empty mask: imagecodecs is not here\n{log}")
    assert verdict_of(good).problems == [
        f"slide {odd.id} ({ODD[fault]}) can be read, but the kernel failed on it: imagecodecs is not here"
    ]


def test_a_kernel_that_fails_on_a_good_slide_or_runs_late_fails(
    good: tuple[Outcome, Expected], hidden: HiddenSet
) -> None:
    """The lines are those that the inference writes; `test_rehearsal` sees it write one of them."""
    log, first = good[0].log.read_text(), hidden.slides[0].id
    good[0].log.write_text(f"slide {first} gets an empty mask: out of memory\n{log}")
    assert verdict_of(good).problems == [f"slide {first} can be read, but the kernel failed on it: out of memory"]
    broken = next(slide.id for slide in hidden.slides if slide.fault == "truncated")
    good[0].log.write_text(f"slide {broken} gets an empty mask: the file is truncated\n{log}")
    assert verdict_of(good).problems == []
    for late in (first, broken):
        good[0].log.write_text(
            f"slide {late} gets an empty mask: there is no time for it; governor.csv tells which other slides do\n{log}"
        )
        assert verdict_of(good).problems == [
            f"the kernel had no time for slide {late}, and maybe for others, so their rows are empty"
        ]


def test_the_table_says_where_python_is_not_kaggles(good: tuple[Outcome, Expected]) -> None:
    steps = [
        Step(version, "infer", "new", good[0], verdict_of(good), Limits(), version)
        for version in ("3.11", KAGGLE_PYTHON)
    ]
    _, _, other, same = session_table(steps).splitlines()
    assert "3.11, Kaggle has 3.13" in other
    assert same.split()[-3:] == ["3.13", "complete", "PASS"]


def test_a_second_fault_behind_the_planted_one_is_reported(good: tuple[Outcome, Expected]) -> None:
    def step(**changes: object) -> Step:
        return Step("disk", "infer", "new", good[0], verdict_of(good, **changes), Limits(), "3.13")

    assert unexpected_results(step(), "disk full") == ["disk passed, but must fail"]
    assert unexpected_results(step(disk_bytes=20 * GIB), "disk full") == []
    both = step(disk_bytes=20 * GIB, copy_error="the output could not be copied out")
    assert unexpected_results(both, "disk full") == [
        "disk failed as it must, but besides: the output could not be copied out"
    ]
    assert len(both.verdict.problems) == 2
    assert both.verdict.problems[0].startswith("disk full")
    assert unexpected_results(step(copy_error="one", lost_packets=1), "disk full") == [
        (
            "disk failed for another reason: used the network, which a code competition forbids: 1 packets of a program"
            " that is not Python"
        ),
        "disk failed for another reason: one",
    ]


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
