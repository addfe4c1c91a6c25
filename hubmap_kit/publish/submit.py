"""Handing a finished kernel version in to the competition, and waiting for its score.

A code competition runs the version once more on the hidden slides, which takes hours; Kaggle then tells a score or an error, no log.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
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


def check(kaggle: Kaggle, entry: Entry, latest: int | None) -> str:
    """Look whether a version can be handed in, and return the build id that its run reported; empty where that cannot be told.

    `latest` is the kernel's newest version as far as it is known: Kaggle tells the state of that one only, so an older one goes in
    unchecked. Raises PublishError when the kernel has not ended well or lacks the file.
    """
    if latest is not None and entry.version != latest:
        log.warning("%s: Kaggle tells the state of version %d only, so version %d is handed in unchecked", entry.kernel, latest, entry.version)
        return ""
    status = kaggle.kernel_status(entry.kernel)
    if status.status != "COMPLETE":
        failure = f" ({status.failure})" if status.failure else ""
        raise PublishError(
            f"kernel {entry.kernel} has the status {status.status} on Kaggle{failure}, and only a COMPLETE version can be handed in; "
            "wait for its end with 'hubmap kernels infer --follow', or push it again"
        )
    with tempfile.TemporaryDirectory() as folder:
        names = f"^({re.escape(entry.file)}|{re.escape(FACTS)})$"
        found = {path.name: path for path in kaggle.kernel_output(entry.kernel, Path(folder), names)}
        if entry.file not in found:
            raise PublishError(f"the output of kernel {entry.kernel} has no {entry.file}, so it would not score; mend the kernel, push it again")
        return _build_id(found[FACTS], entry) if FACTS in found else ""


def submit(kaggle: Kaggle, entry: Entry) -> int:
    """Hand the entry in and return the submission's number. Raises PublishError with Kaggle's words, and what it allows today."""
    try:
        return kaggle.submit_code(entry.competition, entry.kernel, entry.version, entry.file, entry.message)
    except KaggleUnavailable as error:
        # The request may have come through, and each one counts.
        what = str(error).partition(";")[0]
        page = f"https://www.kaggle.com/competitions/{entry.competition}/submissions"
        raise PublishError(f"{what}; before you try again look at {page}, it may have been taken all the same") from error
    except PublishError:
        log.warning("%s", limits(kaggle, entry.competition))
        raise


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


def _build_id(path: Path, entry: Entry) -> str:
    """The build that kernel.json names. Raises PublishError where it says that the kernel did not do its work."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        status, build = str(facts["status"]), str(facts["build_id"])
    except (ValueError, LookupError, TypeError) as error:
        raise PublishError(f"{FACTS} in the output of kernel {entry.kernel} is damaged ({error!r}); push the kernel again") from error
    if status != "complete":
        raise PublishError(f"kernel {entry.kernel} says of itself that it {status} ({facts.get('sentence', 'no reason given')}); push it again")
    return build
