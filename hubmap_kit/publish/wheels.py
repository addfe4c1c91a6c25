"""What may go into the code bundle: pure wheels that Kaggle's image can run without anything else being installed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import InvalidMetadata, Metadata
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from hubmap_kit.errors import PublishError

PYTHONS = ("3.11", "3.12", "3.13")  # what a kernel may run; the image has moved before
PURE = Tag("py3", "none", "any")
_COMPILED = (".so", ".pyd", ".dylib", ".dll")


@dataclass(frozen=True)
class Wheel:
    """A wheel file and what its METADATA says. `name` is canonical, such as segmentation-models-pytorch."""

    path: Path
    name: str
    version: Version
    metadata: Metadata

    def texts(self, *stems: str) -> dict[str, str]:
        """Text files of its dist-info whose names begin with one of `stems` (lower case): name -> text."""
        with zipfile.ZipFile(self.path) as archive:
            names = [name for name in sorted(archive.namelist()) if ".dist-info/" in name and not name.endswith("/")]
            return {
                n.rpartition("/")[2]: archive.read(n).decode(errors="replace")
                for n in names
                if n.rpartition("/")[2].lower().startswith(stems)
            }


def open_wheel(path: Path) -> Wheel:
    """Read a wheel's name and METADATA. Raises PublishError for anything but an undamaged, pure py3-none-any wheel."""
    if path.suffix != ".whl":
        raise PublishError(
            f"{path} is not a wheel; a kernel has no network to build it with, so ship the .whl of this package"
        )
    try:
        name, version, _, tags = parse_wheel_filename(path.name)
    except InvalidWheelFilename as error:
        raise PublishError(f"{path} has no wheel's name ({error}); expected name-version-py3-none-any.whl") from error
    if tags != {PURE}:
        raise PublishError(
            f"{path} is a wheel for one platform or Python; only py3-none-any wheels outlive a change of Kaggle's image"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            metadata = Metadata.from_email(
                archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))), validate=False
            )
    except (zipfile.BadZipFile, StopIteration) as error:
        raise PublishError(f"{path} is damaged or has no METADATA; fetch or build it again") from error
    compiled = [n for n in names if n.lower().endswith(_COMPILED) or ".so." in n.rpartition("/")[2]]
    if compiled:
        raise PublishError(
            f"{path} is tagged py3-none-any but holds compiled code ({compiled[0]}); ship a pure Python release"
        )
    try:
        if canonicalize_name(metadata.name) != name or metadata.version != version:
            raise PublishError(
                f"{path} holds {metadata.name} {metadata.version} under another name; fetch or build it again"
            )
        _ = metadata.requires_dist, metadata.requires_python
    except InvalidMetadata as error:
        raise PublishError(
            f"{path} has a METADATA file that cannot be read ({error}); fetch or build it again"
        ) from error
    return Wheel(path, name, version, metadata)


def check_wheels(wheels: Sequence[Wheel], image: Sequence[Requirement]) -> None:
    """Raise PublishError where the wheels would not install and import offline in the image that `image`
    (constraints.txt) lists.
    """
    names = [wheel.name for wheel in wheels]
    for wheel in wheels:
        if names.count(wheel.name) > 1:
            raise PublishError(
                f"{wheel.path} is one of {names.count(wheel.name)} wheels of {wheel.name}; a bundle holds one version"
                " of each"
            )
        for python in PYTHONS:
            _check_python(wheel, python)
            for requirement in _required(wheel, python):
                _check_requirement(wheel, requirement, wheels, image, python)


def _check_python(wheel: Wheel, python: str) -> None:
    wanted = wheel.metadata.requires_python
    if wanted is not None and not wanted.contains(f"{python}.0"):
        raise PublishError(
            f"{wheel.path} wants Python {wanted}, and kernels may run Python {python}; ship another release"
        )


def _required(wheel: Wheel, python: str) -> Iterator[Requirement]:
    """What the wheel needs on Kaggle's Linux under a Python, without its extras."""
    for requirement in wheel.metadata.requires_dist or ():
        if requirement.marker is None or requirement.marker.evaluate(_environment(python)):
            yield requirement


def _check_requirement(
    wheel: Wheel, wanted: Requirement, wheels: Sequence[Wheel], image: Sequence[Requirement], python: str
) -> None:
    name = canonicalize_name(wanted.name)
    for other in wheels:
        if other.name == name:
            if not wanted.specifier.contains(other.version, prereleases=True):
                raise PublishError(
                    f"{wheel.path} needs {wanted}, and the bundle holds {name} {other.version}; change one of the two"
                )
            return
    held = [
        r
        for r in image
        if canonicalize_name(r.name) == name and (r.marker is None or r.marker.evaluate(_environment(python)))
    ]
    if not held:
        raise PublishError(
            f"{wheel.path} needs {wanted}, which is neither in the bundle nor in constraints.txt, the list of what"
            " Kaggle's image holds; vendor it"
        )
    if not _satisfied(wanted, held[0]):
        raise PublishError(
            f"{wheel.path} needs {wanted}, and Kaggle's image holds {held[0]} (constraints.txt); ship another release"
        )


def _satisfied(wanted: Requirement, held: Requirement) -> bool:
    """Whether every version that the image may hold is good enough. Of a range only its lower end is known."""
    exact = [clause.version for clause in held.specifier if clause.operator == "=="]
    lowest = [clause.version for clause in held.specifier if clause.operator == ">="]
    if exact:
        return wanted.specifier.contains(exact[0], prereleases=True)
    only_lower = all(clause.operator in (">=", ">") for clause in wanted.specifier)
    return only_lower and (
        not wanted.specifier or (bool(lowest) and wanted.specifier.contains(lowest[0], prereleases=True))
    )


def _environment(python: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_release": "",
        "platform_version": "",
        "extra": "",
    }
