"""A folder that grows under a temporary name, remembers which slides it holds, and takes its own name when it is
complete.

Killed at any point, the next run with the same data and settings finds it by its name, `.<name>.<mark>.growing`, and
goes on. A slide counts when its journal entry stands, which is written after its pixels; until then it is simply
written again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hubmap_kit.errors import StoreError
from hubmap_kit.files import write_json

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Growing:
    """`folder` becomes `final`; `journal` beside it has one entry a finished slide."""

    final: Path
    folder: Path
    journal: Path

    def done(self) -> set[int]:
        """The numbers of the slides that are finished."""
        return {int(path.stem) for path in self.journal.glob("[0-9]*.json")}

    def note(self, number: int, facts: Mapping[str, Any]) -> None:
        """Say that a slide is finished, and what later tables need to know of it."""
        write_json(self.journal / f"{number:06d}.json", facts)

    def entries(self) -> Iterator[dict[str, Any]]:
        """What was noted, in the order of the slides."""
        for path in sorted(self.journal.glob("[0-9]*.json")):
            yield json.loads(path.read_text(encoding="utf-8"))

    def forget_damaged(self) -> None:
        """Take slides out of the journal whose own files were taken away or changed between two runs."""
        for number, entry in zip(sorted(self.done()), list(self.entries()), strict=True):
            try:
                check_sizes(self.folder, entry["files"])
            except StoreError:
                (self.journal / f"{number:06d}.json").unlink()

    def finish(self) -> None:
        """Give the folder its name; a kill in between leaves a finished folder, and a journal that the next run
        removes.
        """
        os.replace(self.folder, self.final)
        shutil.rmtree(self.journal, ignore_errors=True)

    def drop(self) -> None:
        """Remove the folder and its journal."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.journal, ignore_errors=True)


@contextmanager
def growing(final: Path, mark: str) -> Iterator[Growing]:
    """The growing folder of `final`, new or as an earlier run left it.

    Raises StoreError when another process is at it.
    """
    final = final.absolute()
    stem = f".{final.name}.{mark}"
    here = Growing(final, final.with_name(f"{stem}.growing"), final.with_name(f"{stem}.journal"))
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = final.with_name(f"{stem}.lock")
    with open(lock, "w") as handle:
        _lock(handle, final)
        _warn_of_others(final, here.folder)
        here.folder.mkdir(exist_ok=True)
        here.journal.mkdir(exist_ok=True)
        try:
            yield here
        finally:
            if not here.folder.exists():
                lock.unlink(missing_ok=True)


def discard(final: Path, mark: str) -> None:
    """Remove the journal of a folder that took its name just before its process was killed."""
    for word in ("journal", "lock"):
        left = final.absolute().with_name(f".{final.name}.{mark}.{word}")
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished conversion; None where there is none, or none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (
        found
        if isinstance(found, dict) and isinstance(found.get("files"), dict) and isinstance(found.get("tables"), dict)
        else None
    )


def check_sizes(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise StoreError naming the first listed file that is missing or of another size; nothing is read."""
    for name, facts in listed.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else -1
        if found != facts["bytes"]:
            state = "is missing" if found < 0 else f"has {found} bytes"
            raise StoreError(
                f"{path} {state} where {MANIFEST} says {facts['bytes']} bytes; delete {folder} and convert again"
            )


def _warn_of_others(final: Path, mine: Path) -> None:
    for other in sorted(final.parent.glob(f".{final.name}.*.growing")):
        if other != mine:
            log.warning(
                "%s is what a conversion with other settings or slides left; delete it if that is not running", other
            )


def _lock(handle: IO[str], final: Path) -> None:
    """Hold the lock until the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two conversions into one folder at a time are then not noticed
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StoreError(
            f"{final} is being written by another process; wait for it, or choose another --out"
        ) from error
