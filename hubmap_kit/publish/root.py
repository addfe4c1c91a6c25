"""The checkout that publishing works from: its folder, and what git says about it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import hubmap_kit
from hubmap_kit.errors import PublishError

PROD = "PROD"
_GIT_S = 120.0
_NO_COMMIT_TIME = 315_532_800  # 1980-01-01, the first moment that a zip file can hold


@dataclass(frozen=True)
class Commit:
    """The state of a checkout.

    `sha` is None outside git; `seconds` is the commit's time; `changes` names files that differ from it.
    """

    sha: str | None
    seconds: int
    changes: tuple[str, ...]


def repository() -> Path:
    """The folder of the checkout that this package is imported from.

    Raises PublishError when it is an installed copy.
    """
    root = Path(hubmap_kit.__file__).resolve().parents[1]
    if not (root / "setup.py").is_file():
        raise PublishError(
            f"{root} holds hubmap_kit but no setup.py; publishing works from a checkout, run scripts/push.sh there"
        )
    return root


def build_folder(root: Path | None = None) -> Path:
    """Where datasets are staged and kernels rendered: `build` of the checkout; against a stand-in for Kaggle, a folder
    of its own in it.
    """
    folder = (root or repository()) / "build"
    return folder / "rehearsed-push" if place() != PROD else folder


def place() -> str:
    """Which Kaggle the kaggle package speaks to: PROD, or LOCALHOST for a stand-in on this machine."""
    return os.environ.get("KAGGLE_API_ENVIRONMENT") or PROD


def commit(root: Path) -> Commit:
    """What git says about `root`.

    New files below hubmap_kit/ count as changes, for the wheel would lack them; others do not.
    """
    if not _in_git(root):
        return Commit(None, _NO_COMMIT_TIME, ())
    sha = git(root, "rev-parse", "HEAD").decode().strip()
    seconds = int(git(root, "show", "-s", "--format=%ct", "HEAD").decode())
    changed = _names(git(root, "diff", "--name-only", "--relative", "-z", "HEAD", "--", "."))
    return Commit(sha, max(seconds, _NO_COMMIT_TIME), tuple(sorted({*changed, *new_files(root)})))


def new_files(root: Path) -> list[str]:
    """Files below hubmap_kit/ that git neither tracks nor ignores."""
    return _names(git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", "hubmap_kit"))


def tracked_files(root: Path) -> list[str]:
    """The files that git tracks below `root`, relative to it; deleted ones are left out."""
    return [name for name in _names(git(root, "ls-files", "-z")) if (root / name).is_file()]


def archive(root: Path, sha: str) -> bytes:
    """The files of a commit as a zip file."""
    # Line ends that the machine's settings ask for must not reach the bytes that are published.
    return git(root, "-c", "core.autocrlf=false", "-c", "core.eol=lf", "archive", "--format=zip", sha)


def git(root: Path, *arguments: str) -> bytes:
    """The output of a git command in `root`. Raises PublishError with git's own words when it fails."""
    # A hook that runs this has its own index and folder in the environment.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, check=False, env=environment, timeout=_GIT_S
        )
    except FileNotFoundError as error:
        raise PublishError("git is not on the PATH, so the commit of the bundle is unknown; install git") from error
    except subprocess.TimeoutExpired as error:
        what = f"'git {arguments[0]}' did not end in {_GIT_S:.0f} s in {root}"
        raise PublishError(f"{what}; see what holds it up (a lock, a network folder), then run this again") from error
    if done.returncode:
        words = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise PublishError(f"git failed in {root} ({words}); mend the checkout, or clone it again")
    return done.stdout


def _in_git(root: Path) -> bool:
    """Whether git tracks this very checkout, not merely a folder above it."""
    return any((folder / ".git").exists() for folder in (root, *root.parents)) and bool(
        git(root, "ls-files", "--", "setup.py")
    )


def _names(listing: bytes) -> list[str]:
    return [os.fsdecode(name) for name in listing.split(b"\0") if name]
