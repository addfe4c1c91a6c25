"""dataset-metadata.json of each kind, from the templates in datasets-meta/, checked as the Kaggle client checks it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError, did_you_mean
from hubmap_kit.files import write_json
from hubmap_kit.publish.root import repository
from hubmap_kit.runtime.build_id import KINDS, METADATA

PLACEHOLDER = "OWNER"  # stands for the account in the templates
KEYS = ("id", "title", "subtitle", "description", "licenses", "keywords")
# Names that the client's documentation lists (docs/datasets_metadata.md of kaggle-cli); what the server makes of others
# is unknown.
LICENCES = (
    "CC0-1.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-SA-4.0",
    "GPL-2.0",
    "ODbL-1.0",
    "DbCL-1.0",
    "copyright-authors",
    "other",
    "unknown",
    "CC-BY-4.0",
    "CC-BY-NC-4.0",
    "PDDL",
    "CC-BY-3.0",
    "CC-BY-3.0-IGO",
    "US-Government-Works",
    "CC-BY-NC-SA-3.0-IGO",
    "CDLA-Permissive-1.0",
    "CDLA-Sharing-1.0",
    "CC-BY-ND-4.0",
    "CC-BY-NC-ND-4.0",
    "ODC-BY-1.0",
    "LGPL-3.0",
    "AGPL-3.0",
    "FDL-1.3",
    "EU-ODP-Legal-Notice",
    "apache-2.0",
    "GPL-3.0",
)


def dataset_metadata(kind: str, owner: str, templates: Path | None = None) -> dict[str, Any]:
    """The metadata of a kind's dataset under the account `owner`. Raises PublishError where Kaggle would refuse it.

    `templates` is the folder datasets-meta, by default that of the checkout.
    """
    path = _template(kind, templates)
    values = _read(path)
    identity = values.get("id")
    if not isinstance(identity, str) or not identity.startswith(f"{PLACEHOLDER}/"):
        raise PublishError(
            f"{path}: id is {identity!r}; expected '{PLACEHOLDER}/<slug>', the account is filled in when it is pushed"
        )
    check(values, path)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", owner):
        raise PublishError(
            f"'{owner}' is no name of a Kaggle account; give the name that your profile's address ends with"
        )
    return {**values, "id": f"{owner}/{identity.partition('/')[2]}", "isPrivate": True}


def write_metadata(folder: Path, kind: str, owner: str, templates: Path | None = None) -> Path:
    """Write dataset-metadata.json into a staged folder and return its path."""
    write_json(folder / METADATA, dataset_metadata(kind, owner, templates))
    return folder / METADATA


def slug(kind: str, templates: Path | None = None) -> str:
    """The slug of a kind's dataset, such as hubmap-kit-code."""
    return str(dataset_metadata(kind, PLACEHOLDER, templates)["id"]).partition("/")[2]


def check(values: dict[str, Any], path: Path) -> None:
    """The client's own rules for a new dataset, and ours. Raises PublishError naming the key."""
    name = str(values.get("id")).rpartition("/")[2]
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or not 6 <= len(name) <= 50:
        raise PublishError(
            f"{path}: id has the slug '{name}'; expected 6 to 50 lower-case letters, digits and single hyphens"
        )
    for key, shortest, longest, needed in (("title", 6, 50, True), ("subtitle", 20, 80, False)):
        text = values.get(key)
        if (text is not None or needed) and not (isinstance(text, str) and shortest <= len(text) <= longest):
            raise PublishError(f"{path}: {key} is {text!r}; expected {shortest} to {longest} characters")
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in values.get("licenses") or [None]]
    if len(names) != 1 or names[0] not in LICENCES:
        raise PublishError(
            f"{path}: licenses is {values.get('licenses')!r}; expected exactly one of {', '.join(LICENCES)}"
        )
    unknown = sorted(values.keys() - KEYS)
    if unknown:
        raise PublishError(f"{path}: unknown key '{unknown[0]}'; expected {', '.join(KEYS)}")


def _template(kind: str, templates: Path | None) -> Path:
    if kind not in KINDS:
        raise PublishError(f"'{kind}' is no kind of dataset; expected {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    return (templates or repository() / "datasets-meta") / kind / METADATA


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PublishError(f"{path} does not exist; take it from the repository") from error
    except ValueError as error:
        raise PublishError(f"{path} is not valid JSON ({error}); mend it, or take it from the repository") from error
    if not isinstance(values, dict):
        raise PublishError(f"{path} holds a {type(values).__name__}; expected an object with id, title and licenses")
    return values
