"""The code bundle: our wheel, the wheels that Kaggle's image lacks, their licences, and BUILD_ID.json.

The same commit gives the same bytes, whoever builds it: the wheel is made from a clean export by one pinned release of
setuptools and packed again with sorted names, the commit's time, fixed permissions and no compression.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from hubmap_kit.errors import PublishError
from hubmap_kit.files import write_text
from hubmap_kit.publish.folders import check_flat, fresh_folder, put
from hubmap_kit.publish.licences import licences
from hubmap_kit.publish.pins import fetch, pip, requirements
from hubmap_kit.publish.root import Commit, archive, commit, new_files, repository, tracked_files
from hubmap_kit.publish.wheels import check_wheels, open_wheel
from hubmap_kit.runtime.build_id import BuildId, describe, write

log = logging.getLogger(__name__)
LICENCES = "LICENSES.md"
VENDORED, BUILD_TOOLS, IMAGE = (
    "hubmap_kit/publish/vendored.txt",
    "hubmap_kit/publish/build_tools.txt",
    "constraints.txt",
)


def build_bundle(out: Path, allow_dirty: bool = False, root: Path | None = None, cache: Path | None = None) -> BuildId:
    """Build the bundle of a checkout into the folder `out` and return its BUILD_ID.

    `root` is the checkout (default: the one that this code runs from), `cache` the folder of fetched wheels. With
    `allow_dirty`, files that differ from the commit, and new ones in the package, go in as they are. Raises
    PublishError.
    """
    root = root or repository()
    state = commit(root)
    _check_clean(root, state, allow_dirty)
    with tempfile.TemporaryDirectory(prefix="hubmap-bundle-") as folder, fresh_folder(out) as growing:
        source = Path(folder) / "source"
        export(root, state, source)
        vendored = fetch(source / VENDORED, cache)
        for path in vendored:
            put(path, growing / path.name)
        built = _build_wheel(source, Path(folder), fetch(source / BUILD_TOOLS, cache), state.seconds)
        repack(built, growing / built.name, state.seconds)
        wheels = [open_wheel(path) for path in sorted(growing.iterdir())]
        check_wheels(wheels, requirements(source / IMAGE))
        write_text(growing / LICENCES, licences(wheels))
        build = describe("code", growing, git_sha=state.sha, dirty=_dirty(state))
        write(growing, build)
        check_flat(growing)
    log.info("bundle %s in %s", build.build_id, out)
    return build


def export(root: Path, state: Commit, into: Path) -> None:
    """Copy what the wheel is made from into a new folder: the commit's own files, or those on disk where they differ
    from it.
    """
    into.mkdir(parents=True)
    if state.sha and not _dirty(state):
        with zipfile.ZipFile(io.BytesIO(archive(root, state.sha))) as files:
            files.extractall(into)
        return
    names = [*tracked_files(root), *new_files(root)] if state.sha else _on_disk(root)
    for name in names:
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, into / name)


def repack(wheel: Path, target: Path, seconds: int) -> None:
    """Write a wheel again so that its bytes depend on its content only: RECORD anew, every entry dated `seconds` (UTC).

    Nothing is compressed: releases of zlib differ in their output.
    """
    with zipfile.ZipFile(wheel) as packed:
        files = {name: packed.read(name) for name in packed.namelist() if not name.endswith("/")}
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    del files[record]
    # dist-info last, as the wheel format recommends.
    names = sorted(files, key=lambda name: (".dist-info/" in name, name))
    lines = [f"{name},sha256={_digest(files[name])},{len(files[name])}" for name in names]
    files[record] = "".join(f"{line}\n" for line in [*lines, f"{record},,"]).encode()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:
        for name in [*names, record]:
            entry = zipfile.ZipInfo(name, time.gmtime(seconds)[:6])
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            packed.writestr(entry, files[name])


def _check_clean(root: Path, state: Commit, allow_dirty: bool) -> None:
    if allow_dirty or (state.sha and not state.changes):
        return
    if not state.sha:
        raise PublishError(
            f"{root} is no git checkout, so its bundle would have no commit; clone it with git, or add --allow-dirty"
        )
    more = f" and {len(state.changes) - 1} more" if len(state.changes) > 1 else ""
    raise PublishError(
        f"{root / state.changes[0]}{more} differs from commit {state.sha[:12]}; commit it, or add --allow-dirty"
    )


def _dirty(state: Commit) -> bool:
    return not state.sha or bool(state.changes)


def _on_disk(root: Path) -> list[str]:
    package = (path for path in (root / "hubmap_kit").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    paths = [*package, *(root / name for name in ("setup.py", "README.md", IMAGE)), *root.glob("LICEN*")]
    return sorted(path.relative_to(root).as_posix() for path in paths)


def _build_wheel(source: Path, folder: Path, tools: list[Path], seconds: int) -> Path:
    """Build the wheel of `source` with pip, offline, with the pinned build tools and nothing of the machine's
    settings.
    """
    # Without this file pip would build with whichever setuptools it meets.
    needs = ", ".join(f'"{wheel.name}=={wheel.version}"' for wheel in map(open_wheel, tools))
    write_text(
        source / "pyproject.toml",
        f'[build-system]\nrequires = [{needs}]\nbuild-backend = "setuptools.build_meta:__legacy__"\n',
    )
    home, out = folder / "home", folder / "wheel"
    home.mkdir()
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PIP_CONFIG_FILE": os.devnull,
        "SOURCE_DATE_EPOCH": str(seconds),
    }
    links = [word for wheel in tools for word in ("--find-links", str(wheel.parent))]
    arguments = ("wheel", str(source), "-w", str(out), "--no-deps", "--no-index", "--no-cache-dir", *links)
    failure = pip(*arguments, environment=environment, folder=folder)
    if failure:
        raise PublishError(
            f"the wheel could not be built from the checkout ({failure}); mend setup.py, or install pip into"
            f" {sys.prefix}"
        )
    return next(out.glob("*.whl"))


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
