"""The verdict on a session: what its log, its output and the watchers say, each fault in one sentence."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from hubmap_kit.competition.checker import check_submission
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.metric import summarise
from hubmap_kit.errors import HubmapError, RehearsalError
from hubmap_kit.publish.follow import read_marker
from hubmap_kit.rehearsal.hidden import LZW, NO_PIXEL_SIZE, SIZE, UNREADABLE, HiddenSet
from hubmap_kit.rehearsal.sandbox import CANARY, GIB, Limits, Outcome, amount

# A submission against the masks that only the rehearsal knows.


@dataclass(frozen=True)
class Score:
    """One hidden slide: its Dice, and whether its row is empty or its file cannot be read."""

    id: str
    organ: str
    source: str
    fault: str
    dice: float
    empty: bool
    rle: str

    @property
    def unreadable(self) -> bool:
        """No kernel can do better than an empty mask here."""
        return self.fault in UNREADABLE


def score(submission: Path, hidden: HiddenSet) -> list[Score]:
    """Check the file against the hidden table (ids, order, runs inside the slides), then compare it with the masks.

    Raises SubmissionError where the scorer would refuse it.
    """
    with _quiet():
        check_submission(submission, hidden.folder / "test.csv")
    predicted = {row["id"]: row["rle"] for _, row in read_rows(submission, ("id", "rle"))}
    scores = []
    for each in hidden.slides:
        text, truth = predicted[each.id], _truth(hidden.masks / f"{each.id}.png")
        scores.append(
            Score(
                each.id, each.organ, each.source, each.fault, _dice(_painted(text, *truth.shape), truth), not text, text
            )
        )
    return scores


def _painted(text: str, height: int, width: int) -> NDArray[np.bool_]:
    """Pairs of a start and a length; pixels are counted from 0 down the first column, then down the next, as in
    train.csv.
    """
    pixels = np.zeros(height * width, bool)
    numbers = [int(word) for word in text.split()]
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        pixels[start : start + length] = True
    return pixels.reshape(width, height).T


def _dice(one: NDArray[np.bool_], two: NDArray[np.bool_]) -> float:
    total = np.count_nonzero(one) + np.count_nonzero(two)
    return 2 * np.count_nonzero(one & two) / total if total else 1.0


def _truth(path: Path) -> NDArray[np.bool_]:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise RehearsalError(
            f"{path} cannot be read, but it holds a hidden slide's mask; leave the folder alone while a rehearsal runs"
        )
    return mask > 0


@contextmanager
def _quiet() -> Iterator[None]:
    """The readers' warnings are about faults that the rehearsal made itself."""
    logger = logging.getLogger("hubmap_kit.competition")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


KERNEL_JSON, SUBMISSION = "kernel.json", "submission.csv"
# What the inference says of a slide that failed, and of the first for which there was no time.
FAILED = re.compile(r"slide (\S+) gets an empty mask: (.*)$", re.MULTILINE)
LATE = re.compile(r"slide (\S+) gets an empty mask: there is no time for it")
ODDITIES = {LZW: "LZW-compressed", SIZE: "its size is not the table's", NO_PIXEL_SIZE: "its pixel size is missing"}
SHOWN = 5  # of faults of one kind
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Expected:
    """What a good session looks like: whose end marker, of which build, with which status, and the files that it
    leaves.

    `files` are paths below /kaggle/working that may be there, `folder/**` for all that a folder holds; `needed` must be
    there.
    """

    kernel: str
    build_id: str
    statuses: tuple[str, ...]
    files: tuple[str, ...]
    needed: tuple[str, ...]
    hidden: HiddenSet | None = None


@dataclass
class Verdict:
    """Problems make it FAIL; notes are worth a look. `scores` has one row a hidden slide."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: str = ""
    scores: list[Score] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the session would have been a good one on Kaggle."""
        return not self.problems


