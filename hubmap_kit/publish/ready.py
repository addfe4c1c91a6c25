"""Waiting for a dataset.

That Kaggle says 'ready' is not enough: for a while, version number, file list and files may be the previous version's.
"""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit import build_id
from hubmap_kit.build_id import FILE, BuildId
from hubmap_kit.errors import KernelError, PublishError, finding
from hubmap_kit.progress import bar
from hubmap_kit.publish.client import DatasetState, Kaggle, KaggleRefusal, KaggleUnavailable
from hubmap_kit.publish.session import dataset_page

log = logging.getLogger(__name__)
# What Kaggle calls a dataset that it still works on. Another word says nothing: BUILD_ID.json decides.
WORKING = (
    "not_yet_persisted",
    "blobs_received",
    "blobs_decompressed",
    "blobs_copied_to_sds",
    "individual_blobs_compressed",
    "reprocessing",
)
UNREADY = (*WORKING, "failed", "deleted")
_ENDS = ("ready", "failed", "deleted")
UNSURE_LOOKS = 2  # at a dataset that holds what it should, whatever Kaggle calls it, before that is believed
_GO_ON = (
    "nothing is lost: run this again, it goes on waiting and uploads only what Kaggle lacks, or give it longer with"
    " --timeout"
)


@dataclass(frozen=True)
class Wanted:
    """What a wait ends with: at least `version` of dataset `name`, holding `build` and its files.

    Without a build, the wait ends as soon as Kaggle has done with the current version, well or badly. `hidden`: the
    dataset is new, so that Kaggle may still deny it to its owner.
    """

    name: str
    build: BuildId | None
    version: int = 0
    hidden: bool = False


@dataclass(frozen=True)
class _Lack:
    """Why the wait goes on, in words that follow "it", and what to do if that stays so."""

    words: str
    advice: str = _GO_ON


def wait_for(client: Kaggle, wanted: Wanted, timeout_s: float, poll_s: float) -> DatasetState:
    """Look every `poll_s` seconds until everything wanted is there.

    Raises PublishError when Kaggle fails or after `timeout_s` seconds.
    """
    begin, said, unsure = time.monotonic(), "", 0
    with bar(None, f"waiting for {wanted.name}", "look") as progress:
        progress.bar_format = "{desc}: {elapsed}{postfix}"
        while True:
            found = _look(client, wanted)
            if isinstance(found, DatasetState):
                unsure += 1
                odd = _odd(wanted, found)
                if not odd or unsure > UNSURE_LOOKS:
                    return found
                found = _Lack(f"has what was waited for, but {odd}")
            else:
                unsure = 0
            if found.words != said:
                log.debug("%s %s", wanted.name, found.words)
                said = found.words
            waited = time.monotonic() - begin
            if waited + poll_s > timeout_s:
                raise PublishError(
                    f"{client.owner}/{wanted.name}: after waiting {_span(waited)}, it {found.words}; {found.advice}"
                )
            progress.set_postfix_str(said, refresh=False)
            progress.update()
            time.sleep(poll_s)


@dataclass(frozen=True)
class Served:
    """What Kaggle hands out as a dataset's BUILD_ID.json now; without a build, `why` says what it does instead, in
    words that follow its name.
    """

    build: BuildId | None
    why: str = ""


def served(client: Kaggle, name: str) -> Served:
    """BUILD_ID.json as it is downloaded from the dataset now. Raises KaggleRefusal for refused credentials."""
    with tempfile.TemporaryDirectory(prefix="hubmap-build-id-") as scratch:
        try:
            client.download_file(name, FILE, Path(scratch))
            return Served(build_id.read(Path(scratch)))
        except KaggleRefusal as error:
            if error.status == 401:
                raise
            return Served(None, f"does not hand out its {FILE} (HTTP {error.status})")
        except KaggleUnavailable as error:
            return Served(None, f"cannot be asked for its {FILE} now ({finding(error)})")
        except (KernelError, PublishError):
            return Served(None, f"hands out a {FILE} that cannot be read")


def lacking(client: Kaggle, name: str, build: BuildId) -> list[str]:
    """The files of a build that the dataset's list of files is sure not to have; none where Kaggle gives no list."""
    try:
        listed = client.files(name)
    except PublishError as error:
        log.warning("%s; its %s decides", finding(error), FILE)
        return []
    return sorted({*build.files, FILE} - set(listed)) if listed else []


def _look(client: Kaggle, wanted: Wanted) -> DatasetState | _Lack:
    try:
        state = client.dataset(wanted.name)
        if state is None:
            return _unseen(client, wanted)
        if wanted.build is None:
            return (
                state
                if _done_with(client, wanted.name, state)
                else _Lack(f"is {state.status or 'in a state that Kaggle does not tell'}")
            )
        return _lack(client, wanted, wanted.build, state) or state
    except KaggleUnavailable as error:
        words, _, advice = str(error).partition("; ")
        return _Lack(f"could not be looked at ({words})", advice)


def _done_with(client: Kaggle, name: str, state: DatasetState) -> bool:
    """Whether Kaggle has done with the current version, well or badly.

    Where its status says nothing, a version that can be read is done.
    """
    return state.status not in WORKING and (state.status in _ENDS or served(client, name).build is not None)


def _odd(wanted: Wanted, state: DatasetState) -> str:
    """What Kaggle says of a dataset that does not go with the files that it hands out; empty for nothing."""
    if 0 < state.version < wanted.version:
        return f"still shows version {state.version} instead of {wanted.version}"
    if state.status not in _ENDS:
        return f"Kaggle calls it {state.status!r}" if state.status else "Kaggle does not tell its status"
    return ""


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _unseen(client: Kaggle, wanted: Wanted) -> _Lack:
    if wanted.hidden:
        return _Lack("is still being created (Kaggle answers 400, 403 or 404 to its owner)")
    page = dataset_page(f"{client.owner}/{wanted.name}")
    return _Lack(
        "is no longer visible to this account (Kaggle answers 400, 403 or 404)", f"look at {page}, then run this again"
    )


def _lack(client: Kaggle, wanted: Wanted, build: BuildId, state: DatasetState) -> _Lack | None:
    page = dataset_page(f"{client.owner}/{wanted.name}")
    if state.status in ("failed", "deleted"):
        raise PublishError(
            f"{client.owner}/{wanted.name} ended as '{state.status}' on Kaggle; {page} may say why, then run this again"
        )
    if state.status in WORKING:
        return _Lack(f"is still {state.status}")
    held, is_there = served(client, wanted.name), f"is {state.status or 'there'} as {version_words(state.version)}"
    if held.build is None:
        return _Lack(f"{is_there}, but {held.why}")
    if (held.build.build_id, held.build.files) != (build.build_id, build.files):
        return _Lack(f"{is_there}, but a download still gives build {held.build.build_id} instead of {build.build_id}")
    lacks = lacking(client, wanted.name, build)
    if lacks and FILE not in lacks:  # it was downloaded just now, so a list without it is not to be trusted
        return _Lack(
            f"{is_there}, but lacks {', '.join(lacks)}", f"look at {page}, then run this again to upload it anew"
        )
    return None


def version_words(version: int) -> str:
    """A dataset's version, also one that Kaggle does not number."""
    return f"version {version}" if version else "a version without a number"
