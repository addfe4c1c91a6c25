"""A staged folder becomes a private Kaggle dataset, or its next version, and is known to be there when the push ends.

Every step may be interrupted: the next push looks at what Kaggle holds and repairs it, and uploads nothing that is
there already.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hubmap_kit import build_id
from hubmap_kit.build_id import FILE, METADATA, BuildId
from hubmap_kit.errors import KernelError, PublishError
from hubmap_kit.publish.answers import a_check, check_private
from hubmap_kit.publish.client import AnswerLost, DatasetState, Kaggle
from hubmap_kit.publish.metadata import dataset_metadata, dataset_slug, write_metadata
from hubmap_kit.publish.ready import WORKING, Wanted, lacking, served, version_words, wait_for
from hubmap_kit.publish.root import build_folder, commit, repository
from hubmap_kit.publish.session import dataset_page
from hubmap_kit.publish.staging import check_flat

log = logging.getLogger(__name__)
LOST_WAIT_S = 300.0  # for a version whose upload nobody acknowledged


class NotTaken(PublishError):
    """Kaggle did not take an upload."""


@dataclass(frozen=True)
class Outcome:
    """What a push did (created, versioned, unchanged) and the version that is current now; 0 where Kaggle does not
    number it.
    """

    action: str
    version: int


@dataclass(frozen=True)
class Plan:
    """What a push would do: `action` is create, version, wait, nothing, or ask where it is not known what Kaggle holds;
    `why` is the reason in words, `version` the current one (0: none, or not numbered).
    """

    action: str
    why: str
    version: int


@dataclass
class Steps:
    """Log lines with the seconds since the push began."""

    begin: float = field(default_factory=time.monotonic)

    def __call__(self, text: str) -> None:
        """Log one line at level INFO."""
        log.info("[%6.1f s] %s", time.monotonic() - self.begin, text)


def check_staged(folder: Path, kind: str) -> BuildId:
    """The verified BUILD_ID.json of a staged folder.

    Raises PublishError or KernelError for what Kaggle would refuse or change.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder} is no folder; stage it with 'hubmap push {kind}' without --staged")
    check_flat(folder)
    for path in sorted(folder.iterdir()):
        if not path.stat().st_size:
            raise PublishError(
                f"{path} is empty, and an upload of no bytes is none; stage the {kind} again with 'hubmap push {kind}'"
            )
    _refuse_public(folder / METADATA)
    build = build_id.verify(folder)
    if build.kind != kind:
        raise PublishError(f"{folder} holds {build.kind}, expected {kind}; push it with 'hubmap push {build.kind}'")
    return build


def look(client: Kaggle, build: BuildId, kind: str, force: bool = False) -> Plan:
    """What a push of a build would do now. Asks Kaggle, changes nothing there."""
    name = dataset_slug(kind)
    dataset_metadata(kind, client.owner)
    state = client.dataset(name)
    if state is None:
        return Plan("create", f"{client.owner}/{name} is absent, or still being created", 0)
    with a_check(force):
        _check_gone_or_public(client, name, state)
    if state.status in WORKING and not force:
        return Plan(
            "wait",
            f"{client.owner}/{name} is still {state.status}; then compare with build {build.build_id}",
            state.version,
        )
    return _compared(client, name, build, state, force)