def judge(outcome: Outcome, limits: Limits, expected: Expected) -> Verdict:
    """Look at everything that a session left behind.

    What a session that was ended could not write any more is no fault of its own.
    """
    verdict = Verdict()
    log = outcome.log.read_text(encoding="utf-8", errors="replace") if outcome.log.is_file() else ""
    stopped = _stopped(outcome, limits)
    verdict.problems += stopped or _ended(outcome, log)
    if not stopped:
        verdict.problems += _marker(log, expected, verdict)
        verdict.problems += _kernel_json(outcome.working / KERNEL_JSON, expected, verdict)
    verdict.problems += _left_over(outcome)
    verdict.problems += _secrets(outcome)
    verdict.problems += _network(outcome)
    verdict.problems += _files(outcome.working, expected, complete=outcome.code == 0)
    if outcome.copy_error:
        verdict.problems.append(outcome.copy_error)
    if expected.hidden is not None and verdict.status in ("complete", "degraded"):
        _submission(outcome, expected.hidden, log, verdict)
    return verdict


def error_line(log: str) -> str:
    """The sentence that a failed kernel ends with, or the last line of its log."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return (
        _sentence(log, "error") or ([line for line in lines if read_marker(line) is None] or ["the log is empty"])[-1]
    )


def _sentence(log: str, word: str) -> str:
    """What follows the last `word:` that begins a line; "" without one."""
    found = re.findall(rf"^\s*{word}:(.*)$", log, re.MULTILINE)
    return found[-1].strip() if found else ""


def _stopped(outcome: Outcome, limits: Limits) -> list[str]:
    if outcome.why:
        return [outcome.why]
    if outcome.stopped == "memory":
        held = amount(outcome.peak_bytes)
        return [
            f"out of memory: its processes held {held} together, more than the session's {limits.memory_gib:g} GiB, and"
            " were ended"
        ]
    if outcome.stopped == "time":
        return [f"out of time: it ran past the session's {limits.minutes:.3g} minutes and was ended"]
    if outcome.disk_bytes >= int(limits.disk_gib * GIB):
        return [f"disk full: its output filled all {amount(limits.disk_gib * GIB)} of /kaggle/working"]
    return []


def _left_over(outcome: Outcome) -> list[str]:
    """On Kaggle a session goes on, and costs quota, until its last process has ended."""
    if not outcome.left:
        return []
    were = "1 process was" if len(outcome.left) == 1 else f"{len(outcome.left)} processes were"
    shown = ", ".join(outcome.left[:SHOWN])
    return [f"{were} still running 10 s after the end marker or the kernel's exit, and the session was ended: {shown}"]


def _ended(outcome: Outcome, log: str) -> list[str]:
    if outcome.code == 0 or outcome.stopped:
        return []
    how = f"was killed by signal {-outcome.code}" if outcome.code < 0 else f"ended with exit code {outcome.code}"
    return [f"the kernel {how}: {error_line(log)}"]


def _marker(log: str, expected: Expected, verdict: Verdict) -> list[str]:
    lines = log.rstrip().splitlines()
    found = read_marker(lines[-1]) if lines else None
    if found is None:
        return ["the log does not end with the kernel's end marker (HUBMAP END ...)"]
    kernel, verdict.status, build_id = found.kernel, found.status, found.build_id
    problems: list[str] = []
    if kernel != expected.kernel:
        problems.append(f"the end marker is that of the kernel {kernel}, expected {expected.kernel}")
    if build_id != expected.build_id:
        problems.append(f"the end marker names build {build_id or 'none'}, expected {expected.build_id}")
    if verdict.status != "failed" and verdict.status not in expected.statuses:
        why = f": {_sentence(log, verdict.status)}" if verdict.status == "degraded" else ""
        problems.append(f"the end marker says {verdict.status}, expected {' or '.join(expected.statuses)}{why}")
    return problems


def _kernel_json(path: Path, expected: Expected, verdict: Verdict) -> list[str]:
    try:
        facts: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = (facts["kernel"], facts["status"], facts["build_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{KERNEL_JSON} is missing or no summary of the kernel ({type(error).__name__})"]
    wanted = (expected.kernel, verdict.status or found[1], expected.build_id)
    return [] if found == wanted else [f"{KERNEL_JSON} says {' '.join(map(str, found))}, the log {' '.join(wanted)}"]


def _secrets(outcome: Outcome) -> list[str]:
    """Every file is searched, the log first: an output is as public as its kernel may become."""
    paths = [
        outcome.log,
        *sorted(path for path in outcome.working.rglob("*") if path.is_file() and not path.is_symlink()),
    ]
    leaks = [path for path in paths if path.is_file() and _holds(path, CANARY.encode())]
    return [f"{path.name} holds the value of a secret variable of the session" for path in leaks]


def _holds(path: Path, needle: bytes) -> bool:
    with open(path, "rb") as file:
        tail = b""
        while chunk := file.read(_CHUNK):
            if needle in tail + chunk:
                return True
            tail = chunk[-len(needle) :]
    return False


def _network(outcome: Outcome) -> list[str]:
    noted = dict.fromkeys((note["host"], note["line"]) for note in outcome.network)
    if noted:
        return [
            f"used the network, which a code competition forbids: asked for {host} at {line}" for host, line in noted
        ]
    if outcome.lost_packets:
        return [
            f"used the network, which a code competition forbids: {outcome.lost_packets} packets of a program that is"
            " not Python"
        ]
    return []


def _files(working: Path, expected: Expected, complete: bool) -> list[str]:
    found = (
        [path.relative_to(working) for path in sorted(working.rglob("*")) if not path.is_dir() or path.is_symlink()]
        if working.is_dir()
        else []
    )
    odd = [path for path in found if not any(_fits(path, pattern) for pattern in (KERNEL_JSON, *expected.files))]
    problems = [f"{path} lies in the output, where nothing expects it" for path in odd[:SHOWN]]
    problems += [
        f"{path} is a link in the output, which Kaggle does not keep" for path in found if (working / path).is_symlink()
    ][:SHOWN]
    needed = expected.needed if complete else ()
    return problems + [f"{name} is missing from the output" for name in needed if not (working / name).exists()]


def _fits(path: Path, pattern: str) -> bool:
    """A pattern is a file's path, or a folder's with `/**` for everything below it."""
    return path.is_relative_to(pattern.removesuffix("/**")) if pattern.endswith("/**") else path == Path(pattern)


def _submission(outcome: Outcome, hidden: HiddenSet, log: str, verdict: Verdict) -> None:
    path = outcome.working / SUBMISSION
    if not path.is_file():
        return  # its absence is a problem already
    try:
        verdict.scores = score(path, hidden)
    except HubmapError as error:
        verdict.problems.append(str(error))
        return
    readable = [each for each in verdict.scores if not each.unreadable]
    verdict.problems += _given_up(readable, log)
    empty = [each.id for each in readable if each.empty]
    if empty:
        verdict.notes.append(f"{len(empty)} readable slides have an empty mask, the first is {empty[0]}")
    filled = [each.id for each in verdict.scores if each.unreadable and not each.empty]
    if filled:
        verdict.problems.append(f"slide {filled[0]} cannot be read, but its row holds a mask")
    seconds = outcome.seconds / max(1, len(verdict.scores))
    verdict.notes.append(
        f"{seconds:.1f} s a slide, start included: 529 slides would take {seconds * 529 / 3600:.1f} h on this machine"
    )


def _given_up(readable: Sequence[Score], log: str) -> list[str]:
    """Slides that can be read, but got no mask: because the kernel failed on them, or maybe because of what is odd
    about them.
    """
    first_late = LATE.findall(log)
    reasons = {name: why for name, why in FAILED.findall(log) if name not in first_late}
    failed = [
        f"{_named(each)}, but the kernel failed on it: {reasons[each.id]}" for each in readable if each.id in reasons
    ]
    late = [
        f"the kernel had no time for slide {first}, and maybe for others, so their rows are empty"
        for first in first_late
    ]
    odd = [each for each in readable if each.fault and each.empty and each.id not in reasons and not late]
    return failed[:SHOWN] + late + [f"{_named(each)}, but its row is empty" for each in odd]


def _named(each: Score) -> str:
    oddity = f" ({ODDITIES[each.fault]})" if each.fault in ODDITIES else ""
    return f"slide {each.id}{oddity} can be read"


def describe(scores: Sequence[Score]) -> dict[str, float]:
    """Mean Dice of the readable slides: of all, of each organ and of each source."""
    rows = [{"organ": each.organ, "source": each.source, "dice": each.dice} for each in scores if not each.unreadable]
    return {name: round(value["dice"], 4) for name, value in summarise(rows).items()} if rows else {}
