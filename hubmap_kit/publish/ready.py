"""Waiting for a dataset. That Kaggle says 'ready' is not enough: for a while, version number, file list and files may be the previous version's."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.errors import KernelError, PublishError
from hubmap_kit.progress import bar
from hubmap_kit.publish.answers import KaggleRefusal, KaggleUnavailable
from hubmap_kit.publish.client import DatasetState, Kaggle
from hubmap_kit.runtime import build_id
from hubmap_kit.runtime.build_id import FILE, BuildId

log = logging.getLogger(__name__)
_GO_ON = "nothing is lost: run this again, it goes on waiting and uploads only what Kaggle lacks, or give it longer with --timeout"


@dataclass(frozen=True)
class Wanted:
    """What a wait ends with: at least `version` of dataset `name`, holding `build` and its files.

    Without a build, the wait ends as soon as Kaggle has done with the current version, well or badly. `hidden`: the dataset is new, so that
    Kaggle may still deny it to its owner.
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
    """Look every `poll_s` seconds until everything wanted is there. Raises PublishError when Kaggle fails or after `timeout_s` seconds."""
    begin, said = time.monotonic(), ""
    with bar(None, f"waiting for {wanted.name}", "look") as progress:
        progress.bar_format = "{desc}: {elapsed}{postfix}"
        while True:
            found = _look(client, wanted)
            if isinstance(found, DatasetState):
                return found
            if found.words != said:
                log.debug("%s %s", wanted.name, found.words)
                said = found.words
            waited = time.monotonic() - begin
            if waited + poll_s > timeout_s:
                raise PublishError(f"{client.owner}/{wanted.name}: after waiting {_span(waited)}, it {found.words}; {found.advice}")
            progress.set_postfix_str(said, refresh=False)
            progress.update()
            time.sleep(poll_s)


def published(client: Kaggle, name: str) -> BuildId | None:
    """BUILD_ID.json as it is downloaded from the dataset now; None where there is none that can be read."""
    with tempfile.TemporaryDirectory(prefix="hubmap-build-id-") as scratch:
        try:
            client.download_file(name, FILE, Path(scratch))
            return build_id.read(Path(scratch))
        except KaggleRefusal as error:
            if error.status in (403, 404):
                return None
            raise
        except KernelError:
            return None


def _look(client: Kaggle, wanted: Wanted) -> DatasetState | _Lack:
    try:
        state = client.dataset(wanted.name)
        if state is None:
            return _unseen(client, wanted)
        if wanted.build is None:
            return state if state.status in ("ready", "failed", "deleted") else _Lack(f"is still {state.status}")
        return _lack(client, wanted, wanted.build, state) or state
    except KaggleUnavailable as error:
        words, _, advice = str(error).partition("; ")
        return _Lack(f"could not be looked at ({words})", advice)
    except KaggleRefusal as error:
        # A part of what is new, such as its list of files, may be denied to its owner for a while.
        if error.status not in (403, 404):
            raise
        return _Lack(f"is not shown to its owner in full yet (HTTP {error.status})")


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _unseen(client: Kaggle, wanted: Wanted) -> _Lack:
    if wanted.hidden:
        return _Lack("is still being created (Kaggle answers 403 or 404 to its owner)")
    page = f"https://www.kaggle.com/datasets/{client.owner}/{wanted.name}"
    return _Lack("is no longer visible to this account (Kaggle answers 403 or 404)", f"look at {page}, then run this again")


def _lack(client: Kaggle, wanted: Wanted, build: BuildId, state: DatasetState) -> _Lack | None:
    page = f"https://www.kaggle.com/datasets/{client.owner}/{wanted.name}"
    if state.status in ("failed", "deleted"):
        raise PublishError(f"{client.owner}/{wanted.name} ended as '{state.status}' on Kaggle; {page} may say why, then run this again")
    if state.status != "ready":
        return _Lack(f"is still {state.status}")
    if state.version < wanted.version:
        return _Lack(f"is ready but still shows version {state.version} instead of {wanted.version}")
    held = published(client, wanted.name)
    if held is None:
        return _Lack(f"is ready as version {state.version}, but its {FILE} cannot be downloaded")
    if (held.build_id, held.files) != (build.build_id, build.files):
        return _Lack(f"is ready as version {state.version}, but a download still gives build {held.build_id} instead of {build.build_id}")
    lacking = sorted({*build.files, FILE} - set(client.files(wanted.name)))
    if lacking:
        return _Lack(f"is ready as version {state.version}, but lacks {', '.join(lacking)}", f"look at {page}, then run this again to upload it anew")
    return None
