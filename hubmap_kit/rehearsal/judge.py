"""The verdict on a session: what its log, its output and the watcher say, one sentence for each fault."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.metric import summarise
from hubmap_kit.errors import HubmapError, TableError
from hubmap_kit.publish.follow import read_marker
from hubmap_kit.rehearsal.hidden import LZW, NO_PIXEL_SIZE, SIZE, HiddenSet, HiddenSlide, Score, score_submission
from hubmap_kit.rehearsal.sandbox import CANARY, GIB, Limits, Outcome

KERNEL_JSON, SUBMISSION = "kernel.json", "submission.csv"
TIMING, METRICS = "timing.csv", "metrics.csv"
# What the inference says of a slide that failed, and of the first for which there was no time.
FAILED = re.compile(r"slide (\S+) gets an empty mask: (.*)$", re.MULTILINE)
LATE = re.compile(r"slide (\S+) gets an empty mask: there is no time for it")
ODDITIES = {LZW: "LZW-compressed", SIZE: "its size is not the table's", NO_PIXEL_SIZE: "its pixel size is missing"}
SHOWN = 5  # of faults of one kind
HIDDEN_SLIDES = 529  # of the competition's hidden test set
NETWORK = "used the network, which a code competition forbids"


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

    @property
    def dice(self) -> dict[str, float]:
        """Mean Dice of the readable slides: of all, of each organ and of each source."""
        rows = [
            {"organ": each.slide.organ, "source": each.slide.source, "dice": each.dice}
            for each in self.scores
            if not each.slide.unreadable
        ]
        return {name: round(value["dice"], 4) for name, value in summarise(rows).items()} if rows else {}


def judge(outcome: Outcome, limits: Limits, expected: Expected) -> Verdict:
    """Look at everything that a session left behind.

    A session that a limit ended is not blamed for what it could not write any more.
    """
    verdict = Verdict()
    log = outcome.log.read_text(encoding="utf-8", errors="replace") if outcome.log.is_file() else ""
    stopped = _stopped(outcome, limits)
    verdict.problems += stopped or _ended(outcome, log)
    if not stopped:
        verdict.problems += _marker(log, expected, verdict)
        verdict.problems += _kernel_json(outcome.working / KERNEL_JSON, expected, verdict)
    verdict.problems += _left_over(outcome) + _secrets(outcome) + _network(outcome)
    verdict.problems += _files(outcome.working, expected, complete=outcome.code == 0)
    if outcome.copy_error:
        verdict.problems.append(outcome.copy_error)
    if expected.hidden is not None and verdict.status in ("complete", "degraded"):
        _submission(outcome, expected.hidden, log, verdict)
    return verdict


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


def amount(count: float) -> str:
    """A number of bytes for a person."""
    if count >= GIB / 10:
        return f"{count / GIB:.2f} GiB"
    return f"{count / (1 << 20):.2f} MiB" if count >= 1 << 20 else f"{count / 1024:.0f} KiB"


def _ended(outcome: Outcome, log: str) -> list[str]:
    if outcome.code == 0 or outcome.stopped:
        return []
    how = f"was killed by signal {-outcome.code}" if outcome.code < 0 else f"ended with exit code {outcome.code}"
    lines = [line.strip() for line in log.splitlines() if line.strip() and read_marker(line) is None]
    return [f"the kernel {how}: {_sentence(log, 'error') or (lines or ['the log is empty'])[-1]}"]


def _sentence(log: str, word: str) -> str:
    """What follows the last `word:` that begins a line; "" without one."""
    found = re.findall(rf"^\s*{word}:(.*)$", log, re.MULTILINE)
    return found[-1].strip() if found else ""


def _marker(log: str, expected: Expected, verdict: Verdict) -> list[str]:
    lines = log.rstrip().splitlines()
    found = read_marker(lines[-1]) if lines else None
    if found is None:
        return ["the log does not end with the kernel's end marker (HUBMAP END ...)"]
    verdict.status = found.status
    problems: list[str] = []
    if found.kernel != expected.kernel:
        problems.append(f"the end marker is that of the kernel {found.kernel}, expected {expected.kernel}")
    if found.build_id != expected.build_id:
        problems.append(f"the end marker names build {found.build_id or 'none'}, expected {expected.build_id}")
    if found.status != "failed" and found.status not in expected.statuses:
        why = f": {_sentence(log, found.status)}" if found.status == "degraded" else ""
        problems.append(f"the end marker says {found.status}, expected {' or '.join(expected.statuses)}{why}")
    return problems


def _kernel_json(path: Path, expected: Expected, verdict: Verdict) -> list[str]:
    try:
        facts: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = (facts["kernel"], facts["status"], facts["build_id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{KERNEL_JSON} is missing or no summary of the kernel ({type(error).__name__})"]
    wanted = (expected.kernel, verdict.status or found[1], expected.build_id)
    return [] if found == wanted else [f"{KERNEL_JSON} says {' '.join(map(str, found))}, the log {' '.join(wanted)}"]


def _left_over(outcome: Outcome) -> list[str]:
    """On Kaggle a session goes on, and costs quota, until its last process has ended."""
    if not outcome.left:
        return []
    were = "1 process was" if len(outcome.left) == 1 else f"{len(outcome.left)} processes were"
    shown = ", ".join(outcome.left[:SHOWN])
    return [f"{were} still running 10 s after the end marker or the kernel's exit, and the session was ended: {shown}"]


def _secrets(outcome: Outcome) -> list[str]:
    """Every file is searched, the log first: an output may be as public as its kernel."""
    paths = [outcome.log, *sorted(outcome.working.rglob("*"))]
    leaks = [path for path in paths if path.is_file() and not path.is_symlink() and _holds(path, CANARY.encode())]
    return [f"{path.name} holds the value of a secret variable of the session" for path in leaks]


def _holds(path: Path, needle: bytes) -> bool:
    if not path.stat().st_size:
        return False  # an empty file cannot be mapped
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(needle) >= 0


def _network(outcome: Outcome) -> list[str]:
    noted = dict.fromkeys((note["host"], note["line"]) for note in outcome.network)
    if noted:
        return [f"{NETWORK}: asked for {host} at {line}" for host, line in noted]
    lost = outcome.lost_packets
    return [f"{NETWORK}: {lost} packets of a program that is not Python"] if lost else []


def _files(working: Path, expected: Expected, complete: bool) -> list[str]:
    paths = sorted(path for path in working.rglob("*") if not path.is_dir() or path.is_symlink())
    found = [path.relative_to(working) for path in paths]
    odd = [path for path in found if not any(_fits(path, pattern) for pattern in (KERNEL_JSON, *expected.files))]
    links = [path for path in found if (working / path).is_symlink()]
    problems = [f"{path} lies in the output, where nothing expects it" for path in odd[:SHOWN]]
    problems += [f"{path} is a link in the output, which Kaggle does not keep" for path in links[:SHOWN]]
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
        scores = verdict.scores = score_submission(path, hidden)
    except HubmapError as error:
        verdict.problems.append(str(error))
        return
    verdict.problems += _given_up([each for each in scores if not each.slide.unreadable], log)
    if empty := [each.slide.id for each in scores if not each.slide.unreadable and not each.rle]:
        verdict.notes.append(f"{len(empty)} readable slides have an empty mask, the first is {empty[0]}")
    if filled := [each.slide.id for each in scores if each.slide.unreadable and each.rle]:
        verdict.problems.append(f"slide {filled[0]} cannot be read, but its row holds a mask")
    seconds = outcome.seconds / max(1, len(scores))
    hours = seconds * HIDDEN_SLIDES / 3600
    verdict.notes.append(
        f"{seconds:.1f} s a slide, start included: {HIDDEN_SLIDES} slides would take {hours:.1f} h on this machine"
    )


def _given_up(readable: Sequence[Score], log: str) -> list[str]:
    """Readable slides without a mask: the kernel failed on them, had no time, or stumbled over what is odd in them."""
    late = LATE.findall(log)
    reasons = {name: why for name, why in FAILED.findall(log) if name not in late}
    failed = [
        f"{_named(each.slide)}, but the kernel failed on it: {reasons[each.slide.id]}"
        for each in readable
        if each.slide.id in reasons
    ]
    no_time = [
        f"the kernel had no time for slide {first}, and maybe for others, so their rows are empty" for first in late
    ]
    odd = [each.slide for each in readable if each.slide.fault and not each.rle and each.slide.id not in reasons]
    empty = [] if late else [f"{_named(slide)}, but its row is empty" for slide in odd]
    return failed[:SHOWN] + no_time + empty


def _named(slide: HiddenSlide) -> str:
    oddity = f" ({ODDITIES[slide.fault]})" if slide.fault in ODDITIES else ""
    return f"slide {slide.id}{oddity} can be read"


def not_resumed(before: Path, after: Path, further: bool = False) -> list[str]:
    """Why a training session did not resume the one before it, one sentence a fold; both are folders of one run.

    What each epoch took tells: training twice on a CPU gives the same losses, but not the same seconds and tiles a
    second. With `further` the later session must have added an epoch.
    """
    old, new = _timing(before), _timing(after)
    begun = [fold for fold, rows in old.items() if rows]
    if not begun:
        return [
            f"the former session left no finished epoch in {before}, so nothing shows that this one went on with it"
        ]
    problems = [problem for fold in begun for problem in _not_kept(before / fold, after / fold)]
    if not problems:
        for fold, rows in new.items():  # no epoch was left out, and none came twice
            epochs = [row.get("epoch", "") for row in rows]
            wanted = [str(number) for number in range(1, len(rows) + 1)]
            if epochs != wanted:
                counts = f"{', '.join(epochs)}, expected {', '.join(wanted)}"
                problems.append(f"{fold}/{TIMING} counts the epochs {counts}")
    if not problems and further and sum(map(len, new.values())) <= sum(map(len, old.values())):
        problems = [f"no epoch came to those of the former session in {before}"]
    return problems


def _timing(run: Path) -> dict[str, list[dict[str, str]]]:
    return {fold.name: _rows(fold / TIMING) for fold in sorted(run.glob("fold[0-9]*"))}


def _not_kept(before: Path, after: Path) -> list[str]:
    """Each row of a former fold must stand in the later one."""
    for name in (TIMING, METRICS):
        old, new = _rows(before / name), _rows(after / name)
        if len(new) < len(old):
            finished = f"the former session had finished {len(old)}: they were not kept"
            return [f"{after.name}/{name} holds {len(new)} epochs, but {finished}"]
        for epoch, (one, two) in enumerate(zip(old, new, strict=False), start=1):
            odd = next((column for column in one if one[column] != two.get(column)), "")
            if odd:
                other = f"{odd} {two.get(odd, 'nothing')}, in the former session {one[odd]}"
                return [f"{after.name}/{name} says of epoch {epoch} {other}: it was trained again instead of kept"]
    return []


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows without empty columns: a later session may have added some."""
    try:
        found = read_rows(path, ("epoch",))
    except TableError:
        return []
    return [{column: text for column, text in row.items() if text} for _, row in found]
