"""Requirement files: wheels pinned by hash, fetched into a cache of the user; and the list of what Kaggle's image
holds.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from hubmap_kit.errors import PublishError
from hubmap_kit.runtime.build_id import sha256

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
