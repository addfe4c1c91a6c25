"""BUILD_ID.json: what a published dataset holds, file by file, so that a kernel can tell what is really mounted.

A dataset is a flat folder, because Kaggle keeps no sub-folders of a plain upload: the logical path
`mini/fold0/model.safetensors` travels as `mini__fold0__model.safetensors`. `unfold` gives the logical tree back as
symbolic links.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

import hubmap_kit
from hubmap_kit.errors import KernelError
from hubmap_kit.files import write_json
from hubmap_kit.progress import track

FILE, METADATA = "BUILD_ID.json", "dataset-metadata.json"
KINDS = ("code", "weights", "tiles", "pretrained")
ALIKE = 12  # hex digits of a hash that go into a build id
_CHUNK = 1 << 20


class Shipped(TypedDict):
    """One uploaded file: hash of its bytes, size, and the path that readers know it by."""

    sha256: str
    bytes: int
    path: str


@dataclass(frozen=True)
class BuildId:
    """The content of BUILD_ID.json. `files` has every other file of the folder under its flat name.

    `git_sha` is the full commit that a code bundle was made from; None for the other kinds.
    """

    kind: str
    build_id: str
    git_sha: str | None
    dirty: bool
    hubmap_kit: str
    files: dict[str, Shipped]


def flat_name(path: str | PurePosixPath) -> str:
    """The name under which a logical path travels.

    Raises KernelError for a path that is absolute or leaves its folder.
    """
    text = str(path)
    if not text.isprintable() or "\\" in text or any(part in ("", ".", "..") for part in text.split("/")):
        raise KernelError(
            f"'{text}' is no plain path inside a dataset; expected names joined by '/', such as"
            " mini/fold0/model.safetensors"
        )
    return text.replace("/", "__")


def describe(
    kind: str, folder: Path, paths: Mapping[str, str] | None = None, git_sha: str | None = None, dirty: bool = False
) -> BuildId:
    """Hash every file of a flat folder; BUILD_ID.json and dataset-metadata.json do not count.

    `paths` gives the logical path of the flat names that stand for one; the others are their own. The id depends on
    names, bytes and, for code, the commit: the same folder always gets the same one.
    """
    if kind not in KINDS:
        raise KernelError(f"'{kind}' is no kind of dataset; expected {', '.join(KINDS)}")
    logical = paths or {}
    files: dict[str, Shipped] = {}
    for path in track(_uploaded(folder), f"hashing {folder.name}", "file"):
        files[path.name] = {
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
            "path": logical.get(path.name, path.name),
        }
    _check_names(files, folder)
    return BuildId(kind, _id_of(kind, files, git_sha, dirty), git_sha, dirty, hubmap_kit.__version__, files)


def write(folder: Path, build: BuildId) -> None:
    """Write BUILD_ID.json into a folder."""
    write_json(folder / FILE, asdict(build))


def read(folder: Path) -> BuildId:
    """Read a folder's BUILD_ID.json without looking at its other files.

    Raises KernelError when it is missing or malformed.
    """
    path = folder / FILE
    try:
        build = _parsed(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise KernelError(
            f"{path} cannot be read ({error.strerror or error}); attach a dataset that 'hubmap push' made"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise KernelError(
            f"{path} is no table of a build ({type(error).__name__}: {error}); push the dataset again with 'hubmap"
            " push'"
        ) from error
    if build.kind not in KINDS:
        raise KernelError(f"{path} says kind '{build.kind}'; expected one of {', '.join(KINDS)}")
    _check_names(build.files, path)
    return build


def verify(folder: Path, expected: str | None = None) -> BuildId:
    """Read BUILD_ID.json and hash the folder again. Raises KernelError naming the first file that differs.

    `expected` is the build id that the reader was made for; None takes whichever is there.
    """
    build = read(folder)
    if expected is not None and build.build_id != expected:
        raise KernelError(
            f"{folder} holds build {build.build_id}, expected {expected}; wait until the new version is mounted, or"
            " push both again"
        )
    found = {path.name: path for path in _uploaded(folder)}
    for name in track(sorted(build.files.keys() | found.keys()), f"checking {folder.name}", "file"):
        difference = _difference(build.files.get(name), found.get(name))
        if difference:
            raise KernelError(f"{folder / name} {difference}; push the dataset again with 'hubmap push {build.kind}'")
    if build.build_id != _id_of(build.kind, build.files, build.git_sha, build.dirty):
        raise KernelError(
            f"{folder / FILE} holds the id {build.build_id}, which its own table does not give; push the dataset again"
        )
    return build


def unfold(folder: Path, into: Path) -> Path:
    """Rebuild the logical tree of a dataset in `into` as symbolic links, and return `into`.

    Nothing is copied or hashed.

    Raises KernelError for a listed file that is missing, and where something else than a link stands in the way.
    """
    build = read(folder)
    for name, facts in build.files.items():
        source, link = (folder / name).absolute(), into / facts["path"]
        if not source.is_file():
            raise KernelError(
                f"{source} is missing although {FILE} lists it; push the dataset again with 'hubmap push {build.kind}'"
            )
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink():
                link.unlink()
            os.symlink(source, link)
        except FileExistsError as error:
            raise KernelError(
                f"{error.filename2 or error.filename} is in the way of {facts['path']}; unfold into an empty folder"
            ) from error
    return into


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _parsed(values: Any) -> BuildId:
    """A parsed BUILD_ID.json as a BuildId. Raises ValueError, KeyError or TypeError when it is not one."""
    wanted = {
        "kind": str,
        "build_id": str,
        "git_sha": (str, type(None)),
        "dirty": bool,
        "hubmap_kit": str,
        "files": dict,
    }
    build = BuildId(**{key: _typed(values[key], types, key) for key, types in wanted.items()})
    for name, facts in build.files.items():
        where = f"files.{name}"
        build.files[name] = {
            "sha256": _typed(facts["sha256"], str, where),
            "bytes": _typed(facts["bytes"], int, where),
            "path": _typed(facts["path"], str, where),
        }
    return build


def _typed(value: Any, types: Any, key: str) -> Any:
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise TypeError(f"{key} is a {type(value).__name__}")
    return value


def _uploaded(folder: Path) -> list[Path]:
    """The entries of a dataset folder that travel as data, by name."""
    return sorted(path for path in folder.iterdir() if path.name not in (FILE, METADATA))


def _difference(listed: Shipped | None, path: Path | None) -> str | None:
    if path is None:
        return f"is missing although {FILE} lists it"
    if listed is None:
        return f"is not listed in {FILE}"
    if not path.is_file():
        return "is not a file"
    size = path.stat().st_size
    if size != listed["bytes"]:
        return f"has {size} bytes where {FILE} says {listed['bytes']}"
    found = sha256(path)
    return (
        None
        if found == listed["sha256"]
        else f"has the sha256 {found[:ALIKE]}... where {FILE} says {listed['sha256'][:ALIKE]}..."
    )


def _id_of(kind: str, files: Mapping[str, Shipped], git_sha: str | None, dirty: bool) -> str:
    table = json.dumps(files, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    digest = hashlib.sha256(table.encode()).hexdigest()[:ALIKE]
    prefix = (git_sha or "nogit")[:ALIKE] if kind == "code" else kind
    return f"{prefix}-{digest}" + ("-dirty" if dirty else "")


def _check_names(files: Mapping[str, Shipped], where: Path) -> None:
    """Every flat name is that of its path, and no path is also the folder of another."""
    paths = {facts["path"] for facts in files.values()}
    for name, facts in files.items():
        # A file may also keep a name with '__' in it that stands for no folder.
        if name != flat_name(facts["path"]) or name in (FILE, METADATA):
            raise KernelError(
                f"{where} lists '{name}' for the path '{facts['path']}'; expected '{flat_name(facts['path'])}'"
            )
        inside = next((str(parent) for parent in PurePosixPath(facts["path"]).parents if str(parent) in paths), None)
        if inside:
            raise KernelError(f"{where} lists '{inside}' as a file and as a folder; rename one of them")
