"""Handing a finished kernel version in to the competition, and waiting for its score.

A code competition runs the version once more on the hidden slides, which takes hours; Kaggle then tells a score or an
error, no log.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError, finding
from hubmap_kit.publish.answers import a_check
from hubmap_kit.publish.client import AnswerLost, Kaggle, Listed, Submission
from hubmap_kit.publish.follow import ENDED, UNDER_WAY, Notes, failed_slides, patient_looks, read_marker
from hubmap_kit.publish.records import settled
from hubmap_kit.publish.session import submissions_page

log = logging.getLogger(__name__)
COMPETITION = "hubmap-organ-segmentation"
FACTS = "kernel.json"  # what a kernel of the kit says about its own run
LATE_LOOKS = 3  # in the list of submissions for one whose answer was lost
GRACE = timedelta(days=1)  # for clocks and zones
_FORCED = ", or hand it in all the same with --force"


@dataclass(frozen=True)
class Entry:
    """What is handed in: one output file of one version of a kernel (`owner/slug`)."""

    kernel: str
    version: int
    file: str
    message: str
    competition: str = COMPETITION


@dataclass(frozen=True)
class Ran:
    """What a version's run said of itself: the builds of the code and of the weights; empty where it said nothing."""

    build_id: str = ""
    weights: str = ""


@dataclass(frozen=True)
class Lost:
    """A submission without an answer: its message, the newest one before it (None: not known), when it was asked for,
    and the numbers that are known to be others.
    """

    message: str
    after: int | None
    asked: datetime
    known: Collection[str]


def check(kaggle: Kaggle, entry: Entry, force: bool = False) -> Ran:
    """Look whether a version can be handed in, and return what its run reported.

    Raises PublishError, unless `force`, when that version has not ended well, lacks the file, or says that too many
    slides failed, and where nothing of it can be looked at. What only cannot be looked at beside that is a warning.
    """
    name = f"version {entry.version} of kernel {entry.kernel}"
    complete = False
    with a_check(force):
        complete = _complete(kaggle, entry, name)
    try:
        files = kaggle.output_files(entry.kernel, entry.version)
    except PublishError as error:
        log.warning("the output of %s cannot be looked at (%s)", name, finding(error))
        files = {}
    facts = _facts(kaggle, entry, files)
    with a_check(force):
        if files and entry.file not in files:
            raise PublishError(
                f"the output of {name} has no {entry.file}, so it would not score; mend the kernel and push it"
                f" again{_FORCED}"
            )
        if not facts and not complete:
            raise PublishError(
                f"neither the status of {name} nor its output says whether it ended well; look at its page{_FORCED}"
            )
        if facts:
            _check_facts(facts, name)
    weights = facts.get("weights")
    return Ran(str(facts.get("build_id") or ""), " ".join(map(str, weights)) if isinstance(weights, list) else "")


def submit(kaggle: Kaggle, entry: Entry) -> int:
    """Hand the entry in and return the submission's number.

    Raises PublishError with Kaggle's words, and what it allows today; AnswerLost where it may have been taken all the
    same.
    """
    try:
        return kaggle.submit_code(entry.competition, entry.kernel, entry.version, entry.file, entry.message)
    except AnswerLost:
        raise
    except PublishError:
        log.warning("%s", limits(kaggle, entry.competition))
        raise


def newest(kaggle: Kaggle, competition: str = COMPETITION) -> int | None:
    """The number of the account's latest submission; 0 without any, None, with a warning, where Kaggle does not
    tell.
    """
    try:
        numbers = [one.ref for one in kaggle.submissions(competition)]
    except PublishError as error:
        log.warning(
            "%s; should the answer to this submission be lost, only its message can tell it from others", finding(error)
        )
        return None
    return None if None in numbers else max((number for number in numbers if number), default=0)


def find_lost(kaggle: Kaggle, lost: Lost, competition: str = COMPETITION) -> int | None:
    """The number of a submission whose answer was lost; None where Kaggle's list is sure not to have it.

    Raises PublishError where the list cannot tell.
    """
    page = submissions_page(competition)
    listed = kaggle.submissions(competition)
    found = [one.ref for one in listed if _may_be(one, lost) and _says(one, lost) and one.ref is not None]
    if len(found) == 1 or (found and lost.after is not None):
        return min(ref for ref in found if ref is not None)
    unclear = bool(found) or any(_may_be(one, lost) for one in listed)
    missing = lost.after not in (None, 0) and lost.after not in [one.ref for one in listed]
    if unclear or missing or not settled(lost.asked):
        why = (
            "in more than one entry"
            if found
            else "not in a form that can be read"
            if unclear
            else "not whole"
            if missing
            else "not there yet"
        )
        raise PublishError(
            f'whether the submission "{lost.message}" of {lost.asked:%Y-%m-%d %H:%M UTC} was taken is not known: in'
            f" Kaggle's list it is {why}; look at {page}, run this again in some minutes, or put its number into the"
            " ledger"
        )
    return None


