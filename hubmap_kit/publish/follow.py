"""Following a kernel on Kaggle to its end, and telling a real end from what only looks like one.

Kaggle's word is not enough: a script that crashed may be called complete, and a kernel may have run with an older
bundle. Its log must end with the marker that every kernel of the kit prints last, for the build that was pushed.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar

from hubmap_kit.errors import PublishError, finding
from hubmap_kit.publish.answers import KaggleRefusal, KaggleUnavailable, a_check
from hubmap_kit.publish.client import Kaggle, KernelStatus
from hubmap_kit.publish.kernel_calls import plain_log
from hubmap_kit.publish.launch import log_hash

log = logging.getLogger(__name__)
T = TypeVar("T")

# Anywhere in a line, and in what JSON makes of one: no quotation mark or backslash belongs to it.
_MARKER = re.compile(
    r"HUBMAP END (?P<kernel>[^\s\"\\]+) (?P<status>complete|degraded|stopped|failed) build_id=(?P<build_id>[^\s\"\\]*)"
    r" utc=(?P<utc>[\w:.+-]+)"
    r"(?: failed=(?P<failed>\d+)/(?P<slides>\d+))?"
)
ENDED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
UNDER_WAY = ("QUEUED", "RUNNING", "CANCEL_REQUESTED", "NEW_SCRIPT")
LATE_LOOKS = 4  # how often the log of a session that has ended is asked for again when it has no marker yet
FAILED_LOOKS = 20  # failed looks in a row after which following gives up: 7 minutes at the usual pace
FIRST_PAUSE_S = 1.0
NOTE_S = 300.0  # between two lines about a status that does not change
EARLIER_LOOKS = 20  # how often an end that looks like that of the session before is not believed


@dataclass(frozen=True)
class Marker:
    """The line that every kernel of the kit prints last.

    `failed` of `slides` slides failed; None where the kernel says nothing of slides.
    """

    kernel: str
    status: str  # complete, degraded, stopped or failed
    build_id: str
    utc: str
    failed: int | None = None
    slides: int | None = None


@dataclass(frozen=True)
class End:
    """A good end: `status` is complete, stopped (out of time, everything saved), or degraded where that is forced."""

    status: str
    build_id: str


@dataclass
class Watch:
    """What is followed: a kernel (its address and name), the build that it must report (None: any), and how patiently.

    `version` is the one that is meant, None the latest. `earlier_log` is the hash of the log before the push: should
    Kaggle not heed the version, which was seen with a stand-in only, an old end is still not taken for the new one.
    `say` gets the kernel's log lines. `pause_s` is the longest time between two looks. `pushed`: it was pushed from
    here, so that it must be there, whatever Kaggle says at first. `force`: a degraded end is a good one.
    """

    kaggle: Kaggle
    ref: str
    kernel: str
    build_id: str | None
    say: Callable[[str], None]
    earlier_log: str = ""
    pause_s: float = 30.0
    hours: float = 14.0
    version: int | None = None
    pushed: bool = True
    force: bool = False
    shown: int = field(default=0, init=False)  # lines of the log that were said


@dataclass(frozen=True)
class _Look:
    """What one look found; `log` is None where Kaggle does not hand it out."""

    status: KernelStatus
    log: str | None

    @property
    def over(self) -> bool:
        """Whether the session has ended: Kaggle's word where it is one that is known, else the end marker."""
        if self.status.status in (*ENDED, *UNDER_WAY):
            return self.status.status in ENDED
        return read_marker(self.log or "") is not None


def follow(watch: Watch) -> End:
    """Wait for the kernel's end and return it.

    Raises PublishError for every end that is not a good one, and on a time-out.

    While Kaggle has not started the session, it may already call it running.
    """
    found, distrusted = _Look(KernelStatus("", ""), ""), 0
    for found in _looks(watch):
        if not found.over:
            continue
        if not found.log or log_hash(found.log) != watch.earlier_log:
            return _judge(watch, found)
        distrusted += found.status.status in ENDED
        if distrusted > EARLIER_LOOKS:
            raise PublishError(
                f"Kaggle still shows the end of the session before for kernel {watch.ref}; {still_there(watch.kernel)}"
            )
    said = found.status.status.lower().replace("_", " ") or "nothing"
    raise PublishError(
        f"kernel {watch.ref} has not ended in {watch.hours:g} h of following (Kaggle says: {said});"
        f" {still_there(watch.kernel)}"
    )


def read_marker(text: str) -> Marker | None:
    """The last end marker in a log, wherever it stands: in a plain line, behind a prefix, or in Kaggle's JSON, also one
    that was cut off.
    """
    # A piece of the JSON may end inside the marker, and a cut-off list may hold it in a piece that no reader of JSON
    # takes.
    found = max((list(_MARKER.finditer(form)) for form in (plain_log(text), text)), key=len)
    if not found:
        return None
    values = found[-1].groupdict()
    counts = {name: None if values[name] is None else int(values[name]) for name in ("failed", "slides")}
    return Marker(values["kernel"], values["status"], values["build_id"], values["utc"], **counts)


def failed_slides(failed: object, slides: object) -> str:
    """What a degraded end means, in words that follow the kernel's name."""
    share = f"{failed} of {slides}" if failed is not None and slides is not None else "too many"
    return f"wrote a valid submission.csv, but {share} slides failed and have an empty mask in it (degraded)"