def push_dataset(
    client: Kaggle,
    folder: Path,
    kind: str,
    *,
    force: bool = False,
    timeout_s: float = 1800.0,
    poll_s: float = 10.0,
    notes: str | None = None,
    build: BuildId | None = None,
) -> Outcome:
    """Upload a staged folder unless Kaggle holds the same build, and wait until the dataset shows exactly its files.

    `timeout_s` bounds each wait for Kaggle, not the upload; `poll_s` is the time between two looks; `notes` goes with a
    version (default: the build id); `build` is what check_staged said of this folder, where it was asked already.
    Raises PublishError or KernelError: one sentence each, with what to do.
    """
    say, build, name = Steps(), build or check_staged(folder, kind), dataset_slug(kind)
    ref = f"{client.owner}/{name}"
    write_metadata(folder, kind, client.owner)
    _refuse_public(folder / METADATA)
    state = client.dataset(name)
    if state is None:
        outcome = _create(client, folder, name, build, say, force, timeout_s, poll_s)
        if outcome is not None:
            return outcome
        state = client.dataset(name)
    if state is None:
        raise PublishError(f"{ref} is no longer visible to this account; look at it on the site, then run this again")
    if state.status in WORKING and not force:
        say(f"{ref}: an earlier push is still {state.status}, waiting for it")
        state = wait_for(client, Wanted(name, None), timeout_s, poll_s)
    with a_check(force):
        _check_gone_or_public(client, name, state)
    plan = _compared(client, name, build, state, force)
    if plan.action == "ask":
        raise PublishError(
            f"{ref}: {plan.why}; nothing was uploaded, run this again in some minutes, or upload it all the same with"
            " --force"
        )
    if plan.action == "nothing":
        say(f"{ref}: {plan.why}, nothing to upload")
        _check_private(client, name, state)
        return Outcome("unchanged", state.version)
    say(f"{ref}: {plan.why}; uploading {described(folder)} as a new version")
    wanted = Wanted(name, build, state.version + 1 if state.version else 0)
    now = _uploaded(
        client, wanted, lambda: client.new_version(folder, notes or build.build_id), say, force, timeout_s, poll_s
    )
    return Outcome("versioned", now.version)


def uploaded(folder: Path) -> list[Path]:
    """The files of a staged folder that travel as data, by name."""
    return sorted(path for path in folder.iterdir() if path.name != METADATA)


def described(folder: Path) -> str:
    """The number of files in a staged folder and their size, in words."""
    sizes = [path.stat().st_size for path in uploaded(folder)]
    return f"{len(sizes)} {'file' if len(sizes) == 1 else 'files'} ({sum(sizes) / 1e6:.1f} MB)"


def _create(
    client: Kaggle, folder: Path, name: str, build: BuildId, say: Steps, force: bool, timeout_s: float, poll_s: float
) -> Outcome | None:
    """Create the dataset and wait for it.

    None: it is there after all, from an earlier push that Kaggle was still working on.
    """
    ref = f"{client.owner}/{name}"
    say(f"{ref}: not there; uploading {described(folder)} as a new private dataset")
    wanted = Wanted(name, build, 1, hidden=True)
    try:
        now = _uploaded(client, wanted, lambda: client.create_dataset(folder), say, force, timeout_s, poll_s)
    except NotTaken as error:
        # Until now, absent and still being created looked the same (403).
        if (
            "already in use" not in str(error)
            and getattr(error.__cause__, "status", 0) != 409
            and client.dataset(name) is None
        ):
            raise
        say(f"{ref}: an earlier push is still being created, waiting for it")
        wait_for(client, Wanted(name, None, hidden=True), timeout_s, poll_s)
        return None
    return Outcome("created", now.version)


def _uploaded(
    client: Kaggle, wanted: Wanted, upload: Callable[[], None], say: Steps, force: bool, timeout_s: float, poll_s: float
) -> DatasetState:
    """Upload, and wait for what was uploaded, also where no answer says that it was taken.

    Raises NotTaken where Kaggle says no.
    """
    ref, lost = f"{client.owner}/{wanted.name}", ""
    try:
        upload()
    except AnswerLost as error:
        lost = str(error)
        log.warning("%s: %s; it may have been taken all the same, looking whether Kaggle shows it", ref, lost)
    except PublishError as error:
        raise NotTaken(str(error)) from error
    say(f"{ref}: uploaded, waiting until {f'version {wanted.version}' if wanted.version else 'it'} is there")
    try:
        now = wait_for(client, wanted, min(timeout_s, LOST_WAIT_S) if lost else timeout_s, poll_s)
    except PublishError as error:
        raise PublishError(f"{lost}, and {error}") if lost else error from None
    say(
        f"{ref}: {version_words(now.version)} is there with build"
        f" {wanted.build.build_id if wanted.build else 'unknown'}"
    )
    with a_check(force):
        _check_private(client, wanted.name, now)
    return now


