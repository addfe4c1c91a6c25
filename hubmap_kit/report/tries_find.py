"""Finding run folders, and naming them so that no two look alike."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from hubmap_kit.errors import TableError
from hubmap_kit.inference.ensemble import MODEL_FILE
from hubmap_kit.training.history import CHECKPOINT_FILE, fold_number

CONFIG = "config.yaml"


def find_runs(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The run folders (those with a config.yaml) in some folders, however deep, and what is wrong with others, a
    sentence each.

    Hidden folders are passed over, and a run is not looked into. Raises TableError for a named folder that does not
    exist.
    """
    runs: dict[Path, Path] = {}
    problems: list[str] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise TableError(f"{folder} is no folder, but a run or a folder of runs was expected; check the path")
        _walk(folder, runs, problems, seen)
    return list(runs.values()), problems


def labels(runs: Sequence[Path]) -> list[str]:
    """For each run folder the shortest end of its path that no other one has."""
    parts = [path.resolve().parts for path in runs]
    return [_label(number, parts) for number in range(len(parts))]


def _label(number: int, parts: Sequence[tuple[str, ...]]) -> str:
    own = parts[number]
    others = [other for place, other in enumerate(parts) if place != number and other != own]
    length = next(
        (length for length in range(1, len(own)) if all(other[-length:] != own[-length:] for other in others)), len(own)
    )
    return shown("/".join(own[-length:]))


def shown(path: str | Path) -> str:
    """A path as text that can be written: bytes of a name that are no UTF-8 become question marks."""
    return os.fsencode(path).decode("utf-8", "replace")


def _walk(top: Path, runs: dict[Path, Path], problems: list[str], seen: set[Path]) -> None:
    def refused(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be looked into ({error.strerror}); it is left out")

    for name, inner, files in os.walk(top, onerror=refused, followlinks=True):
        folder = Path(name)
        real = folder.resolve()
        if real in seen:  # a link may lead back to a folder above it
            inner.clear()
            continue
        seen.add(real)
        if CONFIG in files:
            runs[real] = folder
            inner.clear()
        elif any(_is_fold(folder / each) for each in inner):
            problems.append(
                f"{folder} has trained folds, but no {CONFIG}; take that from the original run, nobody knows its"
                " settings without it"
            )
            inner.clear()
        else:
            inner[:] = sorted(each for each in inner if not each.startswith("."))


def _is_fold(folder: Path) -> bool:
    return fold_number(folder) is not None and any((folder / name).is_file() for name in (MODEL_FILE, CHECKPOINT_FILE))
