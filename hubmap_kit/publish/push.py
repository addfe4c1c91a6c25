"""A staged folder becomes a private Kaggle dataset, or its next version, and is known to be there when the push ends.

Every step may be interrupted: the next push looks at what Kaggle holds and repairs it, and uploads nothing that is there already.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.client import DatasetState, Kaggle
from hubmap_kit.publish.folders import check_flat
from hubmap_kit.publish.metadata import dataset_metadata, slug, write_metadata
from hubmap_kit.publish.ready import Wanted, published, wait_for
from hubmap_kit.runtime import build_id
from hubmap_kit.runtime.build_id import FILE, METADATA, BuildId

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a push did (created, versioned, unchanged) and the version that is current now."""

    action: str
    version: int


@dataclass(frozen=True)
class Plan:
    """What a push would do: `action` is create, version, wait or nothing; `why` is the reason in words, `version` the current one (0: none)."""

    action: str
    why: str
    version: int


@dataclass
class Steps:
    """Log lines with the seconds since the push began."""

    begin: float = field(default_factory=time.monotonic)

    def __call__(self, text: str) -> None:
        log.info("[%6.1f s] %s", time.monotonic() - self.begin, text)


def check_staged(folder: Path, kind: str) -> BuildId:
    """The verified BUILD_ID.json of a staged folder. Raises PublishError or KernelError for what Kaggle would refuse or change."""
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder; stage it with 'hubmap push {kind}' without --staged")
    check_flat(folder)
    for path in sorted(folder.iterdir()):
        if not path.stat().st_size:
            raise PublishError(f"{path} is empty, and an upload of no bytes is none; stage the {kind} again with 'hubmap push {kind}'")
    _refuse_public(folder / METADATA)
    build = build_id.verify(folder)
    if build.kind != kind:
        raise PublishError(f"{folder} holds {build.kind}, expected {kind}; push it with 'hubmap push {build.kind}'")
    return build


def look(client: Kaggle, build: BuildId, kind: str, force: bool = False) -> Plan:
    """What a push of a build would do now. Asks Kaggle, changes nothing there."""
    name = slug(kind)
    dataset_metadata(kind, client.owner)
    state = client.dataset(name)
    if state is None:
        return Plan("create", f"{client.owner}/{name} is absent, or still being created", 0)
    _refuse_gone_or_public(client, name, state)
    if state.status not in ("ready", "failed") and not force:
        return Plan("wait", f"{client.owner}/{name} is still {state.status}; then compare with build {build.build_id}", state.version)
    return _compared(client, name, build, state, force)


def push_dataset(
    client: Kaggle, folder: Path, kind: str, *, force: bool = False, timeout_s: float = 1800.0, poll_s: float = 10.0, notes: str | None = None,
    build: BuildId | None = None,
) -> Outcome:  # fmt: skip
    """Upload a staged folder unless Kaggle holds the same build, and wait until the dataset shows exactly its files.

    `timeout_s` bounds each wait for Kaggle, not the upload; `poll_s` is the time between two looks; `notes` goes with a version
    (default: the build id); `build` is what check_staged said of this folder, where it was asked already. Raises PublishError
    or KernelError: one sentence each, with what to do.
    """
    say, build, name = Steps(), build or check_staged(folder, kind), slug(kind)
    ref = f"{client.owner}/{name}"
    write_metadata(folder, kind, client.owner)
    _refuse_public(folder / METADATA)
    state = client.dataset(name)
    if state is None:
        outcome = _create(client, folder, name, build, say, timeout_s, poll_s)
        if outcome is not None:
            return outcome
        state = client.dataset(name)
    if state is None:
        raise PublishError(f"{ref} is no longer visible to this account; look at it on the site, then run this again")
    _refuse_gone_or_public(client, name, state)
    if state.status not in ("ready", "failed") and not force:
        say(f"{ref}: an earlier push is still {state.status}, waiting for it")
        state = wait_for(client, Wanted(name, None), timeout_s, poll_s)
        _refuse_gone_or_public(client, name, state)
    plan = _compared(client, name, build, state, force)
    if plan.action == "nothing":
        say(f"{ref}: {plan.why}, nothing to upload")
        return Outcome("unchanged", state.version)
    say(f"{ref}: {plan.why}; uploading {described(folder)} as a new version")
    client.new_version(folder, notes or build.build_id)
    say(f"{ref}: uploaded, waiting until version {state.version + 1} is there")
    now = wait_for(client, Wanted(name, build, state.version + 1), timeout_s, poll_s)
    say(f"{ref}: version {now.version} is there with build {build.build_id}")
    return Outcome("versioned", now.version)