def _compared(client: Kaggle, name: str, build: BuildId, state: DatasetState, force: bool) -> Plan:
    """Whether a dataset holds the build already. Only what is sure to be another one is replaced, unless `force`."""
    version, there = state.version, version_words(state.version)
    if state.status in (*WORKING, "failed", "deleted"):
        return Plan("version", f"{there} is {state.status} on Kaggle", version)
    held = served(client, name)
    if held.build is None and FILE in lacking(client, name, build):
        return Plan("version", f"{there} has no {FILE}", version)
    if held.build is None:
        found = f"it {held.why}, so it is not known which build it holds"
        return Plan("version" if force else "ask", found, version)
    if (held.build.build_id, held.build.files) != (build.build_id, build.files):
        return Plan("version", f"{there} holds build {held.build.build_id}, this one is {build.build_id}", version)
    if lacks := lacking(client, name, build):
        return Plan("version", f"{there} lacks {', '.join(lacks)}", version)
    if force:
        return Plan("version", f"{there} holds the same build, but --force is given", version)
    return Plan("nothing", f"{there} holds build {build.build_id} already", version)


def _check_private(client: Kaggle, name: str, state: DatasetState) -> None:
    """Raise PublishError for a dataset that others can see; a warning where Kaggle does not say whether they can."""
    ref = f"{client.owner}/{name}"
    page = dataset_page(ref)
    public = f"{ref} was uploaded and is public on Kaggle; make it private in the settings at {page}"
    check_private(ref, state.private, f"{page}/settings", public)


def _check_gone_or_public(client: Kaggle, name: str, state: DatasetState) -> None:
    page = dataset_page(f"{client.owner}/{name}")
    if state.private is False:
        raise PublishError(
            f"{client.owner}/{name} is public on Kaggle, and so would be its new version; make it private in the"
            f" settings at {page}, then run this again"
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
        raise PublishError(
            f"{path} asks for a public dataset; the kit publishes private ones only, delete the file, the push writes a"
            " new one"
        )


# Which builds a kernel is rendered for: the staged code bundle, if it is of the checkout's commit, and the weights.


def staged_builds(code: Path | None = None, kaggle: Kaggle | None = None, force: bool = False) -> dict[str, str]:
    """The ids that kernels must find: "code", and "weights" where they are known.

    `code` is the folder of the staged code bundle (default: datasets/code in `root.build_folder()`); weights are looked
    for beside it, and where none are staged, or with `force`, at Kaggle. `force` also takes a bundle of another commit.
    Raises PublishError.
    """
    folder = code or build_folder() / "datasets" / "code"
    found = {"code": _code(folder, force).build_id}
    weights = _weights(folder.with_name("weights"), kaggle, force)
    return found | ({"weights": weights} if weights else {})


def _code(folder: Path, force: bool) -> BuildId:
    try:
        build = build_id.read(folder)
    except KernelError as error:
        raise PublishError(
            f"{folder} holds no staged code bundle, so kernels cannot be told what to expect; run 'hubmap push code'"
            " first"
        ) from error
    now = commit(repository())
    if build.git_sha != now.sha:
        text = f"{folder} holds the code of {_short(build.git_sha)}, but the checkout is at {_short(now.sha)}"
        if not force:
            raise PublishError(
                f"{text}, and kernels would run the former; run 'hubmap push code' first, or add --force to run what is"
                " staged"
            )
        log.warning("%s; kernels will run the former", text)
    elif now.changes and not build.dirty:
        log.warning("%s differs from commit %s, and kernels will run the commit", now.changes[0], _short(now.sha))
    return build


def _weights(folder: Path, kaggle: Kaggle | None, force: bool) -> str:
    """The id of the staged weights, or of those that Kaggle serves now; empty where neither is known."""
    if (folder / FILE).is_file() and not (force and kaggle):
        return build_id.read(folder).build_id
    if kaggle is None:
        return ""
    try:
        held = served(kaggle, dataset_slug("weights"))
    except PublishError as error:
        log.warning("%s", error)
        return ""
    return held.build.build_id if held.build and held.build.kind == "weights" else ""


def _short(sha: str | None) -> str:
    return f"commit {sha[:12]}" if sha else "no commit"