def patient_looks(look: Callable[[], T], pause_s: float, hours: float, believe_no: bool = False) -> Iterator[T]:
    """What `look` finds, again and again until the time is over; the first looks follow each other faster than by
    `pause_s`.

    Kaggle may be out of reach, or refuse what is new or was there a moment ago (400, 403, 404), for some looks, not for
    many in a row: its error then. A refusal of the credentials counts at once, and with `believe_no` any refusal until
    something has been found.
    """
    deadline, failed, pause, said = time.monotonic() + hours * 3600, 0, min(pause_s, FIRST_PAUSE_S), ""
    while time.monotonic() < deadline:
        try:
            found = look()
        except (KaggleUnavailable, KaggleRefusal) as error:
            failed += 1
            if failed >= FAILED_LOOKS or (isinstance(error, KaggleRefusal) and (believe_no or error.status == 401)):
                raise
            log.log(logging.DEBUG if str(error) == said else logging.WARNING, "%s (looking again)", finding(error))
            said = str(error)
        else:
            failed, believe_no = 0, False
            yield found
        time.sleep(pause)
        pause = min(pause_s, pause * 1.5)


def _looks(watch: Watch) -> Iterator[_Look]:
    """Status and log, look by look; new lines of the log are said as they come."""
    late, notes = 0, Notes(watch.ref)
    for found in patient_looks(lambda: _look(watch), watch.pause_s, watch.hours, believe_no=not watch.pushed):
        notes(found.status.status)
        if found.log and log_hash(found.log) != watch.earlier_log:
            _say_new(watch, found.log, everything=found.over)
        patience = FAILED_LOOKS if found.log is None else LATE_LOOKS
        if found.status.status == "COMPLETE" and read_marker(found.log or "") is None and late < patience:
            late += 1  # the log may come a little after the status
        else:
            yield found


def _look(watch: Watch) -> _Look:
    """One look at status and log. What Kaggle refuses of the two counts for nothing, unless it refuses both."""
    refused: list[KaggleRefusal] = []

    def ask(call: Callable[[str, int | None], T], nothing: T) -> T:
        try:
            return call(watch.ref, watch.version)
        except KaggleRefusal as error:
            refused.append(error)
            return nothing

    status = ask(watch.kaggle.kernel_status, KernelStatus("", ""))
    text: str | None = ask(watch.kaggle.kernel_log, None)  # type: ignore[arg-type]
    if len(refused) == 2 or (refused and refused[0].status == 401):
        raise refused[0]
    return _Look(status, text)


class Notes:
    """A line when the status changes, and one now and then while it does not."""

    def __init__(self, ref: str) -> None:
        self.ref, self.status, self.said, self.begin = ref, "", 0.0, time.monotonic()

    def __call__(self, status: str) -> None:
        """Log the status unless it is unchanged and was logged less than NOTE_S seconds ago."""
        now = time.monotonic()
        if status == self.status and now - self.said < NOTE_S:
            return
        utc = datetime.now(UTC).strftime("%H:%M:%S UTC")
        log.info(
            "%s, %.0f min: %s is %s",
            utc,
            (now - self.begin) / 60,
            self.ref,
            status.lower().replace("_", " ") or "in a state that Kaggle does not tell",
        )
        self.status, self.said = status, now


def _say_new(watch: Watch, text: str, everything: bool) -> None:
    """Say the lines that are new; the last one of a running kernel may be half a line and waits."""
    lines = text.splitlines()
    if not everything and not text.endswith("\n"):
        lines = lines[:-1]
    for line in lines[watch.shown :]:
        watch.say(line)
    watch.shown = max(watch.shown, len(lines))


def _judge(watch: Watch, found: _Look) -> End:
    """The end that a status and a log amount to."""
    status, text, ref = found.status, found.log or "", watch.ref
    marker = read_marker(text)
    if status.status == "ERROR":
        raise PublishError(
            f"kernel {ref} failed on Kaggle ({_reason(text) or status.failure or 'no reason given'}); mend that, then"
            " push it again"
        )
    if status.status == "CANCEL_ACKNOWLEDGED":
        raise PublishError(
            f"kernel {ref} was cancelled on Kaggle before it ended; push it again, a training with --resume"
        )
    if found.log is None:
        raise PublishError(
            f"Kaggle calls kernel {ref} complete but does not hand out its log, so its end is not known;"
            f" {still_there(watch.kernel)}"
        )
    if marker is None:
        raise PublishError(
            f"Kaggle calls kernel {ref} complete, but its log has no line 'HUBMAP END': it crashed, read the log above"
        )
    if marker.kernel != watch.kernel:
        raise PublishError(
            f"kernel {ref} ended as '{marker.kernel}', expected '{watch.kernel}'; push the right one to its address"
            " again"
        )
    if watch.build_id is not None and marker.build_id != watch.build_id:
        raise PublishError(
            f"kernel {ref} ran the stale build {marker.build_id}, expected {watch.build_id}; push code and kernel again"
        )
    if marker.status == "failed":
        raise PublishError(
            f"kernel {ref} ended and says that it failed ({_reason(text) or 'no reason given'}); mend that, then push"
            " it again"
        )
    if marker.status == "degraded":
        number = f" --version {watch.version}" if watch.version else ""
        advice = (
            f"read the log above, mend that and push it again, or hand it in all the same with 'hubmap submit{number}"
            " --force'"
        )
        with a_check(watch.force):
            raise PublishError(f"kernel {ref} {failed_slides(marker.failed, marker.slides)}; {advice}")
    return End(marker.status, marker.build_id)


def still_there(kernel: str) -> str:
    """What to tell somebody who stops looking."""
    return f"it goes on on Kaggle, look again with 'hubmap kernels {kernel} --follow'"


def _reason(text: str) -> str:
    """The kernel's own last sentence of an error."""
    found = re.findall(r"(?:^|\s)error: *(\S.*)$", text, re.MULTILINE)
    return found[-1].strip().rstrip(".") if found else ""