def uploaded(folder: Path) -> list[Path]:
    """The files of a staged folder that travel as data, by name."""
    return sorted(path for path in folder.iterdir() if path.name != METADATA)


def described(folder: Path) -> str:
    """The number of files in a staged folder and their size, in words."""
    sizes = [path.stat().st_size for path in uploaded(folder)]
    return f"{len(sizes)} {'file' if len(sizes) == 1 else 'files'} ({sum(sizes) / 1e6:.1f} MB)"


def _create(client: Kaggle, folder: Path, name: str, build: BuildId, say: Steps, timeout_s: float, poll_s: float) -> Outcome | None:
    """Create the dataset and wait for it. None: it is there after all, from an earlier push that Kaggle was still working on."""
    ref = f"{client.owner}/{name}"
    say(f"{ref}: not there; uploading {described(folder)} as a new private dataset")
    try:
        client.create_dataset(folder)
    except PublishError as error:
        # Until now, absent and still being created looked the same (403).
        if "already in use" not in str(error) and getattr(error, "status", 0) != 409:
            raise
        say(f"{ref}: an earlier push is still being created, waiting for it")
        wait_for(client, Wanted(name, None, hidden=True), timeout_s, poll_s)
        return None
    say(f"{ref}: uploaded, waiting until it is there")
    now = wait_for(client, Wanted(name, build, 1, hidden=True), timeout_s, poll_s)
    say(f"{ref}: version {now.version} is there with build {build.build_id}")
    return Outcome("created", now.version)


def _compared(client: Kaggle, name: str, build: BuildId, state: DatasetState, force: bool) -> Plan:
    """Whether a dataset holds the build already."""
    if state.status != "ready":
        return Plan("version", f"version {state.version} is {state.status} on Kaggle", state.version)
    held = published(client, name)
    if held is None:
        return Plan("version", f"version {state.version} has no readable {FILE}", state.version)
    if (held.build_id, held.files) != (build.build_id, build.files):
        return Plan("version", f"version {state.version} holds build {held.build_id}, this one is {build.build_id}", state.version)
    lacking = sorted({*build.files, FILE} - set(client.files(name)))
    if lacking:
        return Plan("version", f"version {state.version} lacks {', '.join(lacking)}", state.version)
    if force:
        return Plan("version", f"version {state.version} holds the same build, but --force is given", state.version)
    return Plan("nothing", f"version {state.version} holds build {build.build_id} already", state.version)


def _refuse_gone_or_public(client: Kaggle, name: str, state: DatasetState) -> None:
    page = f"https://www.kaggle.com/datasets/{client.owner}/{name}"
    if not state.private:
        raise PublishError(
            f"{client.owner}/{name} is public on Kaggle, and so would be its new version; make it private in the settings at {page}, then run "
            "this again"
        )
    if state.status == "deleted":
        raise PublishError(
            f"{client.owner}/{name} has been deleted; look at {page} and change the slug in "
            "datasets-meta if it cannot be restored: kernels with a slug that was used before are known to fail"
        )


def _refuse_public(path: Path) -> None:
    """A metadata file in the folder may not ask for a public dataset, whoever wrote it."""
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        public = values.get("isPrivate", True) is not True or values.get("public", False) is not False
    except (ValueError, AttributeError) as error:
        raise PublishError(f"{path} is no JSON object ({error}); delete it, the push writes a new one") from error
    if public:
        raise PublishError(f"{path} asks for a public dataset; the kit publishes private ones only, delete the file, the push writes a new one")
