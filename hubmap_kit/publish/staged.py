"""Which builds a kernel is rendered for: the staged code bundle, if it is of the checkout's commit, and the weights."""

from __future__ import annotations

import logging
from pathlib import Path

from hubmap_kit.errors import KernelError, PublishError
from hubmap_kit.publish.client import Kaggle
from hubmap_kit.publish.metadata import slug
from hubmap_kit.publish.ready import served
from hubmap_kit.publish.root import build_folder, commit, repository
from hubmap_kit.runtime import build_id
from hubmap_kit.runtime.build_id import FILE, BuildId

log = logging.getLogger(__name__)


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
        held = served(kaggle, slug("weights"))
    except PublishError as error:
        log.warning("%s", error)
        return ""
    return held.build.build_id if held.build and held.build.kind == "weights" else ""


def _short(sha: str | None) -> str:
    return f"commit {sha[:12]}" if sha else "no commit"
