"""Following a kernel on Kaggle to its end, and telling a real end from what only looks like one.

Kaggle's word is not enough: a script that crashed may be called complete, and a kernel may have run with an older bundle. Its log must
end with the marker that every kernel of the kit prints last, for the build that was pushed.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TypeVar

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.answers import KaggleUnavailable
from hubmap_kit.publish.client import Kaggle, KernelStatus
from hubmap_kit.publish.launch import log_hash

log = logging.getLogger(__name__)
T = TypeVar("T")

MARKER = re.compile(r"^HUBMAP END (?P<kernel>\S+) (?P<status>complete|stopped|failed) build_id=(?P<build_id>\S*) utc=\S+$")
ENDED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
LATE_LOOKS = 4  # how often the log of a session that has ended is asked for again when it has no marker yet
UNREACHABLE_LOOKS = 10  # failed looks in a row after which following gives up
FIRST_PAUSE_S = 1.0
NOTE_S = 300.0  # between two lines about a status that does not change
EARLIER_LOOKS = 20  # how often an end that looks like that of the session before is not believed


@dataclass(frozen=True)
class End:
    """A good end: `status` is complete or stopped (out of time, everything saved)."""

    status: str
    build_id: str


@dataclass
class Watch:
    """What is followed: a kernel (its address and name), the build that it must report (None: any), and how patiently.

    `version` is the one that is meant, None the latest. `earlier_log` is the hash of the log before the push: should Kaggle not heed the
    version, which was seen with a stand-in only, an old end is still not taken for the new one. `say` gets the kernel's log lines.
    `pause_s` is the longest time between two looks.
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
    shown: int = field(default=0, init=False)  # lines of the log that were said


def follow(watch: Watch) -> End:
    """Wait for the kernel's end and return it. Raises PublishError for every end that is not a good one, and on a time-out.

    While Kaggle has not started the session, it may already call it running.
    """
    text, distrusted = "", 0
    for status, text in _looks(watch):
        if status.status not in ENDED:
            continue
        distrusted += 1
        if not text or log_hash(text) != watch.earlier_log:
            return _judge(watch, status, text)
        if distrusted > EARLIER_LOOKS:
            raise PublishError(f"Kaggle still shows the end of the session before for kernel {watch.ref}; {still_there(watch.kernel)}")
    return _judge(watch, KernelStatus("RUNNING", ""), text)


def last_marker(text: str) -> re.Match[str] | None:
    """The last end marker in a log."""
    return next((found for line in reversed(text.splitlines()) if (found := MARKER.match(line.strip()))), None)


def patient_looks(look: Callable[[], T], pause_s: float, hours: float) -> Iterator[T]:
    """What `look` finds, again and again until the time is over; the first looks follow each other faster than by `pause_s`.

    Kaggle may be out of reach for some looks, not for many in a row: KaggleUnavailable then.
    """
    deadline, failed, pause = time.monotonic() + hours * 3600, 0, min(pause_s, FIRST_PAUSE_S)
    while time.monotonic() < deadline:
        try:
            found = look()
        except KaggleUnavailable as error:
            failed += 1
            if failed >= UNREACHABLE_LOOKS:
                raise
            log.warning("%s", error)
        else:
            failed = 0
            yield found
        time.sleep(pause)
        pause = min(pause_s, pause * 1.5)


def _looks(watch: Watch) -> Iterator[tuple[KernelStatus, str]]:
    """Status and log, look by look; new lines of the log are said as they come."""
    late, notes = 0, Notes(watch.ref)

    def look() -> tuple[KernelStatus, str]:
        return watch.kaggle.kernel_status(watch.ref, watch.version), watch.kaggle.kernel_log(watch.ref, watch.version)

    for status, text in patient_looks(look, watch.pause_s, watch.hours):
        notes(status.status)
        if text and log_hash(text) != watch.earlier_log:
            _say_new(watch, text, everything=status.status in ENDED)
        if status.status == "COMPLETE" and last_marker(text) is None and late < LATE_LOOKS:
            late += 1  # the log may come a little after the status
        else:
            yield status, text


class Notes:
    """A line when the status changes, and one now and then while it does not."""

    def __init__(self, ref: str) -> None:
        self.ref, self.status, self.said, self.begin = ref, "", 0.0, time.monotonic()

    def __call__(self, status: str) -> None:
        now = time.monotonic()
        if status == self.status and now - self.said < NOTE_S:
            return
        utc = datetime.now(timezone.utc).strftime("%H:%M:%S UTC")
        log.info("%s, %.0f min: %s is %s", utc, (now - self.begin) / 60, self.ref, status.lower().replace("_", " "))
        self.status, self.said = status, now


def _say_new(watch: Watch, text: str, everything: bool) -> None:
    """Say the lines that are new; the last one of a running kernel may be half a line and waits."""
    lines = text.splitlines()
    if not everything and not text.endswith("\n"):
        lines = lines[:-1]
    for line in lines[watch.shown :]:
        watch.say(line)
    watch.shown = max(watch.shown, len(lines))


def _judge(watch: Watch, status: KernelStatus, text: str) -> End:
    """The end that a status and a log amount to."""
    marker, ref = last_marker(text), watch.ref
    if status.status == "ERROR":
        raise PublishError(f"kernel {ref} failed on Kaggle ({_reason(text) or status.failure or 'no reason given'}); mend that, then push it again")
    if status.status == "CANCEL_ACKNOWLEDGED":
        raise PublishError(f"kernel {ref} was cancelled on Kaggle before it ended; push it again, a training with --resume")
    if status.status != "COMPLETE":
        raise PublishError(f"kernel {ref} has not ended in {watch.hours:g} h of following; {still_there(watch.kernel)}")
    if marker is None:
        raise PublishError(f"Kaggle calls kernel {ref} complete, but its log has no line 'HUBMAP END': it crashed, read the log above")
    if marker["kernel"] != watch.kernel:
        raise PublishError(f"kernel {ref} ended as '{marker['kernel']}', expected '{watch.kernel}'; push the right one to its address again")
    if watch.build_id is not None and marker["build_id"] != watch.build_id:
        raise PublishError(f"kernel {ref} ran the stale build {marker['build_id']}, expected {watch.build_id}; push code and kernel again")
    if marker["status"] == "failed":
        raise PublishError(f"kernel {ref} ended and says that it failed ({_reason(text) or 'no reason given'}); mend that, then push it again")
    return End(marker["status"], marker["build_id"])


def still_there(kernel: str) -> str:
    """What to tell somebody who stops looking."""
    return f"it goes on on Kaggle, look again with 'hubmap kernels {kernel} --follow'"


def _reason(text: str) -> str:
    """The kernel's own last sentence of an error."""
    found = [line.strip().removeprefix("error:").strip() for line in text.splitlines() if line.strip().startswith("error:")]
    return found[-1].rstrip(".") if found else ""
