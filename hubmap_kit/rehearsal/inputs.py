"""What a kernel finds below /kaggle/input: exactly the sources that its kernel-metadata.json lists, in either of
Kaggle's layouts.

Both layouts are what users report of 2026; when Kaggle shows which is not documented, so a kernel must do with both.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hubmap_kit.build_id import METADATA
from hubmap_kit.errors import RehearsalError

INPUT = "/kaggle/input"
LAYOUTS = ("new", "flat")
Mount = tuple[Path, str]
TRAIN = ("train.csv", "train_images")
TEST = ("test.csv", "test_images", "sample_submission.csv")


@dataclass(frozen=True)
class Shelf:
    """Where the sources lie on this machine: folders by the slug of a dataset or kernel, the competition as files by
    name.
    """

    datasets: Mapping[str, Path] = field(default_factory=dict)
    outputs: Mapping[str, Path] = field(default_factory=dict)
    competition: Mapping[str, Path] = field(default_factory=dict)


def competition(train: Path | None, test: Path | None) -> dict[str, Path]:
    """The competition's files by name: the training part of one folder and the test part of another; what a folder
    lacks is left out.
    """
    parts = [(folder, names) for folder, names in ((train, TRAIN), (test, TEST)) if folder is not None]
    return {name: folder / name for folder, names in parts for name in names if (folder / name).exists()}


def mounts(metadata: Mapping[str, Any], shelf: Shelf, layout: str) -> tuple[Mount, ...]:
    """The mounts of a kernel.

    Raises RehearsalError for a source that is not on the shelf, with the command that brings it there.
    """
    found: list[Mount] = []
    for source in metadata.get("dataset_sources", []):
        folder = _folder(source, shelf.datasets, _dataset_advice(source))
        found += _entries(folder, _place(layout, "datasets", source))
    for source in metadata.get("kernel_sources", []):
        folder = _folder(
            source, shelf.outputs, f"rehearse or download it, and name its folder with --output {_slug(source)}=FOLDER"
        )
        found += _entries(folder, _place(layout, "notebooks", source))
    for source in metadata.get("competition_sources", []):
        target = _place(layout, "competitions", source)
        found += [(path, f"{target}/{name}") for name, path in shelf.competition.items()]
    twice = [target for index, (_, target) in enumerate(found) if target in [other for _, other in found[:index]]]
    if twice:
        raise RehearsalError(f"two sources of the kernel would be mounted at {twice[0]}; rename one, or leave it out")
    return tuple(found)


def _place(layout: str, kind: str, source: str) -> str:
    return f"{INPUT}/{kind}/{source}" if layout == "new" else f"{INPUT}/{_slug(source)}"


def _slug(source: str) -> str:
    return source.rpartition("/")[2]


def _folder(source: str, known: Mapping[str, Path], advice: str) -> Path:
    folder = known.get(_slug(source))
    if folder is None or not folder.is_dir():
        where = f"{folder} does not exist" if folder else "nothing on this machine stands for it"
        raise RehearsalError(f"the kernel attaches {source}, but {where}; {advice}")
    return folder


def _dataset_advice(source: str) -> str:
    kind = _slug(source).rpartition("-")[2]
    commands = {
        "code": "hubmap bundle",
        "weights": "hubmap push weights --run RUN --dry-run",
        "tiles": "hubmap push tiles --store STORE --dry-run",
    }
    commands["pretrained"] = "hubmap push pretrained --weights FILE --dry-run"
    return (
        f"stage it with '{commands[kind]}'"
        if kind in commands
        else "a rehearsal knows the kit's own datasets only; leave it out"
    )


def _entries(folder: Path, target: str) -> Sequence[Mount]:
    """Entry by entry, because the metadata that lies beside staged files is not uploaded."""
    return [(path, f"{target}/{path.name}") for path in sorted(folder.iterdir()) if path.name != METADATA]


# The folder of a rehearsal: made anew each time, and never another one than a rehearsal's own.

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
