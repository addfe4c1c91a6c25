"""LICENSES.md of the code bundle: who made each wheel and under which terms, with the texts that the wheels carry."""

from __future__ import annotations

from collections.abc import Sequence

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.wheels import Wheel

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