def wait_for_lost(kaggle: Kaggle, lost: Lost, pause_s: float, competition: str = COMPETITION) -> int | None:
    """The same right after the submission, with some looks; None where it is not known to have been taken."""
    for _ in range(LATE_LOOKS):
        try:
            if (number := find_lost(kaggle, lost, competition)) is not None:
                return number
        except PublishError as error:
            log.debug("%s", error)
        time.sleep(pause_s)
    return None


def limits(kaggle: Kaggle, competition: str = COMPETITION) -> str:
    """One line about the submissions made and left today."""
    try:
        found = kaggle.submission_limits(competition)
    except PublishError as error:
        return f"submission limits: not known ({finding(error)})"
    return f"submission limits: {found['today']} made today, {found['left']} left today, {found['total']} in all"


def wait(kaggle: Kaggle, ref: int, pause_s: float, hours: float) -> Submission | None:
    """The submission once it has been scored or has failed; None when it is still pending after `hours`."""
    notes = Notes(f"submission {ref}")
    for found in patient_looks(lambda: kaggle.submission(ref), pause_s, hours):
        notes(found.said or found.status)
        if found.status != "PENDING":
            return found
    return None


def _says(one: Listed, lost: Lost) -> bool:
    return one.message is not None and " ".join(one.message.split()) == lost.message


def _may_be(one: Listed, lost: Lost) -> bool:
    """Whether an entry of Kaggle's list can be the lost submission.

    What cannot be read speaks neither for it nor against it.
    """
    if one.message is not None and not _says(one, lost) and lost.after is None:
        return False
    # Kaggle may show a message in another form: whatever came after all that were known, and is in no row here, can
    # be it.
    if one.ref is not None and (str(one.ref) in lost.known or (lost.after is not None and one.ref <= lost.after)):
        return False
    if one.date is None or one.date > lost.asked - GRACE:
        return True
    return lost.after is not None and _says(one, lost)


def _complete(kaggle: Kaggle, entry: Entry, name: str) -> bool:
    """Whether Kaggle calls the version complete; False, with a warning, where it tells no status that is known.

    Raises PublishError for any other.
    """
    try:
        status = kaggle.kernel_status(entry.kernel, entry.version)
    except PublishError as error:
        log.warning("%s; what its output says decides", finding(error))
        return False
    if status.status not in (*ENDED, *UNDER_WAY):
        log.warning(
            "Kaggle gives %s the status '%s', which is not known; what its output says decides", name, status.status
        )
    elif status.status != "COMPLETE":
        failure = f" ({status.failure})" if status.failure else ""
        raise PublishError(
            f"{name} has the status {status.status} on Kaggle{failure}, and only a COMPLETE one can be handed in; wait"
            f" for its end with 'hubmap kernels infer --follow', or push it again{_FORCED}"
        )
    return status.status == "COMPLETE"


def _facts(kaggle: Kaggle, entry: Entry, files: Mapping[str, str]) -> dict[str, Any]:
    """What the run said of itself, in kernel.json or else in the last line of its log; empty, with a warning, where
    neither can be read.
    """
    try:
        if FACTS in files:
            with tempfile.TemporaryDirectory() as folder:
                (path,) = kaggle.kernel_output(entry.kernel, Path(folder), f"^{re.escape(FACTS)}$", entry.version)
                if (facts := dict(json.loads(path.read_text(encoding="utf-8")))).get("status"):
                    return facts
    except (PublishError, ValueError, TypeError) as error:
        log.warning("%s in the output of kernel %s cannot be read (%s)", FACTS, entry.kernel, finding(error))
    try:
        marker = read_marker(kaggle.kernel_log(entry.kernel, entry.version))
    except PublishError:
        marker = None
    if marker is None:
        return {}
    return {
        "status": marker.status,
        "build_id": marker.build_id,
        "failed_slides": marker.failed,
        "slides": marker.slides,
    }


def _check_facts(facts: Mapping[str, Any], name: str) -> None:
    """Raise PublishError where a run says that it did not do its work."""
    status, again = facts.get("status"), f"read its log, mend that and push it again{_FORCED}"
    if status == "degraded":
        raise PublishError(f"{name} {failed_slides(facts.get('failed_slides'), facts.get('slides'))}; {again}")
    if status != "complete":
        raise PublishError(
            f"{name} says of itself that it {status} ({facts.get('sentence', 'no reason given')}); {again}"
        )
