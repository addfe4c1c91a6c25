"""Dataset folders on their way up: built under a temporary name, flat, and free of what Kaggle would change or leave
out.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hubmap_kit.errors import PublishError
from hubmap_kit.files import sweep
from hubmap_kit.runtime.build_id import FILE, METADATA, flat_name

MOST_FILES = 50  # of one dataset, at its top level
ARCHIVES = (
    ".zip",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".gz",
    ".bz2",
    ".tar.bz2",
    ".tbz2",
    ".xz",
    ".7z",
)  # unpacked by the server, or reported to be
ZIPPED_WEIGHTS = (".pt", ".pth")  # zip files inside; Kaggle was seen to unpack some
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LINKED = 1 << 20  # bytes from which a file is linked instead of copied


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place when the block succeeds.

    Raises PublishError where `out` is no dataset.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and ((out / FILE).is_file() or not any(out.iterdir()))):
        raise PublishError(
            f"{out} exists and is no staged dataset (it has no {FILE}); choose another --out, nothing is overwritten"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out.parent, f".{out.name}.*.tmp")
    growing, former = (out.with_name(f".{out.name}.{word}.{os.getpid()}.tmp") for word in ("new", "old"))
    growing.mkdir()
    try:
        yield growing
        if out.exists():
            os.replace(out, former)
        os.replace(growing, out)
    finally:
        for left in (growing, former):
            shutil.rmtree(left, ignore_errors=True)


@dataclass
class Growing:
    """A dataset folder while it is filled: `paths` has the logical path of every flat name, `before_end` what looks at
    the whole.
    """

    folder: Path
    paths: dict[str, str] = field(default_factory=dict)
    before_end: list[Callable[[Path], None]] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where the file of a logical path goes.

        Raises PublishError for odd names, and when two files would travel under one name.
        """
        for part in path.split("/"):
            if not _PLAIN.fullmatch(part):
                raise PublishError(
                    f"'{part}' cannot be a name in a dataset; use letters, digits, '.', '_' and '-', with a letter or"
                    " digit first"
                )
        name = flat_name(path)
        if name in self.paths:
            raise PublishError(f"'{path}' and '{self.paths[name]}' would both travel as {name}; rename one")
        self.paths[name] = path
        return self.folder / name

    def add(self, source: Path, path: str) -> None:
        """Bring a file in under its logical path."""
        target = self.place(path)
        if not source.is_file():
            raise PublishError(f"{source} does not exist or is not a file; expected it to stage")
        put(source, target)


def put(source: Path, target: Path) -> None:
    """Bring a file into a dataset folder: big ones as hard links where the file system can, so nothing is stored
    twice.
    """
    source = source.resolve()
    if source.stat().st_size >= _LINKED:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without hard links
    shutil.copyfile(source, target)


def check_flat(folder: Path) -> None:
    """Raise PublishError where Kaggle would leave out, unpack or refuse a file of the folder."""
    uploaded = sorted(path for path in folder.iterdir() if path.name != METADATA)
    for path in uploaded:
        if not path.is_file():
            raise PublishError(f"{path} is not a file; the client leaves sub-folders out, so a dataset must be flat")
        if path.name.lower().endswith(ARCHIVES):
            raise PublishError(
                f"{path} is an archive, which Kaggle unpacks when it is uploaded; ship wheels and plain files only"
            )
        if path.suffix.lower() in ZIPPED_WEIGHTS:
            raise PublishError(
                f"{path} is a torch file, which Kaggle may unpack like a zip file; ship weights as .safetensors"
            )
    if len(uploaded) > MOST_FILES:
        raise PublishError(
            f"{folder} holds {len(uploaded)} files where Kaggle takes {MOST_FILES} in a dataset; put less into it"
        )
