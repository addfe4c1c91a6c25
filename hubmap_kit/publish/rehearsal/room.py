"""The folder of a rehearsal: made anew each time, and never another one than a rehearsal's own.

The former one goes last.
"""

from __future__ import annotations

import json
import os
import secrets
from itertools import count
from pathlib import Path

from hubmap_kit.errors import RehearsalError

TEMPORARY = (
    ".session-"  # what may be removed at any time: a session's own folder, which one that was killed leaves behind
)
LONG = 1000  # bytes of a path; Linux takes 4095, and each name in it costs time
MARKER, REPORT = ".hubmap-rehearsal", "report.json"
BULKY = ("data", "test", "hidden", "datasets", "outputs", "stores")  # what can be made again


def fresh(folder: Path) -> Path:
    """An empty folder; what a rehearsal left there is set aside.

    Raises RehearsalError where something lies that no rehearsal made.

    The better one of two former rehearsals is kept: one that passed is not given up for one that failed or was broken
    off.
    """
    aside = set_aside(folder)
    for path in (folder, aside):
        _check_own(path)
    if last(folder) == folder and folder.exists() and any(folder.iterdir()):
        remove(aside)
        folder.rename(aside)
    remove(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def last(folder: Path) -> Path:
    """Where the last good rehearsal of `folder` lies: there, or set aside since a later one failed or was broken
    off.
    """
    aside = set_aside(folder)
    return aside if _worth(aside) > _worth(folder) else folder


def set_aside(folder: Path) -> Path:
    """Where the former rehearsal waits until the new one has passed: what it left may be the only output to go on
    with.
    """
    return folder.with_name(f"{folder.name}.previous")


def settle(folder: Path, passed: bool) -> Path | None:
    """Let go of what was set aside once the new rehearsal has passed; otherwise return where it is still kept, if
    anywhere.
    """
    aside = set_aside(folder)
    if passed:
        remove(aside)
    return aside if aside.is_dir() else None


def tidy(folder: Path) -> None:
    """Remove the inputs that the rehearsal made; logs, outputs, kernels, pictures and the report stay."""
    for name in BULKY:
        remove(folder / name)


def remove(path: Path) -> None:
    """Remove what is at `path`, also where a kernel nested folders deeper than Python can follow, or closed them to
    itself.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    made, folders = (path / f".{secrets.token_hex(8)}-{number}" for number in count()), [path]
    while folders:
        os.chmod(folders[-1], 0o700)
        with os.scandir(folders[-1]) as entries:
            below = [
                Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False) or os.unlink(entry.path)
            ]
        if not below:
            folders.pop().rmdir()
        for folder in below:
            os.chmod(folder, 0o700)
            folders.append(folder.rename(next(made)) if len(os.fsencode(folder)) > LONG else folder)


def _worth(folder: Path) -> int:
    """-1: there is nothing; 0: broken off; 1: failed; 2: passed."""
    if not folder.is_dir():
        return -1
    try:
        return 2 if json.loads((folder / REPORT).read_text(encoding="utf-8"))["passed"] else 1
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _check_own(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RehearsalError(f"{folder} is a file; choose a folder with --out")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise RehearsalError(f"{folder} is not empty and was not made by a rehearsal; choose another folder with --out")
