"""What a kernel finds below /kaggle/input: exactly the sources that its kernel-metadata.json lists, in either of
Kaggle's layouts.

Both layouts are what users report of 2026; when Kaggle shows which is not documented, so a kernel must do with both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubmap_kit.errors import RehearsalError
from hubmap_kit.runtime.build_id import METADATA

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
