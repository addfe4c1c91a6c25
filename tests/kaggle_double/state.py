"""What the double holds: datasets, uploads, kernels, submissions; and how that is kept on disk between two runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class File:
    """One stored file; its bytes lie in the state's store under their SHA-256."""

    name: str
    sha256: str
    size: int


@dataclass
class Blob:
    """An announced upload; `sha256` is empty until all its bytes have come."""

    token: str
    name: str
    size: int
    received: int = 0
    sha256: str = ""
    puts: int = 0


@dataclass
class DatasetVersion:
    """One version of a dataset.

    `polls` counts the status calls since it was made, `downloads` those of single files.
    """

    number: int
    notes: str
    files: list[File]
    created: str
    polls: int = 0
    downloads: int = 0


@dataclass
class Dataset:
    """A dataset; `hidden` is how many more calls find it not there (403), as right after its creation."""

    owner: str
    slug: str
    title: str
    licence: str
    private: bool
    hidden: int
    versions: list[DatasetVersion] = field(default_factory=list)
    status: str = "BLOBS_RECEIVED"


@dataclass
class KernelVersion:
    """One pushed kernel version: what was asked for (`asked`: the client's own JSON without the text), what the server
    made of it, and its run.
    """

    number: int
    text: str
    asked: dict[str, Any]
    accelerator: str
    internet: bool
    sources: dict[str, list[str]]
    status: str
    end: str
    polls: int = 0
    failure: str = ""
    log: str = ""
    files: list[File] = field(default_factory=list)


@dataclass
class Kernel:
    """A kernel and its versions."""

    owner: str
    slug: str
    title: str
    versions: list[KernelVersion] = field(default_factory=list)


@dataclass
class Submission:
    """A code submission; scores are text, as Kaggle's are."""

    ref: int
    competition: str
    kernel: str
    version: int
    file: str
    message: str
    date: str
    status: str = "PENDING"
    polls: int = 0
    public_score: str = ""
    private_score: str = ""
    error: str = ""


class State:
    """All that the double remembers.

    `store` is the folder of file contents; with state.json beside it, the state can be read again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.datasets: dict[str, Dataset] = {}
        self.kernels: dict[str, Kernel] = {}
        self.submissions: list[Submission] = []
        self.blobs: dict[str, Blob] = {}
        (folder / "store").mkdir(parents=True, exist_ok=True)
        (folder / "partial").mkdir(exist_ok=True)

    def add(self, name: str, content: bytes | Path) -> File:
        """Store a file; a path is moved into the store."""
        path = (
            content
            if isinstance(content, Path)
            else self.folder / "partial" / f"new-{hashlib.sha256(content).hexdigest()}"
        )
        if isinstance(content, bytes):
            path.write_bytes(content)
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        size = path.stat().st_size
        os.replace(path, self.folder / "store" / sha256)
        return File(name, sha256, size)

    def path(self, file: File) -> Path:
        """Where the bytes of a file lie."""
        return self.folder / "store" / file.sha256

    def read(self, ref: str, name: str, version: int = 0) -> bytes:
        """The bytes of file `name` of dataset `owner/slug`, of its last version or of `version`."""
        return self.path(find(self.datasets[ref].versions[version - 1].files, name)).read_bytes()

    def save(self) -> None:
        """Write state.json beside the store."""
        facts = {
            "datasets": [asdict(value) for value in self.datasets.values()],
            "kernels": [asdict(value) for value in self.kernels.values()],
            "submissions": [asdict(value) for value in self.submissions],
            "blobs": [asdict(value) for value in self.blobs.values()],
        }
        temporary = self.folder / "state.json.tmp"
        temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        os.replace(temporary, self.folder / "state.json")

    def load(self) -> None:
        """Read what `save` wrote, if it is there. Kernel sessions that were still open have ended meanwhile."""
        path = self.folder / "state.json"
        if not path.is_file():
            return
        facts = json.loads(path.read_text(encoding="utf-8"))
        self.datasets = {f"{value['owner']}/{value['slug']}": _dataset(value) for value in facts["datasets"]}
        self.kernels = {f"{value['owner']}/{value['slug']}": _kernel(value) for value in facts["kernels"]}
        self.submissions = [Submission(**value) for value in facts["submissions"]]
        self.blobs = {value["token"]: Blob(**value) for value in facts["blobs"]}
        for kernel in self.kernels.values():
            for version in kernel.versions:
                version.status = version.end

    def remove(self) -> None:
        """Delete everything from the disk."""
        shutil.rmtree(self.folder)


def find(files: Iterable[File], name: str) -> File | None:
    """The file called `name`."""
    return next((file for file in files if file.name == name), None)


def _files(value: dict[str, Any]) -> dict[str, Any]:
    return {**value, "files": [File(**file) for file in value["files"]]}


def _dataset(value: dict[str, Any]) -> Dataset:
    return Dataset(**{**value, "versions": [DatasetVersion(**_files(version)) for version in value["versions"]]})


def _kernel(value: dict[str, Any]) -> Kernel:
    return Kernel(**{**value, "versions": [KernelVersion(**_files(version)) for version in value["versions"]]})
