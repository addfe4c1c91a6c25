"""Handing a finished kernel version in to the competition, and waiting for its score.

A code competition runs the version once more on the hidden slides, which takes hours; Kaggle then tells a score or an error, no log.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.client import Kaggle, KaggleUnavailable, Submission
from hubmap_kit.publish.follow import Notes, patient_looks

log = logging.getLogger(__name__)
COMPETITION = "hubmap-organ-segmentation"
FACTS = "kernel.json"  # what a kernel of the kit says about its own run


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


class AnswerLost(PublishError):
    """The request may have come through, and each submission counts."""


def check(kaggle: Kaggle, entry: Entry) -> Ran:
    """Look whether a version can be handed in, and return what its run reported.

    Raises PublishError when that version has not ended well or lacks the file.
    """
    status = kaggle.kernel_status(entry.kernel, entry.version)
    if status.status != "COMPLETE":
        failure = f" ({status.failure})" if status.failure else ""
        raise PublishError(
            f"version {entry.version} of kernel {entry.kernel} has the status {status.status} on Kaggle{failure}, and only a COMPLETE one can be "
            "handed in; "
            "wait for its end with 'hubmap kernels infer --follow', or push it again"
        )
    with tempfile.TemporaryDirectory() as folder:
        names = f"^({re.escape(entry.file)}|{re.escape(FACTS)})$"
        found = {path.name: path for path in kaggle.kernel_output(entry.kernel, Path(folder), names, entry.version)}
        if entry.file not in found:
            raise PublishError(
                f"the output of kernel {entry.kernel}, version {entry.version}, has no {entry.file}, so it would not score; mend the kernel, "
                "push it again"
            )
        return _ran(found[FACTS], entry) if FACTS in found else Ran()


def submit(kaggle: Kaggle, entry: Entry) -> int:
    """Hand the entry in and return the submission's number. Raises PublishError with Kaggle's words, and what it allows today;
    AnswerLost where it may have been taken all the same."""
    try:
        return kaggle.submit_code(entry.competition, entry.kernel, entry.version, entry.file, entry.message)
    except KaggleUnavailable as error:
        raise AnswerLost(str(error).partition(";")[0]) from error
    except PublishError:
        log.warning("%s", limits(kaggle, entry.competition))
        raise


def newest(kaggle: Kaggle, competition: str = COMPETITION) -> int:
    """The number of the account's latest submission; 0 without any."""
    return max((number for number, _ in kaggle.submissions(competition)), default=0)


def find_lost(kaggle: Kaggle, message: str, after: int, known: Collection[str], competition: str = COMPETITION) -> int | None:
    """The number of a submission whose answer was lost: the first later than `after` with its message, but for the `known` ones; or None."""
    found = [number for number, said in kaggle.submissions(competition) if " ".join(said.split()) == message and str(number) not in known]
    return min((number for number in found if number > after), default=None)


def limits(kaggle: Kaggle, competition: str = COMPETITION) -> str:
    """One line about the submissions made and left today."""
    try:
        found = kaggle.submission_limits(competition)
    except PublishError as error:
        return f"submission limits: not known ({str(error).partition(';')[0]})"
    if found is None:
        return "submission limits: Kaggle tells this account none"
    return f"submission limits: {found['num_today']} made today, {found['num_allowed_now']} left today, {found['num_total']} in all"


def wait(kaggle: Kaggle, ref: int, pause_s: float, hours: float) -> Submission | None:
    """The submission once it has been scored or has failed; None when it is still pending after `hours`."""
    notes = Notes(f"submission {ref}")
    for found in patient_looks(lambda: kaggle.submission(ref), pause_s, hours):
        notes(found.status)
        if found.status != "PENDING":
            return found
    return None


def _ran(path: Path, entry: Entry) -> Ran:
    """The builds that kernel.json names. Raises PublishError where it says that the kernel did not do its work."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        status, ran = str(facts["status"]), Ran(str(facts["build_id"]), " ".join(map(str, facts.get("weights") or ())))
    except (ValueError, LookupError, TypeError) as error:
        raise PublishError(f"{FACTS} in the output of kernel {entry.kernel} is damaged ({error!r}); push the kernel again") from error
    if status != "complete":
        raise PublishError(f"kernel {entry.kernel} says of itself that it {status} ({facts.get('sentence', 'no reason given')}); push it again")
    return ran
