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
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from hubmap_kit.build_id import BuildId, describe, sha256, write
from hubmap_kit.errors import PublishError
from hubmap_kit.files import write_text
from hubmap_kit.publish.root import Commit, archive, commit, new_files, repository, tracked_files
from hubmap_kit.publish.staging import check_flat, fresh_folder, put
from hubmap_kit.publish.wheels import Wheel, check_wheels, open_wheel

# LICENSES.md of the code bundle: who made each wheel and under which terms, with the texts that the wheels carry.

OWN = "hubmap-kit"
_FILES = ("licen", "copying", "notice", "authors")


def licences(wheels: Sequence[Wheel]) -> str:
    """The text of LICENSES.md. Raises PublishError for a wheel of others that comes without its terms."""
    sections = [_section(wheel) for wheel in sorted(wheels, key=lambda wheel: wheel.name)]
    return "\n\n".join(["# Licences of the wheels in this dataset", *sections]) + "\n"


def _section(wheel: Wheel) -> str:
    texts = wheel.texts(*_FILES)
    terms = _terms(wheel)
    if wheel.name != OWN and (terms is None or not texts):
        raise PublishError(
            f"{wheel.path} does not carry its licence (name: {terms}, files: {len(texts)}); ship a release that does"
        )
    lines = [f"## {wheel.name} {wheel.version}", f"- Licence: {terms or 'none stated'}", f"- File: {wheel.path.name}"]
    source = _source(wheel)
    if source:
        lines.append(f"- Source: {source}")
    blocks = [f"### {name}\n\n```text\n{text.strip()}\n```" for name, text in texts.items()]
    return "\n\n".join([lines[0], "\n".join(lines[1:]), *blocks])


def _terms(wheel: Wheel) -> str | None:
    """The licence's name: the SPDX expression, else the old License field, else the classifiers."""
    metadata = wheel.metadata
    old = (metadata.license or "").strip()
    classifiers = [line.rpartition(" :: ")[2] for line in metadata.classifiers or () if line.startswith("License ::")]
    return metadata.license_expression or (old if old and "\n" not in old else None) or ", ".join(classifiers) or None


def _source(wheel: Wheel) -> str | None:
    """Where the source lives: the project's repository or home page, else its page in the package index."""
    urls = {label.lower(): url for label, url in (wheel.metadata.project_urls or {}).items()}
    for label in ("source", "source code", "repository", "homepage"):
        if label in urls:
            return urls[label]
    return wheel.metadata.home_page or (
        None if wheel.name == OWN else f"https://pypi.org/project/{wheel.name}/{wheel.version}/"
    )


# Requirement files: wheels pinned by hash, fetched into a cache of the user; and the list of what Kaggle's image holds.

log = logging.getLogger(__name__)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})\b")


@dataclass(frozen=True)
class Pin:
    """One wheel that a requirement file names: canonical name, version, sha256 of its file."""

    name: str
    version: Version
    sha256: str


def requirements(path: Path) -> list[Requirement]:
    """The requirements of a pip requirement or constraint file, hashes and comments left out.

    Raises PublishError for other lines.
    """
    found = []
    for line in _lines(path):
        try:
            found.append(Requirement(_HASH.sub("", line).strip()))
        except InvalidRequirement as error:
            raise PublishError(f"{path}: '{line}' is no requirement; expected name==version") from error
    return found


def pins(path: Path) -> list[Pin]:
    """The wheels that a file names as `name==version --hash=sha256:...`.

    Raises PublishError for a line without version or hash.
    """
    found = []
    for line, requirement in zip(_lines(path), requirements(path), strict=True):
        digest = _HASH.search(line)
        exact = [clause.version for clause in requirement.specifier if clause.operator == "=="]
        if digest is None or len(exact) != 1 or len(requirement.specifier) != 1:
            raise PublishError(
                f"{path}: '{line}' does not pin one wheel; expected name==version --hash=sha256:<64 hex digits>"
            )
        found.append(Pin(canonicalize_name(requirement.name), Version(exact[0]), digest[1]))
    return found


def fetch(path: Path, cache: Path | None = None) -> list[Path]:
    """The pinned wheels of a requirement file, from the cache or else from the package index; hashed at every use.

    `cache` is hubmap_kit/wheels in the user's cache folder by default. Raises PublishError when a wheel cannot be had.
    """
    folder = cache or default_cache()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pins(path)
    found = [_cached(pin, folder) for pin in wanted]
    if None in found:
        _download(path, folder)
        found = [_cached(pin, folder) for pin in wanted]
    missing = [f"{pin.name} {pin.version}" for pin, wheel in zip(wanted, found, strict=True) if wheel is None]
    if missing:
        raise PublishError(
            f"{path}: the package index has no wheel of {missing[0]} with the pinned sha256; correct the pin"
        )
    return [wheel for wheel in found if wheel is not None]


def default_cache() -> Path:
    """The user's cache of wheels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hubmap_kit" / "wheels"


def _cached(pin: Pin, folder: Path) -> Path | None:
    for path in sorted(folder.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(path.name)
        if (name, version) == (pin.name, pin.version):
            if sha256(path) == pin.sha256:
                return path
            log.warning("%s does not have the pinned sha256; it is fetched again", path)
    return None


def _download(path: Path, folder: Path) -> None:
    log.info("fetching the wheels of %s into %s", path.name, folder)
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        failure = pip("download", "--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(path), "-d", fresh)
        if failure:
            raise PublishError(
                f"{path}: its wheels could not be fetched ({failure}); connect to the network once, they are kept"
            )
        for wheel in Path(fresh).iterdir():
            os.replace(wheel, folder / wheel.name)


def pip(*arguments: str, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str | None:
    """Run pip; None when it did its work, else the line of its output that says why not."""
    command = [sys.executable, "-m", "pip", *arguments, "--no-input", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)
    if not done.returncode:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = (
        [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines or ["pip said nothing"]
    )
    return errors[-1][:200]


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


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
