"""The folder of a rehearsal: made anew each time, and never another one than a rehearsal's own."""

from __future__ import annotations

import shutil
from pathlib import Path

from hubmap_kit.errors import RehearsalError

MARKER = ".hubmap-rehearsal"
BULKY = ("data", "test", "hidden", "datasets", "outputs", "stores")  # what can be made again


def fresh(folder: Path) -> Path:
    """An empty folder. Raises RehearsalError where something lies that no rehearsal made."""
    if folder.exists() and not folder.is_dir():
        raise RehearsalError(f"{folder} is a file; choose a folder with --out")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise RehearsalError(f"{folder} is not empty and was not made by a rehearsal; choose another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    return folder


def tidy(folder: Path) -> None:
    """Remove the inputs that the rehearsal made; logs, outputs, kernels, pictures and the report stay."""
    for name in BULKY:
        shutil.rmtree(folder / name, ignore_errors=True)
